"""Modules that are not of transformers: the groups that a trace finds in them, each asked of the real module by permutation."""

import re

import pytest
import torch
from oracle import answer, check, randomise
from torch import nn
from torch.nn import functional as F

from billhook.tracing.trace import trace


class Net(nn.Module):
    """A module of some parts and a forward; tensors named `buffer...` are registered, others are plain attributes."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            (self.register_buffer if name.startswith("buffer") else self.__setattr__)(name, part)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def P(*shape):
    return nn.Parameter(torch.randn(*shape))


def asked(model, *inputs):
    """The structure of a model, after the oracle has found none of its groups wrong."""
    torch.manual_seed(0)
    model = model.double().eval()
    randomise(model)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    structure = trace(model, inputs)
    groups = [group for group in structure.groups if not group.reason]
    for finding in check(model, structure, lambda: answer(model(*inputs)), groups):
        assert finding.holds, f"{finding.group.kind} of {[(m.name, m.dim) for m in finding.group.members]}: {finding.error:.1e}"
    return structure


def free(structure):
    """Kind, size and members of the groups that may be pruned."""
    return {(g.kind, g.size, frozenset(f"{m.name}:{m.dim}" for m in g.members)) for g in structure.groups if not g.reason}


def made(kind, size, members):
    """One group, with members like `a.weight:0 a.bias:0`."""
    return (kind, size, frozenset(members.split()))


X = torch.randn(2, 7, 8)
IMAGE = torch.randn(2, 3, 9, 9)
IDS = torch.randint(0, 19, (2, 7))


def attention_groups(prefix):
    packed = f"{prefix}.in_proj_weight:0 {prefix}.in_proj_bias:0 {prefix}.out_proj.weight:1"
    return {made("head", 2, packed), made("query_key", 4, packed)}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(batch_first, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 20, norm_first=norm_first, batch_first=batch_first)
    structure = asked(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), X)
    assert free(structure) == {
        *attention_groups("layers.0.self_attn"),
        *attention_groups("layers.1.self_attn"),
        *(made("channel", 20, f"{i}.linear1.weight:0 {i}.linear1.bias:0 {i}.linear2.weight:1") for i in ("layers.0", "layers.1")),
    }
    assert not structure.opaque
    assert not structure.untouched


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_decoder(norm_first):
    layer = nn.TransformerDecoderLayer(8, 2, 20, norm_first=norm_first, batch_first=True)
    structure = asked(nn.TransformerDecoder(layer, 1), X, torch.randn(2, 5, 8))
    assert free(structure) == {
        *attention_groups("layers.0.self_attn"),
        *attention_groups("layers.0.multihead_attn"),
        made("channel", 20, "layers.0.linear1.weight:0 layers.0.linear1.bias:0 layers.0.linear2.weight:1"),
    }


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 10}])
def test_multihead_attention(options):
    model = Net(lambda s, x, k, v: s.m(x, k, v)[0], m=nn.MultiheadAttention(8, 2, **options))
    structure = asked(model, X, torch.randn(2, 7, options.get("kdim", 8)), torch.randn(2, 7, options.get("vdim", 8)))
    assert {g.kind for g in structure.groups if not g.reason} == {"head", "query_key", "value"}
    assert not structure.opaque


class NanoBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(c, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        x = x + self.c_proj((scores @ v).transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Nano(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(19, 12), nn.Embedding(16, 12)
        self.h = nn.ModuleList(NanoBlock(12, 3) for _ in range(2))
        self.ln_f = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 19, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def test_nano_gpt():
    structure = asked(Nano(), IDS)
    (residual,) = structure.of_kind("residual")
    norms = "ln_1.weight:0 ln_1.bias:0 ln_2.weight:0 ln_2.bias:0"
    matrices = "c_attn.weight:1 c_proj.weight:0 c_proj.bias:0 c_fc.weight:1 mlp_proj.weight:0 mlp_proj.bias:0"
    blocks = {f"h.{i}.{name}" for i in range(2) for name in f"{norms} {matrices}".split()}
    ends = {"wte.weight:1", "wpe.weight:1", "ln_f.weight:0", "ln_f.bias:0"}
    assert {f"{m.name}:{m.dim}" for m in residual.members} == blocks | ends
    for i in range(2):
        packed = f"h.{i}.c_attn.weight:0 h.{i}.c_attn.bias:0"
        assert made("head", 3, f"{packed} h.{i}.c_proj.weight:1") in free(structure)
        assert made("query_key", 4, packed) in free(structure)
        assert made("value", 4, f"{packed} h.{i}.c_proj.weight:1") in free(structure)
        assert made("channel", 48, f"h.{i}.c_fc.weight:0 h.{i}.c_fc.bias:0 h.{i}.mlp_proj.weight:1") in free(structure)
    assert structure.tied == {"lm_head.weight": "wte.weight"}
    assert len(structure.attention) == 2


def test_grouped_query_attention():
    def forward(s, x):
        q = s.q(x).view(2, 7, 6, 4).transpose(1, 2)
        k, v = (part(x).view(2, 7, 2, 4).transpose(1, 2).repeat_interleave(3, 1) for part in (s.k, s.v))
        return s.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 7, 24))

    structure = asked(Net(forward, q=nn.Linear(8, 24), k=nn.Linear(8, 8), v=nn.Linear(8, 8), o=nn.Linear(24, 8)), X)
    rows = {name: f"{name}.weight:0 {name}.bias:0" for name in "qkv"}
    assert free(structure) == {
        made("kv_head", 2, f"{rows['q']} {rows['k']} {rows['v']} o.weight:1"),
        made("query_head", 3, f"{rows['q']} o.weight:1"),
        made("query_key", 4, f"{rows['q']} {rows['k']}"),
        made("value", 4, f"{rows['v']} o.weight:1"),
    }


def test_mlp_with_layer_norm():
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    assert free(asked(model, X)) == {
        made("channel", 12, "0.weight:0 0.bias:0 1.weight:0 1.bias:0 3.weight:1"),
        made("channel", 6, "3.weight:0 3.bias:0 5.weight:1"),
    }


def test_residual_cnn():
    def norm(name):
        return f"{name}.weight:0 {name}.bias:0 {name}.running_mean:0 {name}.running_var:0"

    def forward(s, x):
        x = F.relu(s.n0(s.c0(x)))
        x = x + s.n2(s.c2(F.relu(s.n1(s.c1(x)))))
        return s.fc(F.adaptive_avg_pool2d(F.max_pool2d(s.dw(x), 2), 1).flatten(1))

    parts = {"c0": nn.Conv2d(3, 8, 3), "c1": nn.Conv2d(8, 6, 3, padding=1), "c2": nn.Conv2d(6, 8, 3, padding=1)}
    norms = {"n0": nn.BatchNorm2d(8), "n1": nn.BatchNorm2d(6), "n2": nn.BatchNorm2d(8)}
    structure = asked(Net(forward, **parts, **norms, dw=nn.Conv2d(8, 8, 3, groups=8), fc=nn.Linear(8, 5)), IMAGE)
    wide = f"c0.weight:0 c0.bias:0 c2.weight:0 c2.bias:0 {norm('n0')} {norm('n2')} c1.weight:1 dw.weight:0 dw.bias:0 fc.weight:1"
    narrow = f"c1.weight:0 c1.bias:0 {norm('n1')} c2.weight:1"
    assert {group[1:] for group in free(structure)} == {made("", 8, wide)[1:], made("", 6, narrow)[1:]}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_classifier(kind):
    parts = {"e": nn.Embedding(19, 12), "rnn": kind(12, 6, batch_first=True), "head": nn.Linear(6, 3)}
    names = {group[1:] for group in free(asked(Net(lambda s, i: s.head(s.rnn(s.e(i))[0][:, -1]), **parts), IDS))}
    rows = "rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.weight_hh_l0:1 rnn.bias_ih_l0:0 rnn.bias_hh_l0:0 head.weight:1"
    assert names == {(12, frozenset({"e.weight:1", "rnn.weight_ih_l0:1"})), (6, frozenset(rows.split()))}


def line(middle, n=12, m=12, **parts):
    """A middle between two linear layers, `a` with n rows and `b` with m columns."""
    return Net(lambda s, x: s.b(middle(s, s.a(x))), a=nn.Linear(8, n), b=nn.Linear(m, 5), **parts)


def written(s, h):
    memory = h.new_ones(12)
    memory[torch.tensor([0, 5])] = 0.0
    return h * memory


def written_by_mask(s, h):
    h = h.clone()
    h[..., s.g > 0] = 0.0
    return h


def overwritten_index(s, h):
    at = h.new_zeros(1, dtype=torch.long)
    at[0] = (s.g.sum() > -99).long()
    return h[..., at]


def product_into_memory(s, h):
    memory = h.new_zeros(12, 14)
    torch.mm(s.w, s.w.mT, out=memory[:, 1:13])
    return h @ memory[:, 1:13]


def added_by_index(s, h):
    return h.new_zeros(2, 7, 12).index_add(2, torch.arange(12), h)


def scattered(s, h):
    return h.new_zeros(2, 6, 12).scatter_add(1, s.r(h).argmax(-1, keepdim=True).expand(2, 7, 12), h)


def gathered(s, h):
    return s.e[None].expand(2, 6, 12).gather(1, s.r(h).argmax(-1, keepdim=True).expand(2, 7, 12))


def chosen(change):
    """Rows of a table `e`, by the index of the largest of six scores after some change of it."""
    return lambda s, h: s.e[change(s.r(h).argmax(-1), h)]


ROUTED = {"r": nn.Linear(12, 6), "e": P(6, 12)}
FLAGGED = {
    "constant attribute": line(lambda s, h: h * s.mask, mask=torch.tensor([1.0, 0.0] * 6).double()),
    "sum of arange": line(lambda s, h: h + torch.arange(12).view(3, 4).sum(1).repeat_interleave(4)),
    "write at an index": line(written),
    "rfft": line(lambda s, h: torch.fft.rfft(h).abs() * s.w, m=7, w=P(7)),
    "window over channels": line(lambda s, h: s.c(h.view(14, 1, 12)).view(2, 7, 10), m=10, c=nn.Conv1d(1, 1, 3)),
    "pool over channels": line(lambda s, h: F.avg_pool1d(h, 2), m=6),
    "resize over channels": line(lambda s, h: F.interpolate(h, scale_factor=2), m=24),
    "unfold over channels": line(lambda s, h: h.unfold(-1, 4, 4).flatten(2)),
    "im2col of a parameter": Net(lambda s, x: x @ F.unfold(s.w[None], 2).view(8, -1), w=P(2, 4, 3)),
    "topk": line(lambda s, h: h.topk(4).values * s.w, m=4, w=P(4)),
    "sort": line(lambda s, h: h.sort(-1).values),
    "take along": line(lambda s, h: torch.take_along_dim(h, s.r(h).argsort(-1), -1), r=nn.Linear(12, 12)),
    "added by index": line(added_by_index),
    "permuted arange": line(lambda s, h: h[..., torch.arange(12).view(3, 4).t().reshape(12)]),
    "list of indices": line(lambda s, h: h[..., [0, 2, 5]], m=3),
    "longer table": line(lambda s, h: h * s.t(torch.arange(12))[:, 0], t=nn.Embedding(20, 1)),
    "mask of a parameter": Net(lambda s, x: s.a(x)[..., s.g > 0].sum(-1), a=nn.Linear(8, 12), g=P(12)),
    "nonzero": Net(lambda s, x: s.a(x)[..., torch.where(s.g > 0)[0]].sum(-1), a=nn.Linear(8, 12), g=P(12)),
    "padding": line(lambda s, h: s.e[F.pad(h, (2, 0)).argmax(-1)], e=P(14, 12)),
    "repeated": line(lambda s, h: s.e[h.repeat(1, 1, 2).argmax(-1)], e=P(24, 12)),
    "masked select": Net(lambda s, x: torch.masked_select(s.a(x), s.g > 0).sum(), a=nn.Linear(8, 12), g=P(12)),
    "value of a parameter": line(lambda s, h: h * s.w[2].item() + s.w.tolist()[1], w=P(4)),
    "largest of a parameter": line(lambda s, h: h[..., s.w.argmax()].unsqueeze(-1), m=1, w=P(3, 4)),
    "as_strided shifted": line(lambda s, h: h.as_strided((2, 7, 5), (84, 12, 1), 1) * s.w, m=5, w=P(5)),
    "as_strided": line(lambda s, h: h @ s.w.as_strided((12, 12), (1, 12)), w=P(12, 12)),
    "selected norm weight": line(lambda s, h: F.layer_norm(h, (12,), s.w[0], s.w[1]), w=P(3, 12)),
    "index written over": line(overwritten_index, m=1, g=P(3)),
    "concatenated indices": line(chosen(lambda i, h: torch.cat([i, i])), **ROUTED),
    "filled index": line(chosen(lambda i, h: i.masked_fill(h[..., 0] > 0, 0)), **ROUTED),
    "clamped index": line(chosen(lambda i, h: i.clamp(max=0)), **ROUTED),
    "index as truth": line(lambda s, h: h * s.r(h).argmax(-1, keepdim=True).bool(), **ROUTED),
    "sum of indices": line(lambda s, h: h * s.r(h).argmax(-1).sum(), **ROUTED),
    "index in Python": Net(lambda s, x: s.a(x) * (1 + s.r(x).sum((0, 1)).argmax().item()), a=nn.Linear(8, 5), r=nn.Linear(8, 6)),
    "index as output": Net(lambda s, x: s.r(x).argmax(-1), r=nn.Linear(8, 6)),
}


@pytest.mark.parametrize("name", FLAGGED)
def test_what_depends_on_order_is_refused(name):
    """Each of these was once, or could be, a group that permutation refutes."""
    asked(FLAGGED[name], X)


EXACT = {
    "buffer": (line(lambda s, h: h * s.buffer_mask, buffer_mask=torch.tensor([1.0, 0.0] * 6)), {12}),
    "write by a mask": (line(written_by_mask, g=P(12)), {12}),
    "product into memory": (line(product_into_memory, w=P(12, 12)), {12}),
    "scatter_add": (line(scattered, r=nn.Linear(12, 6)), {12}),
    "gather": (line(gathered, **ROUTED), {12}),
    "table": (line(chosen(lambda i, h: i.flip(1)), **ROUTED), {12}),
    "sentinel": (line(chosen(lambda i, h: i.masked_fill(h[..., 0] > 1e9, 6).clamp(0, 5)), **ROUTED), {12}),
    "views in place": (line(lambda s, h: h.unsqueeze_(2).transpose_(2, 3).squeeze_(-1)), {12}),
    "glu": (line(lambda s, h: F.glu(h), m=6), {6}),
    "stripes": (line(lambda s, h: torch.stack((-h[..., 1::2], h[..., ::2]), -1).flatten(-2)), {6}),
    "outer product": (line(lambda s, h: (h[..., None] * s.w).flatten(2), n=4, w=P(3)), {4, 3}),
    "repeated": (line(lambda s, h: h.repeat(1, 1, 3), n=4), {4, 3}),
    "cross entropy": (
        Net(
            lambda s, x: F.cross_entropy(s.r(s.a(x)).flatten(0, 1), x[..., 0].abs().clamp(0, 5).long().flatten()),
            a=nn.Linear(8, 12),
            r=nn.Linear(12, 6),
        ),
        {12},
    ),
    "distance": (Net(lambda s, x: F.mse_loss(s.a(x), s.r(x)), a=nn.Linear(8, 12), r=nn.Linear(8, 12)), {12}),
    "rows by a mask": (line(lambda s, h: h.masked_scatter((h[..., :1] > 0).expand_as(h), s.w), w=P(14, 12)), {11}),
    "entries by a mask": (line(lambda s, h: h.masked_scatter(h > 0, s.w), w=P(14, 12)), set()),
    "known places by a mask": (
        Net(
            lambda s, x: s.b(s.a(x).flatten(0, 1) * s.t(torch.arange(14)[torch.arange(14)[x[..., 0].flatten() > -1e9]])),
            a=nn.Linear(8, 12),
            b=nn.Linear(12, 3),
            t=nn.Embedding(14, 12),
        ),
        {12},
    ),
    "weight norm": (nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(*n)) for n in ((8, 12), (12, 3)))), {12}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_what_does_not_is_found(name):
    model, sizes = EXACT[name]
    assert {size for _, size, _ in free(asked(model, X))} == sizes


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_grouped_and_transposed_convolutions(groups):
    parts = {"a": nn.Conv2d(3, 8, 1), "c": nn.Conv2d(8, 16, 3, groups=groups), "t": nn.ConvTranspose2d(16, 8, 3, groups=groups)}
    assert groups in {size for _, size, _ in free(asked(nn.Sequential(*parts.values(), nn.Conv2d(8, 2, 1)), IMAGE))}


def test_images_read_at_places_of_a_grid():
    grid = torch.rand(2, 5, 5, 2) * 2 - 1
    model = Net(lambda s, x, g: s.b(F.grid_sample(s.a(x), g, align_corners=False)), a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(12, 4, 1))
    assert {size for _, size, _ in free(asked(model, IMAGE, grid))} == {12}


def test_without_a_rule_an_op_is_opaque():
    structure = asked(line(lambda s, h: h @ torch.linalg.svd(s.w)[0], w=P(12, 12)), X)
    assert re.search(r"no rule for the op _linalg_svd, in Net \(test_trace_modules\.py:\d+\)", *structure.opaque)
    assert not free(structure)


def test_an_op_of_ones_own_is_opaque():
    with torch.library._scoped_library("billhook_tests", "FRAGMENT") as library:
        library.define("twist(Tensor x) -> Tensor")
        library.impl("twist", lambda x: x.flip(-1).contiguous(), "CompositeExplicitAutograd")
        structure = asked(line(lambda s, h: torch.ops.billhook_tests.twist(h)), X)
    assert "twist" in next(iter(structure.opaque)) and not free(structure)  # noqa: PT018


def test_values_that_nobody_knows_are_listed():
    (assumed,) = asked(line(lambda s, h: h if h.sum() > -1e9 else -h), X).assumed
    assert re.search(r"a value is asked for: taken as true, or 1, in Net \(test_trace_modules\.py:\d+\)", assumed)


def test_a_forward_that_does_not_run_names_op_and_line():
    with pytest.raises(ValueError, match=r"Net does not run .*: at test_trace_modules\.py:\d+, op view: RuntimeError"):
        trace(line(lambda s, h: h.view(3, 5)), [X])


def test_memory_on_the_cpu_is_refused():
    model = line(lambda s, h: torch.zeros(2, 7, 12, dtype=h.dtype).index_add_(2, torch.arange(12), h))
    with pytest.raises(ValueError, match="a tensor on the CPU is written to"):
        trace(model, [X])


def test_inputs_are_asked_for_by_name():
    with pytest.raises(ValueError, match="example_inputs"):
        trace(nn.Linear(2, 3))


@pytest.mark.parametrize(("key", "is_free"), [(-2, True), (3, False)])
def test_a_range_before_a_single_index_is_free_if_the_index_counts_from_the_end(key, is_free):
    def forward(net, x):
        heads = net.a(x).unflatten(-1, (5, 4))  # three, a key, and a value
        return net.b(heads[..., :-2, :].flatten(-2)) + net.c(heads[..., key, :]) + net.d(heads[..., -1, :])

    structure = asked(Net(forward, a=nn.Linear(8, 20), b=nn.Linear(12, 8), c=nn.Linear(4, 8), d=nn.Linear(4, 8)), X)
    blocks = {(size, members) for _, size, members in free(structure) if {"a.weight:0", "b.weight:1"} <= members}
    assert any(size == 3 for size, _ in blocks) == is_free
