"""Saves the result of a fit as a verified Hugging Face checkpoint."""

import itertools
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import a_path
from billhook.checkpoints.place import check_target
from billhook.checkpoints.save import Saved, check_names, save
from billhook.fit.events.shape_event import ShapeCallback
from billhook.fit.ranks import together
from billhook.fit.run import callbacks_of, check_some_steps, is_trial
from billhook.model.find import find_transformer
from billhook.running.shards import gathered, unsharded


class Export(Callback):
    """Saves the model as a Hugging Face checkpoint at the end of the fit: reloaded and compared before it is moved into place.

    Nothing is saved in a `fast_dev_run`.

    Args:
        folder: The folder; new, empty, or an earlier export.

    Raises:
        ValueError: Before training, if `folder` holds something that billhook did not write.

    >>> import billhook as bh
    >>> callback = bh.Export("outputs/model")  # last in Trainer(callbacks=[...])
    """

    def __init__(self, folder: str = "outputs/model") -> None:
        a_path("folder", folder)
        self.folder = folder
        self.saved: Saved | None = None
        self._probe: dict[str, Tensor] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the folder."""
        if stage == "fit":
            check_some_steps(trainer, "Export")
            check_target(self.folder)
            self.saved = self._probe = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a model whose checkpoint would not load, before training."""
        check_names(find_transformer(pl_module))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        """Keeps an example of the first batch to verify with, for models that read neither token ids nor images."""
        if self._probe is None:
            name = find_transformer(pl_module).main_input_name
            own = name not in ("input_ids", "pixel_values") and isinstance(batch, dict) and name in batch
            tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim > 0} if own else {}  # type: ignore[attr-defined]
            self._probe = {k: v[:1].detach().cpu().clone() for k, v in tensors.items() if k != "labels"}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves on one process; the others wait."""
        if is_trial(trainer):
            rank_zero_info(f"billhook: nothing is saved to {self.folder}, since this is a fast_dev_run")
            return
        model = find_transformer(pl_module)
        with unsharded(model), gathered(model), together(trainer, "Export"):
            if trainer.is_global_zero:
                self._save(trainer, model)

    def _save(self, trainer: pl.Trainer, model: PreTrainedModel) -> None:
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        events = [event for callback in callbacks_of(trainer, ShapeCallback) for event in callback.events]
        self.saved = save(
            model,
            self._free_folder(),
            tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
            {"steps": trainer.global_step, "events": events},
            self._probe or None,
        )
        adapters = f"; {self.saved.adapters}" if self.saved.adapters else ""
        rank_zero_info(f"billhook: saved to {self.saved.folder}, {self.saved.says}{adapters}")

    def _free_folder(self) -> str:
        """Returns the folder, or one next to it if the folder has been filled in the meantime, so that the result is not lost."""
        try:
            check_target(self.folder)
        except ValueError as error:
            number = next(n for n in itertools.count(2) if not Path(f"{self.folder}-{n}").exists())
            rank_zero_warn(f"{error}; the model is saved to '{self.folder}-{number}'")
            return f"{self.folder}-{number}"
        return self.folder
