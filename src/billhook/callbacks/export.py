"""The Export callback: saves a verified Hugging Face checkpoint at the end of training."""

import errno
import inspect
import itertools
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from billhook.adapters.checkpoint import save_adapters
from billhook.arguments import check_path, check_types
from billhook.atomic_folder import RECORD, check_target, replacement_note
from billhook.callbacks.degradation import Degradation, check_listed_after
from billhook.callbacks.head_masking import HeadMasking
from billhook.checkpoints.push import NotPushed, check_repository, check_token, push
from billhook.checkpoints.save import Saved, check_names, save
from billhook.engine import blockwise, examples_of, is_sharded, reshard, store_of, write_sharded
from billhook.fit.callback import FitCallback
from billhook.fit.event import events_of, start_metrics
from billhook.fit.fit import Fit
from billhook.fit.ranks import from_first_rank, on_first_rank
from billhook.folder_lock import FolderLock
from billhook.model import Preprocessor, check_tokenizer, load_preprocessor, save_shape
from billhook.report.summary import parameter_count
from billhook.serving.converter import find_converter
from billhook.serving.worker import Missing
from billhook.serving.written import check_gguf, export_gguf

UNVERIFIED = """Export failed at the end of training. These are the final weights, not verified. The error was:

{error}

To try again, run `billhook export {ckpt} OUT`. To read the weights, use torch.load, or torch.distributed.checkpoint for shards.
"""


class Export(FitCallback):
    """Saves a verified Hugging Face checkpoint at the end of training.

    The checkpoint is reloaded and compared before it replaces `folder`. A trial export before the first step reports problems
    early. The folder is locked against other runs until training ends. If the final export fails, the weights are kept in a
    folder with the suffix `-unverified`. A `fast_dev_run` runs only the trial and leaves no files.

    Args:
        folder: Output folder. It must be new, empty, or an earlier export, which is replaced.
        tokenizer: Tokenizer, processor, or image processor to save, or its name or folder. Defaults to the one of the data
            module, the module, or the loaders, or else of the base model.
        probe: Forward inputs for comparing outputs. Defaults to an example of the first training batch, or to the inputs that
            `bh.save` generates.
        rehearse: If False, skips the trial export, which needs the time and disk space of a save. Defaults to True.
        gguf: GGUF file to write at the end, in the folder's dtype, with llama.cpp's converter (`pip install 'billhook[serve]'`),
            or with billhook's own if layers differ. If the conversion fails, a warning says why and the folder stays.
        converter: Path of llama.cpp's `convert_hf_to_gguf.py`. Defaults to the installed one.
        push_to_hub: Hub repository, such as `"user/name"`, to which the verified folder is pushed with the token of
            `hf auth login` or HF_TOKEN. If the push fails, a warning says how to try again and the folder stays.
        private: If True, requires a private repository. Otherwise a new repository uses the account's default.

    Raises:
        ValueError: Before training, if `folder` is not a billhook checkpoint, an argument is not legal, the model cannot be
            saved, verified, or converted, or there is no token for `push_to_hub`. If the model has another size than the last
            event left, before a resumed run and at the end. At the end, if it breaks a limit of `Degradation`.

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
        check_types(Export, locals())
        if probe is not None and not any(isinstance(value, Tensor) for value in probe.values()):
            raise ValueError(f"probe={probe!r} must be a dictionary of forward inputs, such as {{'input_ids': ...}}.")
        if push_to_hub is not None:
            check_repository("push_to_hub", push_to_hub)
        elif private:
            raise ValueError("private=True requires push_to_hub. Pass the repository as push_to_hub.")
        self.folder = folder
        self.probe = probe
        self.rehearse = rehearse
        self.tokenizer = tokenizer
        self.gguf = gguf
        self.converter = converter
        self.push_to_hub = push_to_hub
        self.private = private
        self.saved: Saved | None = None
        self._probe: Mapping[str, Any] | None = None
        self._along = list[Preprocessor]()
        self._begun = False
        self._claim: FolderLock | None = None

    def prepare(self, fit: Fit) -> None:
        """Checks the folder and loads a tokenizer or processor given by name."""
        fit.check_takes_steps("Export")
        check_target(self.folder)
        if self.gguf is not None:
            check_gguf(self.gguf)
            find_converter(self.converter)
        if self.push_to_hub is not None:
            on_first_rank(fit, "Export", partial(check_token, "push_to_hub", self.push_to_hub))
        for callback in fit.callbacks(Degradation):
            check_listed_after(fit, self, callback)
        if not fit.is_trial:
            if words := replacement_note(self.folder):
                rank_zero_info(f"billhook: the fit will be saved to '{self.folder}'{words}")
            if self.gguf is not None and Path(self.gguf).is_file():
                rank_zero_info(f"billhook: the GGUF file {self.gguf} will be replaced")
        self.saved = None
        self._begun = False
        self._along = []
        if self.tokenizer is not None:
            self._along = [load_preprocessor(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer]

    def _claimed(self) -> None:
        self._claim = self._claim or FolderLock(Path(self.folder).resolve())

    def resolve(self, fit: Fit) -> None:
        """Checks that the checkpoint would load, and locks the folder."""
        check_names(fit.model)
        # not in `setup`: a ModelCheckpoint would warn about the lock file next to the folder
        on_first_rank(fit, "Export", self._claimed)

    def begin_training(self, fit: Fit) -> None:
        """Finds the tokenizer or processor to save; warns if there is none."""
        self._along = self._along or fit.preprocessors()
        for preprocessor in self._along:
            check_tokenizer(fit.model, preprocessor)
        if not self._along:
            rank_zero_warn(
                f"Export: no tokenizer or processor was found in the data module, the module, the loaders, or the base model's "
                f"folder, so none is saved to {self.folder}. Pass Export(tokenizer=...)."
            )
        if fit.resumes:
            _check_events_kept(fit)

    def before_batch(self, fit: Fit, batch: object) -> None:
        """Keeps an example of the first batch for verification, and runs the trial export."""
        if self._begun or fit.is_tuning:
            return
        self._begun = True
        model = fit.model
        self._probe = self.probe or _inputs_in(batch, model)
        if not self.rehearse:
            return
        masking = fit.callbacks(HeadMasking)
        for callback in masking:  # a resumed run may have masked heads, which become zeros at the end of training only
            callback.unmask()
        try:
            with blockwise(model):
                on_first_rank(fit, "Export", partial(self._rehearse, model), store_of(model).independently)
        finally:
            for callback in masking:
                callback.mask(fit.module, callback.heads)

    def _rehearse(self, model: PreTrainedModel) -> None:
        """Saves the model next to the folder and deletes the result, to report problems early."""
        target = Path(self.folder).resolve()
        draft = target.with_name(f".{target.name}.rehearsal")
        if (draft / RECORD).is_file():  # left by a run that was killed
            shutil.rmtree(draft, ignore_errors=True)
        check_target(draft)
        try:
            try:
                save(model, draft, self._along, probe=self._probe)
            except (OSError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                by = "an example of the first batch" if self.probe is None and self._probe else "the probe"
                raise ValueError(
                    f"Export: the trial export before training failed on {by}: {type(error).__name__}: "
                    f"{str(error).removesuffix('.')}. Pass other forward inputs as Export(probe={{...}})."
                ) from error
            if self.gguf is not None:
                export_gguf(draft, draft / "rehearsal.gguf", converter=self.converter)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def end_training(self, fit: Fit) -> None:
        """Saves on the first rank; the others wait."""
        if fit.is_trial:
            rank_zero_info(f"billhook: fast_dev_run, so {self.folder} was not written")
            return
        model = fit.model
        failed = list[Exception]()
        try:
            _check_events_kept(fit)
            for callback in fit.callbacks(Degradation):
                if callback.broken:
                    raise ValueError(f"Export: the model breaks a limit of Degradation. {'; '.join(callback.broken)}")
        except ValueError as error:
            failed.append(error)  # the weights are kept
        else:
            with blockwise(model):
                on_first_rank(fit, "Export", partial(self._export, fit, model, failed), store_of(model).independently)
        full = any(isinstance(error, OSError) and error.errno == errno.ENOSPC for error in failed)
        words = [f"{type(error).__name__}: {error}" for error in failed if not full]
        for why in from_first_rank(fit, "Export", "the error", words):
            self._keep(fit, model, why)
        on_first_rank(fit, "Export", partial(_raise, failed))

    def _export(self, fit: Fit, model: PreTrainedModel, failed: list[Exception]) -> None:
        """Saves and converts; on error, appends to `failed`, so that ranks keep weights."""
        try:
            start = start_metrics(fit)
            folder = self.folder
            record = {"steps": fit.step, **({"start": start} if start else {}), "events": events_of(fit), **fit.record()}
            for callback in fit.callbacks(Degradation):
                record.setdefault("degradation", callback.last)
                record |= {"written": callback.written} if callback.written else {}
            try:
                check_target(folder)
            except ValueError as error:  # it is in use meanwhile
                folder = _unused(folder)
                rank_zero_warn(f"{error} Saving to {folder} instead.")
            self.saved = save(model, folder, self._along, record, self._probe)
        except Exception as error:  # noqa: BLE001 - raised again later
            failed.append(error)
            return
        adapters = f"; {self.saved.adapters}" if self.saved.adapters else ""
        rank_zero_info(f"billhook: saved to {self.saved.folder}, {self.saved.format}{adapters}")
        if self.gguf is None:
            return
        try:
            written = export_gguf(self.saved.folder, self.gguf, converter=self.converter)
        except (ValueError, Missing, OSError) as error:
            reason = str(error).removesuffix(".")
            rank_zero_warn(f"Export: {self.gguf} was not written ({reason}). The checkpoint is in {self.saved.folder}.")
        else:
            rank_zero_info(f"billhook: {self.gguf} is {written}")

    def release(self, fit: Fit, completed: bool) -> None:
        """Lets other runs write to the folder."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def close(self, fit: Fit) -> None:
        """Pushes the checkpoint from the first rank; the others wait."""
        if self.push_to_hub is not None:
            on_first_rank(fit, "Export", partial(self._push, self.push_to_hub))

    def _push(self, repository: str) -> None:
        if self.saved is None:
            return
        try:
            address = push(self.saved.folder, repository, self.private)
        except (ValueError, NotPushed) as error:
            rank_zero_warn(str(error))
            return
        rank_zero_info(f"billhook: pushed to {address}")

    def _keep(self, fit: Fit, model: PreTrainedModel, why: str) -> None:
        """Keeps the weights if the export failed; each rank writes its shards."""
        folder = Path(from_first_rank(fit, "Export", "a folder for the weights", _unused(f"{self.folder}-unverified")))
        reshard(model)
        checkpoint = {"state_dict": model.state_dict()}
        save_adapters(model, checkpoint)
        with suppress(Exception):  # the shape may be what failed
            save_shape(model, checkpoint)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if is_sharded(model):
                write_sharded(folder / "weights.ckpt", checkpoint, fit.rank == 0)
            elif fit.rank == 0:
                torch.save(checkpoint, folder / "weights.ckpt")
            (folder / "UNVERIFIED.txt").write_text(UNVERIFIED.format(error=why, ckpt=folder / "weights.ckpt"))
        except (OSError, CheckpointException):
            shutil.rmtree(folder, ignore_errors=True)
            return
        rank_zero_warn(f"Export failed. The unverified weights are in {folder}.")


def _check_events_kept(fit: Fit) -> None:
    """Raises `ValueError` if the model does not have the size that the last event left."""
    for event in events_of(fit)[-1:]:
        params = parameter_count(fit.module)
        if event["after"].get("params", params) != params:
            raise ValueError(
                f"Export: the event at step {event['step']} left {event['after']['params']:,} parameters, but the model has "
                f"{params:,}, so the event is lost. Load the model from the checkpoint that training resumes from."
            )


def _raise(failed: Sequence[Exception]) -> None:
    for error in failed:
        raise error


def _unused(folder: str) -> str:
    """Returns the name, with a number appended if it exists."""
    names = itertools.chain([folder], (f"{folder}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def _inputs_in(batch: object, model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Returns an example of a batch's forward inputs, on the CPU; None without the main input."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get(model.main_input_name), Tensor):
        return None
    taken = inspect.signature(model.forward).parameters
    tensors = {name: value.detach() for name, value in batch.items() if name in taken and isinstance(value, Tensor)}
    if not model.config.is_encoder_decoder or "decoder_input_ids" in tensors:  # else the decoder inputs are made from labels
        tensors.pop("labels", None)
    with suppress(ValueError):  # it cannot be split into examples
        tensors = examples_of(tensors)[0]
    return {name: value.cpu().clone() for name, value in tensors.items()}
