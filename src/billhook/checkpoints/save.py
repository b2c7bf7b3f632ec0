"""Save, load and verify Hugging Face checkpoints: what was written is reloaded and compared before it is moved into place."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from billhook.adapters.merge import has_adapters, merged_copy
from billhook.assets import model_path
from billhook.checkpoints.equivalent import equivalents, rendered
from billhook.checkpoints.place import RECORD, beside, check_target, move, repair, size
from billhook.model.find import find_transformer
from billhook.model.meta import check_checkpoint, model_class, read_config
from billhook.model.shape import KEY, unbuilt_shape
from billhook.model.shaped import load_as, readable, to_entry
from billhook.model.transformers_internals import attention_of

Way = Literal["plain", "equivalent", "shaped"]
WAYS: dict[Way, str] = {
    "plain": "an ordinary Hugging Face checkpoint: plain from_pretrained loads it, without billhook",
    "equivalent": "an ordinary Hugging Face checkpoint of another family, which computes the same and has config fields for its "
    "shape: plain from_pretrained loads it, without billhook",
    "shaped": "a Hugging Face checkpoint of a shape that its class has no config fields for: bh.load loads it, plain "
    "from_pretrained refuses it",
}


@dataclass(frozen=True)
class Saved:
    """What `save` did.

    Attributes:
        folder: Where the checkpoint is.
        way: How it was saved: `"plain"`, as an ordinary Hugging Face checkpoint; `"equivalent"`, as one of another family; or
            `"shaped"`, as one that `load` loads.
        difference: The largest difference between the logits of the model and of what was reloaded.
        megabytes: The size of the folder, in 10^6 bytes.
        adapters: What has become of PEFT's adapters, in a line; None if there were none.
        family: The model type of that other family, such as `"mistral"`; None if it is the model's own.
    """

    folder: str
    way: Way
    difference: float
    megabytes: float
    adapters: str | None = None
    family: str | None = None

    @property
    def says(self) -> str:
        """How it was saved, in words."""
        return f"{WAYS[self.way]}; it is saved as {self.family}" if self.family else WAYS[self.way]


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    record: Mapping[str, Any] | None = None,
    probe: Mapping[str, Tensor] | None = None,
) -> Saved:
    """Saves a model as a Hugging Face checkpoint that is known to load: written beside, reloaded, compared, moved into place.

    What stands at `folder` is at every moment nothing, an empty folder or a complete checkpoint, also if the process is
    killed, and a save that fails leaves everything as it was. A checkpoint that billhook wrote there earlier is replaced. Two
    renames do that; a process killed right between them leaves nothing at `folder` and the earlier checkpoint, complete, beside
    it as `.NAME.draft-old`, which the next save puts back first. Where `folder` is a symbolic link, what it points to is
    replaced and the link stays. The model is left as it was: modes, gradients, config, and torch's random state too.

    Where the model's class builds tensors of other sizes from the model's config, the first of these is taken that holds:

    - its class builds them from a config with other numbers of heads and `head_dim` said: that config is written;
    - a family that computes the same builds them: a Llama whose heads do not divide its width is saved as a Mistral, a GPT-2 with
      one KV head as a GPTBigCode. What is reloaded must have the same tensors and give the same logits, bit for bit; where
      linears are transposed, but for rounding. The model itself stays what it is;
    - else config.json says under `"billhook"` which sizes and whole-number attributes are others (layers differ, say), and which
      linears store fewer heads than they hand out, and `load` loads it. Plain `from_pretrained` refuses it with
      a RuntimeError, unless it is told to ignore mismatched sizes.

    Of a model with PEFT's adapters attached, a copy is saved into whose weights they are merged as `merge` does it: in linears of
    which 1 % or more is zero, every zero stays, and the others are merged in full. If that leaves something out of what the
    adapters add, a warning says how much; under `mask_adapters` it is nothing. To keep other zeros, or none, merge first.

    Args:
        model: A Hugging Face model, or a module that holds one.
        folder: Where to; new, empty, or an earlier checkpoint of billhook's.
        tokenizer: Saved along.
        record: What was done to the model, for `billhook.json`. Numbers that JSON lacks become `"NaN"`, `"Infinity"` and
            `"-Infinity"` there.
        probe: Inputs on which the logits are compared; by default 32 random token ids, or a random image.

    Returns:
        Where it is, the way it was saved, and the largest difference of logits.

    Raises:
        ValueError: Before anything is written, if something that billhook did not write stands at `folder`, `record` is not
            plain data, a model that reads neither token ids nor images comes without `probe`, a part of it is wrapped by
            `torch.compile` (compiled in place is right), or adapters cannot be merged.
        RuntimeError: If the reloaded model computes other logits. Then nothing has been put at `folder`.
    """
    target, plain = Path(folder).resolve(), _to_plain(record or {})
    _check_no_prompts(model)
    model = find_transformer(model)
    check_names(model)
    probe = probe or make_probe(model.config, model.main_input_name)
    repair(target)
    check_target(folder)
    model, adapters = _merged(model)
    with beside(target) as draft, _untouched(model):
        way, family, difference = _write(model, draft, probe)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        saved = Saved(str(folder), way, difference, size(draft) / 1e6, adapters, family)
        files = sorted([RECORD, *(path.name for path in draft.iterdir())])
        (draft / RECORD).write_text(json.dumps({**plain, "saved": asdict(saved), "files": files}, indent=1) + "\n")
        move(draft, target)
    return saved


def _write(model: PreTrainedModel, draft: Path, probe: Mapping[str, Tensor]) -> tuple[Way, str | None, float]:
    """Saves and verifies the model; what its config said before of a shape that its class does not build is dropped.

    Returns:
        The way, the family where it is another, and the largest difference of logits.
    """
    vars(model.config).pop(KEY, None)
    shape = unbuilt_shape(model)
    if not shape.tensors:
        model.save_pretrained(draft)
        return "plain", None, verify(model, draft, probe)
    setattr(model.config, KEY, to_entry(shape))
    model.save_pretrained(draft)
    written = (draft / "config.json").read_bytes()
    for kind, config in equivalents(model):
        other = rendered(model, kind, config)
        (other or config).save_pretrained(draft)
        difference = _difference(model, draft, probe, kind)
        if difference == 0 or (difference is not None and other is not None):  # transposed linears round otherwise
            return ("plain", None, 0.0) if kind is type(model) else ("equivalent", config.model_type, difference)
        if other is not None:
            model.save_pretrained(draft)
    (draft / "config.json").write_bytes(written)
    return "shaped", None, verify(model, draft, probe)


def _difference(model: PreTrainedModel, draft: Path, probe: Mapping[str, Tensor], kind: type[PreTrainedModel]) -> float | None:
    """The largest difference of logits; None if it is more than rounding."""
    try:
        return verify(model, draft, probe, kind)
    except RuntimeError:
        return None


def _check_no_prompts(module: nn.Module) -> None:
    """Refuses what PEFT puts before a model's inputs, as no weights of the model can hold it."""
    for part in module.modules():
        config = part.active_peft_config if isinstance(part, PeftModel) else None
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: {type(config).__name__} puts prompts before the inputs, which a plain checkpoint cannot hold: "
                "save them with PEFT, or the model without them (get_base_model())"
            )


def check_names(model: PreTrainedModel) -> None:
    """Refuses a model in which weights have names that its class would not find.

    Raises:
        ValueError: If a part of it is wrapped by `torch.compile`.
    """
    for name, part in model.named_modules():
        if "_orig_mod" in part._modules:
            raise ValueError(
                f"model: {name} is wrapped by torch.compile, which renames its weights, so that no checkpoint of it loads: "
                "compile it in place, as in layer.compile()"
            )


def _merged(model: PreTrainedModel) -> tuple[PreTrainedModel, str | None]:
    """The model, or if PEFT is in it a copy without adapters, and what became of them."""
    if not has_adapters(model):
        return model, None
    result = merged_copy(model)
    if result.lost:
        warnings.warn(f"the checkpoint does not compute what the model does: {result}", stacklevel=3)
    return cast(PreTrainedModel, result.model), str(result)


def load(folder: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """Loads a checkpoint in the class of transformers that its config names; no code that it brings is run.

    Args:
        folder: A folder, a hub name, or `"tiny"`.
        dtype: The dtype of the weights, `"auto"` for the checkpoint's own.

    Raises:
        ValueError: If a folder is not a checkpoint, its config names no class that transformers has or asks for code, what the
            config says under `"billhook"` is not what `save` writes or not what the files hold, or the files cannot be read.
    """
    name = model_path(str(folder))
    check_checkpoint(name)
    kind = model_class(read_config(name), name)
    with readable(name):
        return load_as(kind, name, dtype)


@torch.no_grad()
def verify(model: PreTrainedModel, folder: Path, probe: Mapping[str, Tensor], kind: type[PreTrainedModel] | None = None) -> float:
    """Reloads a folder in a class, by default the model's, and compares logits.

    Returns:
        The largest absolute difference.

    Raises:
        RuntimeError: If it is above what the dtype's rounding explains, or the model computes no finite number.
    """
    reloaded = load_as(kind or type(model), str(folder), model.dtype).to(cast(Any, model.device))
    reloaded.set_attn_implementation(cast(str, attention_of(model.config)))
    inputs = {k: v.to(model.device) for k, v in probe.items()}
    with _evaluating(model), _evaluating(reloaded):
        expected, found = (logits_of(m, inputs) for m in (model, reloaded))
    finite = expected.isfinite()
    if not finite.any():
        raise RuntimeError("the model computes no finite logits, so nothing can be verified (it has diverged); it was not saved")
    same = (expected == found) | (expected.isnan() & found.isnan())
    difference = float((expected - found)[~same].abs().nan_to_num(torch.inf).max()) if not same.all() else 0.0
    tolerance = 8 * torch.finfo(model.dtype).eps * max(1.0, expected[finite].abs().max().item())
    if difference > tolerance:
        raise RuntimeError(f"the reloaded checkpoint computes other logits: they differ by {difference:.3g}; it was not saved")
    return difference


def logits_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits in float32, or for a model without a head what it gives first."""
    output = model(**inputs)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits.float()


def make_probe(config: PretrainedConfig, main_input_name: str) -> dict[str, Tensor]:
    """A random input: 32 token ids that end as a sequence does, or an image.

    Raises:
        ValueError: If the model reads something else.
    """
    generator = torch.Generator().manual_seed(0)
    text = config.get_text_config()
    if main_input_name == "input_ids" and hasattr(text, "vocab_size"):
        length = min(32, getattr(text, "max_position_embeddings", None) or 32)
        ids = torch.randint(text.vocab_size, (1, length), generator=generator)
        if isinstance(end := getattr(text, "eos_token_id", None), int) and 0 <= end < text.vocab_size:
            ids[:, -1] = end  # some classifiers read there
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    if main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)}
    raise ValueError(f"probe: a model that reads {main_input_name} needs a batch of its inputs to be verified with")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Puts back what saving and reloading change: torch's random state, and dtype and class in the config."""
    configs = [model.config, *(c for c in vars(model.config).values() if isinstance(c, PretrainedConfig))]
    before = [dict(vars(config)) for config in configs]
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            yield
    finally:
        for config, fields in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(fields)


def _to_plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON can hold it.

    Raises:
        ValueError: If it holds what JSON lacks.
    """

    def finite(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
        return value

    try:
        plain: dict[str, Any] = json.loads(json.dumps(finite(record), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"record: {RECORD} holds plain data only (JSON): {error}") from error
    return plain
