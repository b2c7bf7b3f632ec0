"""Every public argument refuses what its annotation does not allow, in a sentence of billhook's own; nothing changes."""

import collections.abc
import inspect
import math
import types
import typing
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import billhook as bh
from kit.families import llama, tokens

HOME = Path(bh.__file__).parent
SPACES = (bh, bh.criteria, bh.importance, bh.kv_methods, bh.pruning, bh.training)
PUBLIC = {name: getattr(space, name) for space in SPACES for name in space.__all__ if callable(getattr(space, name))}
NO_ARGUMENTS = {name for name, one in PUBLIC.items() if not inspect.signature(one).parameters}
ANY = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
ITERABLE = (collections.abc.Iterable, collections.abc.Sequence, collections.abc.Collection, collections.abc.Mapping, list, tuple)


class Nothing:
    """A value that nothing takes."""


MODEL = llama(**SMALL)
PLAN, BATCHES = bh.pruning.plan_units(MODEL, {0: [1]}), [{"input_ids": tokens()} for _ in range(2)]
VALUES = [
    *(None, True, -1, 3, 0.5, -0.5, math.nan, math.inf, "", "taylor", "wanda", "adam", b"wanda", Nothing(), Nothing, print),
    *({"heads": 0.5}, {0: 5}, [], [Nothing()], ["a", 1], (math.nan,), torch.zeros(2, 3), nn.Linear(2, 2), MODEL.config),
    *(bh.Wanda(), bh.Taylor(), bh.kv_methods.Mean(), bh.RepairConfig(), bh.Amount(heads=0.5), PLAN, torch.float32),
]


def allowed(value, kind):
    """Whether an annotation may allow a value."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(allowed(value, one) for one in inside)
    if origin is typing.Literal:
        return any(value is word or (isinstance(value, str) and value == word) for word in inside)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool) and math.isfinite(value)
    if origin in ITERABLE:
        if isinstance(value, Nothing | nn.Module) or not isinstance(value, collections.abc.Iterable):
            return False
        items = list(value.items() if origin is collections.abc.Mapping and isinstance(value, dict) else value)
        return typing.Any in inside or not any(isinstance(one, Nothing) for one in items)
    if origin is type:
        return isinstance(value, type) and issubclass(value, nn.Module)
    if origin is collections.abc.Callable:
        return callable(value)
    if getattr(kind, "_is_protocol", False):
        return hasattr(value, "units")
    return isinstance(value, origin or kind)


def annotations(name):
    one = PUBLIC[name]
    kinds = typing.get_type_hints(one.__init__ if inspect.isclass(one) else one)
    named = [key for key, own in inspect.signature(one).parameters.items() if own.kind is not own.VAR_KEYWORD]
    return {key: kinds[key] for key in named}


def legal(name):
    """The arguments that have no default, as they may be."""
    units = bh.find_units(MODEL, "head") if name in ("score", "gates") else {0: [1]}
    by_name = {
        **{"model": MODEL, "config": MODEL.config, "models": [MODEL], "units": units, "plan": PLAN, "batches": BATCHES},
        **{"kind": bh.TransformerModule if name == "load_from_checkpoint" else "head", "importance": bh.importance.WeightNorm()},
        **{
            "num_key_value_heads": 2,
            "ratio": 0.5,
            "pattern": "2:4",
            "amount": bh.Amount(heads=0.5),
            "budget": bh.Budget(params=0.9),
            "data": "tiny",
            "folder": "nowhere",
            "blocks": 1,
            "monitor": "val_loss",
            "optimizer": torch.optim.SGD(MODEL.parameters(), 0.1),
            "masks": {},
        },
        **{"texts": bh.Calibration(), "name": "a", "checkpoint_path": "nowhere.ckpt", "index": np.zeros(1), "kv_of": np.zeros(1)},
        **{"in_features": 4, "totals": {}, "counts": {}, "examples": []},
        "dense": MODEL if name == "verdict" else bh.training.Targets([]),
        **dict.fromkeys(("readers", "leaves", "kv_leaves", "members"), ()),
    }
    needed = [key for key, own in inspect.signature(PUBLIC[name]).parameters.items() if own.default is own.empty]
    return {key: by_name[key] for key in needed if key in by_name} | ({"prompts": 0} if name == "verdict" else {})


def state(model):
    """All that a refused call must leave as it is."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, type(m), set(vars(m))) for m in model.modules()]
    return {name: value.clone() for name, value in model.state_dict().items()}, hooks, model.config.to_dict()


def same(model, before):
    values, *rest = state(model)
    return (
        values.keys() == before[0].keys()
        and all(torch.equal(values[n], before[0][n]) for n in values)
        and rest == list(before[1:])
    )


def call(name, arguments):
    made = PUBLIC[name](**arguments)
    with made if isinstance(made, AbstractContextManager) else nullcontext():
        pass


def raised_by_billhook(error):
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return HOME in Path(trace.tb_frame.f_code.co_filename).parents


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - NO_ARGUMENTS))
@settings(ANY, max_examples=40)
@given(data=st.data())
def test_what_an_annotation_does_not_allow_is_refused(name, data):
    kinds, before = annotations(name), state(MODEL)
    refused = {argument: [value for value in VALUES if not allowed(value, kind)] for argument, kind in kinds.items()}
    argument = data.draw(st.sampled_from(sorted(argument for argument, values in refused.items() if values)))
    value = data.draw(st.sampled_from(refused[argument]))
    with pytest.raises((ValueError, TypeError)) as refusal:
        call(name, legal(name) | {argument: value})
    said = str(refusal.value)
    assert raised_by_billhook(refusal.value), f"{name}({argument}={value!r}): {said}"
    assert argument in said
    assert repr(value) in said or type(value).__name__ in said
    assert same(MODEL, before)


class Packed(nn.Linear):
    """A linear whose weight is quantised, as GPTQ's are: packed in a tensor that is no parameter."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        del self.weight
        self.register_buffer("qweight", linear.weight.detach().mul(100).to(torch.int8))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).t() / 100


def quantised():
    model = llama(**SMALL)
    for layer in model.model.layers:
        layer.self_attn.o_proj, layer.mlp.down_proj = Packed(layer.self_attn.o_proj), Packed(layer.mlp.down_proj)
    return model


def holds(*models):
    module = nn.Module()
    for number, model in enumerate(models):
        module.add_module(f"own{number}", model)
    return module


STRANGE = {
    "meta": lambda: llama(**SMALL).to("meta"),
    "quantised": quantised,
    "a linear": lambda: nn.Linear(4, 4),
    "nothing": nn.Module,
    "two models": lambda: holds(llama(**SMALL), llama(**SMALL)),
    "no blocks": lambda: llama(**SMALL, num_hidden_layers=0),
    "nan": lambda: llama(**SMALL).apply(lambda module: [own.data.fill_(math.nan) for own in module.parameters()]),
}
BATCHED = {
    "no batches": lambda: [],
    "an iterator of none": lambda: iter([]),
    "one batch": lambda: {"input_ids": tokens()},
    "a tensor": tokens,
    "nothing in them": lambda: [{}] * 2,
    "no tokens": lambda: [{"input_ids": tokens()[:, :0]}] * 2,
    "no rows": lambda: [{"input_ids": tokens()[:0]}] * 2,
    "words": lambda: ["some words"] * 2,
    "padding": lambda: [{"input_ids": tokens(), "attention_mask": torch.zeros(2, 12, dtype=torch.long)}] * 2,
}
SCORES = (
    bh.importance.WeightNorm(),
    bh.Taylor(),
    bh.Taylor("second"),
    bh.importance.GateGradient(),
    bh.OutputNorm(),
    bh.importance.ActivationNorm(),
    bh.OBS(),
)
HOW = {
    "score": [{"importance": one} for one in SCORES],
    "prune": [{"criterion": one, "sparsity": 0.5} for one in (bh.Wanda(), bh.SparseGPT(), bh.Magnitude(), bh.criteria.RIA())],
    "convert_kv_heads": [*({"method": one} for one in ("mean", "svd", "aligned", "auto")), {"repair": bh.RepairConfig()}],
    "plan": [{"heads": 0.5}, {"channels": 0.5, "importance": bh.importance.WeightNorm()}, {"blocks": 1}, {"residual": 0.5}],
}
OF_MODELS = sorted(name for name, one in PUBLIC.items() if not inspect.isclass(one) and "model" in annotations(name))


def fingerprint(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [module.training for module in model.modules()]


def refusal_of(name, arguments):
    try:
        call(name, arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OF_MODELS)
@settings(ANY, max_examples=20)
@given(data=st.data())
def test_strange_models_and_batches_are_done_or_refused(name, data, tmp_path_factory):
    """Never an error from the depths; a model that is refused is as it was. What a model's own forward refuses is its own."""
    strange = data.draw(st.sampled_from([None, *STRANGE]))
    model = llama(**SMALL) if strange is None else STRANGE[strange]()
    arguments = legal(name) | data.draw(st.sampled_from(HOW.get(name, [{}]))) | {"model": model}
    if "folder" in arguments:
        arguments["folder"] = tmp_path_factory.mktemp("saved") / "model"
    if "batches" in annotations(name):
        arguments["batches"] = BATCHES if strange else BATCHED[data.draw(st.sampled_from(sorted(BATCHED)))]()
    values, modes = fingerprint(model)
    error = refusal_of(name, arguments)
    if error is not None:
        forward = name == "prune" and strange in ("a linear", "two models")  # that take no input_ids
        assert forward or raised_by_billhook(error), f"{name} of {strange}: {error!r}"
        now, then = fingerprint(model)
        assert modes == then
        assert all(now[key].is_meta or torch.equal(now[key].nan_to_num(), value.nan_to_num()) for key, value in values.items())


def numeric(kind):
    """Whether an annotation allows numbers, and no mere truth values."""
    inside = typing.get_args(kind)
    return kind in (int, float) or (typing.get_origin(kind) in (typing.Union, types.UnionType) and any(map(numeric, inside)))


BESIDE = {
    "Amount": {"residual": 0.5},
    "DepthPruning": {"blocks": 1},
    "StopWhenWorse": {"monitor": "val_loss"},
    "Budget": {"params": 0.9},
    "WeightPruning": {"sparsity": 0.5},
    "measure_speed": {"contexts": [4], "new_tokens": 2, "rounds": 1, "batch_sizes": [1]},
    "prune": {"criterion": bh.Magnitude(), "sparsity": 0.5},
    "shrink": {"batches": [{"input_ids": tokens()} for _ in range(4)], "search": bh.Search(generations=0)},
}
"""What else a call needs to be legal."""
NAMES = sorted(PUBLIC.keys() - NO_ARGUMENTS)
NUMBERS = [(name, key) for name in NAMES for key, kind in annotations(name).items() if numeric(kind)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument"), NUMBERS)
def test_a_number_out_of_range_is_refused_by_name_or_is_legal(name, argument):
    """Minus one, zero, a half below and above: taken, or refused with the argument and the number; then nothing has changed."""
    for value in (-1, 0, -0.5, 1.5):
        model, arguments = llama(**SMALL), legal(name)
        given = {key: model if key == "model" else [model] if key == "models" else own for key, own in arguments.items()}
        given |= {} if argument in ("ratio", "blocks") else BESIDE.get(name, {})
        before, error = state(model), refusal_of(name, given | {argument: value})
        if error is not None:
            said = str(error)
            assert raised_by_billhook(error), f"{name}({argument}={value}): {error!r}"
            assert argument in said, f"{name}({argument}={value}): {said}"
            assert same(model, before)
