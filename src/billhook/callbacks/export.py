"""The result of a fit as a Hugging Face checkpoint, verified."""

import itertools
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from billhook.callbacks.shape_event import ShapeCallback
from billhook.checkpoint import WAYS, Saved, save
from billhook.place import check_target
from billhook.run import callbacks_of
from billhook.structure.shape import find_transformer


class Export(Callback):
    """Saves the model as a Hugging Face checkpoint at the end of the fit: reloaded and compared before it is moved into place.

    Args:
        folder: Where to; new, empty, or an earlier export.

    Raises:
        ValueError: Before training, if something that billhook did not write stands at `folder`.
    """

    def __init__(self, folder: str = "outputs/model") -> None:
        self.folder = folder
        self.saved: Saved | None = None
        self._probe: dict[str, Tensor] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks model and folder."""
        if stage == "fit":
            find_transformer(pl_module)
            check_target(self.folder)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        """Keeps two examples of a batch to verify with, for models that read more than token ids or images."""
        model = find_transformer(pl_module)
        if self._probe is None and isinstance(batch, dict) and model.main_input_name in batch:
            tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim > 0 and k != "labels"}
            self._probe = {k: v[:2].detach().cpu().clone() for k, v in tensors.items()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves on one process; the others wait."""
        if trainer.is_global_zero:
            model = find_transformer(pl_module)
            tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
            events = [event for callback in callbacks_of(trainer, ShapeCallback) for event in callback.events]
            self.saved = save(
                model,
                self._free_folder(),
                tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
                {"steps": trainer.global_step, "events": events},
                None if _has_default_probe(model.main_input_name) else self._probe,
            )
            rank_zero_info(f"billhook: saved to {self.saved.folder}, {WAYS[self.saved.way]}")
        trainer.strategy.barrier("billhook export")

    def _free_folder(self) -> str:
        """The folder; or one beside it, where something has come to stand there in the meantime: the result is not lost."""
        try:
            check_target(self.folder)
        except ValueError as error:
            number = next(n for n in itertools.count(2) if not Path(f"{self.folder}-{n}").exists())
            rank_zero_warn(f"{error}; it goes to '{self.folder}-{number}'")
            return f"{self.folder}-{number}"
        return self.folder


def _has_default_probe(main_input_name: str) -> bool:
    return main_input_name in ("input_ids", "pixel_values")
