"""Saves the result of a fit as a verified Hugging Face checkpoint."""

import errno
import inspect
import itertools
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from billhook.adapters.checkpoint import save_adapters
from billhook.arguments import check_path, check_types
from billhook.atomic_folder import RECORD, check_target, replacement_note
from billhook.callbacks.degradation import Degradation, check_listed_after
from billhook.checkpoints.origin import CARD
from billhook.checkpoints.push import NotPushed, check_repository, check_token, push
from billhook.checkpoints.save import Saved, check_names, save
from billhook.engine.batches import examples_of
from billhook.engine.passes import blockwise
from billhook.engine.sharded_files import write_sharded
from billhook.engine.sharding import is_sharded, reshard
from billhook.engine.store import store_of
from billhook.fit.event import events_of, start_metrics
from billhook.fit.lightning_internals import is_tuning
from billhook.fit.measure import log_card
from billhook.fit.preprocessors import find_preprocessors
from billhook.fit.ranks import from_first_rank, on_first_rank
from billhook.fit.run import callbacks_of, check_takes_steps, is_dev_run, training_record
from billhook.folder_lock import FolderLock
from billhook.model.checkpoint_shape import save_shape
from billhook.model.find import find_transformer
from billhook.model.preprocessors import Preprocessor, load_preprocessor
from billhook.serving.converter import find_converter
from billhook.serving.worker import Missing
from billhook.serving.written import check_gguf, export_gguf

UNVERIFIED = """These are the weights at the end of a fit whose export failed; nothing has verified them. The error was:

{error}

`billhook export {ckpt} OUT` tries again; torch.load reads them, or if they are shards, torch.distributed.checkpoint.
"""


class Export(Callback):
    """Saves the model as a Hugging Face checkpoint at the end of the fit: reloaded and compared before it is moved into place.

    That is rehearsed before the first step, beside `folder`, so that what could not be saved costs no training. No other run can
    write to the folder until the fit ends. Should it fail at
    the end all the same, the weights are kept in a folder of the name with `-unverified` behind it. Nothing is left of a
    `fast_dev_run`, which rehearses alone.

    Args:
        folder: The folder; new, empty, or an earlier export, which is replaced: a line says so before training.
        tokenizer: The tokenizer, processor, or image processor that is saved along, or the name or folder of one. By default it
            is the one that the data module, the module or the loaders hold, or else the one beside the model that training
            started from.
        probe: Inputs of the model on which it is compared; by default an example of the first training batch, where that holds
            what the model's forward takes, or else what `bh.save` makes.
        rehearse: False to save at the end alone; a rehearsal takes the time and the disk of a save.
        gguf: A GGUF file to write of the folder at the end, for llama.cpp and what is built on it, of the folder's dtype: by
            llama.cpp's converter (`pip install 'billhook[serve]'`), or by billhook where layers differ. Should that fail at the
            end, a warning says why, and the folder stays.
        converter: Where llama.cpp's `convert_hf_to_gguf.py` is; by default the one that is installed.
        push_to_hub: A repository of the Hub, as in `"user/name"`, that the folder is pushed to once it is verified, with the
            token of `hf auth login` or HF_TOKEN. Should that fail, a warning says why and how to try again, and the folder stays.
        private: True if that repository must be private; otherwise a new one is as the account has it by default.

    Raises:
        ValueError: Before training, if `folder` holds something that billhook did not write, an argument is not legal, or the
            model cannot be saved, verified or, for `gguf`, converted; or there is no token for `push_to_hub`.

    >>> import billhook as bh
    >>> callback = bh.Export("outputs/model")  # last in Trainer(callbacks=[...])
    """

    def __init__(
        self,
        folder: str = "outputs/model",
        tokenizer: Preprocessor | str | None = None,
        probe: Mapping[str, Any] | None = None,
        rehearse: bool = True,
        gguf: str | None = None,
        converter: str | None = None,
        push_to_hub: str | None = None,
        private: bool = False,
    ) -> None:
        check_path("folder", folder)
        if gguf is not None:
            check_path("gguf", gguf, [".gguf"])
        if tokenizer is not None and not isinstance(tokenizer, Preprocessor | str):
            raise ValueError(f"tokenizer={tokenizer!r} must be one of transformers' own, or the name or folder of one")
        if probe is not None and not (isinstance(probe, Mapping) and any(isinstance(value, Tensor) for value in probe.values())):
            raise ValueError(f"probe={probe!r} must be a dictionary of inputs of the model's forward, as {{'input_ids': ...}}")
        check_types(Export, locals())
        if push_to_hub is not None:
            check_repository("push_to_hub", push_to_hub)
        elif private:
            raise ValueError("private=True is of a repository of the Hub: name it as push_to_hub")
        self.folder, self.probe, self.rehearse = folder, probe, rehearse
        self.tokenizer = tokenizer
        self.gguf, self.converter = gguf, converter
        self.push_to_hub, self.private = push_to_hub, private
        self.saved: Saved | None = None
        self._probe: Mapping[str, Any] | None = None
        self._along, self._begun = list[Preprocessor](), False
        self._claim: FolderLock | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the folder, and loads a tokenizer or processor that is given by name."""
        if stage == "fit":
            check_takes_steps(trainer, "Export")
            check_target(self.folder)
            if self.gguf is not None:
                check_gguf(self.gguf)
                find_converter(self.converter)
            if self.push_to_hub is not None:
                on_first_rank(trainer, "Export", partial(check_token, "push_to_hub", self.push_to_hub))
            for callback in callbacks_of(trainer, Degradation):
                check_listed_after(trainer, self, callback)
            if not is_dev_run(trainer):
                self._tell_replaced()
            self.saved, self._begun, self._along = None, False, []
            if self.tokenizer is not None:
                self._along = [load_preprocessor(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer]

    def _tell_replaced(self) -> None:
        """Says before training what the results will replace."""
        if words := replacement_note(self.folder):
            rank_zero_info(f"billhook: the fit will be saved to '{self.folder}'{words}")
        if self.gguf is not None and Path(self.gguf).is_file():
            rank_zero_info(f"billhook: the GGUF file '{self.gguf}' will be replaced")

    def _claimed(self) -> None:
        """Claims the folder, if it has not been yet."""
        self._claim = self._claim or FolderLock(Path(self.folder).resolve())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a model whose checkpoint would not load, and claims the folder, before training."""
        check_names(find_transformer(pl_module))
        # not in `setup`, where a ModelCheckpoint warns of any file that lies beside the folder, as a lock does
        on_first_rank(trainer, "Export", self._claimed)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds what is saved along; warns if there is nothing."""
        self._along = self._along or find_preprocessors(trainer, pl_module)
        if not self._along:
            rank_zero_warn(
                f"no tokenizer is saved along to '{self.folder}', nor a processor, since neither data module, module and loaders "
                "hold one nor does one lie where the model came from; give Export tokenizer=..."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        """Keeps an example of the first batch to verify with, and rehearses."""
        if self._begun or is_tuning(trainer):
            return
        self._begun, model = True, find_transformer(pl_module)
        self._probe = self.probe or _inputs_in(batch, model)
        if not self.rehearse:
            return
        with blockwise(model):
            on_first_rank(trainer, "Export", partial(self._rehearse, model), store_of(model).apart)

    def _rehearse(self, model: PreTrainedModel) -> None:
        """Saves the model as it is beside the folder, and removes that again; what fails now would fail at the end."""
        target = Path(self.folder).resolve()
        draft = target.with_name(f".{target.name}.rehearsal")
        if (draft / RECORD).is_file():  # of a run that was killed
            shutil.rmtree(draft, ignore_errors=True)
        check_target(draft)
        try:
            self._rehearse_save(model, draft)
            if self.gguf is not None:
                export_gguf(draft, draft / "rehearsal.gguf", converter=self.converter)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _rehearse_save(self, model: PreTrainedModel, draft: Path) -> None:
        try:
            save(model, draft, self._along, probe=self._probe)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            by = "an example of the first batch" if self.probe is None and self._probe else "the probe"
            raise ValueError(
                f"Export: before training the model cannot be saved and verified by {by}: {type(error).__name__}: {error}; "
                "give Export other inputs of its forward as probe={...}"
            ) from error

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves on one process; the others wait."""
        if is_dev_run(trainer):
            rank_zero_info(f"billhook: nothing is saved to {self.folder}, since this is a fast_dev_run")
            return
        model, failed = find_transformer(pl_module), list[Exception]()
        with blockwise(model):
            on_first_rank(trainer, "Export", partial(self._export, trainer, model, failed), store_of(model).apart)
        full = any(isinstance(error, OSError) and error.errno == errno.ENOSPC for error in failed)
        words = [f"{type(error).__name__}: {error}" for error in failed if not full]
        for why in from_first_rank(trainer, "Export", "how it has failed", words):
            self._keep(trainer, model, why)
        on_first_rank(trainer, "Export", partial(_raise, failed))

    def _export(self, trainer: pl.Trainer, model: PreTrainedModel, failed: list[Exception]) -> None:
        """Saves, converts and logs; puts an error into `failed`, for which all ranks keep the weights."""
        try:
            self._save(trainer, model)
        except Exception as error:  # noqa: BLE001 - it is raised again
            failed.append(error)
            return
        self._convert()
        if self.saved is not None:
            log_card(trainer, Path(self.saved.folder) / CARD)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets other runs write to the folder."""
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets other runs write to the folder."""
        self._let_go()

    def _let_go(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pushes what was saved, as one process; the others wait."""
        if self.push_to_hub is not None:
            on_first_rank(trainer, "Export", partial(self._push, self.push_to_hub))

    def _push(self, repository: str) -> None:
        """Pushes what was saved, if anything was; warns where that fails."""
        if self.saved is None:
            return
        try:
            address = push(self.saved.folder, repository, self.private)
        except (ValueError, NotPushed) as error:
            rank_zero_warn(str(error))
            return
        rank_zero_info(f"billhook: pushed to {address}")

    def _convert(self) -> None:
        """Writes the GGUF file of what was saved."""
        if self.gguf is None or self.saved is None:
            return
        try:
            written = export_gguf(self.saved.folder, self.gguf, converter=self.converter)
        except (ValueError, Missing, OSError) as error:
            rank_zero_warn(f"no GGUF file is written, and the model is in '{self.saved.folder}': {error}")
            return
        rank_zero_info(f"billhook: {self.gguf} is {written}")

    def _save(self, trainer: pl.Trainer, model: PreTrainedModel) -> None:
        degradation = [{"degradation": callback.last} for callback in callbacks_of(trainer, Degradation)]
        start = {"start": start_metrics(trainer)} if start_metrics(trainer) else {}
        record = {"steps": trainer.global_step, **start, "events": events_of(trainer), **training_record(trainer)}
        record |= degradation[0] if degradation else {}
        self.saved = save(model, self._free_folder(), self._along, record, self._probe)
        adapters = f"; {self.saved.adapters}" if self.saved.adapters else ""
        rank_zero_info(f"billhook: saved to {self.saved.folder}, {self.saved.says}{adapters}")

    def _keep(self, trainer: pl.Trainer, model: PreTrainedModel, why: str) -> None:
        """Keeps the weights of a model that could not be exported; each rank writes its shards."""
        folder = Path(from_first_rank(trainer, "Export", "a folder for the weights", _unused(f"{self.folder}-unverified")))
        reshard(model)
        checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
        save_adapters(model, checkpoint)
        with suppress(Exception):  # what failed may be this
            save_shape(model, checkpoint)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if is_sharded(model):
                write_sharded(folder / "weights.ckpt", checkpoint, trainer.is_global_zero)
            elif trainer.is_global_zero:
                torch.save(checkpoint, folder / "weights.ckpt")
            (folder / "UNVERIFIED.txt").write_text(UNVERIFIED.format(error=why, ckpt=folder / "weights.ckpt"))
        except (OSError, CheckpointException):
            shutil.rmtree(folder, ignore_errors=True)
            return
        rank_zero_warn(f"Export failed; the weights are kept, not verified, in '{folder}'")

    def _free_folder(self) -> str:
        """Returns the folder, or one next to it if the folder has been filled in the meantime, so that the result is not lost."""
        try:
            check_target(self.folder)
        except ValueError as error:
            folder = _unused(self.folder)
            rank_zero_warn(f"{error}; the model is saved to '{folder}'")
            return folder
        return self.folder


def _raise(failed: Sequence[Exception]) -> None:
    for error in failed:
        raise error


def _unused(folder: str) -> str:
    """Returns the name, with a number behind it if it is taken."""
    names = itertools.chain([folder], (f"{folder}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def _inputs_in(batch: object, model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Returns an example of what a model's forward takes of a batch, on the CPU; None if its main input is not there."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get(model.main_input_name), Tensor):
        return None
    taken = inspect.signature(model.forward).parameters
    tensors = {name: value.detach() for name, value in batch.items() if name in taken and isinstance(value, Tensor)}
    if not (model.config.is_encoder_decoder and "decoder_input_ids" not in tensors):  # else the decoder's inputs are made of them
        tensors.pop("labels", None)
    with suppress(ValueError):  # it cannot be taken apart
        tensors = examples_of(tensors)[0]
    return {name: value.cpu().clone() for name, value in tensors.items()}
