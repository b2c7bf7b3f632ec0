"""Scores of heads against brute force: differences of losses, and sums over rows and columns that are counted by hand."""

import copy
import math
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
import transformers

import billhook as bh
from billhook.importance.baselines import RandomUnits
from billhook.importance.reap import RoutingImportance
from billhook.importance.score import Importance, make_run, score
from billhook.units.find import find_units
from billhook.units.units import UnitKind
from kit.families import build, llama, tokens
from kit.ranks import Ranks
from kit.units import hooks

GATES = bh.importance.GateGradient()
CONFIG = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 64}


def subclasses(kind):
    return [kind, *(one for own in kind.__subclasses__() for one in subclasses(own))]


OURS = [kind for kind in subclasses(Importance) if kind.__module__.startswith("billhook.") and not kind.__abstractmethods__]
EVERY = [  # of heads, with its defaults and as it is used otherwise
    *(kind() for kind in OURS if not issubclass(kind, bh.importance.BlockInfluence | RoutingImportance)),
    *(bh.Taylor("unit"), bh.Taylor("mixed"), bh.importance.WeightNorm(1)),
]


def loud(model):
    """Weights so large that heads matter, in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval().double()


def bert():
    return loud(transformers.BertForMaskedLM(transformers.BertConfig(**CONFIG)))


def gpt2():
    return loud(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=64)))


def padded(rows=3, length=10, side="right", labels=False):
    """Rows of which each has one token fewer than the one before."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        mask[row, slice(-row, None) if side == "right" else slice(row)] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | {"labels": ids.masked_fill(mask == 0, -100)} if labels else batch


READERS = {
    "bert": ("bert.encoder.layer.{}.attention", "bert.encoder.layer.{}.attention.output.dense", 4),
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.attn.c_proj", 4),
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.self_attn.o_proj", 8),
}
BUILD = {"bert": bert, "gpt2": gpt2, "llama": lambda: loud(llama())}


@contextmanager
def by_hand(model, family, values):
    """Heads of one layer after the other multiplied, with heads counted by hand; `values` of shape `[..., heads]` a layer."""
    handles = []
    for layer, own in enumerate(values):
        reader = model.get_submodule(READERS[family][1].format(layer))

        def gate(_, args, own=own):
            return ((args[0].unflatten(-1, (own.shape[-1], -1)) * own[..., None]).flatten(-2),)

        handles.append(reader.register_forward_pre_hook(gate))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference(model, family, loss, layer, head, step=1e-3):
    """The central difference of a loss by the gate of one head."""
    found = []
    for value in (1 + step, 1 - step):
        values = [torch.ones(READERS[family][2], dtype=torch.float64) for _ in range(2)]
        values[layer][head] = value
        with by_hand(model, family, values), torch.no_grad():
            found.append(float(loss()))
    return (found[0] - found[1]) / (2 * step)


def differences(model, family, loss):
    return torch.tensor(
        [[difference(model, family, loss, layer, head) for head in range(READERS[family][2])] for layer in (0, 1)]
    )


def scores(model, family, batches, importance=GATES, **options):
    """The scores as a tensor, checked to be those of the layers by name."""
    found = bh.score(model, bh.find_units(model, "head"), importance, batches, **options)
    assert list(found) == [READERS[family][0].format(layer) for layer in (0, 1)]
    assert all(one.dtype == torch.float32 and one.device.type == "cpu" for one in found.values())
    return torch.stack(list(found.values()))


def near(got, expected, relative=1e-3):
    torch.testing.assert_close(got.double(), expected.double(), rtol=relative, atol=relative * float(expected.abs().max()) / 10)


def own_loss(model, batch):
    """The sum of the losses of tokens, and how many there are, without the loss of transformers."""
    batch = dict(batch)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if not isinstance(model, transformers.BertForMaskedLM):
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return each.sum(), int((labels != -100).sum())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gate_gradient_of_batches_and_examples_is_a_difference(family):
    model = BUILD[family]()
    batches = [padded(labels=True), padded(rows=2, length=7, labels=True)]
    whole, single = [], []
    for batch in batches:
        count = own_loss(model, batch)[1]
        whole.append(differences(model, family, lambda batch=batch, count=count: own_loss(model, batch)[0] / count).abs())
        for row in range(len(batch["input_ids"])):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            single.append(differences(model, family, lambda one=one, count=count: own_loss(model, one)[0] / count).abs())
    relative = 1e-3 if family != "llama" else 3e-2  # its norms compute in float32
    near(scores(model, family, batches, bh.importance.GateGradient("batch")), sum(whole) / 2, relative)
    near(scores(model, family, batches, bh.importance.GateGradient("example")), sum(single) / 5, relative)
    without = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    if family != "bert":  # what a causal model reads is what it is to say
        near(scores(model, family, without, bh.importance.GateGradient("batch")), sum(whole) / 2, relative)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gate_gradient_of_tokens_is_that_of_a_gate_at_each_token(family, side):
    model, heads = BUILD[family](), READERS[family][2]
    batches = [padded(side=side, labels=True), padded(rows=2, length=7, side=side, labels=True)]
    total, count = torch.zeros(2, heads, dtype=torch.float64), 0
    for batch in batches:
        gates = [torch.ones(*batch["input_ids"].shape, heads, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        with by_hand(model, family, gates):
            loss, tokens = own_loss(model, batch)
            gradients = torch.autograd.grad(loss / tokens, gates)
        counts = batch["attention_mask"].bool()
        total += torch.stack([gradient[counts].abs().sum(0) for gradient in gradients])
        count += int(counts.sum())
    near(scores(model, family, batches), total / count, 1e-4)
    near(scores(model, family, iter(batches), bh.importance.GateGradient("token")), total / count, 1e-4)


@pytest.mark.daily("bert-*-left", "llama-*-right")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "importance",
    [
        *map(bh.importance.GateGradient, ("token", "example", "batch")),
        *(bh.Taylor(), bh.Taylor("mixed"), bh.importance.ActivationNorm(), bh.OutputNorm(), bh.importance.Ablation()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_stands_under_the_mask_does_not_matter(family, importance, side):
    model = BUILD[family]()
    batch = padded(side=side, labels=family == "bert")
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], tokens(3, 10))}
    found = [scores(model, family, [one], importance) for one in (batch, other)]
    near(
        found[0], found[1], 1e-3 if isinstance(importance, bh.importance.Ablation) else 1e-5
    )  # the loss of transformers is a float32


def by_rows(tensor, heads):
    return tensor.reshape(heads, -1)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("per", ["head", "kv_head"])
def test_weight_norm_by_hand_for_grouped_queries(p, per):
    model, expected = BUILD["llama"](), []  # 8 query heads of 4, served by 4 KV heads
    for layer in model.model.layers:
        own = {name: layer.self_attn.get_submodule(f"{name}_proj").weight.detach() for name in "qkvo"}
        if per == "head":
            rows = [by_rows(own["q"], 8), by_rows(own["o"].T, 8)]
        else:
            rows = [by_rows(one, 4) for one in (own["q"], own["k"], own["v"], own["o"].T)]
        expected.append(torch.cat(rows, dim=1).norm(p=p, dim=1))
    near(scores(model, "llama", None, bh.importance.WeightNorm(p), per=per), torch.stack(expected), 1e-6)


@pytest.mark.parametrize("per", ["head", "kv_head"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_output_norm_is_how_far_outputs_move_without_a_head(family, per):
    model, batches = BUILD[family](), [padded(labels=True), padded(rows=2, length=6, labels=True)]
    heads = {"head": READERS[family][2], "kv_head": 4}[per]
    expected, count = torch.zeros(2, heads, dtype=torch.float64), sum(int(batch["attention_mask"].sum()) for batch in batches)
    for layer in (0, 1):
        reader, seen = model.get_submodule(READERS[family][1].format(layer)), []
        handle = reader.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        for batch in batches:
            model(**batch)
        handle.remove()
        for batch, given in zip(batches, seen, strict=True):
            for head in range(heads):
                without = given.unflatten(-1, (heads, -1)).clone()
                without[..., head, :] = 0
                moved = reader(given) - reader(without.flatten(-2))
                expected[layer, head] += moved[batch["attention_mask"].bool()].square().sum().detach()
    near(scores(model, family, batches, bh.OutputNorm(), per=per), (expected / count).sqrt(), 1e-5)


@pytest.mark.parametrize("per", ["head", "kv_head"])
def test_activation_norm_by_hand(per):
    model, batches = BUILD["llama"](), [padded(), padded(rows=2, length=6)]
    total, count = torch.zeros(2, 8 if per == "head" else 4, dtype=torch.float64), 0
    for batch in batches:
        seen = []
        handles = [layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
                   for layer in model.model.layers]  # fmt: skip
        model(**batch)
        for handle in handles:
            handle.remove()
        counts = batch["attention_mask"].bool()
        total += torch.stack([one[counts].unflatten(-1, (total.shape[1], -1)).norm(dim=-1).sum(0) for one in seen])
        count += int(counts.sum())
    near(scores(model, "llama", batches, bh.importance.ActivationNorm(), per=per), total / count, 1e-5)


@pytest.mark.parametrize("per", ["head", "kv_head"])
def test_ablation_by_hand(per):
    model, batches = BUILD["llama"](), [padded(labels=True), padded(rows=2, length=6, labels=True)]
    expected = torch.zeros(2, 8 if per == "head" else 4, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            whole = model(**batch).loss
            for layer in (0, 1):
                for head in range(expected.shape[1]):
                    with bh.mask(model, {layer: [head]}, per=per):
                        expected[layer, head] += (model(**batch).loss - whole) / 2
    near(scores(model, "llama", batches, bh.importance.Ablation(), per=per), expected, 1e-5)


def test_random_heads_depend_on_the_seed_alone():
    model = BUILD["llama"]()
    one, same, other = (scores(model, "llama", None, RandomUnits(seed)) for seed in (1, 1, 2))
    torch.manual_seed(5)
    assert torch.equal(one, same)
    assert torch.equal(one, scores(model, "llama", [{"input_ids": tokens()}], RandomUnits(1)))
    assert not torch.equal(one, other)
    assert 0 <= float(one.min()) < float(one.max()) < 1
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize("importance", EVERY, ids=repr)
def test_scores_of_each_layer_have_unit_length(importance):
    model, batches = BUILD["llama"](), [{"input_ids": tokens()}]
    raw = scores(model, "llama", batches, importance)
    found = scores(model, "llama", batches, importance, normalize=True)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found, raw / raw.norm(dim=1, keepdim=True))


def test_a_kv_head_has_the_credit_of_its_query_heads_summed_before_the_absolute_value():
    model, batch = BUILD["llama"](), {"input_ids": tokens(2, 6)}
    gates = [torch.ones(2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with by_hand(model, "llama", gates):
        gradients = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, gates)
    of = torch.tensor([head // 2 for head in range(8)])
    products = torch.stack(gradients).new_zeros(2, 2, 6, 4).index_add_(-1, of, torch.stack(gradients))
    wanted = {"token": products.abs().mean((1, 2)), "example": products.sum(2).abs().mean(1), "batch": products.sum((1, 2)).abs()}
    for each, expected in wanted.items():
        near(scores(model, "llama", [batch], bh.importance.GateGradient(each), per="kv_head"), expected, 1e-4)


@pytest.mark.parametrize("kind", get_args(UnitKind))
@pytest.mark.parametrize("importance", [kind() for kind in OURS], ids=repr)
def test_it_scores_each_unit_or_says_which_importance_does(importance, kind):
    model = build("mixtral")
    units = bh.find_units(model, kind)
    try:
        found = bh.score(model, units, importance, [{"input_ids": tokens()}])
    except ValueError as error:
        assert str(error).startswith(("importance=", "importance: "))  # noqa: PT017 - either is right
        of_one_kind = bh.importance.BlockInfluence | RoutingImportance
        assert isinstance(importance, of_one_kind) or not all(one.readers for one in units.values())
    else:
        assert {name: len(own) for name, own in found.items()} == {name: one.count() for name, one in units.items()}


def state(model):
    return {
        "hooks": hooks(model),
        "modes": [module.training for module in model.modules()],
        "needs": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "cache": model.config.use_cache,
        "random": torch.get_rng_state().tolist(),
        "names": list(model.state_dict()),
        "sums": [float(parameter.detach().double().sum()) for parameter in model.parameters()],
    }


@pytest.mark.parametrize("importance", EVERY, ids=repr)
def test_the_model_is_as_before_whatever_happens(importance):
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    assert model.config.use_cache
    seen = []

    def loss(model, batch):
        seen.append((model.training, model.config.use_cache, model.model.layers[1].self_attn.training))
        torch.rand(3)
        if len(seen) % 3 == 0:
            raise RuntimeError("third")
        return model(**batch, labels=batch["input_ids"]).loss

    before, batches = state(model), [{"input_ids": tokens()}]
    before["random"] = torch.get_rng_state().tolist()
    bh.score(model, bh.find_units(model, "head"), importance, batches, normalize=True)
    assert state(model) == before
    if importance.needs_data:
        with pytest.raises(RuntimeError, match="third"):
            bh.score(model, bh.find_units(model, "head"), importance, batches * 3, loss=loss, normalize=True)
        assert state(model) == before
        assert set(seen) == {(False, False, False)}


@pytest.mark.parametrize("importance", [bh.importance.GateGradient(), bh.Taylor()], ids=repr)
def test_a_loss_that_asks_nothing_of_a_layer_names_it(importance):
    model, batches = llama(), [{"input_ids": tokens()}]

    def first(model, batch):
        return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()

    for loss, layer in ((first, 1), (lambda model, _: model.model.embed_tokens.weight.sum(), 0)):
        with pytest.raises(ValueError, match=rf"loss does not depend on the units of model\.layers\.{layer}\.self_attn\."):
            bh.score(model, bh.find_units(model, "head"), importance, batches, loss=loss, normalize=True)


def test_what_is_no_loss_is_refused():
    model, batches = llama(), [{"input_ids": tokens()}]
    for loss, said in (
        (lambda model, batch: model(**batch).logits, r"loss must be a single number, got a tensor of shape \[2, 12, 64\]"),
        (lambda model, batch: model(**batch).logits.mean().detach(), "loss has no gradient, so it depends on no unit"),
        (
            lambda model, batch: model(**batch).logits.mean() * math.nan,
            r"batches: batch 0 \(counted from 0\) has a NaN or infinite gradient for model.layers.1.self_attn",
        ),
    ):
        for importance in (bh.importance.GateGradient(), bh.Taylor()):
            with pytest.raises(ValueError, match=said):
                bh.score(model, bh.find_units(model, "head"), importance, batches, loss=loss, normalize=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = math.inf
    for importance in (bh.importance.ActivationNorm(), bh.OutputNorm(), bh.importance.Ablation()):
        with pytest.raises(ValueError, match="is NaN or infinite. The loss or the model is not finite on a batch"):
            bh.score(model, bh.find_units(model, "head"), importance, batches, normalize=True)


def test_batches_that_do_not_do_are_refused():
    model, encoder = llama(), BUILD["bert"]()
    for importance in (one for one in EVERY if one.needs_data):
        name = type(importance).__name__
        with pytest.raises(ValueError, match="batches=None: BertForMaskedLM does not generate text"):
            bh.score(encoder, bh.find_units(encoder, "head"), importance)
        with pytest.raises(ValueError, match=f"batches: {name} needs at least one batch"):
            bh.score(model, bh.find_units(model, "head"), importance, [], normalize=True)
    with pytest.raises(ValueError, match="BertForMaskedLM returns no loss for inputs input_ids. Add labels, or pass loss="):
        bh.score(bert(), bh.find_units(bert(), "head"), bh.importance.GateGradient(), [{"input_ids": tokens()}], normalize=True)
    with pytest.raises(ValueError, match="a Tensor is not a dictionary of model inputs. Pass dictionaries, or pass loss="):
        bh.score(model, bh.find_units(model, "head"), bh.importance.GateGradient(), [tokens()], normalize=True)
    with pytest.raises(ValueError, match="each='x' must be one of token, example, batch"):
        bh.importance.GateGradient("x")
    with pytest.raises(ValueError, match="p=3 must be 1 or 2"):
        bh.importance.WeightNorm(3)
    ids = tokens()  # with a loss of one's own, a batch may be anything
    found = bh.score(
        model,
        bh.find_units(model, "head"),
        bh.importance.GateGradient(),
        [ids],
        loss=lambda model, ids: model(ids, labels=ids).loss,
        normalize=True,
    )
    torch.testing.assert_close(
        found, bh.score(model, bh.find_units(model, "head"), bh.importance.GateGradient(), [{"input_ids": ids}], normalize=True)
    )


def test_tokens_of_a_decoder_are_those_with_labels():
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in {"layers": 1, "attention_heads": 4}.items()}
    config = transformers.BartConfig(d_model=32, vocab_size=64, encoder_ffn_dim=48, decoder_ffn_dim=48, **sides)
    model = loud(transformers.BartForConditionalGeneration(config))
    batch = padded() | {"labels": tokens(3, 5)}
    batch["labels"][1, 3:] = -100
    found = bh.score(model, bh.find_units(model, "head"), bh.importance.GateGradient(), [batch])
    counts = {"encoder.layers.0.self_attn": batch["attention_mask"].bool()}
    counts |= dict.fromkeys(["decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"], batch["labels"] != -100)
    assert list(found) == [f"model.{name}" for name in counts]
    for name, asked in counts.items():
        gate = torch.ones(*asked.shape, 4, dtype=torch.float64, requires_grad=True)
        handle = model.get_submodule(f"model.{name}.out_proj").register_forward_pre_hook(
            lambda _, args, gate=gate: ((args[0].unflatten(-1, (4, -1)) * gate[..., None]).flatten(-2),)
        )
        (gradient,) = torch.autograd.grad(model(**batch).loss, gate)
        handle.remove()
        near(found[f"model.{name}"], gradient[asked].abs().mean(0), 1e-4)


ADDING = [one for one in EVERY if not isinstance(one, bh.OBS)]  # which takes the mean of what each rank finds


@pytest.mark.parametrize("importance", [*ADDING, bh.importance.GateGradient("example"), bh.Taylor("second")], ids=repr)
def test_ranks_add_up(importance):
    model, batches = BUILD["llama"](), [padded(), padded(rows=2, length=6), padded(rows=4, length=5)]
    heads = find_units(model, "head")
    trials = [make_run(model, heads, batch) for batch in batches]
    whole = score(model, heads, importance, trials)
    copies = [copy.deepcopy(model) for _ in range(2)]

    def scored(rank, comm):
        own = [make_run(copies[rank], heads, batch) for batch in (batches[1:] if rank else batches[:1])]
        return score(copies[rank], heads, importance, own, reduce=comm)

    one, other = Ranks(2).run(scored)
    for name, expected in whole.items():
        torch.testing.assert_close(one[name], expected)
        assert torch.equal(one[name], other[name])


def test_adapters():
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], r=2, init_lora_weights=False)
    model, batches = peft.get_peft_model(loud(llama()), config).eval(), [{"input_ids": tokens()}]
    merged = copy.deepcopy(model).merge_and_unload()
    for importance in (
        bh.importance.GateGradient(),
        bh.importance.GateGradient("batch"),
        bh.importance.ActivationNorm(),
        bh.OutputNorm(),
        bh.importance.Ablation(),
    ):
        found, expected = (
            list(bh.score(one, bh.find_units(one, "head"), importance, batches, normalize=True).values())
            for one in (model, merged)
        )
        torch.testing.assert_close(found, expected)
