"""Gates multiply what a head gives; a masked head is one whose columns nobody reads."""

import copy
from contextlib import contextmanager

import peft
import pytest
import torch

import billhook as bh
from billhook.units.find import find_units
from billhook.units.gates import Gate, place_gates
from kit.families import build, llama, tokens
from kit.units import ATTENTIVE, SEQ2SEQ, hooks, small, weight_of

STEP = 2**-13  # parts of many models compute in float32, so that a smaller one would measure rounding


def zeroed(model, columns):
    """A copy in which the columns of each reader, for (reader, head, head size), are zero."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for reader, head, size in columns:
            weight_of(other, reader)[head * size : (head + 1) * size] = 0
    return other


@contextmanager
def without_columns(model, columns):
    """The columns of each reader, for (reader, head, head size), are zero for as long as the block lasts."""
    weights = {reader: weight_of(model, reader) for reader, _, _ in columns}
    before = {reader: weight.detach().clone() for reader, weight in weights.items()}
    with torch.no_grad():
        for reader, head, size in columns:
            weights[reader][head * size : (head + 1) * size] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for reader, weight in before.items():
                weights[reader].copy_(weight)


@contextmanager
def gated(case, per="head"):
    """What `gates` does, with the heads that were found before the model became float64."""
    gates = {name: torch.ones(one.count(per), requires_grad=True) for name, one in case.heads.items()}
    handles = place_gates(case.model, case.heads, gates, per)
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def assert_same(got, expected, relative=1e-9):
    assert (got - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "falcon", "deepseek_v3")
@pytest.mark.parametrize("name", [*ATTENTIVE, *SEQ2SEQ])
def test_one_leaves_the_answer_and_the_gradient_is_that_of_a_difference(name):
    case = small(name)
    with torch.no_grad():
        before = case.run()
    with gated(case) as gates:
        with torch.no_grad():
            assert torch.equal(case.run(), before)
        found = dict(zip(gates, torch.autograd.grad(case.loss(), list(gates.values())), strict=True))
        scale = max(float(gradient.abs().max()) for gradient in found.values())
        assert scale > 1e-3
        with torch.no_grad():
            for attention, gate in gates.items():
                for head in {0, len(gate) // 2 + 1, len(gate) - 1}:
                    losses = []
                    for value in (1 + STEP, 1 - STEP):
                        gate[head] = value
                        losses.append(float(case.loss()))
                    gate[head] = 1
                    difference = (losses[0] - losses[1]) / (2 * STEP)
                    assert difference == pytest.approx(float(found[attention][head]), rel=0.02, abs=2e-3 * scale)


@pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "falcon", "deepseek_v3")
@pytest.mark.parametrize("name", [*ATTENTIVE, *SEQ2SEQ])
def test_a_masked_head_is_one_whose_columns_nobody_reads(name):
    case = small(name)
    with torch.no_grad():
        whole = case.run()
        for attention, one in case.heads.items():
            count = len(one.kv_of)
            size = len(one.index) // count
            masks = {"head": [0, count - 1], "kv_head": [one.count("kv_head") - 1]}
            for per, heads in masks.items():
                groups = count // one.count("kv_head")
                queries = heads if per == "head" else range(heads[0] * groups, (heads[0] + 1) * groups)
                with bh.mask(case.model, {attention: heads}, per=per):
                    masked = case.run()
                with without_columns(case.model, [(reader, head, size) for reader in one.readers for head in queries]):
                    assert_same(masked, case.run())
                assert not torch.equal(masked, whole)
        assert torch.equal(case.run(), whole)


def test_nothing_is_left_on_the_model():
    model, ids = llama(), tokens()
    before, state, plain = hooks(model), dict(model.state_dict()), model(ids).logits
    parameters = [name for name, _ in model.named_parameters()]

    def untouched():
        assert hooks(model) == before
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(ids).logits, plain)

    with bh.mask(model, {0: [1], 1: [2, 3]}):
        assert hooks(model) != before
        assert list(model.state_dict()) == list(state)
        assert [name for name, _ in model.named_parameters()] == parameters
    untouched()
    mask = bh.mask(model, {"model.layers.0.self_attn": [1]})
    mask.remove()
    untouched()
    mask.remove()
    untouched()
    with bh.gates(model, bh.find_units(model, "head")):
        assert [name for name, _ in model.named_parameters()] == parameters
    untouched()
    for block in (lambda model: bh.gates(model, bh.find_units(model, "head")), lambda model: bh.mask(model, {0: [1]})):
        with pytest.raises(RuntimeError, match="inside"), block(model):
            raise RuntimeError("inside")
        untouched()
    own = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda *_: None)
    with bh.mask(model, {0: [1]}):
        pass
    assert len(model.model.layers[0].self_attn.o_proj._forward_pre_hooks) == 1
    own.remove()


def test_masks_and_gates_compose():
    model, ids = llama(), tokens()
    with bh.mask(model, {0: [0, 1], 1: [3]}):
        expected = model(ids).logits
    outer = bh.mask(model, {0: [0]})
    with bh.mask(model, {0: [1], 1: [3]}):
        torch.testing.assert_close(model(ids).logits, expected)
        with bh.mask(model, {0: [0, 1]}):
            torch.testing.assert_close(model(ids).logits, expected)
        with bh.gates(model, bh.find_units(model, "head")) as gates:
            assert torch.equal(model(ids).logits, expected)
            first, second = torch.autograd.grad(model(ids).logits.square().mean(), list(gates.values()))
            assert [head for head, gradient in enumerate(first) if gradient == 0] == [0, 1]
            assert [head for head, gradient in enumerate(second) if gradient == 0] == [3]
        outer.remove()
        alone = model(ids).logits
    with bh.mask(model, {0: [1], 1: [3]}):
        assert torch.equal(model(ids).logits, alone)


def test_a_position_without_a_unit_has_the_gate_of_none():
    linear, index = torch.nn.Linear(3, 1), torch.tensor([1, -1, 0])
    gated, _ = Gate(torch.tensor([2.0, 3.0]), index)(linear, (torch.ones(1, 3), "more"))
    assert gated.tolist() == [[3.0, 1.0, 2.0]]


@pytest.mark.parametrize("dora", [False, True])
def test_adapters(dora):
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2, use_dora=dora, init_lora_weights=False)
    model, ids = peft.get_peft_model(llama(), config).eval().double(), tokens()
    merged = copy.deepcopy(model).merge_and_unload()
    with bh.mask(model, {0: [2], 1: [0, 7]}) as mask, bh.mask(merged, {0: [2], 1: [0, 7]}) as other:
        assert mask.units == other.units
        assert_same(model(ids).logits, merged(ids).logits)
        masked = model(ids).logits
    layers = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
    assert_same(masked, zeroed(merged, [(layers[0], 2, 4), (layers[1], 0, 4), (layers[1], 7, 4)])(ids).logits)
    with bh.gates(model, bh.find_units(model, "head")) as gates, bh.gates(merged, bh.find_units(merged, "head")) as others:
        found = torch.autograd.grad(model(ids).logits.square().mean(), list(gates.values()))
        expected = torch.autograd.grad(merged(ids).logits.square().mean(), list(others.values()))
    torch.testing.assert_close(found, expected)
    with bh.mask(model, {0: [2]}), model.disable_adapter():
        off = model(ids).logits
    with bh.mask(model.unload(), {0: [2]}):
        assert_same(off, model(ids).logits)


def test_half_precision():
    model, ids = llama().bfloat16(), tokens()
    plain = model(ids).logits
    with bh.gates(model, bh.find_units(model, "head")) as gates:
        logits = model(ids).logits
        assert torch.equal(logits, plain)
        gradients = torch.autograd.grad(logits.float().square().mean(), list(gates.values()))
    assert all(gate.dtype == gradient.dtype == torch.float32 for gate, gradient in zip(gates.values(), gradients, strict=True))
    with bh.mask(model, {1: [5]}):
        masked = model(ids).logits
    assert torch.equal(masked, zeroed(model, [("model.layers.1.self_attn.o_proj", 5, 4)])(ids).logits)
    model = llama()
    with torch.autocast("cpu", torch.bfloat16), bh.mask(model, {1: [5]}):
        masked = model(ids).logits
        assert torch.equal(masked, zeroed(model, [("model.layers.1.self_attn.o_proj", 5, 4)])(ids).logits)


def test_a_trace_does_not_mind():
    def described(structure):
        return [(g.kind, g.size, dict(g.flags), g.reason, [(m.name, m.dim) for m in g.members]) for g in structure.groups]

    model = llama()
    before = bh.trace(model)
    with (
        bh.mask(model, {0: [1]}),
        bh.gates(model, bh.find_units(model, "head")),
        bh.gates(model, bh.find_units(model, "head"), per="kv_head"),
    ):
        after = bh.trace(model)
    assert described(after) == described(before)
    assert repr(after.attention[0].o) == repr(before.attention[0].o)
    assert not after.opaque


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_from_a_cache(family):
    ids, model, reader, layer = tokens(), build(family), "model.layers.1.self_attn.o_proj", 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    size = model.get_submodule(reader).in_features // len(find_units(model, "head")[list(find_units(model, "head"))[layer]].kv_of)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    with bh.mask(model, {layer: [1, 3]}):
        masked = model.generate(ids, **options)
    expected = zeroed(model, [(reader, 1, size), (reader, 3, size)]).generate(ids, **options)
    assert torch.equal(masked.sequences, expected.sequences)
    torch.testing.assert_close(masked.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(masked.scores[0], plain.scores[0], rtol=1e-2)


def test_a_plan_masks_what_it_removes():
    model, ids = llama(), tokens()
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25, kv_heads=0.5)
    with bh.mask(model, plan) as mask:
        masked = model(ids).logits
    assert mask.units == plan.units
    bh.apply(model, plan)
    torch.testing.assert_close(model(ids).logits, masked)


def test_channels_have_gates_too():
    model, ids = llama(), tokens()
    channels = bh.find_units(model, "channel")
    plain = model(ids).logits
    with bh.gates(model, channels) as gates:
        assert {name: len(gate) for name, gate in gates.items()} == {name: one.count() for name, one in channels.items()}
        assert torch.equal(model(ids).logits, plain)
        with torch.no_grad():
            gates["model.layers.1.mlp"][[3, 7]] = 0
        gated = model(ids).logits
    with bh.mask(model, {1: [3, 7]}, "channel"):
        assert torch.equal(model(ids).logits, gated)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, [3, 7]] = 0
    torch.testing.assert_close(model(ids).logits, gated)


def test_what_no_module_of_its_own_reads_has_no_gate():
    model = build("mixtral")
    with pytest.raises(
        ValueError, match="experts: no single module consumes the experts of model.layers.0.mlp, so they cannot be masked"
    ):
        bh.mask(model, {0: [1]}, "expert")
    with pytest.raises(ValueError, match="blocks: no single module consumes"), bh.gates(model, bh.find_units(model, "block")):
        pass


def test_blocks_are_skipped_and_a_trace_does_not_mind():
    model, ids = llama(), tokens()
    before, plain = hooks(model), model(ids).logits
    groups = [(group.kind, group.size, group.reason) for group in bh.trace(model).groups]
    with bh.mask(model, [1], "block") as mask:
        assert mask.units == {"model.layers": [1]}
        masked = model(ids).logits
        assert [(group.kind, group.size, group.reason) for group in bh.trace(model).groups] == groups
    assert hooks(model) == before
    assert torch.equal(model(ids).logits, plain)
    bh.pruning.prune_units(model, [1], kind="block")
    torch.testing.assert_close(model(ids).logits, masked)


class Convolved(torch.nn.Module):
    """Attention over places, whose projections are convolutions: channels come before places, and there are as many."""

    def __init__(self, dims, window=1):
        super().__init__()
        kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d}[dims]
        self.q, self.k, self.v = (kind(8, 16, 1) for _ in range(3))
        self.o = kind(16, 8, window, padding="same")

    def forward(self, x):
        q, k, v = (one(x).flatten(2).unflatten(1, (4, 4)).mT for one in (self.q, self.k, self.v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.mT.flatten(1, 2).view(len(x), 16, *x.shape[2:]))


@pytest.mark.parametrize(("dims", "window"), [(1, 1), (1, 3), (2, 1)])
def test_heads_that_a_convolution_reads(dims, window):
    torch.manual_seed(0)
    model, x = Convolved(dims, window).double(), torch.randn(2, 8, *[16] * dims, dtype=torch.float64)
    inputs = {"x": x}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.o.weight[:, 4:8] = 0
    with bh.mask(model, {0: [1]}, example_inputs=inputs):
        assert_same(model(x), other(x))
    units = bh.find_units(model, "head", example_inputs=inputs)
    with bh.gates(model, units) as gates:
        (found,) = torch.autograd.grad(model(x).square().mean(), list(gates.values()))
    (weight,) = torch.autograd.grad(model(x).square().mean(), [model.o.weight])
    torch.testing.assert_close(found.double(), (weight * model.o.weight).transpose(0, 1).unflatten(0, (4, 4)).flatten(1).sum(1))


def test_an_input_without_the_heads_is_refused():
    model = llama()
    with bh.mask(model, {0: [1]}), pytest.raises(ValueError, match=r"Linear is given \[1, 3\], which has not the 32 positions"):
        model.model.layers[0].self_attn.o_proj(torch.zeros(1, 3))
