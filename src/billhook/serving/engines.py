"""Support of checkpoints by inference engines, from source review of their code.

`engines.json` holds the reviewed releases, their source files by model class, the classes whose config fields an engine ignores,
and the sentence of each verdict.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from transformers import PretrainedConfig

from billhook.model.config_fields import text_config
from billhook.tracing.show import name_pattern

MULTIPLES = (256, 128, 64, 32)
"""Preferred divisors of a row's length, best first.

K-quants of llama.cpp use blocks of 256, FP8 and other formats 128 or 64, and every llama.cpp format 32.
"""
GPUS = (2, 4, 8)
"""Numbers of GPUs for tensor parallelism."""
Engine = Literal["llama.cpp", "vLLM", "SGLang"]
DIFFER = "layers differ in size"
MLP_FIELDS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")
SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", *MLP_FIELDS)


@cache
def engines() -> dict[str, Any]:
    """Returns the content of `engines.json`.

    A class without a source file in an engine runs in its code for all models, which reads `head_dim` as transformers does.
    """
    return json.loads(Path(__file__).with_name("engines.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def multiple_of(length: int) -> int:
    """Returns the largest of `MULTIPLES` that divides a length, or 1.

    >>> multiple_of(1280), multiple_of(1216), multiple_of(1229)
    (256, 64, 1)
    """
    return next((multiple for multiple in MULTIPLES if length % multiple == 0), 1)


def can_split(kv_heads: int, gpus: int, exact: bool = False) -> bool:
    """Tests if GPUs can split KV heads evenly; unless `exact`, heads may be copied."""
    return kv_heads % gpus == 0 or (not exact and gpus % kv_heads == 0)


@dataclass(frozen=True)
class Verdict:
    """Support of a checkpoint by an engine. `print` shows it in one line.

    Attributes:
        engine: Name of the engine.
        supported: True or False; None if its code for this class was not reviewed.
        reason: Reviewed class and file, or the reason against it.
        notes: Further remarks, one sentence each.
    """

    engine: Literal["transformers"] | Engine
    supported: bool | None
    reason: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        word = {True: "yes", False: "no", None: "unknown"}[self.supported]
        return "; ".join([f"{word}: {self.reason}", *self.notes])


class Sizes(NamedTuple):
    """The sizes in a config that engines use; None for a missing field."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden: int | None
    mlp: tuple[int, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Sizes":
        """Reads the sizes from a config."""
        fields = {name: value for name in SIZES if type(value := _field(text_config(config), name)) is int}
        heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
        kv_heads = 1 if _field(text_config(config), "multi_query") is True else fields.get("num_key_value_heads") or heads
        head_dim = fields.get("head_dim") or (hidden // heads if heads and hidden else None)
        return cls(heads, kv_heads, head_dim, hidden, tuple(fields[name] for name in MLP_FIELDS if name in fields))

    @property
    def splits_hidden_size(self) -> bool:
        """True if head dimension x heads equals the hidden size, or if the config has no heads."""
        return None in self[:4] or (self.heads or 0) * (self.head_dim or 0) == self.hidden


def verdicts(kind: str, config: PretrainedConfig, entry: Mapping[str, Any] | None = None, zeros: bool = False) -> list[Verdict]:
    """Returns the verdicts of transformers, llama.cpp, vLLM, and SGLang for a checkpoint.

    Args:
        kind: Model class in config.json.
        config: Config of the model.
        entry: Entry `"billhook"` of config.json: a shape that no config field expresses. Defaults to None.
        zeros: If True, weights were pruned to zero.
    """
    shape = _unexpressed(entry, config) if entry else ""
    loads = f"{shape}: load it with billhook.load, because from_pretrained fails" if shape else "from_pretrained loads it"
    notes = ["sparse weights run at dense speed"] if zeros else []
    return [
        Verdict("transformers", not shape, loads),
        *(_verdict(engine, kind, config, shape, notes) for engine in get_args(Engine)),
    ]


def grouped(answers: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Returns verdicts with the names of their engines; equal verdicts are grouped."""
    names_of: dict[str, list[str]] = {}
    for verdict in answers:
        names_of.setdefault(str(verdict), []).append(verdict.engine)
    return [(", ".join(names), text) for text, names in names_of.items()]


def _field(config: PretrainedConfig, name: str) -> Any:  # noqa: ANN401 - whatever a config holds
    try:
        return getattr(config, name, None)
    except Exception:  # a list with a number per layer, for which transformers raises
        return None


def _unexpressed(entry: Mapping[str, Any], config: PretrainedConfig) -> str:
    """Returns the reason why the shape under `"billhook"` in config.json needs that entry."""
    shape = entry.get("shape", {})
    if shape.get("handed"):
        return "attention modules store fewer KV heads than their class computes with"
    sizes_of = defaultdict[str, list[tuple[int, ...]]](list)
    for name, size in shape.get("tensors", {}).items():
        sizes_of[name_pattern(name)].append(tuple(size))
    layers = _field(text_config(config), "num_hidden_layers")
    differ = [name for name, sizes in sizes_of.items() if "*" in name and (len(set(sizes)) > 1 or len(sizes) != layers)]
    return DIFFER if differ else "no config field expresses its sizes"


def _verdict(engine: Engine, kind: str, config: PretrainedConfig, shape: str, notes: Sequence[str]) -> Verdict:
    review, sizes = engines(), Sizes.of(config)
    sentences, release = review["sentences"], review["releases"][engine]
    if engine == "llama.cpp" and (why := shape if shape == DIFFER else "" if shape else misread(kind, config)):
        if limitation := deci_limitation(config):
            return Verdict(engine, False, f"{why}, and {limitation}")
        return Verdict(engine, True, sentences["deci"].format(reason=why, release=release), tuple(notes))
    if shape:
        return Verdict(engine, False, sentences["billhook_shape"].format(shape=shape))
    if kind not in review["files"]:
        return Verdict(engine, None, sentences["unknown"].format(kind=kind))
    files, every = review["files"][kind], review["all_models"]
    file = files.get(engine) or every[engine]
    runs = kind if engine in files else every["class"]
    cited = f"{runs}, {file} ({release})"
    if kind in review["computes_head_dim"][engine] and not sizes.splits_hidden_size:
        return Verdict(engine, False, sentences["computes_head_dim"].format(cited=cited, **sizes._asdict()))
    if engine != "llama.cpp":
        if rope_factors(config) and (runs not in review["reads_longrope"][engine] or _extends(config)):
            return Verdict(engine, False, sentences["reads_longrope"].format(cited=cited))
        return Verdict(engine, True, cited, (_parallel(sizes, file in review["copies_no_kv_heads"]), *notes))
    for field in review["has_no_biases"][engine].get(kind, ()):
        if _field(config, field) is True:
            return Verdict(engine, False, sentences["has_no_biases"].format(cited=cited, field=field))
    window, types = _field(config, "sliding_window"), _field(config, "layer_types")
    has_window = type(window) is int and (not isinstance(types, list) or "sliding_attention" in types)
    windows = (
        [sentences["sees_no_window"].format(window=window)] if has_window and kind in review["sees_no_window"][engine] else []
    )
    return Verdict(engine, True, cited, (*windows, _quants(sizes), *notes))


def misread(kind: str, config: PretrainedConfig) -> str:
    """Returns the reason why llama.cpp's converter misreads a model, or an empty string.

    The architecture `deci` may compute such a model (see `deci_limitation`).
    """
    review = engines()
    written, sentences = review["reads_longrope"], review["sentences"]
    if config.model_type in review["deci"]["instead_of"] and not Sizes.of(config).splits_hidden_size:
        return str(sentences["instead_of"])
    if _rope(config).get("rope_type") != "longrope" or kind in written["llama.cpp's converter"]:
        return ""
    return "" if kind in written["llama.cpp"] and rope_factors(config) else str(sentences["drops_longrope"])


def rope_factors(config: PretrainedConfig) -> list[float] | None:
    """Returns longrope's divisors of rotary frequencies if they hold at all lengths.

    None if the config has another type, other factors for long texts, or scaled attention.
    """
    rope = _rope(config)
    equal = rope.get("rope_type") == "longrope" and rope.get("short_factor") == rope.get("long_factor")
    return rope.get("short_factor") if equal and rope.get("attention_factor") == 1 else None


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the rotary parameters of a config, empty if it has none."""
    rope = _field(text_config(config), "rope_parameters")
    return rope if isinstance(rope, dict) else {}


def _extends(config: PretrainedConfig) -> bool:
    """Tests if the maximum length exceeds longrope's original length.

    vLLM and SGLang then scale attention.
    """
    length = _field(text_config(config), "max_position_embeddings")
    return bool(length > _rope(config).get("original_max_position_embeddings", length))


def deci_limitation(config: PretrainedConfig) -> str | None:
    """Returns the reason why llama.cpp's `deci` cannot compute a model, or None.

    Its layers may differ, and it computes the same as a Llama, and so as every family that differs only in storage order.
    """
    deci, rope = engines()["deci"], _rope(config)
    needs = {"model_type": config.model_type, "hidden_act": getattr(config, "hidden_act", None)}
    needs["rope_type"] = "default" if rope_factors(config) else rope.get("rope_type", "default")
    needs |= {"partial_rotary_factor": rope.get("partial_rotary_factor", 1)}
    unsupported = next((field for field, value in needs.items() if value not in deci["supports"][field]), None)
    return deci["limitations"][unsupported].format(**needs) if unsupported else None


def _quants(sizes: Sizes) -> str:
    """Returns the rows whose length K-quants do not divide, with the largest divisor."""
    rows = {"hidden size": sizes.hidden or 0, "heads": (sizes.heads or 0) * (sizes.head_dim or 0)}
    rows |= {f"MLP width {number}" if number > 1 else "MLP width": n for number, n in enumerate(sizes.mlp, 1)}
    short = []
    for name, size in rows.items():
        if (best := multiple_of(size)) != MULTIPLES[0]:
            short.append(f"{size:,} ({name}, {f'a multiple of {best}' if best > 1 else 'F16'})")
    if not short:
        return f"K-quants apply to all rows (multiples of {MULTIPLES[0]})"
    return f"K-quants need multiples of {MULTIPLES[0]}; types with more bits replace them in rows of {_listed(short)}"


def _parallel(sizes: Sizes, exact: bool) -> str:
    """Returns the possible numbers of GPUs, and the reason against others."""
    reasons = defaultdict[str, list[str]](list)
    for gpus in GPUS:
        parts = [f"{sizes.heads} query heads"] if (sizes.heads or 0) % gpus else []
        if sizes.kv_heads and not can_split(sizes.kv_heads, gpus, exact):
            parts.append(f"{sizes.kv_heads} KV head{'s' * (sizes.kv_heads > 1)}")
        parts += [f"an MLP width of {width:,}" for width in sizes.mlp if width % gpus]
        reasons[_listed(parts)].append(str(gpus))
    legal = reasons.pop("", None)
    first = f"tensor parallelism over {_listed(legal, 'or')} GPUs" if legal else "one GPU"
    return ", ".join([first, *(f"not {_listed(gpus, 'or')} ({reason})" for reason, gpus in reasons.items())])


def _listed(words: Sequence[str], last: str = "and") -> str:
    *most, end = words or [""]
    return f"{', '.join(most)} {last} {end}" if most else end
