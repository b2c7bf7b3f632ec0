"""Restores a model's shape from a Lightning checkpoint, and handles the state of callbacks that a run does not have."""

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast
from zipfile import is_zipfile

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from billhook.adapters.checkpoint import save_adapters
from billhook.arguments import check_types
from billhook.checkpoints.export import MASKED
from billhook.engine.sharded_files import TENSORS, DeferredTensor, is_sharded_checkpoint, read_sharded
from billhook.fit.run import callbacks_of
from billhook.model.checkpoint_shape import load_shape, save_shape
from billhook.model.find import find_transformer
from billhook.units.gates import zero_units

LARGE = "optimizer_states", "callbacks", "current_model_state"
"""What checkpoints hold beside weights that may be as large; modules see it, and Lightning needs none of it to make one."""
ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)


class ShapeInCheckpoint:
    """For a LightningModule that holds a Hugging Face model: its checkpoints carry the shape, and loading them restores it.

    Callbacks that change shapes do this for any module in a fit; with this class before `LightningModule` among the bases,
    `load_from_checkpoint` does it too.

    >>> import billhook as bh, lightning.pytorch as pl
    >>> class Module(bh.training.ShapeInCheckpoint, pl.LightningModule):
    ...     '''Holds a Hugging Face model and trains it.'''
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the shape, and the scaling of LoRA."""
        assert isinstance(self, nn.Module)
        save_shape(self, checkpoint)
        save_adapters(find_transformer(self), checkpoint)
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Sets the shape before weights are loaded; heads that are masked in the checkpoint are masked in the module, too."""
        assert isinstance(self, nn.Module)
        load_shape(self, checkpoint)
        prepare_for_weights(self, getattr(self, "_trainer", None), checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def load_from_checkpoint(kind: type[ModuleT], checkpoint_path: str | Path, **options: Any) -> ModuleT:  # noqa: ANN401
    """Calls `kind.load_from_checkpoint(checkpoint_path, **options)`, also where callbacks have changed the model's shape.

    `TransformerModule`, and a class with `ShapeInCheckpoint` among its bases, can do it themselves; any other class of a
    LightningModule that holds a Hugging Face model needs this. Heads that the checkpoint has masked do nothing in the module.

    Args:
        kind: The class of the module.
        checkpoint_path: The checkpoint: a file, or the folder of a sharded one, which needs no process group. It is read a tensor
            at a time into the module.
        **options: What the class and Lightning's `load_from_checkpoint` take.

    Returns:
        A module of that class.

    Example:
        >>> import billhook as bh
        >>> bh.training.load_from_checkpoint(bh.TransformerModule, "run.ckpt")  # doctest: +SKIP

    Raises:
        ValueError: If the checkpoint holds another model than the class makes.
    """
    check_types(load_from_checkpoint, locals())
    path = Path(checkpoint_path)
    source: str | Path | BytesIO = checkpoint_path
    shaped, checkpoint = ShapeInCheckpoint, read_sharded(path) if is_sharded_checkpoint(path) else _mapped(path, options)
    if checkpoint is not None:
        source, shaped = _tensors_later(checkpoint)
    bases = (kind,) if issubclass(kind, shaped) else (shaped, kind)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: Any = type(kind.__name__, bases, names)
    module = cast(ModuleT, made.load_from_checkpoint(source, **options))
    module.__class__ = kind  # Lightning makes the module and loads into it in one call, of the class that is asked
    return module


def _mapped(path: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """Maps a checkpoint that is a file, and notes in the options where Lightning would put its tensors; None of other files."""
    requested, locations = options.get("map_location"), dict[int, str]()
    if not is_zipfile(path) or not (requested is None or isinstance(requested, str | torch.device)):
        return None

    # torch calls it for each storage with the device that the tensor was on; one that returns the storage leaves it mapped
    def note(storage: Any, location: str) -> Any:  # noqa: ANN401 - one of torch's kinds of storage
        locations[storage.data_ptr()] = location
        return storage

    checkpoint = torch.load(path, map_location=note, mmap=True, weights_only=options.get("weights_only"))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(TENSORS), dict):
        return None
    plain = {
        name: tensor for name, tensor in checkpoint[TENSORS].items() if type(tensor) is Tensor and tensor.layout == torch.strided
    }
    if requested is None:
        saved = [locations.get(tensor.untyped_storage().data_ptr(), "cpu") for tensor in plain.values()]
        options["map_location"] = next(filter(_is_there, saved), "cpu")
    unread = {name: DeferredTensor.of(tensor.shape, tensor.dtype, tensor.detach) for name, tensor in plain.items()}
    return checkpoint | {TENSORS: checkpoint[TENSORS] | unread}


def _is_there(location: str) -> bool:
    """Tells whether tensors that were saved on a device can come back to it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and torch.device(location).type == accelerator.type


def _tensors_later(checkpoint: dict[str, Any]) -> tuple[BytesIO, type[ShapeInCheckpoint]]:
    """Returns what Lightning loads of a checkpoint whose tensors are unread, and a class for modules to take them."""
    state, source = checkpoint[TENSORS], BytesIO()
    later = {key: checkpoint[key] for key in LARGE if key in checkpoint}
    placed = {name: torch.empty(0) if isinstance(tensor, DeferredTensor) else tensor for name, tensor in state.items()}
    torch.save({key: tensor for key, tensor in checkpoint.items() if key not in later} | {TENSORS: placed}, source)
    source.seek(0)

    # Lightning moves what it loads to a device at once: it moves an empty tensor, which then says where the unread one goes
    class Later(ShapeInCheckpoint):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            placed = checkpoint[TENSORS]
            unread = {
                name: state[name].on(tensor.device) for name, tensor in placed.items() if isinstance(state[name], DeferredTensor)
            }
            checkpoint |= {**later, TENSORS: placed | unread}
            super().on_load_checkpoint(checkpoint)

    return source, Later


def unclaimed_states(trainer: pl.Trainer | None, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the states of callbacks, by key, that no callback of a run restores."""
    taken = set() if trainer is None else {callback.state_key for callback in callbacks_of(trainer, Callback)}
    return {key: state for key, state in (checkpoint.get("callbacks") or {}).items() if key not in taken}


def check_callbacks(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuses to continue with a callback instead of another of its kind, whose state would be lost."""
    others, states = unclaimed_states(trainer, checkpoint), checkpoint.get("callbacks") or {}
    for callback in callbacks_of(trainer, Callback):
        named = [key for key in others if key.startswith(f"{type(callback).__qualname__}{{")]
        if getattr(callback, "must_resume", False) and callback.state_key not in states and named:
            raise ValueError(
                f"the checkpoint is of a run with {', '.join(named)}, and this run has {callback.state_key} in its place, which "
                "does not know what has been done: go on with the arguments of that run, or begin a new fit with the weights "
                "alone (bh.training.load_from_checkpoint)"
            )


def prepare_for_weights(module: nn.Module, trainer: pl.Trainer | None, checkpoint: dict[str, Any]) -> None:
    """Prepares for the weights of a checkpoint, once the model has its shape: masked heads, and the place in the data."""
    _restore_masks(module, trainer, checkpoint)
    fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
    fit_checkpoint = getattr(trainer.datamodule, "fit_checkpoint", None) if fits else None  # type: ignore[union-attr]
    if fit_checkpoint is not None:
        fit_checkpoint(checkpoint)


def _restore_masks(module: nn.Module, trainer: pl.Trainer | None, checkpoint: dict[str, Any]) -> None:
    """Zeroes the weights that read heads masked in a checkpoint, once they are loaded, if no callback masks these heads again.

    It warns where training continues without the callback that held masks.
    """
    lost, masked = dict[str, str](), checkpoint.get(MASKED)  # what nobody masks, by the callback that did
    for key, state in unclaimed_states(trainer, checkpoint).items():
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
        for key, what in lost.items():
            rank_zero_warn(
                f"the checkpoint is of a run with {key}, which this run lacks: the {what} that it has masked are zero, and "
                "nothing keeps them so when training goes on"
            )
