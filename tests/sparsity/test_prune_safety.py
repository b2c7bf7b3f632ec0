"""A pruning that fails changes nothing, one that succeeds nothing but weights, and what makes no sense is refused by name."""

import copy

import pytest
import torch
from torch import nn

import billhook as bh
from kit import prunes
from kit.families import llama, recompute, tokens


def state(model):
    """All of a model, and of torch, that is to be as before."""
    config = getattr(model, "config", None)
    return {
        "modes": [module.training for module in model.modules()],
        "own": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "identities": [(id(p), p.data_ptr(), p.dtype) for p in model.parameters()],
        "gradients": [None if p.grad is None else id(p.grad) for p in model.parameters()],
        "config": None if config is None else copy.deepcopy(config.to_dict()),
        "rng": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def in_use(**changes):
    """A model as it is in the middle of training."""
    model = llama(**changes).train()
    model.model.layers[1].eval()
    model.config.use_cache = True
    recompute(model)
    model.model.embed_tokens.requires_grad_(False)
    model(tokens(), labels=tokens()).loss.backward()
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.SparseGPT(), bh.Magnitude()])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_only_weights_change(criterion, sequential):
    model = in_use(attention_dropout=0.5)
    calm = copy.deepcopy(model).eval()
    before = state(model)
    prunes.prune(model, criterion, [{"input_ids": tokens()} for _ in range(2)], 0.5, sequential=sequential)
    before["rng"] = state(model)["rng"] if sequential is None else before["rng"]
    torch.manual_seed(0)
    assert {**state(model), "rng": None} == {**before, "rng": None}
    assert (calm.model.layers[0].mlp.up_proj.weight == 0).sum() == 0


def test_random_numbers_go_on_as_before():
    model, batches = llama(attention_dropout=0.5).train(), [{"input_ids": tokens()}]
    before = torch.get_rng_state()
    bh.prune(model, bh.Wanda(), batches, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


class Breaks(bh.Wanda):
    error: BaseException = OSError("disk full")
    after = 3

    def prune(self, weight, *rest):
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        if self.count > self.after:
            raise self.error
        return super().prune(weight, *rest)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("of its own")])
def test_an_error_in_the_criterion(error, sequential):
    model = in_use()
    before, old = state(model), weights(model)
    criterion = Breaks()
    criterion.__dict__["error"] = error
    batches = [{"input_ids": tokens()}]
    before = state(model)
    with pytest.raises(
        type(error), match="model.layers.0.self_attn.o_proj: of its own" if isinstance(error, ValueError) else None
    ):
        prunes.prune(model, criterion, batches, 0.5, sequential=sequential)
    assert state(model) == before
    assert same(weights(model), old)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_an_error_in_the_models_forward(error, sequential):
    model, calls = in_use(), []

    def fails(*_):
        calls.append(0)
        if len(calls) == 3:
            raise error

    model.model.layers[1].mlp.act_fn.register_forward_pre_hook(fails)
    batches = [{"input_ids": tokens()} for _ in range(4)]
    before, old = state(model), weights(model)
    with pytest.raises(type(error)):
        prunes.prune(model, bh.Wanda(), batches, 0.5, sequential=sequential)
    assert state(model) == before
    assert same(weights(model), old)


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.SparseGPT(), bh.criteria.RIA()])
def test_inputs_that_are_no_numbers(criterion):
    model = llama()
    norm = model.model.layers[1].input_layernorm
    norm.weight.data[3] = float("nan")
    before, old = state(model), {n: v.nan_to_num(7.0) for n, v in weights(model).items()}
    with pytest.raises(
        ValueError,
        match=r"model.layers.1.self_attn.q_proj: NaN, infinite or overflowing inputs .* the first in feature 3",
    ):
        bh.prune(model, criterion, [{"input_ids": torch.ones(2, 5, dtype=torch.long)}], 0.5)
    assert state(model) == before
    assert same({n: v.nan_to_num(7.0) for n, v in weights(model).items()}, old)


class PrunesNothing(bh.Wanda):
    def prune(self, *_):
        pytest.fail("too late")


def test_owl_refuses_a_weight_that_is_not_finite_before_anything_is_pruned():
    model, batches = llama(), [{"input_ids": tokens()}]
    model.model.layers[1].mlp.down_proj.weight.data[3, 2] = float("inf")
    before, old = state(model), weights(model)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: the weight contains NaN or inf\.$"):
        prunes.prune(model, PrunesNothing(), batches, 0.5, allocation=bh.criteria.OWL())
    assert state(model) == before
    assert same(weights(model), old)


def test_an_interrupted_reduction_changes_nothing():
    model, old = llama(), None
    old = weights(model)

    def reduce(tensor):
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError):
        bh.prune(model, bh.Wanda(), [{"input_ids": tokens()}], 0.5, reduce=reduce)
    assert same(weights(model), old)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.daily("blocks")
@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "blocks"])
def test_models_compiled_in_place(part):
    torch._dynamo.reset()
    ids, models = tokens(), [llama() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compiled = models[1]
    for one in [compiled] if part == "model" else compiled.model.layers:
        one.compile(backend="eager")
    with torch.no_grad():
        compiled(ids)
    for model in models:
        bh.prune(model, bh.Wanda(), [{"input_ids": ids}], 0.5)
    assert same(weights(models[1]), weights(models[0]))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, models[0](ids).logits)
    torch._dynamo.reset()


class TestRefused:
    """By the name of the argument, before anything has changed."""

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"sparsity": 1.0}, r"sparsity=1.0 must be a fraction of the weights in \[0, 1\)"),
            ({}, "sparsity=None requires an N:M pattern"),
            ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity=0.6 contradicts pattern='2:4'"),
            ({"pattern": "4:2"}, "pattern='4:2' must be"),
            ({"pattern": "2:5"}, "pattern='2:5': model.layers.0.self_attn.q_proj has 32 inputs, not a multiple of 5"),
            ({"sparsity": 0.5, "skip": ["*.fc1"]}, r"skip='\*.fc1' matches none of the 14 linear layers, such as"),
            ({"sparsity": 0.5, "skip": ["*"]}, r"skip=\['\*'\] excludes all 14 linear layers"),
            (
                {"pattern": "2:4", "allocation": bh.criteria.OWL()},
                "allocation=OWL.* cannot be combined with pattern='2:4', which determines each layer's sparsity",
            ),
            ({"sparsity": 0.5, "sequential": "blocks"}, "sequential='blocks' must be one of"),
            ({"sparsity": 0.5, "batches": []}, "batches is empty: Wanda needs calibration data"),
            ({"sparsity": 0.5, "batches": ["a text"]}, "batches: a str is not a dictionary, tuple, list, or tensor"),
            ({"sparsity": 0.5, "batches": "a text"}, "batches='a text' must be an Iterable"),
            ({"sparsity": 0.5, "batches": {"input_ids": tokens()}}, r"batches is a single batch \(dict\)\. Pass a list"),
            ({"sparsity": 0.5, "criterion": bh.Wanda}, "criterion=.*Wanda.* must be a Criterion"),
        ],
    )  # fmt: skip
    def test_arguments(self, arguments, match):
        model = llama()
        before, old = state(model), weights(model)
        given = {"criterion": bh.Wanda(), "batches": [{"input_ids": tokens()}]} | arguments
        before["rng"] = torch.get_rng_state().tolist()
        with pytest.raises(ValueError, match=match):
            prunes.prune(model, **given)
        assert state(model) == before
        assert same(weights(model), old)

    def test_batches_of_padding_alone(self):
        batch = {"input_ids": tokens(), "attention_mask": torch.zeros(2, 12, dtype=torch.long)}
        with pytest.raises(ValueError, match="batches: no linear layer was called with a non-padding token"):
            bh.prune(llama(), bh.Wanda(), [batch], 0.5)

    def test_a_model_without_linears(self):
        with pytest.raises(ValueError, match="model: Sequential has no linear layers to prune"):
            bh.prune(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)), bh.Magnitude(), sparsity=0.5)

    def test_a_quantised_linear(self):
        model = llama()
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj is quantized"):
            bh.prune(model, bh.Magnitude(), sparsity=0.5)

    def test_a_model_on_meta(self):
        with torch.device("meta"):
            model = llama()
        with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj has no values"):
            bh.prune(model, bh.Magnitude(), sparsity=0.5)
