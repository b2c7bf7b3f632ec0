"""Taylor importance against the authors' formulas, written out here matrix by matrix from whole gradients."""

import copy
import math

import pytest
import torch
import transformers
from torch import nn

import billhook as bh
from kit.families import build, llama, tokens
from kit.losses import BERT, LOUD, loud, own_loss

ORDERS = ["first", "second", "mixed", "vector", "unit"]


def matrices(family, layer, kind, per):
    """The parameters of one place in the model's order: name, dimension, and the unit of each position along it."""
    if family in ("llama", "mha"):
        start, each = f"model.layers.{layer}.", list(range(48))
        if kind == "channel":
            return [(f"{start}mlp.{n}_proj.weight", dim, each) for n, dim in (("gate", 0), ("up", 0), ("down", 1))]
        query, key = [p // 4 for p in range(32)], [p // 4 for p in range(32 if family == "mha" else 16)]
        if per == "kv_head":
            query = [head // 2 for head in query]  # query heads 2 i and 2 i + 1 are served by KV head i
        parts = [("q", 0, query), ("k", 0, key), ("v", 0, key), ("o", 1, query)]
        parts = parts if per == "kv_head" or family == "mha" else [parts[0], parts[3]]
        return [(f"{start}self_attn.{n}_proj.weight", dim, of) for n, dim, of in parts]
    if family == "bert":
        start, each, heads = f"bert.encoder.layer.{layer}.", list(range(48)), [p // 8 for p in range(32)]
        if kind == "channel":
            return [(f"{start}{n}", dim, each) for n, dim in (("intermediate.dense.weight", 0), ("intermediate.dense.bias", 0),
                                                              ("output.dense.weight", 1))]  # fmt: skip
        made = [(f"{start}attention.self.{n}.{what}", 0, heads) for n in ("query", "key", "value") for what in ("weight", "bias")]
        return [*made, (f"{start}attention.output.dense.weight", 1, heads)]
    start, each, heads = f"transformer.h.{layer}.", list(range(128)), [p // 8 for p in range(32)]
    if kind == "channel":
        return [(f"{start}mlp.{n}", dim, each) for n, dim in (("c_fc.weight", 1), ("c_fc.bias", 0), ("c_proj.weight", 0))]
    return [(f"{start}attn.{n}", dim, of) for n, dim, of in (("c_attn.weight", 1, heads * 3), ("c_attn.bias", 0, heads * 3),
                                                             ("c_proj.weight", 0, heads))]  # fmt: skip


def backward(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


def salience(model, batch, order, loss):
    """For every parameter w g, w^2 H or w g - w^2 H / 2, as the authors' script has them."""
    weights = {name: one.detach() for name, one in model.named_parameters()}
    gradients = backward(model, loss(model, batch))
    if order not in ("second", "mixed"):
        return {name: weights[name] * gradients[name] for name in gradients}
    rows = len(batch["input_ids"])
    squares = {name: torch.zeros_like(one) for name, one in gradients.items()}
    for row in range(rows):
        for name, one in backward(model, loss(model, {key: value[[row]] for key, value in batch.items()})).items():
            squares[name] += one * one / rows
    if order == "second":
        return {name: weights[name] * one * weights[name] for name, one in squares.items()}
    return {name: weights[name] * gradients[name] - 0.5 * weights[name] * one * weights[name] for name, one in squares.items()}


def of_matrix(values, dim, of, order):
    """What a matrix gives each unit: position by position."""
    found = torch.zeros(max(of) + 1, dtype=torch.float64)
    for position, unit in enumerate(of):
        vector = values.select(dim, position)
        found[unit] += {"vector": vector.sum().abs(), "unit": vector.sum()}.get(order, vector.abs().sum())
    return found


def by_hand(model, family, batches, order, kind="head", per="head", reduce=lambda rows: rows.sum(0)):
    total = 0
    for batch in batches:
        found = salience(model, batch, order, own_loss)
        rows = [torch.stack([of_matrix(found[name], dim, of, order) for name, dim, of in matrices(family, layer, kind, per)])
                for layer in (0, 1)]  # fmt: skip
        total += torch.stack([one.sum(0).abs() if order == "unit" else reduce(one) for one in rows]) / len(batches)
    return total


def scores(model, batches, importance, kind="head", per="head", **options):
    units = bh.find_units(model, [kind])
    found = bh.score(model, units, importance, batches, **({"loss": own_loss} | options), per=per)
    assert list(found) == list(units)
    assert all(one.shape == (units[name].count(per),) for name, one in found.items())
    return torch.stack(list(found.values())).double()


BATCHES = [{"input_ids": tokens(3, 8)}, {"input_ids": tokens(2, 5)}]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("family", "per"), [("llama", "head"), ("llama", "kv_head"), ("mha", "head"), ("bert", "head"),
                                             ("gpt2", "head")])  # fmt: skip
def test_heads_by_the_authors_formulas(family, per, order):
    model = LOUD[family]()
    expected = by_hand(model, family, BATCHES, order, per=per)
    torch.testing.assert_close(scores(model, BATCHES, bh.Taylor(order), per=per), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_channels_by_the_authors_formulas(family, order):
    model = LOUD[family]()
    expected = by_hand(model, family, BATCHES, order, "channel")
    torch.testing.assert_close(scores(model, BATCHES, bh.Taylor(order), "channel"), expected, rtol=1e-5, atol=0)


@pytest.mark.daily("mean-*", "*-mixed")
@pytest.mark.parametrize("order", ["first", "mixed", "vector"])
@pytest.mark.parametrize(("reduce", "how"), [
    ("mean", lambda rows: rows.mean(0)), ("max", lambda rows: rows.max(0).values), ("product", lambda rows: rows.prod(0)),
    ("first", lambda rows: rows[0]), ("last", lambda rows: rows[-1]),
])  # fmt: skip
def test_what_matrices_give_becomes_one_number(order, reduce, how):
    model = LOUD["llama"]()
    for kind, per in (("channel", "head"), ("head", "kv_head")):
        expected = by_hand(model, "llama", BATCHES, order, kind, per, how)
        torch.testing.assert_close(scores(model, BATCHES, bh.Taylor(order, reduce), kind, per), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_a_kv_head_has_the_credit_of_the_query_heads_that_it_serves(order):
    """The authors' code gives query head h to KV head h mod 4; with 8 query heads and 4 KV heads it is h // 2."""
    model = LOUD["llama"]()
    places = dict([next(iter(bh.find_units(model, ["head"]).items()))])
    for head in range(8):

        def loss(model, batch, head=head):
            return model.model.layers[0].self_attn.q_proj.weight[4 * head : 4 * head + 4].square().sum()

        (found,) = bh.score(model, places, bh.Taylor(order), BATCHES, loss=loss, normalize=True, per="kv_head").values()
        assert found.nonzero().flatten().tolist() == [head // 2]


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_shares_change_nothing(kind):
    model = LOUD["llama"]()
    found = [scores(model, BATCHES, bh.Taylor("mixed", passes=passes), kind) for passes in (1, 2, 3, 1000)]
    assert all(torch.equal(one, found[0]) for one in found)


def test_gradients_that_are_there_stay_and_nobody_else_is_called():
    model, called = LOUD["llama"](), []
    own_loss(model, BATCHES[1]).backward()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: (one.grad, one.grad.clone(), one.requires_grad) for name, one in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(called.append)

    def fails(model, batch):
        def stop(_):
            raise OSError("on the way back")

        hidden = model.model(**batch).last_hidden_state
        hidden.register_hook(stop)
        return hidden.sum()

    for order in ORDERS:
        scores(model, BATCHES, bh.Taylor(order), "channel")
        with pytest.raises(OSError, match="on the way back"):
            scores(model, BATCHES, bh.Taylor(order), "channel", loss=fails)
        for name, one in model.named_parameters():
            grad, copy, needed = before[name]
            assert one.grad is grad
            assert torch.equal(grad, copy)
            assert one.requires_grad is needed
            assert not one._backward_hooks
    assert not called


def naive(model, batch, units, per="head"):
    """The first order of some places from whole gradients, in float64, by the positions that `Units` says."""
    found = backward(model, own_loss(model, batch))
    weights, total = dict(model.named_parameters()), {}
    for place, one in units.items():
        total[place] = torch.zeros(one.count(per), dtype=torch.float64)
        for member in one.members_by_unit(per):
            if member.name in found:
                values = weights[member.name].detach().double() * found[member.name].double()
                of = [max(unit, 0) for unit in one.of_member(member, per).tolist()]
                assert (one.of_member(member, per) >= 0).all()
                total[place][: max(of) + 1] += of_matrix(values, member.dim, of, "first")
    return total


def test_tied_weights_and_parameters_that_are_used_several_times():
    tied = loud(llama(tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    albert = loud(transformers.AlbertForMaskedLM(transformers.AlbertConfig(**BERT, embedding_size=16, num_hidden_groups=1)))
    for model, kind in ((tied, "residual"), (albert, "head")):
        units = bh.find_units(model, [kind])
        expected = naive(model, BATCHES[0], units)
        found = bh.score(model, units, bh.Taylor(), BATCHES[:1], loss=own_loss)
        assert list(found) == list(expected)
        assert len(found) == 1
        for place, one in found.items():
            torch.testing.assert_close(one.double(), expected[place], rtol=1e-5, atol=0)


def test_frozen_weights_under_adapters():
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(loud(llama()), config).eval()
    unfrozen = copy.deepcopy(model).requires_grad_(True)
    for kind in ("head", "channel"):
        found = scores(model, BATCHES[:1], bh.Taylor(), kind)
        inner = unfrozen.get_base_model()
        expected = naive(inner, BATCHES[0], bh.find_units(inner, [kind]))
        torch.testing.assert_close(found, torch.stack(list(expected.values())), rtol=1e-5, atol=0)
        assert any("lora" in m.name for one in bh.find_units(inner, [kind]).values() for m in one.members_by_unit())
    assert [name for name, one in model.named_parameters() if one.requires_grad] == [
        name for name, _ in model.named_parameters() if "lora" in name
    ]


def test_half_precision_is_multiplied_in_float32():
    model = build("llama").bfloat16()
    units = bh.find_units(model, ["channel"])
    expected = naive(model, BATCHES[0], units)
    found = bh.score(model, units, bh.Taylor(), BATCHES[:1], loss=own_loss)
    for place, one in found.items():
        torch.testing.assert_close(one.double(), expected[place], rtol=1e-5, atol=0)
    model = build("llama")

    def mixed(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return own_loss(model, batch)

    exact = scores(model, BATCHES, bh.Taylor("mixed"), "channel")
    torch.testing.assert_close(scores(model, BATCHES, bh.Taylor("mixed"), "channel", loss=mixed), exact, rtol=0.2, atol=1e-6)


def test_experts_and_their_router():
    model = build("mixtral")
    units = bh.find_units(model, ["expert"])
    assert [one.readers for one in units.values()] == [(), ()]
    expected = naive(model, BATCHES[0], units)
    found = bh.score(model, units, bh.Taylor(), BATCHES[:1], loss=own_loss)
    for place, one in found.items():
        torch.testing.assert_close(one.double(), expected[place], rtol=1e-5, atol=0)
        mlp = model.get_submodule(place)
        weights = (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj)
        norms = sum(weight.detach().flatten(1).square().sum(1) for weight in weights).sqrt()
        torch.testing.assert_close(bh.score(model, units, bh.importance.WeightNorm())[place], norms)
    for importance in (bh.importance.GateGradient(), bh.importance.ActivationNorm(), bh.OutputNorm(), bh.importance.Ablation()):
        with pytest.raises(ValueError, match=r"\(experts\) have none. Use Taylor, WeightNorm, or RandomUnits"):
            bh.score(model, units, importance, BATCHES, loss=own_loss, normalize=True)


@pytest.mark.parametrize(("order", "where"), [("first", "batch 1"), ("mixed", "batch 1"), ("second", "example 2 of batch 1")])
def test_a_gradient_that_is_not_finite_is_said(order, where):
    model, batches = LOUD["llama"](), [{"input_ids": tokens(3, 5)} for _ in range(3)]
    batches[1]["weights"] = torch.tensor([1.0, 1.0, math.nan])

    def loss(model, batch):
        batch = dict(batch)
        weights = batch.pop("weights", torch.ones(1))
        return own_loss(model, batch) * weights.mean()

    with pytest.raises(
        ValueError,
        match=rf"batches: {where} \(counted from 0\) has a NaN or infinite gradient for model\.layers\.\d\.mlp\.\w+\.weight",
    ):
        scores(model, batches, bh.Taylor(order), "channel", loss=loss)
    with pytest.raises(
        ValueError, match=r"batches: batch 1 \(counted from 0\) has a NaN or infinite gradient for model\.layers\.1\.mlp"
    ):
        scores(model, batches, bh.importance.GateGradient(), "channel", loss=loss)


@pytest.mark.parametrize(("batch", "shapes"), [
    ({"input_ids": tokens(3, 4), "weight": torch.tensor(1.0)}, r"\(3, 4\), \(\)"),
    ({"input_ids": tokens(3, 4), "labels": tokens(2, 4)}, r"\(3, 4\), \(2, 4\)"),
    ({"text": "none"}, "none"),
])  # fmt: skip
def test_batches_that_cannot_be_taken_apart(batch, shapes):
    model = LOUD["llama"]()

    def loss(model, batch):
        return own_loss(model, {"input_ids": batch.get("input_ids", tokens(1, 4))})

    for order in ("second", "mixed"):
        with pytest.raises(ValueError, match=rf"a batch with tensors of shapes {shapes} cannot be split into examples"):
            scores(model, [batch], bh.Taylor(order), loss=loss)
    assert scores(model, [batch], bh.Taylor(), loss=loss).isfinite().all()


@pytest.mark.parametrize(("arguments", "said"), [
    ({"order": "third"}, "order='third' must be one of first, second, mixed, vector, unit"),
    ({"reduce": "min"}, "reduce='min' must be one of sum, mean, max, product, first, last"),
    ({"order": "unit", "reduce": "max"}, "reduce='max' is not supported with order='unit'"),
    ({"passes": 0}, "passes=0 must be a whole number of at least 1"),
    ({"passes": True}, "passes=True must be a whole number"),
])  # fmt: skip
def test_what_is_not_legal_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        bh.Taylor(**arguments)


def test_quantised_weights_have_no_gradient():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model: model.layers.0.mlp.up_proj.weight is quantized \(torch.int8\)"):
        scores(model, BATCHES, bh.Taylor(), "channel")
