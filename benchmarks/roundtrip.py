"""Does every operation on every architecture that transformers builds small, saves, reloads and compares.

`python benchmarks/roundtrip.py --processes 2 --out docs/evidence/roundtrip.md` writes the table; model types restrict it, and
`--sample 60` draws pairs of an architecture and an operation by a seed. `--experts --out docs/evidence/experts_roundtrip.md`
asks only mixtures, for what is done to experts.

For each pair the operation is carried out, if billhook does not refuse it, and the model compared with an oracle that does not
use billhook's surgery: a dense model with KV heads replaced by their means, with zeroed columns where heads or channels are read,
with blocks that return their input, with routers that choose no removed expert, with the largest |W| * ||x|| kept. The model is
saved, loaded (by plain `from_pretrained`, or `bh.load`) and compared, also in what it generates with and without a cache; and
again through a Lightning checkpoint and `billhook export`.
"""

import argparse
import collections
import contextlib
import copy
import gc
import io
import json
import logging
import multiprocessing
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from oracle import difference, randomise
from small_configs import architectures, build, has_experts, names, small_config
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import billhook as bh
from billhook.checkpoints.export import export
from billhook.cli.inspect import conversion
from billhook.model.experts import expert_layers
from billhook.model.inputs import make_inputs
from billhook.model.transformers_internals import match_implementations
from billhook.sparsity.weight_plan import WeightPlan

HEADS = ("num_heads", "num_attention_heads")
SECONDS = 60
TOLERANCE = 1e-4  # relative to the largest output, and at least 30 times the effect of the last digit of every weight
BUGS = ("wrong", "raw", "late")
STATES = ("right", "refused", *BUGS)
OPERATIONS = (
    "untouched",
    "KV mean",
    "KV svd",
    "heads",
    "channels",
    "residual",
    "experts",
    "blocks",
    "2:4",
    "KV after heads",
    "channels after KV",
)


OF_EXPERTS = ("50%", "2:4", "experts", "expert channels")


class Refused(Exception):
    """billhook refused before anything changed."""


class Late(Exception):
    """billhook refused after work had begun."""


class Wrong(Exception):
    """Something else was computed than expected."""


@dataclass
class Result:
    """What came out for one pair."""

    auto: str
    model_type: str
    operation: str
    state: str
    detail: str = ""
    way: str = ""
    oracle: bool = False
    seconds: float = 0.0


class Holder(bh.training.ShapeInCheckpoint, pl.LightningModule):
    """A user's own module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Subject:
    """One architecture: a small model with random weights, its inputs, and what it answers."""

    def __init__(self, model_type, config_class, model_class):
        self.model_type = model_type
        config = small_config(config_class)
        try:
            self.dense = build(config, model_class, "batched_mm" if has_experts(config) else "eager")
            self.inputs = make_inputs(self.dense)
            self.answer(self.dense)
        except Exception:  # not every class of experts has the batched implementation
            self.dense = build(small_config(config_class), model_class)
            self.inputs = make_inputs(self.dense)
        built = self.dense.state_dict().keys()
        made = {name: buffer.clone() for name, buffer in self.dense.named_buffers() if name not in built}
        randomise(self.dense)
        for name, buffer in self.dense.named_buffers():
            if name in made:  # which no checkpoint holds: the class makes it
                buffer.copy_(made[name])
        self.dense.train().eval()  # some then forget what they have computed from parameters
        self.expected = self.answer(self.dense)
        if not all(value.isfinite().any() for value in self.expected if value.numel()):
            raise ValueError("random weights give no finite number")
        noisy = copy.deepcopy(self.dense)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in noisy.parameters():
                tensor.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(tensor.shape, generator=generator))
        self.tolerance = max(TOLERANCE, min(1e-2, 30 * self.error(self.answer(noisy), self.expected)))

    def model(self):
        """Returns a copy to work on."""
        return copy.deepcopy(self.dense)

    @torch.no_grad()
    def answer(self, model) -> list[Tensor]:
        """Returns all real numbers that a model gives; some draw noise or which patches they see."""
        torch.manual_seed(0)
        output = model(**self.inputs)
        return [value.float() for value in real(output)]

    @staticmethod
    def error(found, expected) -> float:
        """Returns the largest difference, relative to the largest value of each output."""
        if [a.shape for a in found] != [b.shape for b in expected]:
            return float("inf")
        return max((difference(a, b) for a, b in zip(found, expected, strict=True) if b.numel()), default=0.0)

    def same(self, model, expected, what) -> None:
        """Compares a model with what is expected."""
        try:
            found = self.answer(model)
        except Exception as error:
            raise Wrong(f"{what}: does not run: {first_line(error)}") from error
        if not (error := self.error(found, expected)) < self.tolerance:
            raise Wrong(f"{what}: differs by {error:.2g}")


def real(output: Any) -> Iterator[Tensor]:
    """Yields all real numbers in what a model gives, except those of each block."""
    if hasattr(output, "items"):
        output = [value for name, value in output.items() if name not in ("mems", "hidden_states", "attentions")]
    if isinstance(output, Tensor):
        yield from [output] if output.is_floating_point() else []
    elif isinstance(output, list | tuple):
        for value in output:
            yield from real(value)


def first_line(error: BaseException) -> str:
    """Returns class and message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def where(error: BaseException) -> str:
    """Names the last frame of billhook in a traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/billhook/" in f.filename]
    return f"{frames[-1].filename.split('/billhook/')[-1]}:{frames[-1].lineno}" if frames else "?"


# ---------------------------------------------------------------------------------------------- operations

Done = list[Tensor] | None
"""What the oracle expects, None if there is none."""


def refusing(subject: Subject, model: nn.Module, step: Callable[[], Any]) -> Any:
    """Carries out a step that may be refused, if the model is then bit for bit as before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        return step()
    except ValueError as error:
        after = model.state_dict()
        if after.keys() != before.keys() or any(
            tensor.shape != after[name].shape or not torch.equal(tensor.nan_to_num(), after[name].nan_to_num())
            for name, tensor in before.items()
        ):
            raise Late(f"refused, and the model has changed: {first_line(error)}") from error
        raise Refused(" ".join(str(error).split())[:300]) from error


def convert(method: str, subject: Subject, model: nn.Module) -> Done:
    """Halves the KV heads, or takes the highest legal number."""
    found = refusing(subject, model, lambda: conversion(model))
    if not found["legal"]:
        raise Refused(found["says"])
    before, after = found["num_key_value_heads"], max(found["legal"])
    batches = [subject.inputs] if method == "svd" else []
    dense = copy.deepcopy(model)
    plan = refusing(subject, model, lambda: bh.convert_kv_heads(model, after, method, batches))
    if method != "mean" or before != plan.before:
        return None
    return tied(subject, dense, plan)


def tied(subject: Subject, dense: nn.Module, plan) -> list[Tensor] | None:
    """Answers with every KV head of the dense model replaced by the mean of its group."""
    state = dense.state_dict(keep_vars=True)
    stages = any(isinstance(getattr(dense.config, said, None), list | tuple) for said in HEADS)
    for name, pooled in plan.parameters.items():
        heads, count = plan.before, len(pooled.index)
        if len(set(pooled.index)) == count:
            continue  # nothing is pooled: all heads read it
        if stages:  # of other numbers of heads
            path = name.split(".")
            owners = [dense.get_submodule(".".join(path[:end])) for end in range(len(path) - 1, 0, -1)]
            heads = next((vars(owner)[said] for owner in owners for said in HEADS if said in vars(owner)), heads)
        if count % heads or pooled.counts.min() != pooled.counts.max():
            return None  # joined with queries
        moved = state[name].data.movedim(pooled.dim, 0)
        size = moved.shape[0] // heads
        grouped = moved.reshape(plan.after, heads // plan.after, size, *moved.shape[1:])
        mean = grouped.mean(1, keepdim=True).expand_as(grouped).reshape(moved.shape).movedim(0, pooled.dim)
        state[name].data = mean.contiguous()
    return subject.answer(dense)


def remove(amount: dict[str, float], kind: str, subject: Subject, model: nn.Module) -> Done:
    """Removes the units with the smallest weights, or of each expert the channels with the smallest outputs."""
    dense = copy.deepcopy(model)
    importance = bh.OutputNorm() if kind == "expert channels" else bh.importance.WeightNorm()
    torch.manual_seed(0)
    plan = refusing(subject, model, lambda: bh.plan(model, importance, [subject.inputs], **amount))
    if not plan.units or (kind == "expert channels" and not plan.by_expert):
        raise Refused("nothing to remove")
    try:
        refusing(subject, model, lambda: bh.apply(model, plan))
    except Refused as error:
        raise Late(f"planned, then refused: {error}") from error
    if kind == "experts":
        return rerouted(subject, dense, plan)
    return zeroed(subject, dense, plan) if kind in ("heads", "channels", "expert channels") else None


@torch.no_grad()
def zeroed(subject: Subject, dense: nn.Module, plan) -> list[Tensor] | None:
    """Answers with zeros where modules read the units: unit u, of equally wide ones, at [u * width, (u + 1) * width)."""
    found = bh.find_units(dense, list(dict.fromkeys(plan.kinds.values())))
    often = collections.Counter(reader for name, one in found.items() if plan.units.get(name) for reader in one.readers)
    if any(count > 1 for count in often.values()):
        return None  # units within units, as the width of heads
    with expert_layers(dense):
        for name, one in found.items():
            for number, reader in enumerate(one.readers if plan.units.get(name) else ()):
                module = dense.get_submodule(reader)
                weight, dim = module.weight, 0 if isinstance(module, Conv1D) else 1
                groups = getattr(module, "groups", 1)
                if groups > 1 or weight.shape[dim] % one.count():
                    return None
                width = weight.shape[dim] // one.count()
                if width > 1 and weight.ndim > 2 and plan.kinds[name] == "channel":
                    return None  # the convolution reads other channels next to them
                for unit in plan.by_expert[name][number].tolist() if name in plan.by_expert else plan.units[name]:
                    weight.narrow(dim, unit * width, width).zero_()
            if plan.units.get(name) and not one.readers:
                return None
    return subject.answer(dense)


@torch.no_grad()
def rerouted(subject: Subject, dense: nn.Module, plan) -> list[Tensor] | None:
    """Answers with routers that never choose a removed expert: its logit, and what `topk` compares, is minus infinity."""
    removed: dict[int, Tensor] = {}
    for name, one in bh.find_units(dense, "expert").items():
        for member in one.members:
            if member.dim == 0 and (weight := dense.get_parameter(member.name)).ndim == 2:
                removed[id(weight)] = torch.isin(torch.from_numpy(one.of_member(member)), torch.tensor(plan.units.get(name, [])))
    linear, topk, of_tensor, current = nn.functional.linear, torch.topk, Tensor.topk, torch.zeros(0, dtype=torch.bool)

    def masked(values: Tensor) -> Tensor:
        for size in (len(current), len(current) // (getattr(dense.config, "n_group", None) or 1)):
            if size and values.shape[-1] == size:
                return values.masked_fill(current[:size], -torch.inf)
        return values

    def linear_without(inputs, weight, bias=None):
        nonlocal current
        if id(weight) not in removed:
            return linear(inputs, weight, bias)
        current = removed[id(weight)]
        return masked(linear(inputs, weight, bias))

    nn.functional.linear = linear_without
    torch.topk = lambda values, *args, **kwargs: topk(masked(values), *args, **kwargs)
    Tensor.topk = lambda values, *args, **kwargs: of_tensor(masked(values), *args, **kwargs)
    try:
        return subject.answer(dense) if removed else None
    finally:
        nn.functional.linear, torch.topk, Tensor.topk = linear, topk, of_tensor


def remove_block(subject: Subject, model: nn.Module) -> Done:
    """Removes the last block of every stack that has several."""
    stacks = refusing(subject, model, lambda: bh.find_units(model, "block"))
    chosen = {name: [one.count() - 1] for name, one in stacks.items() if one.count() > 1}
    if not chosen:
        raise Refused("one block only")
    dense = copy.deepcopy(model)
    plan = refusing(subject, model, lambda: bh.pruning.plan_units(model, chosen, "block"))
    try:
        refusing(subject, model, lambda: bh.apply(model, plan))
    except Refused as error:
        raise Late(f"planned, then refused: {error}") from error
    with contextlib.ExitStack() as stack:
        for name, numbers in chosen.items():
            for number in numbers:
                block = dense.get_submodule(f"{name}.{number}")
                handle = block.register_forward_hook(skipped, with_kwargs=True)
                stack.callback(handle.remove)
        return subject.answer(dense)


def skipped(module, args, kwargs, out):
    """Returns a block's input as its output, of a tuple in the first place."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return type(out)([hidden, *out[1:]]) if isinstance(out, tuple | list) else hidden


def prune(pattern: str, subject: Subject, model: nn.Module) -> Done:
    """Keeps half of the weights by Wanda, on the inputs of the dense model."""
    dense = copy.deepcopy(model)
    torch.manual_seed(0)  # some draw what they see
    plan = refusing(
        subject,
        model,
        lambda: bh.prune(
            model,
            bh.Wanda(),
            [subject.inputs],
            0.5 if pattern == "unstructured" else None,
            pattern,
            options=bh.PruneOptions(sequential="none"),
        ),
    )
    assert isinstance(plan, WeightPlan)
    return largest_kept(subject, dense, model, plan, 4 if pattern == "2:4" else None)


@torch.no_grad()
def largest_kept(subject: Subject, dense: nn.Module, model: nn.Module, plan: WeightPlan, group: int | None) -> list[Tensor]:
    """Answers with the weights kept that are not zero in the model, once they are known to be the best |W| * ||x||.

    That is half of each group of weights of an output, or half of all of them.
    """
    sums: dict[str, Tensor] = {}
    handles = []
    with expert_layers(dense), expert_layers(model):
        for name in plan.pruned:

            def add(module, args, out, name=name):
                sums[name] = sums.get(name, 0) + squares_read(module, args[0].double().square())

            read = dense.get_submodule(name)
            weight = read.weight
            sharing = [part for part in dense.modules() if part is read or is_view_of(getattr(part, "weight", None), weight)]
            handles += [module.register_forward_hook(add) for module in sharing]
        subject.answer(dense)
        for handle in handles:
            handle.remove()
        for name in plan.pruned:
            module, zeros = dense.get_submodule(name), model.get_submodule(name).weight == 0
            scores = as_matrix(module, module.weight).abs().double()
            if name not in plan.by_magnitude:
                scores *= sums[name].sqrt()
            lost = scores * as_matrix(module, zeros)  # where norms are 0, any two do
            of = group or scores.shape[1]
            least = scores.reshape(scores.shape[0], -1, of).sort().values[..., : of // 2].sum(-1)
            if not torch.allclose(lost.reshape(scores.shape[0], -1, of).sum(-1), least, rtol=1e-5):
                raise Wrong(f"{name}: others than the smallest |W| * ||x|| of {of} are zero")
            module.weight.masked_fill_(zeros, 0)
    return subject.answer(dense)


def is_view_of(tensor: object, weight: Tensor) -> bool:
    """Returns whether two tensors are the same memory, as the weights of tied layers and of tied experts."""
    return isinstance(tensor, Tensor) and tensor.shape == weight.shape and tensor.data_ptr() == weight.data_ptr()


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Returns what lies as a weight does as `[out, in]`; of a convolution the channels of one tap are next to each other."""
    if isinstance(module, Conv1D):
        return weight.T
    return weight.movedim(1, -1).flatten(1)


def squares_read(module: nn.Module, squares: Tensor) -> Tensor:
    """Sums the squares that each weight is multiplied with: of a convolution the derivative of all outputs by its weight."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return squares.flatten(0, -2).sum(0)
    weight = torch.zeros_like(module.weight, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(module._conv_forward(squares, weight, None).sum(), weight)
    return as_matrix(module, gradient)


def untouched(subject: Subject, model: nn.Module) -> Done:
    """Leaves the model as it is."""
    return subject.expected


def after(first, second, subject: Subject, model: nn.Module) -> Done:
    """Does one after the other; the oracle is that of the second."""
    first(subject, model)
    try:
        return second(subject, model)
    except Refused as error:
        raise Refused(f"after the first: {error}") from error


def run_operation(operation: str, subject: Subject, model: nn.Module) -> Done:
    """Carries out one operation."""
    heads, channels = {"heads": 0.34}, {"channels": 0.25}
    match operation:
        case "untouched":
            return untouched(subject, model)
        case "KV mean":
            return convert("mean", subject, model)
        case "KV svd":
            return convert("svd", subject, model)
        case "heads":
            return remove(heads, "heads", subject, model)
        case "channels":
            return remove(channels, "channels", subject, model)
        case "residual" | "experts":
            return remove({operation: 0.25}, operation, subject, model)
        case "blocks":
            return remove_block(subject, model)
        case "expert channels":
            return remove(channels, operation, subject, model)
        case "2:4":
            return prune("2:4", subject, model)
        case "50%":
            return prune("unstructured", subject, model)
        case "KV after heads":
            return after(lambda *both: remove(heads, "heads", *both), lambda *both: convert("mean", *both), subject, model)
        case "channels after KV":
            return after(lambda *both: convert("mean", *both), lambda *both: remove(channels, "channels", *both), subject, model)
    raise AssertionError(operation)


# ---------------------------------------------------------------------------------------------- saved and reloaded


def save(subject: Subject, model: nn.Module, folder: Path) -> str:
    """Saves, loads, and compares."""
    expected = subject.answer(model)
    try:
        saved = bh.save(model, folder / "saved")
    except (ValueError, RuntimeError) as error:
        raise Late(f"save: {first_line(error)}") from error
    loaded = bh.load(folder / "saved") if saved.way == "shaped" else None
    if loaded is None:
        kind = getattr(transformers, model_class_of(folder / "saved"), type(model))
        loaded = kind.from_pretrained(folder / "saved")
    subject.same(prepared(loaded, model), expected, f"saved ({saved.way}) and loaded")
    if (before := generated(subject, model)) and generated(subject, subject.dense, False) == generated(subject, subject.dense):
        for cached in (True, False):
            if generated(subject, loaded, cached) != before:
                raise Wrong(f"saved and loaded: generates other tokens{' with a cache' * cached}")
    return saved.way


def generated(subject: Subject, model: nn.Module, cached: bool = True) -> list[int]:
    """Returns the most likely tokens after the first row of the inputs; empty for a model that does not generate from text."""
    ids = subject.inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or not getattr(model, "can_generate", bool)():
        return []
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": cached, "eos_token_id": None, "pad_token_id": 0}
    try:
        return model.generate(ids[:1], **settings).flatten().tolist()
    except Exception:  # such as of one that needs an image, too
        return []


def model_class_of(folder: Path) -> str:
    """Returns the class that a folder's config names."""
    return re.search(r'"architectures": \[\s*"(\w+)"', (folder / "config.json").read_text()).group(1)


def prepared(loaded: nn.Module, model: nn.Module) -> nn.Module:
    """Gives a loaded model the implementations of the other."""
    match_implementations(model, loaded)
    return loaded.eval()


def checkpoint(subject: Subject, model: nn.Module, folder: Path) -> None:
    """Goes through a Lightning checkpoint and `billhook export`."""
    expected = subject.answer(model)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    module = Holder(model)
    trainer.strategy.connect(module)
    module._trainer = trainer
    trainer.save_checkpoint(folder / "last.ckpt")
    module._trainer = None
    model.eval()
    try:
        saved = export(folder / "last.ckpt", folder / "exported")
    except (ValueError, RuntimeError) as error:
        raise Late(f"export: {first_line(error)}") from error
    loaded = bh.load(folder / "exported")
    subject.same(prepared(loaded, model), expected, f"exported ({saved.way}) and loaded")


def examine(auto: str, subject: Subject, operation: str) -> Result:
    """Examines one pair."""
    result = Result(auto, subject.model_type, operation, "right")
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = subject.model()
            expected = run_operation(operation, subject, model)
            if expected is not None:
                result.oracle = True
                subject.same(model, expected, "oracle")
            result.way = save(subject, model, Path(folder))
            checkpoint(subject, model, Path(folder))
    except Refused as error:
        result.state, result.detail = "refused", str(error)
    except Late as error:
        result.state, result.detail = "late", str(error)
    except Wrong as error:
        result.state, result.detail = "wrong", str(error)
    except Exception as error:  # whatever comes from the depths
        result.state, result.detail = "raw", f"{first_line(error)} ({where(error)})"
    result.seconds = time.perf_counter() - start
    return result


def examine_one(job: tuple[str, str, tuple[str, ...]]) -> list[Result]:
    """Examines one architecture, in this process."""
    auto, model_type, operations = job
    quiet()

    def ring(*_):
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        subject = Subject(*next(found for own, *found in architectures(model_type) if own == auto))
    except Exception as error:
        return [Result(auto, model_type, "", "not built", first_line(error))]
    finally:
        signal.alarm(0)
    results = []
    for operation in operations:
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                results.append(examine(auto, subject, operation))
        except TimeoutError as error:
            results.append(Result(auto, model_type, operation, "raw", str(error), seconds=SECONDS))
        finally:
            signal.alarm(0)
    gc.collect()
    return results


def quiet() -> None:
    """Lets only results be heard."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def is_mixture(model_type: str) -> bool:
    """Returns whether the config of a model type counts experts."""
    try:
        return has_experts(small_config(next(iter(architectures(model_type)))[2]))
    except Exception:  # a config that cannot be made small
        return False


def jobs(
    types: list[str], operations: tuple[str, ...], sample: int | None, seed: int
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yields architectures with the operations that are asked of each."""
    every = [own for own in names() if not types or own[1] in types]
    if sample is None:
        yield from ((*own, operations) for own in every)
        return
    pairs = random.Random(seed).sample([(own, operation) for own in every for operation in operations], sample)
    for own in dict.fromkeys(own for own, _ in pairs):
        yield (*own, tuple(operation for other, operation in pairs if other == own))


def table(results: list[Result]) -> str:
    """Counts by operation."""
    lines = [f"| operation | {' | '.join(STATES)} | right by an oracle |", "|---|" + "---:|" * (len(STATES) + 1)]
    for operation in dict.fromkeys((*OPERATIONS, *OF_EXPERTS)):
        own = [result for result in results if result.operation == operation]
        if not own:
            continue
        states = collections.Counter(result.state for result in own)
        oracle = sum(result.oracle and result.state == "right" for result in own)
        lines.append(f"| {operation} | " + " | ".join(str(states[state]) for state in STATES) + f" | {oracle} |")
    return "\n".join(lines)


def page(results: list[Result], command: str) -> str:
    """Writes the counts, every bug, and the kinds of reasons for which pairs were refused."""
    built = len({(result.auto, result.model_type) for result in results if result.operation})
    small = sum(not result.operation for result in results)
    bugs = [result for result in results if result.state in BUGS]
    kinds = collections.Counter(kind(result.detail) for result in results if result.state == "refused")
    lines = [
        f"# Every operation on {built} architectures",
        "",
        f"{sum(bool(result.operation) for result in results):,} pairs of an architecture of transformers "
        f"{transformers.__version__} and an operation. Models are small and have random weights. The states mean:",
        "",
        "- *right*: equal to an independent computation if there is one, the same after saving and loading, and "
        "after a Lightning checkpoint and `billhook export`;",
        "- *refused*: an error with a reason, before anything changed;",
        "- *wrong*: other outputs;",
        "- *raw*: an unexpected error;",
        "- *late*: an error after a plan was made.",
        "",
        f"{small} more names of the auto classes were not tried, because `small_configs.py` has no small model of them that runs "
        f"on guessed inputs. Command: `{command}`",
        "",
        table(results),
        "",
        "### Bugs",
        "",
        *(["| auto class | model type | operation | state | what |", "|---|---|---|---|---|"] if bugs else ["None."]),
        *(f"| {r.auto} | {r.model_type} | {r.operation} | {r.state} | {r.detail[:160].replace('|', '/')} |" for r in bugs),
        "",
        "### Refused",
        "",
        "| pairs | kind of reason |",
        "|---:|---|",
        *(f"| {count} | {name} |" for name, count in kinds.most_common()),
    ]
    return "\n".join(lines) + "\n"


KINDS = {
    "the model has no such unit, or none that may be removed": r"the model has no prunable units|no linear layers"
    r"|has no blocks|has no attention|one block only|one KV head already|in its encoder only",
    "the model does not run on meta tensors with guessed inputs": r"does not run on meta tensors",
    "a parameter that the run never used may have the same units": r"which the run never used",
    "the model's code does not follow, or computes something else": r"not follow|follows the number|something else without"
    r"|does not run without|more than KV heads|another outcome|runs without some|not built of",
    "heads cannot be told apart, or their number does not divide": r"heads one after|irregular|one width|one size|told apart"
    r"|to hold heads|times in one call|of a linear$|by one linear|fewer than there are",
    "the model's output has the hidden dimensions": r"the model's output has it",
    "a norm or a gate reads all units at once": r"a norm (spans|or a gate)",
    "inputs that N of N:M does not divide": r"which N does not divide",
    "the config cannot describe the smaller model": r"the config of",
}
"""What a reason contains, by kind, without numbers and names."""


def kind(detail: str) -> str:
    """Returns the kind of a reason."""
    text = re.sub(r"\b\w*[a-z]\w*\.[\w.*]+", "...", re.sub(r"\b[A-Z]\w+(For\w+|Model|LMHeadModel)\b", "the model", detail))
    text = re.sub(r"\b\d[\d,.]*", "N", text)[:140]
    return next((name for name, pattern in KINDS.items() if re.search(pattern, text)), "other")


def main() -> int:
    """Sweeps, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types, all by default")
    parser.add_argument("--operations", nargs="+", choices=(*OPERATIONS, *OF_EXPERTS))
    parser.add_argument("--experts", action="store_true", help="mixtures of experts only, and what is done to these")
    parser.add_argument("--sample", type=int, help="so many pairs, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="print the right ones too")
    parser.add_argument("--out", type=Path, help="where the table is written")
    parser.add_argument("--results", type=Path, help="a JSON file for all results")
    parser.add_argument("--again", action="store_true", help="ask again only what was a bug in that file")
    arguments = parser.parse_args()
    quiet()
    operations = tuple(arguments.operations or (OF_EXPERTS if arguments.experts else OPERATIONS))
    every = arguments.names or dict.fromkeys(own[1] for own in names())
    types = [own for own in every if not arguments.experts or is_mixture(own)]
    work = list(jobs(types, operations, arguments.sample, arguments.seed))
    results: list[Result] = []
    if arguments.again:
        held = [Result(**own) for own in json.loads(arguments.results.read_text())]
        results = [result for result in held if result.state not in BUGS]
        bugs = [result for result in held if result.state in BUGS]
        own = dict.fromkeys((result.auto, result.model_type) for result in bugs)
        work = [(*one, tuple(r.operation for r in bugs if (r.auto, r.model_type) == one)) for one in own]
    with multiprocessing.get_context("fork").Pool(arguments.processes, maxtasksperchild=20) as pool:
        for own in pool.imap_unordered(examine_one, work):
            for result in own:
                results.append(result)
                if arguments.all or result.state in (*BUGS, "not built"):
                    print(
                        f"{result.model_type:28} {result.operation:18} {result.state:14} {result.seconds:4.1f}s {result.way:10} "
                        f"{result.detail}",
                        flush=True,
                    )
    print(table(results))
    if arguments.results:
        arguments.results.write_text(json.dumps([asdict(result) for result in results]))
    if arguments.out:
        ordered = sorted(results, key=lambda r: (r.auto, r.model_type, r.operation))
        arguments.out.write_text(page(ordered, f"python benchmarks/roundtrip.py {' '.join(sys.argv[1:])}"))
    return int(any(result.state in BUGS for result in results))


if __name__ == "__main__":
    sys.exit(main())
