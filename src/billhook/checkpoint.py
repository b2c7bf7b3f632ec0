"""Save, load and verify Hugging Face checkpoints: what was written is reloaded and compared before it is moved into place."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from billhook.assets import model_path
from billhook.structure.shape import find_transformer

RECORD = "billhook.json"
Way = Literal["plain"]
WAYS: dict[Way, str] = {"plain": "an ordinary Hugging Face checkpoint: plain from_pretrained loads it, without billhook"}


@dataclass(frozen=True)
class Saved:
    """What `save` did.

    Attributes:
        folder: Where the checkpoint is.
        way: How it was saved: `"plain"`, as an ordinary Hugging Face checkpoint.
        difference: The largest difference between the logits of the model and of what was reloaded.
        megabytes: The size of the folder, in 10^6 bytes.
    """

    folder: str
    way: Way
    difference: float
    megabytes: float


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: Mapping[str, Any] | None = None,
    probe: Mapping[str, Tensor] | None = None,
) -> Saved:
    """Saves a model as a Hugging Face checkpoint that is known to load: written beside, reloaded, compared, moved into place.

    Until the last moment nothing stands at `folder` but what stood there before, also if the process is killed. A checkpoint
    that billhook wrote there earlier is replaced.

    Args:
        model: A Hugging Face model, or a module that holds one.
        folder: Where to; new, empty, or an earlier checkpoint of billhook's.
        tokenizer: Saved along.
        record: What was done to the model, for `billhook.json`.
        probe: Inputs on which the logits are compared; by default 2 x 16 random token ids, or 2 random images.

    Returns:
        Where it is, the way it was saved, and the largest difference of logits.

    Raises:
        ValueError: If something that billhook did not write stands at `folder`.
        RuntimeError: If the reloaded model computes other logits. Then nothing has been put at `folder`.
    """
    target, model = Path(folder).absolute(), find_transformer(model)
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target) as draft:
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        difference = verify(model, draft, probe)
        saved = Saved(str(folder), "plain", difference, _size(draft) / 1e6)
        (draft / RECORD).write_text(json.dumps({**(record or {}), "saved": asdict(saved)}, indent=1) + "\n")
        _flush(draft)
        _move(draft, target)
    return saved


def load(folder: str | Path, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads a checkpoint in the class that its config names.

    Args:
        folder: A folder, a hub name, or `"tiny"`.
        dtype: The dtype of the weights, `"auto"` for the checkpoint's own.
        trust_remote_code: Run the modelling code that a repository brings.

    Raises:
        ValueError: If a folder is not a checkpoint, or its config names no class that transformers has.
    """
    name = model_path(str(folder))
    check_checkpoint(name)
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    model: PreTrainedModel = model_class(config, name).from_pretrained(name, dtype=dtype)
    return model


def check_checkpoint(name: str) -> None:
    """Refuses a path that is not a Hugging Face checkpoint; a hub name passes.

    Raises:
        ValueError: With what is missing.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"the folder '{name}' has no config.json, so it is not a Hugging Face checkpoint")
    if path.is_file() or (not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1)):
        raise ValueError(f"'{name}' is not a folder with a Hugging Face checkpoint")


def model_class(config: PretrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class that a config names.

    Raises:
        ValueError: If it names none, or one that transformers does not have.
    """
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(f"the config of '{name}' names the class {names or None}, which transformers does not have")
    return found


def check_target(folder: str | Path) -> None:
    """Refuses a folder to save to in which something stands that billhook did not write.

    Raises:
        ValueError: If so.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / RECORD).is_file()):
        raise ValueError(f"'{folder}' holds something that billhook did not write ({RECORD} is not there): name another folder")


@torch.no_grad()
def verify(model: PreTrainedModel, folder: Path, probe: Mapping[str, Tensor] | None = None) -> float:
    """Reloads a folder in the model's class and compares logits.

    Returns:
        The largest absolute difference.

    Raises:
        RuntimeError: If it is above what the dtype's rounding explains.
    """
    reloaded = type(model).from_pretrained(folder, dtype=model.dtype).to(cast(Any, model.device))
    reloaded.set_attn_implementation(model.config._attn_implementation)
    inputs = {k: v.to(model.device) for k, v in (probe or make_probe(model.config, model.main_input_name)).items()}
    with _evaluating(model), _evaluating(reloaded):
        expected, found = (m(**inputs).logits.float() for m in (model, reloaded))
    difference = float((expected - found).abs().max())
    tolerance = 8 * torch.finfo(model.dtype).eps * max(1.0, expected.abs().max().item())
    if not difference <= tolerance:
        raise RuntimeError(f"the reloaded checkpoint computes other logits: they differ by {difference:.3g}; it was not saved")
    return difference


def make_probe(config: PretrainedConfig, main_input_name: str) -> dict[str, Tensor]:
    """Two random inputs: 16 token ids each, or an image.

    Raises:
        ValueError: If the model reads something else.
    """
    generator = torch.Generator().manual_seed(0)
    if main_input_name == "input_ids":
        vocab_size = config.get_text_config().vocab_size
        ids = torch.randint(vocab_size, (2, 16), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    if main_input_name == "pixel_values":
        size = (2, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
    raise ValueError(f"probe: a model that reads {main_input_name} needs a batch of its inputs to be verified with")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, gone afterwards; those that a killed process left are cleared away first."""
    for left in target.parent.glob(f".{target.name}.draft-*"):
        shutil.rmtree(left, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.draft-", dir=target.parent))
    draft.chmod(0o755)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(draft: Path, target: Path) -> None:
    """Puts the draft in the target's place; an older checkpoint there is complete until the new one stands."""
    if not target.exists() or not any(target.iterdir()):
        draft.rename(target)  # over nothing or an empty folder: one step
        return
    old = target.with_name(f".{target.name}.draft-old")
    target.rename(old)
    try:
        draft.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
