"""Verified saving and loading of Hugging Face checkpoints."""

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.adapters.merge import has_adapters, temporarily_merged
from billhook.arguments import check_types
from billhook.assets import model_path
from billhook.atomic_folder import RECORD, check_target, draft_folder, replace_folder
from billhook.checkpoints.card import card
from billhook.checkpoints.equivalent import equivalents
from billhook.checkpoints.origin import CARD, origin_of
from billhook.checkpoints.verify import Probe, expect, make_probe, verify
from billhook.display import Printable
from billhook.engine import cpu_by_default, forked, one_thread, store_of
from billhook.folder_lock import lock_folder
from billhook.model import (
    KEY,
    Preprocessor,
    Shape,
    check_checkpoint,
    check_dense,
    check_tokenizer,
    find_transformer,
    load_as,
    model_class,
    nested_configs,
    read_config,
    readable,
    shape_beyond_config,
    to_entry,
)
from billhook.private_paths import without_paths
from billhook.versions import versions

Way = Literal["plain", "equivalent", "shaped"]
FORMATS: dict[Way, str] = {
    "plain": "standard checkpoint: from_pretrained loads it",
    "equivalent": "standard checkpoint of an equivalent architecture, which can express the shape: from_pretrained loads it",
    "shaped": "billhook checkpoint: load it with bh.load (no config field of its class can express the shape, so from_pretrained "
    "fails)",
}


@dataclass(frozen=True, repr=False)
class Saved(Printable):
    """Result of `save`.

    Attributes:
        folder: Folder of the checkpoint.
        way: Format: `"plain"` (a standard checkpoint), `"equivalent"` (a standard checkpoint of an equivalent architecture), or
            `"shaped"` (a billhook checkpoint, for `bh.load`).
        difference: Largest difference between the logits of the model and of the reloaded model.
        megabytes: Size of the folder in 10^6 bytes.
        adapters: How LoRA adapters were merged, in one line; None without adapters.
        family: Model type of the equivalent architecture, such as `"mistral"`, or None.
    """

    folder: str
    way: Way
    difference: float
    megabytes: float
    adapters: str | None = None
    family: str | None = None

    @property
    def format(self) -> str:
        """The format, and how to load it, in words."""
        return f"{FORMATS[self.way]} (saved as {self.family})" if self.family else FORMATS[self.way]

    def _renderables(self) -> list[str]:
        return [
            f"Saved to {self.folder} ({self.megabytes:.1f} MB)",
            f"Format: {self.format}",
            f"Verified: largest logit difference {self.difference:.3g}",
        ]


@cpu_by_default()
@one_thread()
def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Preprocessor | Sequence[Preprocessor] | None = None,
    record: Mapping[str, Any] | None = None,
    probe: Probe | None = None,
) -> Saved:
    """Saves a verified Hugging Face checkpoint, reloaded and compared before it is in place.

    The save is atomic: `folder` is missing, empty, or a complete checkpoint at any time, even if the process is killed. If a
    save fails, nothing changes. An existing billhook checkpoint is replaced by two renames. If the process is killed between
    them, the old checkpoint remains next to `folder`, as `.NAME.old-` and eight hex digits, until a save replaces a newer one. If
    `folder` is a symbolic link, its target is replaced. Threads of a process save and load one after the other. The model is
    unchanged, including modes, gradients, config, and torch's random state.

    If the model's class would build different sizes from the config, the first possible format is used:

    - a standard checkpoint, whose config has different numbers of heads and `head_dim`;
    - a standard checkpoint of an equivalent architecture: a Llama whose heads do not divide its hidden size is saved as a
      Mistral. The reloaded model must have the same tensors and bitwise identical logits. The model in memory keeps its class.
      This format comes first if vLLM and llama.cpp ignore `head_dim` for the model type: a Qwen2 whose heads do not add up to
      the hidden size is saved as a SeedOss, unless a layer uses a sliding window;
    - a billhook checkpoint: config.json lists the differing sizes and integer attributes under `"billhook"`, for example per
      layer. `load` loads it. `from_pretrained` raises a RuntimeError, unless it is set to
      ignore mismatched sizes.

    If `head_dim` is empty in the config, the model's value is written.

    For a model with PEFT adapters, a copy with merged adapters is saved, as by `merge`. Layers with at least 1% zeros keep every
    zero; the others are merged in full. If part of an update is lost, a warning reports how much (nothing with `mask_adapters`).
    To handle zeros differently, merge first.

    Args:
        model: A Hugging Face model, or a module that contains one.
        folder: Output folder. It must be new, empty, or an earlier billhook checkpoint, which is replaced.
        tokenizer: Tokenizer or processor to save with the model, or a list of these.
        record: History of the model, for `billhook.json` and the model card, `README.md`. Absolute paths are reduced to file
            names, because both may be published. Numbers that JSON lacks become `"NaN"`, `"Infinity"`, and `"-Infinity"`.
            Without a record, the card has the model's origin, license, loading code, and supported engines.
        probe: Inputs for comparing logits. Defaults to random inputs of the kinds that the model accepts.

    Returns:
        Folder, format, and largest logit difference.

    Raises:
        ValueError: Before anything is written, if `folder` is not a billhook checkpoint, `record` is not plain data, the model
            does not run with `probe` or its inputs cannot be guessed, a module is wrapped by `torch.compile` (compiling in place
            is supported), or adapters cannot be merged.
        RuntimeError: If the model has no finite logits, or the logits of the reloaded model differ by more than rounding: four
            times the effect of changing every weight by its last digit. `folder` is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save(load("tiny"), f"{folder}/model", record={"note": "unchanged"})
        >>> saved.way, saved.difference
        ('plain', 0.0)
    """
    arguments = locals()
    plain = _to_plain(record or {})
    check_types(save, arguments)
    for part in model.modules():
        config = getattr(part, "active_peft_config", None)  # of a PeftModel
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: {type(config).__name__} adds prompts to the inputs, which a model checkpoint cannot contain. Save them "
                "with PEFT, or save the model without them (get_base_model())."
            )
    model = find_transformer(model)
    check_names(model)
    check_dense(model)
    preprocessors = [] if tokenizer is None else list(tokenizer) if isinstance(tokenizer, Sequence) else [tokenizer]
    for preprocessor in preprocessors:
        check_tokenizer(model, preprocessor)
    probe = probe or make_probe(model)
    check_target(folder)
    target = Path(folder).resolve()
    with lock_folder(target), temporarily_merged(model) if has_adapters(model) else nullcontext() as merged:
        check_target(folder)
        if merged is not None:
            model = cast(PreTrainedModel, merged.model)
            if merged.lost:
                warnings.warn(f"the checkpoint differs from the model: {merged.text()}", stacklevel=4)
        expected = expect(model, probe)
        origin = origin_of(str(model.config.name_or_path), model.config)
        with draft_folder(target) as draft, _untouched(model):
            way, family, difference = _write(model, expected, draft, probe)
            for preprocessor in preprocessors:
                preprocessor.save_pretrained(draft)
            adapters = None if merged is None else merged.text()
            size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
            saved = Saved(str(folder), way, difference, size / 1e6, adapters, family)
            result = asdict(saved) | {"folder": target.name}
            plain = {**origin, **plain, "versions": plain.get("versions", versions("lightning")), "saved": result}
            config = read_config(str(draft)) if family else type(model.config).from_pretrained(draft)
            (draft / CARD).write_text(card(plain, saved.format, config), encoding="utf-8")
            files = sorted([RECORD, *(path.name for path in draft.iterdir())])
            (draft / RECORD).write_text(json.dumps({**plain, "files": files}, indent=1) + "\n")
            replace_folder(draft, target)
        store_of(model).reopen(target)
        return saved


def _write(model: PreTrainedModel, expected: Tensor, draft: Path, probe: Probe) -> tuple[Way, str | None, float]:
    """Writes and verifies a model; returns format, equivalent type, and logit difference."""
    shape = state_shape(model)
    _write_weights(model, draft)
    written = (draft / "config.json").read_bytes()
    for kind, config in equivalents(model):
        config.save_pretrained(draft)
        with suppress(RuntimeError):  # different logits
            difference = verify(model, expected, draft, probe, kind)
            if difference == 0:
                return ("plain", None, 0.0) if kind is type(model) else ("equivalent", config.model_type, difference)
    (draft / "config.json").write_bytes(written)
    return ("shaped" if shape.tensors else "plain"), None, verify(model, expected, draft, probe)


def state_shape(model: PreTrainedModel) -> Shape:
    """Completes a model's config: `head_dim`, and an entry for an unusual shape."""
    vars(model.config).pop(KEY, None)  # the entry of an earlier save
    for _, config in nested_configs(model.config):
        if vars(config).get("head_dim", 0) is None:  # SGLang fails without it
            sizes = set()
            for module in model.modules():
                size = getattr(module, "head_dim", None)
                if getattr(module, "config", None) is config and type(size) is int:
                    sizes.add(size)
            config.head_dim = sizes.pop() if len(sizes) == 1 else None
    shape = shape_beyond_config(model)
    if shape.tensors:
        setattr(model.config, KEY, to_entry(shape))
    return shape


def _write_weights(model: PreTrainedModel, draft: Path) -> None:
    try:
        store_of(model).write(draft)
    except RuntimeError as error:
        names = defaultdict(list)  # of each parameter that the class does not tie
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in model.all_tied_weights_keys:
                names[id(parameter)].append(name)
        shared = next((shared[:2] for shared in names.values() if len(shared) > 1), None)
        if shared is None or "shared tensors" not in str(error):
            raise
        raise ValueError(
            f"model: {' and '.join(shared)} share a tensor that {type(model).__name__} does not tie. Copy it, for example with "
            "copy.deepcopy of a layer that is used twice."
        ) from error


def check_names(model: PreTrainedModel) -> None:
    """Raises an error if weights are renamed, so that the class would not find them."""
    for name, part in model.named_modules():
        if "_orig_mod" in part._modules:
            raise ValueError(
                f"model: {name} is wrapped by torch.compile, which renames its weights, so that its checkpoint cannot be loaded. "
                "Compile it in place, as in layer.compile()."
            )


@one_thread()
def load(folder: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """Loads a checkpoint in the transformers class of its config, without custom code.

    Args:
        folder: A folder, a Hub name, or `"tiny"`.
        dtype: Data type of the weights. `"auto"` uses the checkpoint's.

    Raises:
        ValueError: If a folder is not a checkpoint, its config has no transformers class or requires custom code, its entry
            `"billhook"` is malformed or does not match the files, or the files cannot be read.

    Example:
        >>> model = load("tiny")
        >>> model.config.num_key_value_heads, model.num_parameters()
        (8, 2754816)
    """
    check_types(load, locals())
    name = model_path(str(folder))
    check_checkpoint(name)
    kind = model_class(read_config(name), name)
    with readable(name):
        return load_as(kind, name, dtype)


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Restores the random state and config fields that saving and reloading change."""
    before = [(vars(config), dict(vars(config))) for _, config in nested_configs(model.config)]
    try:
        with forked(model.device):
            yield
    finally:
        for now, fields in before:
            now.clear()
            now.update(fields)


def _to_plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a record to plain data for JSON, without private paths."""

    def finite(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
        return value

    try:
        plain: dict[str, Any] = without_paths(json.loads(json.dumps(finite(record), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"record must be plain data (JSON): {error}") from error
    return plain
