"""Training examples for calibration, drawn and understood without a trace in the training."""

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from billhook.fit.by_hand import loss_by_hand
from billhook.fit.run import isolated
from billhook.running.batches import Run, own_loss, runs_of
from billhook.running.overridden import overridden
from billhook.running.trees import tree_flatten, tree_leaves, tree_unflatten

Pair = tuple[Any, Callable[[nn.Module, Any], Tensor]]
"""A batch, and from the model and it to the loss."""


@contextmanager
def aside(pl_module: pl.LightningModule, seed: int) -> Iterator[None]:
    """Leaves no trace of what happens within: random numbers are others, the same ones each time; nothing is logged.

    Args:
        pl_module: The module in training.
        seed: Of the random numbers.
    """
    trained = {parameter: parameter.requires_grad for parameter in pl_module.parameters()}
    try:
        with overridden(pl_module, log=_nothing), isolated(), torch.no_grad():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        for parameter, requires_grad in trained.items():
            parameter.requires_grad = requires_grad


def _nothing(*_: object, **__: object) -> None:
    """Logs nothing."""


def check_source(examples: int, calibration: Iterable[Any] | None) -> None:
    """Refuses less than one example, and batches that can be read only once.

    Raises:
        ValueError: With what is legal.
    """
    if type(examples) is not int or examples < 1:
        raise ValueError(f"examples={examples!r} must be at least 1")
    check_calibration(calibration)


def check_calibration(calibration: Iterable[Any] | None) -> None:
    """Refuses batches that can be read only once.

    Raises:
        ValueError: With what can be read again.
    """
    if isinstance(calibration, Iterator):
        raise ValueError(f"calibration={type(calibration).__name__} can be read only once: give a list or a DataLoader")


def check_readable(trainer: pl.Trainer) -> None:
    """Refuses training data that a calibration would use up.

    Raises:
        ValueError: If it can be read only once.
    """
    for loader in tree_leaves(trainer.train_dataloader):
        source = loader.dataset if isinstance(loader, DataLoader) else loader
        if isinstance(source, Iterator):
            raise ValueError(
                f"calibration=None takes examples from the training data, but {type(source).__name__} can be read only once: "
                "give batches of their own"
            )


def training_examples(trainer: pl.Trainer, number: int) -> Iterator[Any]:
    """This rank's share of some training examples, in batches as training has them.

    Args:
        trainer: The trainer, in the middle of a fit.
        number: Examples of each loader on all ranks together; all there are, if there are fewer. Of a stream, the first ones.
    """
    loaders, structure = tree_flatten(trainer.train_dataloader)
    columns = [_batches(loader, number, trainer.global_rank, trainer.world_size) for loader in loaders]
    return (tree_unflatten(row, structure) for row in zip(*columns, strict=False))


def _batches(loader: Any, number: int, rank: int, ranks: int) -> Iterator[Any]:  # noqa: ANN401
    if not isinstance(loader, DataLoader):
        for index, batch in enumerate(loader):
            if index % ranks == rank:
                yield batch
            number -= _size(batch)
            if number <= 0:
                return
        return
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        examples: Iterator[Any] = islice(iter(loader.dataset), rank, number, ranks)
    else:
        indices = getattr(loader.sampler, "indices", range(len(loader.dataset)))  # those of a subset
        order = torch.randperm(len(indices))[:number][rank::ranks]
        examples = (loader.dataset[indices[place]] for place in order.tolist())
    if loader.batch_sampler is None:
        yield from map(loader.collate_fn, examples)
        return
    while chunk := list(islice(examples, loader.batch_size or 1)):
        yield loader.collate_fn(chunk)


def _size(batch: Any) -> int:  # noqa: ANN401
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


def on_device(trainer: pl.Trainer, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches as training moves and converts them."""
    for batch in batches:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def runs_as_in_training(pl_module: pl.LightningModule, model: nn.Module, batches: Iterable[Any]) -> list[Run]:
    """A run for each batch: of the model on what `training_step` makes of it.

    A dictionary of nothing but what the model's forward takes is given to the model at once. Of anything else it is seen what
    `training_step` calls the model with. Where that does not call the model as a whole, the step itself is the run.

    Args:
        pl_module: The module in training.
        model: The model in it.
        batches: The batches.

    Raises:
        ValueError: If neither is possible.
    """
    names = list(inspect.signature(model.forward).parameters)
    runs: list[Run] = []
    for number, batch in enumerate(batches):
        step = _step(pl_module, batch, number)
        if isinstance(batch, Mapping) and set(batch) <= set(names):
            runs += runs_of(model, [batch])
        elif (call := _call(model, step, f"{type(pl_module).__name__} on batch {number}, a {type(batch).__name__}")) is not None:
            runs += runs_of(model, [dict(zip(names, call.args, strict=False)) | call.kwargs])
        elif pl_module.automatic_optimization:
            runs.append(Run(step))
        else:
            raise ValueError(
                f"calibration: training_step of {type(pl_module).__name__} steps its optimizers itself and does not call "
                f"{type(model).__name__} as a whole: give batches that the model takes, as dictionaries"
            )
    return runs


def _step(pl_module: pl.LightningModule, batch: Any, number: int) -> Callable[[], object]:  # noqa: ANN401
    parameters = inspect.signature(pl_module.training_step).parameters.values()
    anything = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return partial(pl_module.training_step, *((batch, number) if anything else (batch, number)[: len(parameters)]))


def training_loss(pl_module: pl.LightningModule, number: int) -> Callable[[nn.Module, Any], Tensor]:
    """The loss that `training_step` gives for a batch; where it steps its optimizers itself, what it gives to `manual_backward`.

    Args:
        pl_module: The module in training.
        number: The batch's number.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        if not pl_module.automatic_optimization:
            return _loss_by_hand(pl_module, model, batch, number)
        given: Any = _step(pl_module, batch, number)()
        found = given["loss"] if isinstance(given, Mapping) else given
        if not isinstance(found, Tensor):
            raise ValueError(f"training_step of {type(pl_module).__name__} gives no loss for batch {number}: {found!r}")
        return found

    return loss


def _loss_by_hand(pl_module: pl.LightningModule, model: nn.Module, batch: Any, number: int) -> Tensor:  # noqa: ANN401
    """The loss of a module that steps its optimizers itself; of batches that only the model takes, the model's own."""
    try:
        found = loss_by_hand(pl_module, _step(pl_module, batch, number))
        reason: object = "it gives nothing to manual_backward"
    except Exception as error:
        found, reason = None, error
    if found is not None:
        return found
    try:
        return own_loss(model, dict(batch) if isinstance(batch, Mapping) else batch)
    except Exception as error:
        raise ValueError(
            f"calibration: training_step of {type(pl_module).__name__}, which steps its optimizers itself, has no loss for batch "
            f"{number} ({reason}), and neither has {type(model).__name__} ({error})"
        ) from error


def gradient_precision(trainer: pl.Trainer) -> AbstractContextManager[object]:
    """The precision of the fit, for gradients that are not scaled: where float16 would lose them, bfloat16 or float32."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision) or plugin.precision != "16-mixed":
        return plugin.forward_context()
    able = trainer.strategy.root_device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(plugin.device, torch.bfloat16) if able else nullcontext()


def scoring_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, calibration: Iterable[Any] | None, number: int
) -> Iterator[Pair]:
    """This rank's batches to score from, with the loss of each.

    Args:
        trainer: The trainer, in the middle of a fit.
        pl_module: The module in training.
        calibration: The batches of all ranks; None for training examples.
        number: How many of these, on all ranks together.
    """
    if calibration is None:
        batches: Iterable[Any] = training_examples(trainer, number)
    else:
        batches = islice(calibration, trainer.global_rank, None, trainer.world_size)
    for index, batch in enumerate(on_device(trainer, batches)):
        yield batch, training_loss(pl_module, index)


class _Call(BaseException):
    """The model has been called, and what with."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs


def _call(model: nn.Module, step: Callable[[], object], what: str) -> _Call | None:
    """What a training step first calls the model with; None if it does not."""

    def forward(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        raise _Call(args, kwargs)

    try:
        with overridden(model, forward=forward), torch.compiler.set_stance("force_eager"):
            step()
    except _Call as call:
        return call
    except Exception as error:
        raise ValueError(
            f"calibration: training_step of {what} failed before it came to {type(model).__name__} ({error}): "
            "give batches that the model takes, as dictionaries"
        ) from error
    return None
