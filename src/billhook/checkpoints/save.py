"""Saves and loads Hugging Face checkpoints: written, reloaded and compared before they are moved into place."""

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.adapters.merge import has_adapters, temporarily_merged
from billhook.arguments import check_types
from billhook.assets import model_path
from billhook.atomic_folder import RECORD, check_name, check_target, draft_folder, folder_size, recover_folder, replace_folder
from billhook.checkpoints.card import card
from billhook.checkpoints.equivalent import equivalents, say_head_dim, transposed
from billhook.checkpoints.origin import CARD, origin_of
from billhook.checkpoints.verify import Probe, expect, make_probe, verify
from billhook.display import Printable
from billhook.engine.state import forked
from billhook.engine.store import store_of
from billhook.folder_lock import lock_folder
from billhook.model.config_fields import nested_configs
from billhook.model.find import check_dense, find_transformer
from billhook.model.meta import check_checkpoint, model_class, read_config
from billhook.model.preprocessors import Preprocessor
from billhook.model.shape import KEY, shape_beyond_config, to_entry
from billhook.model.shaped import load_as, readable
from billhook.private_paths import without_paths
from billhook.sparsity.learned_masks import with_learned_masks
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


def save(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Preprocessor | Sequence[Preprocessor] | None = None,
    record: Mapping[str, Any] | None = None,
    probe: Probe | None = None,
) -> Saved:
    """Saves a model as a Hugging Face checkpoint that is known to load: written to a draft, reloaded, compared, moved into place.

    At every moment `folder` is missing, empty or a complete checkpoint, also if the process is killed, and a save that fails
    leaves everything as it was. A checkpoint that billhook wrote there earlier is replaced, by two renames; a process killed
    right between them leaves nothing at `folder`, and the earlier checkpoint, complete, next to it as `.NAME.draft-old`, which
    the next save puts back first. Where `folder` is a symbolic link, its target is replaced and the link stays. The model is left
    as it was: modes, gradients, config, and torch's random state too.

    Where the model's class builds tensors of other sizes from the model's config, the first of these ways is taken that works:

    - its class builds them from a config with other numbers of heads and with `head_dim`: that config is written;
    - a family that computes the same builds them: a Llama whose heads do not divide its width is saved as a Mistral, a GPT-2 with
      one KV head as a GPTBigCode. The reloaded model must have the same tensors and give the same logits, bit for bit, except
      for rounding where linears are transposed. The model itself stays in its class. Where vLLM and llama.cpp read no `head_dim`
      in the model's own family, this comes first: a Qwen2 whose heads are not together as wide as its hidden size is saved as a
      SeedOss, if no layer sees through a window;
    - otherwise config.json reports under `"billhook"` which sizes and whole-number attributes differ (between layers, for
      example), and which linears store fewer heads than they give, and `load` loads it. Plain `from_pretrained` refuses it with
      a RuntimeError, unless it is asked to ignore mismatched sizes.

    A field `head_dim` that a config leaves empty is written as the number that the model has.

    Of a model with PEFT's adapters attached, a copy is saved, with the adapters merged as by `merge`: in linears of which 1 % or
    more is zero, every zero stays, and the others are merged in full. If part of the adapters' product is left out, a warning
    reports how much; under `mask_adapters` it is nothing. To keep other zeros, or none, merge first.

    Args:
        model: A Hugging Face model, or a module that holds one.
        folder: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        tokenizer: Saved along; or a processor, or several of them.
        record: The history of the model, for `billhook.json` and what of it the model card shows, `README.md`. Absolute paths in
            it become the names of their files, as both may be published. Numbers that JSON lacks become `"NaN"`, `"Infinity"`
            and `"-Infinity"`. Without one the card says what the model was made of, its licence, how it is loaded and which
            engines run it.
        probe: Inputs on which the logits are compared; by default random ones of the kinds that the model reads.

    Returns:
        Where it is, the way it was saved, and the largest difference of logits.

    Raises:
        ValueError: Before anything is written, if something that billhook did not write stands at `folder`, `record` is not
            plain data, the model does not run with `probe`, or comes without it and its inputs cannot be guessed, a part of it
            is wrapped by `torch.compile` (compiled in place is right), or adapters cannot be merged.
        RuntimeError: If the model computes no finite logits, or the reloaded one others, by more than rounding explains: four
            times the effect of changing every weight by its last digit. Nothing is written at `folder`.

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
    check_name(folder)
    target = Path(folder).resolve()
    _check_no_prompts(model)
    model = find_transformer(model)
    check_names(model)
    check_dense(model)
    probe = probe or make_probe(model)
    check_target(folder)
    with lock_folder(target):
        recover_folder(target)
        check_target(folder)
        if not has_adapters(model):
            return _save(model, str(folder), target, tokenizer, plain, probe)
        with temporarily_merged(model) as merged:
            if merged.lost:
                warnings.warn(f"the checkpoint does not compute what the model does: {merged.text()}", stacklevel=2)
            return _save(cast(PreTrainedModel, merged.model), str(folder), target, tokenizer, plain, probe, merged.text())


def _save(
    model: PreTrainedModel,
    folder: str,
    target: Path,
    tokenizer: Preprocessor | Sequence[Preprocessor] | None,
    plain: dict[str, Any],
    probe: Probe,
    adapters: str | None = None,
) -> Saved:
    """Saves a model without adapters to a folder that is claimed, with a record in plain data that says what was merged."""
    expected, origin = expect(model, probe), origin_of(str(model.config.name_or_path), model.config)
    with draft_folder(target) as draft, _untouched(model), with_learned_masks(model):
        way, family, difference = _write(model, expected, draft, probe)
        for preprocessor in [] if tokenizer is None else tokenizer if isinstance(tokenizer, Sequence) else [tokenizer]:
            preprocessor.save_pretrained(draft)
        saved = Saved(folder, way, difference, folder_size(draft) / 1e6, adapters, family)
        said = asdict(saved) | {"folder": target.name}
        plain = {**origin, **plain, "versions": plain.get("versions", versions("lightning")), "saved": said}
        config = read_config(str(draft)) if family else type(model.config).from_pretrained(draft)
        (draft / CARD).write_text(card(plain, saved.format, config), encoding="utf-8")
        files = sorted([RECORD, *(path.name for path in draft.iterdir())])
        (draft / RECORD).write_text(json.dumps({**plain, "files": files}, indent=1) + "\n")
        replace_folder(draft, target)
    store_of(model).reopen(target)
    return saved


def _write(model: PreTrainedModel, expected: Tensor, draft: Path, probe: Probe) -> tuple[Way, str | None, float]:
    """Saves and verifies the model; returns the way, the family where it is another, and the largest difference of logits."""
    vars(model.config).pop(KEY, None)  # an older report
    say_head_dim(model)
    shape = shape_beyond_config(model)
    if shape.tensors:
        setattr(model.config, KEY, to_entry(shape))
    _write_weights(model, draft)
    written = (draft / "config.json").read_bytes()
    for kind, config in equivalents(model):
        if to_transpose := transposed(model, kind):
            _write_weights(model, draft, to_transpose)
        config.save_pretrained(draft)
        with suppress(RuntimeError):  # other logits
            difference = verify(model, expected, draft, probe, kind)
            if difference == 0 or to_transpose:  # transposed linears round otherwise
                return ("plain", None, 0.0) if kind is type(model) else ("equivalent", config.model_type, difference)
        if to_transpose:
            _write_weights(model, draft)
    (draft / "config.json").write_bytes(written)
    return ("shaped" if shape.tensors else "plain"), None, verify(model, expected, draft, probe)


def _write_weights(model: PreTrainedModel, draft: Path, to_transpose: Collection[str] = ()) -> None:
    """Writes config and weights, some transposed, into a folder that is empty but for what was written so before."""
    try:
        store_of(model).write(draft, to_transpose)
    except RuntimeError as error:
        if "shared tensors" not in str(error) or (shared := _shared(model)) is None:
            raise
        raise ValueError(
            f"model: {' and '.join(shared)} are one tensor, and {type(model).__name__} does not tie them: give each its own, "
            "as by copy.deepcopy of a layer that is used twice"
        ) from error


def _shared(model: PreTrainedModel) -> list[str] | None:
    """Names two parameters that are one tensor, although their class does not tie them."""
    names = defaultdict[int, list[str]](list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in model.all_tied_weights_keys:
            names[id(parameter)].append(name)
    return next((shared[:2] for shared in names.values() if len(shared) > 1), None)


def way_of(model: PreTrainedModel) -> tuple[Way, PretrainedConfig]:
    """Says how `save` writes a model, if the logits are the same, and the config that then says its shape; no values are read."""
    for kind, config in equivalents(model):
        return ("plain" if kind is type(model) else "equivalent"), config
    return ("shaped" if shape_beyond_config(model).tensors else "plain"), model.config


def _check_no_prompts(module: nn.Module) -> None:
    """Refuses prompts that PEFT puts before a model's inputs, as no weights of the model can hold them."""
    for part in module.modules():
        config = getattr(part, "active_peft_config", None)  # of a PeftModel
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: {type(config).__name__} puts prompts before the inputs, which a plain checkpoint cannot hold: "
                "save them with PEFT, or the model without them (get_base_model())"
            )


def check_names(model: PreTrainedModel) -> None:
    """Refuses a model in which weights have names that its class would not find."""
    for name, part in model.named_modules():
        if "_orig_mod" in part._modules:
            raise ValueError(
                f"model: {name} is wrapped by torch.compile, which renames its weights, so that no checkpoint of it loads: "
                "compile it in place, as in layer.compile()"
            )


def load(folder: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """Loads a checkpoint in the class of transformers that its config names; no code that it brings is run.

    Args:
        folder: A folder, a hub name, or `"tiny"`.
        dtype: The dtype of the weights, `"auto"` for the checkpoint's own.

    Raises:
        ValueError: If a folder is not a checkpoint, its config names no class that transformers has or asks for code, what the
            config reports under `"billhook"` is not as `save` writes it or does not fit the files, or these cannot be read.

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
    """Puts back what saving and reloading change: torch's random state, and dtype and class in the config."""
    before = [(vars(config), dict(vars(config))) for _, config in nested_configs(model.config)]
    try:
        with forked(model.device):
            yield
    finally:
        for now, fields in before:
            now.clear()
            now.update(fields)


def _to_plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the record to plain data for JSON, without private paths, as it may be published."""

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
        raise ValueError(f"record: {RECORD} holds plain data only (JSON): {error}") from error
    return plain
