"""What importance says of channels, by hand: of feed-forward blocks, whose readers are one linear layer, and of the stream."""

import pytest
import torch
import transformers

import billhook as bh
from billhook.importance.score import by_unit
from kit.families import build, tokens
from kit.losses import LOUD, own_loss

LAST = {
    "llama": "model.layers.{}.mlp.down_proj",
    "bert": "bert.encoder.layer.{}.output.dense",
    "gpt2": "transformer.h.{}.mlp.c_proj",
}


def batches():
    """With padding, which does not count."""
    found = []
    for rows, length in ((3, 8), (2, 5)):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[-1, -2:] = 0
        found.append({"input_ids": tokens(rows, length), "attention_mask": mask})
    return found


def scores(model, given, importance, kind="channel", **options):
    found = bh.score(model, bh.find_units(model, kind), importance, given, own_loss, **options)
    return torch.stack(list(found.values())).double()


def seen(model, names, batch):
    """What modules get, with its gradient, of the tokens that count: [tokens, channels] each."""
    inputs = {}

    def keep(module, args):
        args[0].retain_grad() if args[0].requires_grad else None
        inputs[module] = args[0]

    handles = [model.get_submodule(name).register_forward_pre_hook(keep) for name in names]
    own_loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    counts = batch["attention_mask"].bool()
    own = [inputs[model.get_submodule(name)] for name in names]
    return [(one.detach()[counts], one.grad[counts]) for one in own]


def columns(reader):
    weight = reader.weight.detach()
    return weight if isinstance(reader, transformers.pytorch_utils.Conv1D) else weight.T


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_channels(family):
    model, given = LOUD[family](), batches()
    count = sum(int(batch["attention_mask"].sum()) for batch in given)
    gradient, norm, squares = 0, 0, 0
    for batch in given:
        found = seen(model, [LAST[family].format(layer) for layer in (0, 1)], batch)
        gradient += torch.stack([(a * g).abs().sum(0) for a, g in found])
        norm += torch.stack([a.abs().sum(0) for a, _ in found])
        squares += torch.stack([a.square().sum(0) for a, _ in found])
    weights = torch.stack([columns(model.get_submodule(LAST[family].format(layer))).norm(dim=1) for layer in (0, 1)])
    near = {"rtol": 1e-5, "atol": 1e-12}
    torch.testing.assert_close(scores(model, given, bh.importance.GateGradient()), gradient / count, **near)
    torch.testing.assert_close(scores(model, given, bh.importance.ActivationNorm()), norm / count, **near)
    torch.testing.assert_close(
        scores(model, given, bh.OutputNorm()), weights * (squares / count).sqrt(), **near
    )  # Wanda's product


def test_channels_of_the_stream():
    """Minitron's: what norms give, each once, though q, k and v read the first of a block, and gate and up the second."""
    model, given = LOUD["llama"](), batches()
    count = sum(int(batch["attention_mask"].sum()) for batch in given)
    first = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    names = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in first] + ["lm_head"]
    once = [name for name in names if name.split(".")[-1] in ("q_proj", "gate_proj", "lm_head")]
    norm, gradient, squares = 0, 0, 0
    for batch in given:
        norm += sum(a.abs().sum(0) for a, _ in seen(model, once, batch))
        gradient += sum(a * g for a, g in seen(model, once, batch)).abs().sum(0)  # retain_grad has all readers' gradients
        for name, (a, _) in zip(names, seen(model, names, batch), strict=True):
            squares += a.square().sum(0) * columns(model.get_submodule(name)).square().sum(1)
    near = {"rtol": 1e-4, "atol": 1e-12}
    torch.testing.assert_close(
        scores(model, given, bh.importance.ActivationNorm(), "residual")[0], norm / count / len(once), **near
    )
    torch.testing.assert_close(scores(model, given, bh.importance.GateGradient(), "residual")[0], gradient / count, **near)
    torch.testing.assert_close(
        scores(model, given, bh.OutputNorm(), "residual")[0], (squares / count / len(names)).sqrt(), **near
    )


def test_readers_that_run_several_times():
    """Two blocks share one feed-forward: its channels have one gate, and give twice."""
    model = LOUD["llama"]()
    first, second = (layer.mlp for layer in model.model.layers)
    second.gate_proj, second.up_proj, second.down_proj = first.gate_proj, first.up_proj, first.down_proj
    units, batch = dict(list(bh.find_units(model, ["channel"]).items())[:1]), {"input_ids": tokens(2, 6)}
    assert {model.get_submodule(reader) for one in units.values() for reader in one.readers} == {first.down_proj}
    given = []
    handle = first.down_proj.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), given.append(args[0]))[1])
    own_loss(model, batch).backward()
    handle.remove()
    model.zero_grad()
    expected = {
        "gradient": sum(a.detach() * a.grad for a in given).abs().mean((0, 1)),
        "norm": sum(a.detach().abs().mean((0, 1)) for a in given) / 2,
        "output": (sum(a.detach().square().mean((0, 1)) for a in given) / 2).sqrt() * columns(first.down_proj).norm(dim=1),
    }
    importance = {"gradient": bh.importance.GateGradient(), "norm": bh.importance.ActivationNorm(), "output": bh.OutputNorm()}
    for name, one in importance.items():
        (found,) = bh.score(model, units, one, [batch], loss=own_loss).values()
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("at_once", [2**24, 20], ids=["all at once", "some"])
@pytest.mark.parametrize("index", [
    [0, 1, 2, 3], [0, 0, 1, 1, 2, 2], [1, 0, 2], [0, 1, 0, 1, 2, 2], [-1, 0, 1, -1], [0, 0, 1], [2, 0, 1, 1, 0, 2, -1, -1],
])  # fmt: skip
def test_sums_over_positions_and_outputs_without_a_unit(index, at_once):
    """Also where the units stand anywhere, or are of different sizes."""
    import numpy as np

    from billhook.importance.activations import gram_of, unit_positions
    from billhook.units.units import Units

    count, width = max(index) + 1, len(index)
    units = Units("head", "x", ("y",), np.array(index), np.arange(count), (), (), ())
    values, reader = torch.randn(2, 5, width), torch.nn.Linear(width, 7)
    found, (table, there) = by_unit(values, units, "head"), unit_positions(units, "head")
    gram = gram_of(reader, table, there, width, at_once)
    for unit in range(count):
        own = [position for position, one in enumerate(index) if one == unit]
        torch.testing.assert_close(found[..., unit], values[..., own].sum(-1))
        block = reader.weight.detach()[:, own].T @ reader.weight.detach()[:, own]
        torch.testing.assert_close(gram[unit][: len(own), : len(own)], block)
        assert not gram[unit][len(own) :].any()
        assert not gram[unit][:, len(own) :].any()


def test_outputs_in_mixed_precision_are_summed_in_float32():
    model, batch, given = LOUD["llama"]().float(), {"input_ids": tokens(2, 6)}, []
    reader = model.model.layers[0].self_attn.o_proj
    handle = reader.register_forward_pre_hook(lambda _, args: given.append(args[0].detach().double()))
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(model, [batch], bh.OutputNorm(), "head")
    handle.remove()
    seen, weight = given[-1].unflatten(-1, (8, 4)), reader.weight.detach().double().unflatten(-1, (8, 4))
    moved = torch.einsum("bthi,ohi->bhto", seen, weight).square().sum((0, 2, 3))
    torch.testing.assert_close(found[0], (moved / 12).sqrt(), rtol=1e-5, atol=0)


@torch.no_grad()
def test_channels_of_experts_count_by_the_gates_of_their_tokens():
    model = build("mixtral")
    ids, padding = tokens(), torch.ones(tokens().shape, dtype=torch.int64)
    padding[0, 3:] = 0
    found = bh.score(model, bh.find_units(model, "channel"), bh.OutputNorm(), [{"input_ids": ids, "attention_mask": padding}])
    block, given = model.model.layers[0].mlp, []
    block.experts.register_forward_pre_hook(lambda _, args: given.append(args))
    model(input_ids=ids, attention_mask=padding)
    hidden, chosen, gates = given[0]
    squares, count = torch.zeros(block.experts.down_proj.shape[2], dtype=torch.float64), 0
    for token in padding.flatten().nonzero().flatten().tolist():
        for expert, gate in zip(chosen[token].tolist(), gates[token].double(), strict=True):
            up, down = block.experts.gate_up_proj[expert].double(), block.experts.down_proj[expert].double()
            gated, linear = (up @ hidden[token].double()).chunk(2)
            squares += (gate * torch.nn.functional.silu(gated) * linear * down).square().sum(0)
            count += 1
    torch.testing.assert_close(found["model.layers.0.mlp.experts"].double(), (squares / count).sqrt(), rtol=1e-5, atol=0)


def test_heads_that_a_convolution_reads():
    """SqueezeBERT has channels before tokens; here there are as many of both."""
    config = transformers.SqueezeBertConfig(
        vocab_size=64, hidden_size=32, embedding_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48,
        q_groups=1, k_groups=1, v_groups=1, intermediate_groups=1, output_groups=1, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model, kept = transformers.SqueezeBertForSequenceClassification(config).eval(), []
    batch = {"input_ids": tokens(2, 32), "attention_mask": torch.ones(2, 32, dtype=torch.long), "labels": torch.tensor([0, 2])}
    batch["attention_mask"][1, -4:] = 0
    reader = model.transformer.encoder.layers[0].post_attention.conv1d
    handle = reader.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    loss = model(**batch).loss
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, kept)
    given, gradient = ((one.mT[batch["attention_mask"].bool()]).unflatten(1, (4, 8)) for one in (kept[0].detach(), gradient))
    moved = torch.einsum("thd,ohd->tho", given, reader.weight.detach().squeeze(-1).unflatten(1, (4, 8)))
    units = bh.find_units(model, "head")
    near = {"rtol": 1e-4, "atol": 1e-9, "check_dtype": False}
    for importance, expected in (
        (bh.importance.GateGradient(), (given * gradient).sum(-1).abs().mean(0)),
        (bh.importance.ActivationNorm(), given.norm(dim=-1).mean(0)),
        (bh.OutputNorm(), moved.square().sum(-1).mean(0).sqrt()),
    ):
        (found,) = bh.score(model, units, importance, [batch]).values()
        torch.testing.assert_close(found, expected, **near)
    plan = bh.pruning.plan_units(model, {0: [1]})
    with pytest.raises(ValueError, match="no linear layer consumes the removed units"):
        bh.repair(model, plan, [batch, batch])
    model.transformer.encoder.layers[0].post_attention.conv1d = torch.nn.Conv1d(32, 32, 3, padding=1)
    with pytest.raises(ValueError, match="has several kernel positions, and some of its inputs are padding"):
        bh.score(model, units, bh.OutputNorm(), [batch])
    model.transformer.encoder.layers[0].post_attention.conv1d = torch.nn.Conv1d(32, 32, 3, padding=1, groups=4)
    with pytest.raises(ValueError, match="has several kernel positions, so the effect of a unit is not"):
        bh.score(model, units, bh.OutputNorm(), [batch])
