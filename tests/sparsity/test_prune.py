"""What `prune` makes of a model: what a plain loop makes of it, exact counts, and nothing else than the linears' zeros."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import billhook as bh
from billhook.calibration import calibration
from billhook.engine.batches import runs_of
from billhook.engine.comm import SINGLE_PROCESS
from billhook.engine.statistics import InputGram, InputNorms
from billhook.model.experts import ExpertLinear, expert_layers, holder_of
from billhook.model.layers import prunable, weight_of
from billhook.model.plan import apply
from billhook.sparsity.checks import expected_tokens, too_few_tokens
from billhook.sparsity.criteria import WandaAlpha
from billhook.sparsity.visitor import WalkSettings
from kit import prunes
from kit.families import build as build_family
from kit.families import llama, tokens
from kit.sparsity import CRITERIA, batches_of, family, masks_of, weight_named

FAMILIES = ["llama", "gpt2", "t5", "bert", "mixtral", "vit", "falcon", "gpt_neox", "bart", "whisper", "mamba", "clip"]
IMAGES = ["convnext", "resnet"]


def seen_by(model, names, batches):
    """What linears are given, from plain hooks in plain runs of the whole model."""
    modules, seen = dict(model.named_modules()), {name: [] for name in names}
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def as_matrix(linear, weight):
    """What lies as a linear's weight does, `[out, in]`; of a convolution channels are innermost."""
    if isinstance(linear, ExpertLinear):
        return linear.of_stack(weight)
    return weight.t() if isinstance(linear, Conv1D) else weight.movedim(1, -1).flatten(1)


def by_hand(model, batches, sparsity, stages):
    """Wanda as the paper says it, on a copy: for each stage, hooks, a stable sort of each row, and the lowest go."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for names in stages:
        for name, inputs in seen_by(model, names, batches).items():
            weight = modules[name].weight.data
            squares = torch.zeros(weight.shape[1])
            for one in inputs:
                squares += one.square().sum(0)
            order = (weight.abs() * squares.sqrt()).sort(dim=1, stable=True).indices
            weight.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], 0)
    return model


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_wanda_is_what_a_plain_loop_makes_bit_for_bit(sequential, sparsity):
    model, batches = llama(), [{"input_ids": tokens()} for _ in range(3)]
    blocks = [[name for name in prunable(model) if f"layers.{i}." in name] for i in range(2)]
    reads = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]  # one tensor each
    layers = [[name for name in block if name.endswith(some)] for block in blocks for some in reads]
    stages = {"block": blocks, "layer": layers, "none": [blocks[0] + blocks[1]]}[sequential]
    expected = by_hand(model, batches, sparsity, stages)
    prunes.prune(model, bh.Wanda(), batches, sparsity, sequential=sequential)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name


def test_sparsegpt_is_its_own_criterion_on_plainly_gathered_moments():
    model, batches = llama(), [{"input_ids": tokens()} for _ in range(3)]
    expected, criterion = copy.deepcopy(model), bh.SparseGPT(block_size=16)
    modules = dict(expected.named_modules())
    for i in range(2):
        names = [name for name in prunable(model) if f"layers.{i}." in name]
        for name, inputs in seen_by(expected, names, batches).items():
            weight, moments = modules[name].weight.data, InputGram(modules[name].weight.shape[1])
            for one in inputs:
                moments.add(one)
            weight.copy_(criterion.prune(weight, moments, 0.5)[0])
    bh.prune(model, criterion, batches, 0.5)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected.state_dict()[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.daily("llama-*", "*-Wanda-unstructured", "t5-SparseGPT-2:4")
@pytest.mark.filterwarnings("ignore:no calibration batch called")
@pytest.mark.filterwarnings("ignore:X.T X is not positive definite")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("kind", CRITERIA, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", FAMILIES + IMAGES)
def test_every_criterion_on_every_family(name, kind, pattern):
    model, criterion = family(name), kind()
    batches, before = batches_of(model), {n: v.clone() for n, v in model.state_dict().items()}
    with expert_layers(model):
        linears = prunable(model)
    odd = [n for n, m in linears.items() if weight_of(m).shape[1] % 4] if pattern != "unstructured" else []
    pruning = prunes.prune(model, criterion, batches, 0.5, pattern, skip=odd)
    touched = {id(getattr(*holder_of(m))) for n, m in linears.items() if n in pruning.pruned}
    assert len(touched) > 3
    for n, value in model.state_dict(keep_vars=True).items():
        if id(value) not in touched:
            assert torch.equal(value, before[n]), n
    masks = pruning.masks(model)
    for n, m in linears.items():
        if n not in pruning.pruned:
            continue
        n = m.stacked(n) if isinstance(m, ExpertLinear) else n
        stored = n if isinstance(m, ExpertLinear) else f"{n}.weight"
        mask, weight, old = (as_matrix(m, one) for one in (masks[n], weight_named(model, n).detach(), before[stored]))
        assert not weight[~mask].any()
        if not criterion.updates:
            assert torch.equal(weight[mask], old[mask])
        if pattern == "2:4":
            assert (mask.reshape(len(mask), -1, 4).sum(-1) == 2).all()
        elif criterion.compares == "row":
            assert ((~mask).sum(1) == mask.shape[1] // 2).all()
        elif not isinstance(criterion, bh.SparseGPT | WandaAlpha):
            assert (~mask).sum() == mask.numel() // 2
    with torch.no_grad():
        assert all(v.isfinite().all() for v in model(**batches[0]).values() if isinstance(v, torch.Tensor))
    assert all(n in str(pruning) or n in pruning.pruned for n in pruning.uncalled)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_model_has_the_same_zeros_and_logits(name, tmp_path):
    model, ids = family(name), torch.randint(3, 60, (2, 9))
    bh.prune(model, bh.Wanda(), [{"input_ids": ids}], pattern="2:4")
    bh.save(model, tmp_path / "out")
    loaded = bh.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    masks = masks_of(model)
    assert all(torch.equal(mask, masks[n]) for n, mask in masks_of(loaded).items())


class TestLora:
    def adapted(self, **changes):
        settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
        model = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model

    @pytest.mark.parametrize("criterion", [bh.Wanda(), bh.SparseGPT(), bh.Magnitude()])
    @pytest.mark.parametrize("inner", [False, True])
    def test_base_weights_are_pruned(self, criterion, inner):
        model, batches = self.adapted(), [{"input_ids": tokens(), "attention_mask": torch.ones(2, 12)}]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        pruning = bh.prune(model.base_model.model if inner else model, criterion, batches, 0.5)
        assert len(pruning.pruned) == 14
        assert not any("base_layer" in name or "lora" in name for name in pruning.pruned)
        for name, value in model.state_dict().items():
            linear = name.endswith(("proj.weight", "base_layer.weight"))
            assert torch.equal(value, before[name]) is not linear, name
            if linear:
                assert (value == 0).float().mean() == 0.5
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in before if "lora" in n}

    def test_statistics_are_of_what_the_adapted_model_computes(self):
        model, batches = self.adapted(), [{"input_ids": tokens()}]
        merged = copy.deepcopy(model).merge_and_unload()
        pruning = prunes.prune(model, bh.Wanda(), batches, 0.5, sequential="none", dry_run=True)
        expected = prunes.prune(merged, bh.Wanda(), batches, 0.5, sequential="none", dry_run=True)
        of = {name.removeprefix("base_model.model."): mask for name, mask in pruning.masks(model).items()}
        same = [
            torch.equal(of[name], mask)
            for name, mask in expected.masks(merged).items()
            if "q_proj" not in name and "v_proj" not in name
        ]
        assert len(same) == 10
        assert all(same)

    def test_merged_while_it_is_attached(self):
        model = self.adapted()
        model.merge_adapter()
        bh.prune(model, bh.Wanda(), [{"input_ids": tokens()}], 0.5)
        assert (model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight == 0).float().mean() == 0.5

    def test_what_is_trained_as_a_copy_is_left_alone(self):
        model = self.adapted(modules_to_save=["down_proj"])
        pruning = bh.prune(model, bh.Wanda(), [{"input_ids": tokens()}], 0.5)
        assert len(pruning.pruned) == 12
        assert not any("down_proj" in name for name in pruning.pruned)


def test_experts_that_are_no_linears_are_named():
    model = family("llama4_text")
    with pytest.warns(UserWarning, match=r"are not linear layers, and stay dense: .*experts.gate_up_proj") as caught:
        bh.prune(model, bh.Magnitude(), sparsity=0.5)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("llama", "gpt2", "bert", "t5", "vit", "whisper", "mamba", "mixtral"):
            bh.prune(family(name), bh.Magnitude(), sparsity=0.5, dry_run=True)


class Routed(nn.Module):
    """Blocks of three experts, of which one is given nothing, and one is not even called."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("up", "empty", "never")}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block["up"](x) + block["empty"](x[:, :0]).sum()
        return x


class Rarely(nn.Module):
    """A linear that is given every fourth token."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("up", "down")})

    def forward(self, input_ids):
        x = self.block["up"](torch.nn.functional.one_hot(input_ids % 8, 8).float())
        return x + self.block["down"](x[:, ::4]).sum()


@pytest.mark.filterwarnings("ignore:X.T X is not positive definite")
@pytest.mark.parametrize("kind", [bh.SparseGPT, bh.criteria.ALPS, bh.criteria.Refit, bh.Wanda])
def test_fewer_tokens_than_inputs_are_told_before_the_work_for_what_solves_for_weights(kind, caplog, monkeypatch):
    calibration.log_once.cache_clear()
    told, walk = [], WalkSettings.walk
    monkeypatch.setattr(WalkSettings, "walk", lambda *given: told.append(caplog.text) or walk(*given))
    solves = kind is not bh.Wanda
    bh.prune(llama(), kind(), [{"input_ids": tokens(2, 20)}], 0.5, dry_run=True)
    before = "2 linear layers have fewer calibration tokens than inputs, such as model.layers.0.mlp.down_proj (40 for 48)"
    assert (before in told[0]) is (before in caplog.text) is solves
    bh.prune(Rarely(), kind(), [{"input_ids": tokens(1, 16)}], 0.5, dry_run=True)
    after = "1 linear layer has fewer calibration tokens than inputs, such as block.down (4 for 8)"
    assert after not in told[1]
    assert (after in caplog.text) is solves


def test_the_layer_that_lacks_most_tokens_is_named():
    counts = {"first": (90, 100), "second": (40, 60), "third": (60, 60)}
    said = "2 linear layers have fewer calibration tokens than inputs, such as second (40 for 60), "
    assert too_few_tokens(bh.SparseGPT(), counts).startswith(said)
    assert too_few_tokens(bh.Wanda(), counts) == too_few_tokens(bh.SparseGPT(), {"third": (60, 60)}) == ""


def test_tokens_are_counted_before_any_run():
    model, mask = llama(), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    texts = [{"input_ids": tokens(2, 4), "attention_mask": mask}, {"input_ids": tokens(1, 5)}]
    layers = {"linear": nn.Linear(6, 2), "convolution": nn.Conv2d(6, 2, 3)}
    for batches, known in ((texts, True), ([*texts, texts[0] | {"decoder_input_ids": tokens()}], False)):
        runs = runs_of(model, batches)
        assert expected_tokens(bh.SparseGPT(), layers, runs, SINGLE_PROCESS) == ({"linear": (9, 6)} if known else {})
        assert expected_tokens(bh.Wanda(), layers, runs, SINGLE_PROCESS) == {}


@pytest.mark.parametrize(("name", "sequential", "often"), [
    ("albert", "block", ("query", "key", "value", "dense", "ffn", "ffn_output")),
    ("albert", "layer", ("query", "key", "value", "dense", "ffn", "ffn_output")),
    ("prophetnet", "layer", ("relative_pos_embeddings", "self_attn.out_proj")),
    ("prophetnet", "block", ()),
])  # fmt: skip
def test_every_call_of_a_linear_counts(name, sequential, often):
    """Those that are called again after they would have been pruned come first, in the dense model."""
    model = family(name)
    often = (
        [one for one in prunable(model) if one.endswith(often) and ("albert_layers" in one or "decoder" in one)] if often else []
    )
    batches, called = batches_of(model), seen_by(model, prunable(model), batches_of(model))
    twice = [one for one, calls in called.items() if len(calls) > len(batches)]
    assert often == ([one for one in prunable(model) if one in twice] if sequential == "layer" or name == "albert" else [])
    expected = by_hand(model, batches, 0.5, [often])
    found = prunes.prune(model, bh.Wanda(), batches, 0.5, sequential=sequential, dry_run=True).masks(model)
    for one in often:
        assert torch.equal(found[one], expected.get_submodule(one).weight != 0), one
    if not often:  # a block sees all calls in it
        block = [one for one in prunable(model) if "encoder.layers.0" in one]
        assert all(torch.equal(found[one], by_hand(model, batches, 0.5, [block]).get_submodule(one).weight != 0) for one in block)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_a_weight_of_two_linears_is_pruned_by_the_inputs_of_both(sequential):
    model = llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight, name = first.up_proj.weight, "model.layers.0.mlp.up_proj"
    batches = [{"input_ids": tokens()} for _ in range(2)]
    seen = seen_by(model, [name, "model.layers.1.mlp.up_proj"], batches)
    both = [one for batch in zip(*seen.values(), strict=True) for one in batch]
    mask, alone = (bh.Wanda().prune(first.up_proj.weight.data, norms_of(inputs), 0.5)[1] for inputs in (both, seen[name]))
    assert not torch.equal(mask, alone)
    prunes.prune(model, bh.Wanda(), batches, 0.5, sequential=sequential)
    assert torch.equal(second.up_proj.weight != 0, mask)


def norms_of(inputs):
    norms = InputNorms(inputs[0].shape[1])
    for one in inputs:
        norms.add(one)
    return norms


@pytest.mark.parametrize("allocation", [None, bh.criteria.OWL()])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_linears_that_no_token_reaches_stay_dense_and_are_named(sequential, allocation):
    model = Routed()
    with pytest.warns(
        UserWarning, match=r"no calibration batch called 4 linear layers, kept dense.*blocks.0.empty.*blocks.0.never"
    ):
        pruning = prunes.prune(model, bh.Wanda(), [torch.randn(2, 5, 8)], 0.5, sequential=sequential, allocation=allocation)
    assert set(pruning.pruned) == {"blocks.0.up", "blocks.1.up"}
    assert len(pruning.uncalled) == 4
    assert all((linear.weight == 0).any() == ("up" in name) for name, linear in prunable(model).items())
    assert "not called by any batch" in str(pruning)


class Skips(nn.Module):
    """Blocks of which each batch says which it goes through."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x, through):
        for number in through:
            x = self.blocks[number](x)
        return x


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_blocks_that_not_every_batch_comes_to(sequential):
    model = Skips()
    batches = [(torch.randn(3, 8), through) for through in ([0, 1], [1], [0, 2], [2])]
    pruning = prunes.prune(model, bh.Wanda(), batches, 0.5, sequential=sequential, dry_run=True)
    assert len(pruning.pruned) == 6
    first = InputNorms(8)
    for number in (0, 2):
        first.add(batches[number][0])
    assert torch.equal(pruning.masks(model)["blocks.0.0"], bh.Wanda().prune(model.blocks[0][0].weight, first, 0.5)[1])


def test_planning_changes_nothing_and_says_what_would_become():
    model, batches = llama(), [{"input_ids": tokens()}]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruning = bh.prune(model, bh.Wanda(), batches, 0.5, dry_run=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert str(pruning).splitlines() == [
        "Wanda(compares='row'), unstructured",
        "  model.layers.*.self_attn.q_proj     2 x [    32,     32]  sparsity 0.5000",
        "  model.layers.*.self_attn.k_proj     2 x [    16,     32]  sparsity 0.5000",
        "  model.layers.*.self_attn.v_proj     2 x [    16,     32]  sparsity 0.5000",
        "  model.layers.*.self_attn.o_proj     2 x [    32,     32]  sparsity 0.5000",
        "  model.layers.*.mlp.gate_proj        2 x [    48,     32]  sparsity 0.5000",
        "  model.layers.*.mlp.up_proj          2 x [    48,     32]  sparsity 0.5000",
        "  model.layers.*.mlp.down_proj        2 x [    32,     48]  sparsity 0.5000",
    ]
    apply(model, pruning)
    other = copy.deepcopy(model)
    bh.prune(other, bh.Wanda(), batches, 0.0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(
        ValueError,
        match=r"belongs to another model: model.layers.0.self_attn.q_proj has shape \(32, 32\) in the plan and \(64, 64\) here",
    ):
        apply(llama(hidden_size=64), pruning)
    with pytest.raises(ValueError, match="belongs to another model: model.layers.0.self_attn.q_proj .* None here"):
        pruning.masks(build_family("phi").model.layers[0])


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.Magnitude()])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_progress_is_told(criterion, sequential):
    told = []
    prunes.prune(llama(), criterion, [{"input_ids": tokens()}], 0.5, sequential=sequential, progress=lambda *n: told.append(n))
    assert told[-1] == (14, 14)
    assert told == sorted(told)


def test_skip_and_output_embeddings():
    model = llama(tie_word_embeddings=False)
    pruning = prunes.prune(model, bh.Wanda(), [{"input_ids": tokens()}], 0.5, skip=["*.mlp.*"], output_embeddings=True)
    assert (model.lm_head.weight == 0).float().mean() == 0.5
    assert model.model.layers[0].mlp.up_proj.weight.all()
    assert len(pruning.pruned) == 9


@pytest.mark.parametrize(
    "criterion", [bh.Magnitude(compares="global"), bh.Wanda(compares="global"), bh.criteria.RIA(compares="global")]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_of_all_linears_compete(name, criterion):
    model = family(name).eval()
    batches, dense = batches_of(model), copy.deepcopy(model)
    pruning = prunes.prune(model, criterion, batches, 0.5, sequential="none")
    linears, scores = prunable(dense), {}
    seen = seen_by(dense, list(linears), batches)
    for linear, module in linears.items():
        norms = InputNorms(seen[linear][0].shape[-1])
        for inputs in seen[linear]:
            norms.add(inputs)
        scores[linear] = criterion.score(weight_of(module), norms)
    flat = torch.cat([one.flatten() for one in scores.values()])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[flat.sort(stable=True).indices[: len(flat) // 2]] = False
    expected = dict(zip(scores, keep.split([one.numel() for one in scores.values()]), strict=True))
    shares = set()
    for linear, module in prunable(model).items():
        assert torch.equal(weight_of(module), weight_of(linears[linear]) * expected[linear].view(weight_of(module).shape)), linear
        shares.add(1 - pruning.pruned[linear].kept / module.weight.numel())
    assert len(shares) > 1, "each gives another share"


@pytest.mark.parametrize(("criterion", "settings", "match"), [
    (bh.Wanda(compares="global"), {"sparsity": 0.5}, "sequential='block' must be 'none' with criterion="),
    (bh.Magnitude(compares="global"), {"pattern": "2:4"}, "compares all layers and does not support pattern='2:4'"),
    (
        bh.Magnitude(compares="global"),
        {"sparsity": 0.5, "allocation": bh.criteria.OWL()},
        "allocation=OWL.* cannot be combined with criterion=Magnitude.*, which determines each layer's sparsity",
    ),
])  # fmt: skip
def test_competing_with_all_and_something_else(criterion, settings, match):
    with pytest.raises(ValueError, match=match):
        prunes.prune(llama(), criterion, [{"input_ids": tokens()}], **settings)
    with pytest.raises(ValueError, match="compares all layers, and Refit works on each layer"):
        bh.criteria.Refit(bh.Wanda(compares="global"))


if torch.cuda.is_available():

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_two_of_four_is_what_sparse_kernels_take(dtype):
        """Compressed and multiplied by the GPU's own kernels, a 2:4 weight gives what it gives as it is."""
        linear = nn.Linear(128, 128, bias=False, dtype=dtype, device="cuda")
        x = torch.randn(128, 128, dtype=dtype, device="cuda")
        bh.prune(nn.ModuleDict({"linear": linear}), bh.Magnitude(), pattern="2:4")
        expected = linear(x)
        linear.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(linear.weight.detach()))
        torch.testing.assert_close(linear(x), expected, atol=1e-2, rtol=1e-2)
