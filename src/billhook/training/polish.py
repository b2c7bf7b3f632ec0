"""Trains a smaller model toward the dense model's predictions, without labels.

A global step after local repairs, as in Puzzle (Bercovich et al., 2024, https://arxiv.org/abs/2411.19146) and Minitron
(Muralidharan et al., 2024, https://arxiv.org/abs/2407.14679), on few parameters, as in PERP (Zimmer et al., 2023,
https://arxiv.org/abs/2312.15230). The step back toward the start is that of WiSE-FT (Wortsman et al., 2021,
https://arxiv.org/abs/2109.01903).
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from billhook.adapters.lora import LoRA
from billhook.adapters.masked import mask_nonzero
from billhook.adapters.merge import has_adapters, merge
from billhook.arguments import check_types
from billhook.calibration.calibration import Batches
from billhook.engine import evaluating, evaluating_without_grad, is_sharded, restored_modes, store_of
from billhook.fit.run import isolated_rng
from billhook.model import find_transformer, is_linear, is_pruned, weight_holders, weight_of
from billhook.progress import OnProgress
from billhook.repairs.polish import RESTARTS, SMALLER, PolishConfig, lr_of
from billhook.sparsity.enforcement import hold_masks
from billhook.tracing.trace import trace
from billhook.training.module import TransformerModule
from billhook.training.targets import Target, Targets, by_source, divergence
from billhook.units import units_of

WARMUP, BETAS = 0.1, (0.9, 0.95)
HELD_OUT = 8
"""One example of this number is held out, of each source."""
CHECKS = 3
"""How often the held-out examples are measured during the steps."""
SHARES = 0.25, 0.5, 0.75
"""Shares of the way from the start to the trained parameters that are compared with the whole way."""


@dataclass(frozen=True)
class Polished:
    """Result of a polish.

    Attributes:
        how: The settings.
        steps: Number of steps that were taken.
        lr: Peak learning rate of these steps.
        share: Share of the way from the start to the trained parameters, in [0, 1]; 0 keeps the start.
        before: Mean held-out divergence of each source at the start.
        after: Mean held-out divergence of each source at the end.
    """

    how: PolishConfig
    steps: int
    lr: float
    share: float
    before: Mapping[str, float]
    after: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for records."""
        taken = {"lr": self.lr, "taken": self.steps, "share": self.share}
        return asdict(self.how) | taken | {"before": {**self.before}, "after": {**self.after}}

    def text(self) -> str:
        """Returns a line about the held-out divergence."""
        sources = ", ".join(f"{name or 'data'} {self.before[name]:.4f} -> {self.after[name]:.4f}" for name in self.before)
        done = f"Polish: {self.words}" if self.share else self.words.capitalize()
        return f"{done}. Divergence from the dense model on held-out calibration examples: {sources}"

    @property
    def words(self) -> str:
        """Describes the trained parameters and the steps, as part of a sentence."""
        if not self.share:
            return "polish undone, because it brought no held-out text nearer"
        what = {"scales": "scales", "lora": "LoRA", "all": "all weights"}[self.how.trains]
        return f"{what} polished in {self.steps} steps" + (f", {self.share:.0%} of the way" if self.share < 1 else "")


def polish(
    model: PreTrainedModel,
    dense: Targets | PreTrainedModel,
    batches: Batches | None = None,
    how: PolishConfig | None = None,
    progress: OnProgress | None = None,
) -> Polished:
    """Trains a smaller model toward the dense model's predictions, in place.

    Args:
        model: The smaller model, in memory, without adapters.
        dense: The dense model, or its predictions (`Targets.of`, made before the model was changed).
        batches: Batches of forward inputs, or a `Calibration`, for a dense model. At least two examples of one source.
        how: Settings. Defaults to `PolishConfig()`.
        progress: Callback with the number of finished steps and the total.

    Raises:
        ValueError: If the model is streamed or has adapters, or there are too few examples. The model is then unchanged.

    Example:
        >>> import torch, billhook as bh
        >>> model, batches = bh.load("tiny"), [{"input_ids": torch.arange(i, i + 32)[None]} for i in range(4)]
        >>> dense = bh.training.Targets.of(model, batches)
        >>> bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), channels=0.25))
        >>> result = bh.polish(model, dense, how=bh.PolishConfig(steps=3))
        >>> result.after[""] <= result.before[""]
        True
    """
    check_types(polish, locals())
    subject, how = find_transformer(model), how or PolishConfig()
    check_can_polish(subject)
    targets = dense if isinstance(dense, Targets) else Targets.of(dense, batches or [], progress)
    train, held_out = targets.split(HELD_OUT)
    if not held_out:
        raise ValueError(f"polish: {len(train)} examples are too few, as one of each source is held out. Pass at least two.")
    with isolated_rng(), _in_float32(subject), _as_before(subject):
        torch.manual_seed(how.seed)
        lora = LoRA(dropout=0.0) if how.trains == "lora" else None
        module = _PolishModule(subject, lr=lr_of(how), weight_decay=0.0, warmup=WARMUP, decay="linear", lora=lora)
        module.prepare(how, held_out, progress)
        try:
            device = subject.device
            while True:
                _fit(module, _in_turn(train, how), device, how)
                subject.to(device)  # type: ignore[arg-type]  # Lightning has moved it to the CPU
                if not module.has_risen or how.lr is not None or module.lr <= lr_of(how) / SMALLER**RESTARTS:
                    return module.choose()
                module.restart(module.lr / SMALLER)
        except BaseException:
            module.interpolate(0.0)
            raise
        finally:
            module.fold()


def _fit(module: pl.LightningModule, examples: DataLoader[Any], device: torch.device, how: PolishConfig) -> None:
    """Trains on one device, and prints and writes nothing."""
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in eval mode")  # which no step changes
        trainer = pl.Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            max_steps=how.steps,
            max_epochs=-1,
            limit_val_batches=0,
            accumulate_grad_batches=how.batch_size,
            gradient_clip_val=1.0,
            plugins=[LightningEnvironment()],  # a cluster's would expect its own number of devices
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, examples, val_dataloaders=[])
        finally:
            lightning.setLevel(level)


class _PolishModule(TransformerModule):
    """Trains a model toward targets, and keeps the best state on held-out ones."""

    def prepare(self, how: PolishConfig, held_out: Sequence[Target], progress: OnProgress | None) -> None:
        """Chooses the parameters to train, and keeps their start."""
        model = self.model
        self.how, self.held_out, self.progress = how, by_source(held_out), progress
        self.checks = {how.steps * number // CHECKS for number in range(1, CHECKS + 1)}
        self.scales, self.scaled = nn.ParameterList(), list[nn.Module]()
        self.hooks = list[RemovableHandle]()
        if how.trains == "lora":
            mask_nonzero(model)  # so that zeros stay zero in the merged weights
        elif how.trains == "scales":
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.ndim <= 1)
            for layer in consumers(model):
                scale = nn.Parameter(torch.ones(weight_of(layer).shape[1], device=weight_of(layer).device))
                self.scales.append(scale)
                self.scaled.append(layer)
                self.hooks.append(layer.register_forward_pre_hook(partial(_scaled, scale)))
        self.trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.start = self.best = self._state()
        self.before: dict[str, float] = {}
        self.taken = 0
        self.restart(self.lr)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Creates AdamW with short averages, because steps are few, and holds zeros."""
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"]
        for group in optimizer.param_groups:
            group["betas"] = BETAS
        if self.how.trains == "all":
            weights = {name: holder.get_parameter(attribute) for name, (holder, attribute) in weight_holders(self.model).items()}
            masks = {name: weight.detach() != 0 for name, weight in weights.items()}
            sparse = {name: mask for name, mask in masks.items() if is_pruned(int((~mask).sum()), mask.numel())}
            hold_masks(self.model, optimizer, sparse)
        return configured

    def on_train_start(self) -> None:
        """Measures the held-out examples at the start."""
        super().on_train_start()
        self.before = self.measure()
        self.lowest = max(self.before.values())

    def training_step(self, batch: Target, batch_idx: int) -> Tensor:  # type: ignore[override]
        """Returns the divergence on an example, `[]`."""
        with evaluating(self.model):  # without dropout, as the stored predictions, and without a KV cache
            return divergence(self.model, batch)

    def on_train_batch_end(self, outputs: object, batch: Target, batch_idx: int) -> None:
        """Keeps the state that is best for the worst source, and stops if it only rises."""
        if self.trainer.global_step == self.taken:
            return  # a batch of a step that needs more batches
        self.taken = self.trainer.global_step
        if self.progress is not None:
            self.progress(self.taken, self.how.steps)
        if self.taken in self.checks:
            worst = max(self.measure().values())
            if worst < self.lowest:
                self.lowest, self.best = worst, self._state()
            elif self.best is self.start and self.taken < self.how.steps:
                self.has_risen = self.trainer.should_stop = True

    def restart(self, lr: float) -> None:
        """Goes back to the start, to train with another learning rate."""
        self.interpolate(0.0)
        self.lr, self.has_risen, self.best = lr, False, self.start
        self.lowest, self.taken = math.inf, 0

    def choose(self) -> Polished:
        """Goes to the best point between the start and the best state."""
        candidates = {0.0: self.before}
        for share in (*SHARES, 1.0) if self.best is not self.start else ():
            self.interpolate(share)
            candidates[share] = self.measure()
        share = min(candidates, key=lambda share: max(candidates[share].values()))
        self.interpolate(share)
        return Polished(self.how, self.taken, self.lr, share, self.before, candidates[share])

    def interpolate(self, share: float) -> None:
        """Sets the parameters to a point between the start (0) and the best state (1)."""
        for parameter, start, end in zip(self.trained, self.start, self.best, strict=True):
            parameter.data.copy_(end if share == 1 else torch.lerp(start, end.to(start.device), share))

    def measure(self) -> dict[str, float]:
        """Returns the mean divergence on the held-out examples of each source."""
        with evaluating_without_grad(self.model):
            sums = {
                source: torch.stack([divergence(self.model, example) for example in examples]).mean()
                for source, examples in self.held_out.items()
            }
        return {source: float(value) for source, value in sums.items()}

    def fold(self) -> None:
        """Puts the scales or the adapters into the weights."""
        for hook in self.hooks:
            hook.remove()
        for layer, scale in zip(self.scaled, self.scales, strict=True):
            weight_of(layer).mul_(scale.detach().to(weight_of(layer).device))
        if self.how.trains == "lora":
            merge(self.model)

    def _state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.trained]


def consumers(model: nn.Module) -> list[nn.Module]:
    """Finds linear layers whose only inputs are heads or channels and that share no weight."""
    holders = Counter(id(part) for module in model.modules() for part in module._parameters.values())
    units = units_of(model, trace(model), ["head", "channel"]).values()
    names = dict.fromkeys(reader for layer in units if not layer.of_experts for reader in layer.readers)
    layers = dict.fromkeys(map(model.get_submodule, names))
    return [layer for layer in layers if is_linear(layer) and holders[id(layer.get_parameter("weight"))] == 1]


def _scaled(scale: Tensor, layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Multiplies the input of a layer, as multiplying the columns of its weight would."""
    return (arguments[0] * scale, *arguments[1:])


def check_can_polish(model: nn.Module) -> None:
    """Raises if a model cannot be polished: it is in files, sharded, or has adapters."""
    if not store_of(model).holds_all or is_sharded(model):
        raise ValueError(
            "polish: a streamed or sharded model cannot be polished, because training needs all weights at once. Save it, and "
            "train it with billhook fit and distillation."
        )
    if has_adapters(model):
        raise ValueError("polish: the model has adapters. Merge them first with bh.training.merge.")


def _in_turn(examples: Sequence[Target], how: PolishConfig) -> DataLoader[Any]:
    """Draws examples of all steps: of each source in turn, each in random order."""
    generator = torch.Generator().manual_seed(how.seed)
    sources = cycle([_shuffled(group, generator) for group in by_source(examples).values()])
    drawn: Any = [next(next(sources)) for _ in range(how.steps * how.batch_size)]
    return DataLoader(drawn, batch_size=None)


def _shuffled(examples: Sequence[Target], generator: torch.Generator) -> Iterator[Target]:
    while True:
        for number in torch.randperm(len(examples), generator=generator).tolist():
            yield examples[number]


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Keeps parameters in float32, because half precision loses small steps."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Restores afterward which parameters have gradients, and the modes of modules."""
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with restored_modes(model):
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
            parameter.grad = None
