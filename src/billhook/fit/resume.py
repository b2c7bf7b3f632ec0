"""Restores shapes from Lightning checkpoints; handles state of missing callbacks."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast
from zipfile import is_zipfile

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from billhook.adapters.checkpoint import save_adapters
from billhook.arguments import check_types
from billhook.checkpoints.export import MASKED
from billhook.engine import TENSORS, DeferredTensor, is_sharded_checkpoint, read_sharded
from billhook.model import Checkpoint, find_transformer, load_shape, save_shape
from billhook.units import zero_units

LARGE = "optimizer_states", "callbacks", "current_model_state"
"""Large checkpoint entries besides weights, which Lightning does not need to create a module."""
ModuleT = TypeVar("ModuleT", bound=LightningModule)


class ShapeInCheckpoint:
    """Mixin for LightningModules: checkpoints save and restore the model's shape.

    Callbacks that change shapes do this for any module during training. With this class before `LightningModule` among the bases,
    `load_from_checkpoint` does it, too.

    >>> import billhook as bh, lightning.pytorch as pl
    >>> class Module(bh.training.ShapeInCheckpoint, pl.LightningModule):
    ...     '''Trains a Hugging Face model.'''
    """

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Adds the shape and the scaling of LoRA."""
        assert isinstance(self, nn.Module)
        save_shape(self, checkpoint)
        save_adapters(find_transformer(self), checkpoint)
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Restores shape and masked heads before weights are loaded."""
        assert isinstance(self, nn.Module)
        load_shape(self, checkpoint)
        prepare_for_weights(self, getattr(self, "_trainer", None), checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def load_from_checkpoint(kind: type[ModuleT], checkpoint_path: str | Path, **options: Any) -> ModuleT:  # noqa: ANN401
    """Loads a LightningModule from a checkpoint with changed shapes.

    Use it for any LightningModule with a Hugging Face model. `TransformerModule` and classes with the `ShapeInCheckpoint` mixin
    do not need it. Heads that the checkpoint masks are zeroed.

    Args:
        kind: Class of the module.
        checkpoint_path: Checkpoint file, or folder of a sharded checkpoint (no process group needed). Tensors are loaded one at a
            time.
        **options: Arguments of the class and of Lightning's `load_from_checkpoint`.

    Returns:
        A module of class `kind`.

    Example:
        >>> import billhook as bh
        >>> bh.training.load_from_checkpoint(bh.TransformerModule, "run.ckpt")  # doctest: +SKIP

    Raises:
        ValueError: If the checkpoint's model differs from the model that the class creates.
    """
    check_types(load_from_checkpoint, locals())
    path = Path(checkpoint_path)
    source: str | Path | BytesIO = checkpoint_path
    shaped: type[ShapeInCheckpoint] = ShapeInCheckpoint
    checkpoint = read_sharded(path) if is_sharded_checkpoint(path) else _mapped(path, options)
    if checkpoint is not None:
        state = checkpoint[TENSORS]
        later = dict[str, Any]()
        first = dict[str, Any]()
        for key, value in checkpoint.items():
            (later if key in LARGE else first)[key] = value
        placed = {name: torch.empty(0) if isinstance(tensor, DeferredTensor) else tensor for name, tensor in state.items()}
        source = BytesIO()
        torch.save(first | {TENSORS: placed}, source)
        source.seek(0)

        # Lightning moves loaded tensors to a device at once: it moves empty tensors, whose device the real ones then follow
        class Later(ShapeInCheckpoint):
            def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
                unread = {
                    name: state[name].on(tensor.device)
                    for name, tensor in checkpoint[TENSORS].items()
                    if isinstance(state[name], DeferredTensor)
                }
                checkpoint |= {**later, TENSORS: checkpoint[TENSORS] | unread}
                super().on_load_checkpoint(checkpoint)

        shaped = Later
    bases = (kind,) if issubclass(kind, shaped) else (shaped, kind)
    subclass: Any = type(kind.__name__, bases, {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    module = cast(ModuleT, subclass.load_from_checkpoint(source, **options))
    module.__class__ = kind  # Lightning creates the module and loads it in one call, of the class that it is called on
    return module


def _mapped(path: Path, options: dict[str, Any]) -> Checkpoint | None:
    """Memory-maps a checkpoint file and sets `map_location`; None if it cannot."""
    requested = options.get("map_location")
    locations = {}
    if not is_zipfile(path) or not (requested is None or isinstance(requested, str | torch.device)):
        return None

    # torch calls it for each storage with its original device; returning the storage keeps it mapped
    def note(storage: Any, location: str) -> Any:  # noqa: ANN401 - one of torch's kinds of storage
        locations[storage.data_ptr()] = location
        return storage

    checkpoint = torch.load(path, map_location=note, mmap=True, weights_only=options.get("weights_only"))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(TENSORS), dict):
        return None
    tensors = checkpoint[TENSORS].items()
    plain = {name: tensor for name, tensor in tensors if type(tensor) is Tensor and tensor.layout == torch.strided}
    if requested is None:
        saved = [locations.get(tensor.untyped_storage().data_ptr(), "cpu") for tensor in plain.values()]
        device = torch.accelerator.current_accelerator(check_available=True)
        there = (location for location in saved if device is not None and torch.device(location).type == device.type)
        options["map_location"] = next(there, "cpu")
    unread = {name: DeferredTensor.of(tensor.shape, tensor.dtype, tensor.detach) for name, tensor in plain.items()}
    return checkpoint | {TENSORS: checkpoint[TENSORS] | unread}


def callbacks_of(trainer: Trainer | None) -> Sequence[Callback]:
    """Returns the callbacks of a trainer, if any."""
    return () if trainer is None else trainer.callbacks  # type: ignore[attr-defined]


def unclaimed_states(callbacks: Iterable[Callback], states: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the callback states of a checkpoint that none of these callbacks restores."""
    taken = {callback.state_key for callback in callbacks}
    return {key: state for key, state in states.items() if key not in taken}


def check_callbacks(callbacks: Sequence[Callback], states: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a callback replaces another of its class."""
    others = unclaimed_states(callbacks, states)
    for callback in callbacks:
        kind = callback.state_key.partition("{")[0]
        named = [key for key in others if key.startswith(f"{kind}{{")]
        if getattr(callback, "must_resume", False) and callback.state_key not in states and named:
            raise ValueError(
                f"the checkpoint's run has {', '.join(named)}, but this run has {callback.state_key} instead. Use the arguments "
                "of that run, or start a new run from its weights (bh.training.load_from_checkpoint)."
            )


def prepare_for_weights(module: nn.Module, trainer: Trainer | None, checkpoint: Checkpoint) -> None:
    """Prepares masked heads and the data position before weights are loaded.

    Consumer weights of masked heads are zeroed after loading, if no callback masks them. Warns if training continues without the
    callback that enforced masks.
    """
    masked = checkpoint.get(MASKED)
    lost = {}  # kind of masks by callback, if the run lacks it
    for key, state in unclaimed_states(callbacks_of(trainer), checkpoint.get("callbacks") or {}).items():
        if isinstance(state, dict) and (state.get("heads") or state.get("masks")):
            lost[key] = "heads" if state.get("heads") else "weights"
    if masked and "heads" in lost.values():
        zero = partial(zero_units, module, masked["heads"], per=masked["per"])

        def zero_once(*_: object) -> None:
            hook.remove()
            zero()

        if trainer is not None and trainer.strategy.restore_checkpoint_after_setup:  # FSDP2 has loaded weights already
            zero()
        else:
            hook = module.register_load_state_dict_post_hook(zero_once)  # type: ignore[no-untyped-call]
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
        fit_checkpoint = getattr(trainer.datamodule, "fit_checkpoint", None)  # type: ignore[attr-defined]
        if fit_checkpoint is not None:
            fit_checkpoint(checkpoint)
        for key, what in lost.items():
            rank_zero_warn(
                f"the checkpoint's run has {key}, which this run lacks. The {what} that it masked are zero, but training will "
                "change them."
            )
