"""What may be mixed is what the family's published code lets pass, in any dtype, also where a rotary embedding turns slowly."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from billhook.kv_heads.layout import find_projections
from billhook.kv_heads.symmetry import Mixing, Symmetries, find_symmetries
from billhook.tracing.trace import trace
from kit import families, kv_zoo
from kit.families import llama


def freedoms_of(model):
    return list(find_symmetries(model, find_projections(model, trace(model))).values())


def together(start, end):
    return (Mixing(tuple(range(start, end))),) if start < end else ()


def apart(width, rotary=None):
    """Pairs half of the rotary width apart (Llama, NeoX), and the rest together."""
    half = (rotary or width) // 2
    return (*(Mixing((f,), (f + half,)) for f in range(half)), *together(2 * half, width))


def beside(width, rotary=None):
    """Pairs side by side (GPT-J, Cohere), and the rest together."""
    half = (rotary or width) // 2
    return (*(Mixing((2 * f,), (2 * f + 1,)) for f in range(half)), *together(2 * half, width))


WIDE = {"hidden_size": 128, "num_attention_heads": 8, "head_dim": 16}
NO_HEAD_DIM = {"hidden_size": 128, "num_attention_heads": 8}


def rope(kind="default", theta=10000.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
GEMMA = WIDE | {"query_pre_attn_scalar": 16, "num_hidden_layers": 6}

CASES = {
    "llama": (lambda: llama(**WIDE), apart(16)),
    "llama, yarn": (lambda: llama(**WIDE, **YARN), apart(16)),
    "llama, llama3": (lambda: llama(**WIDE, **LLAMA3), apart(16)),
    "llama, biases": (lambda: llama(**WIDE, attention_bias=True), apart(16)),
    "llama, eager": (lambda: llama(**WIDE, attn_implementation="eager"), apart(16)),
    "mistral": (lambda: families.build("mistral", **WIDE), apart(16)),
    "gemma2": (lambda: families.build("gemma2", **WIDE, query_pre_attn_scalar=16), apart(16)),
    "phi3": (lambda: kv_zoo.build("phi3"), apart(4)),
    "falcon": (lambda: kv_zoo.build("falcon"), apart(4)),
    "modernbert": (lambda: kv_zoo.build("modernbert"), apart(4)),
    "phi, half of a head": (lambda: families.build("phi", **NO_HEAD_DIM), apart(16, 8)),
    "neox, a quarter": (lambda: kv_zoo.build("gpt_neox", hidden_size=128), apart(16, 4)),
    "gptj": (lambda: kv_zoo.build("gptj", n_embd=128, rotary_dim=16), beside(16)),
    "gptj, half of a head": (lambda: kv_zoo.build("gptj", n_embd=128, rotary_dim=8), beside(16, 8)),
    "codegen": (lambda: kv_zoo.build("codegen"), beside(8, 4)),
    "cohere without its norm": (lambda: families.build("cohere", **NO_HEAD_DIM, use_qk_norm=False), beside(16)),
    **{
        name: (lambda name=name: kv_zoo.build(name), together(0, 4))
        for name in ("gpt2", "gpt_bigcode", "bert", "bart", "opt", "vit")
    },
    "t5": (lambda: kv_zoo.build("t5"), together(0, 4)),
    "bloom": (lambda: kv_zoo.build("bloom"), together(0, 4)),
    "albert": (lambda: kv_zoo.build("albert"), together(0, 4)),
    "xglm": (lambda: kv_zoo.build("xglm"), together(0, 4)),
    "mpt": (lambda: kv_zoo.build("mpt"), together(0, 4)),
    **{name: (lambda name=name: families.build(name), ()) for name in ("qwen3", "olmo2", "cohere")},
}
FIXED = ("bloom", "t5", "mpt", "olmo2")


@pytest.mark.parametrize("family", CASES)
def test_the_numbers_of_each_family_may_be_mixed_as_its_code_says(family):
    build, keys = CASES[family]
    model = build()
    width = next(iter(find_projections(model, trace(model)).values())).v.index.shape[1]
    found = freedoms_of(model)
    for number, own in enumerate(found):
        cross = family == "t5" and number in (3, 5)
        assert own == Symmetries(keys, together(0, width), family not in FIXED or cross, kv_zoo.calls_interface(model))


def test_layers_without_positions_may_mix_more():
    model = families.build("smollm3", **NO_HEAD_DIM, num_hidden_layers=8)
    turned = model.config.no_rope_layers
    assert set(turned) == {0, 1}
    assert [own.keys for own in freedoms_of(model)] == [apart(16) if turns else together(0, 16) for turns in turned]


def test_local_and_global_layers_each_with_its_own_norm_mix_no_keys_but_values():
    found = freedoms_of(families.build("gemma3_text", **GEMMA))
    assert len(found) == 6
    assert {(own.keys, own.values, own.order) for own in found} == {((), together(0, 16), True)}


@pytest.mark.daily("*-dtype1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theta", [1e4, 8e6])
@pytest.mark.parametrize(("family", "keys"), [("cohere", beside(64)), ("llama", apart(64))])
def test_slow_turns_are_seen_whatever_the_dtype(family, keys, theta, dtype):
    """Of Command R the slowest pair turns by 1.6e-7 a token; in bfloat16 that is nothing."""
    own = {"use_qk_norm": False} if family == "cohere" else {}
    model = families.build(family, hidden_size=128, num_attention_heads=2, num_key_value_heads=2, **own, **rope(theta=theta))
    model.config.max_position_embeddings = 8192
    assert {found.keys for found in freedoms_of(model.to(dtype))} == {keys}


class Tricky(nn.Module):
    """Llama's attention without positions, and with something at each number of its values, keys or heads."""

    def __init__(self, old, trick):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = old.q_proj, old.k_proj, old.v_proj, old.o_proj
        self.trick, self.scale = trick, nn.Parameter(torch.rand(4) + 0.5)
        self.config, self.layer_idx = old.config, old.layer_idx

    def forward(self, hidden_states, **_):
        q, k, v = (
            linear(hidden_states).unflatten(-1, (-1, 4)).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.trick == "norm of values":
            v = v * v.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        if self.trick == "gate of values":
            v = v * torch.sigmoid(self.scale)
        if self.trick == "gate of keys":
            k = k * self.scale
        if self.trick == "a factor for each head":
            v = v * self.scale[: v.shape[1], None, None]
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
        out = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize(("trick", "expected"), [
    ("nothing", Symmetries(together(0, 4), together(0, 4), True, False)),
    ("norm of values", Symmetries(together(0, 4), (), True, False)),
    ("gate of values", Symmetries(together(0, 4), (), True, False)),
    ("a factor for each head", Symmetries(together(0, 4), together(0, 4), False, False)),
    ("gate of keys", Symmetries((), together(0, 4), True, False)),
])  # fmt: skip
def test_what_stands_in_between_is_noticed(trick, expected):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn = Tricky(layer.self_attn, trick)
    assert freedoms_of(model) == [expected] * 2


@pytest.mark.parametrize(
    ("family", "dtype"), [*((one, torch.float32) for one in ("llama", "gptj", "t5", "albert")), ("llama", torch.float64)]
)
def test_the_model_stays_as_it_is(family, dtype):
    model = (llama() if family == "llama" else kv_zoo.build(family)).to(dtype).train()
    places = find_projections(model, trace(model))
    tensors = [(one, one.data, one.data_ptr(), one.dtype) for one in (*model.parameters(), *model.buffers())]
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    accumulators = [accumulator(one) for one in model.parameters()]  # where DDP waits for gradients
    with torch.autocast("cpu", torch.bfloat16):
        assert find_symmetries(model, places) == find_symmetries(model, places)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(one.data_ptr() == place and one.dtype == dtype for one, _, place, dtype in tensors)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in model.parameters())
    assert all(accumulator(one) is own for one, own in zip(model.parameters(), accumulators, strict=True))


def accumulator(parameter):
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]


def test_it_is_the_same_under_autocast_and_with_kernels_that_know_no_float64():
    model = llama(**WIDE)
    places = find_projections(model, trace(model))
    plain = find_symmetries(model, places)
    with torch.autocast("cpu", torch.bfloat16):
        assert find_symmetries(model, places) == plain
    model.config._attn_implementation_internal = "flex_attention"
    assert find_symmetries(model, places) == plain
    assert model.config._attn_implementation == "flex_attention"


def test_one_that_fails_leaves_the_model_as_it_was():
    model = llama()
    places = find_projections(model, trace(model))
    before = copy.deepcopy(model.state_dict())
    model.model.layers[1].self_attn.__class__ = OnlyHalf
    with pytest.raises(RuntimeError, match="no kernel"):
        find_symmetries(model, places)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class OnlyHalf(LlamaAttention):
    """With a kernel that knows no float64."""

    def forward(self, hidden_states, *args, **kwargs):
        if self.k_proj.weight.dtype == torch.float64:
            raise RuntimeError("no kernel")
        return super().forward(hidden_states, *args, **kwargs)


class Direct(LlamaAttention):
    """Called without hooks."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


def test_an_attention_that_is_not_called_as_a_module_is_refused():
    model = llama()
    places = find_projections(model, trace(model))
    model.model.layers[1].self_attn.__class__ = Direct
    with pytest.raises(ValueError, match=r"layers.1.self_attn is not called as a module, so its heads cannot be recorded"):
        find_symmetries(model, places)
    assert not any(module._forward_pre_hooks for module in model.modules())
