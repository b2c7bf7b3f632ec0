"""Says which engines serve a checkpoint and why, by its config and by what was read in their code; nothing is run.

What was read lies in `engines.json`: releases, files by the class that config.json names, the classes of which an engine reads
less than their configs say, and a sentence for each verdict.
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
"""What the length of a row is best a multiple of, the best first.

K-quants of llama.cpp take blocks of 256, FP8 and other formats 128 or 64, and all that llama.cpp has 32.
"""
GPUS = (2, 4, 8)
"""How many GPUs may share each layer (tensor parallelism)."""
Engine = Literal["llama.cpp", "vLLM", "SGLang"]
DIFFER = "layers differ in size"
FFN = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")
SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", *FFN)


@cache
def engines() -> dict[str, Any]:
    """Returns what was read.

    A class without a file of its own in an engine runs there in code for all models, which takes `head_dim` as transformers does.
    """
    return json.loads(Path(__file__).with_name("engines.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def multiple_of(length: int) -> int:
    """Returns the largest of `MULTIPLES` that a length is a multiple of; 1 if it is of none.

    >>> multiple_of(1280), multiple_of(1216), multiple_of(1229)
    (256, 64, 1)
    """
    return next((multiple for multiple in MULTIPLES if length % multiple == 0), 1)


def shares(kv_heads: int, gpus: int, exact: bool = False) -> bool:
    """Tells whether a number of GPUs can share KV heads; unless `exact`, each may have a copy of a head with others."""
    return kv_heads % gpus == 0 or (not exact and gpus % kv_heads == 0)


@dataclass(frozen=True)
class Verdict:
    """An answer to whether an engine serves a checkpoint; `print` shows it in a line.

    Attributes:
        engine: Which.
        serves: True or False; None if its code was not read for this class.
        why: The class and file that were read, or what is in the way.
        notes: What else matters there, a sentence each.
    """

    engine: Literal["transformers"] | Engine
    serves: bool | None
    why: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        word = {True: "yes", False: "no", None: "unknown"}[self.serves]
        return "; ".join([f"{word}: {self.why}", *self.notes])


class Sizes(NamedTuple):
    """The sizes that engines read of a config, or of the text model's in it; None where it says none."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden: int | None
    ffn: tuple[int, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Sizes":
        """Reads them."""
        fields = {name: value for name in SIZES if type(value := _field(text_config(config), name)) is int}
        heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
        kv_heads = 1 if _field(text_config(config), "multi_query") is True else fields.get("num_key_value_heads") or heads
        head_dim = fields.get("head_dim") or (hidden // heads if heads and hidden else None)
        return cls(heads, kv_heads, head_dim, hidden, tuple(fields[name] for name in FFN if name in fields))

    @property
    def shared_out(self) -> bool:
        """True if heads are as wide as the hidden size shared among them, and where a config says no heads."""
        return None in self[:4] or (self.heads or 0) * (self.head_dim or 0) == self.hidden


def verdicts(kind: str, config: PretrainedConfig, entry: Mapping[str, Any] | None = None, zeros: bool = False) -> list[Verdict]:
    """Says for transformers, llama.cpp, vLLM and SGLang whether they serve a checkpoint.

    Args:
        kind: The class that config.json names.
        config: The config.
        entry: What stands in config.json under `"billhook"`, if anything does: a shape that no field of the config says.
        zeros: Whether weights were pruned to zero.
    """
    unsaid = _unsaid(entry, config) if entry else ""
    loads = f"{unsaid}: billhook.load loads it, plain from_pretrained refuses it" if unsaid else "plain from_pretrained loads it"
    notes = ["zeros run at dense speed"] if zeros else []
    return [
        Verdict("transformers", not unsaid, loads),
        *(_verdict(engine, kind, config, unsaid, notes) for engine in get_args(Engine)),
    ]


def told(answers: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Returns names of engines and what is said of them, once where that is the same."""
    alike: dict[str, list[str]] = {}
    for verdict in answers:
        alike.setdefault(str(verdict), []).append(verdict.engine)
    return [(", ".join(names), text) for text, names in alike.items()]


def _field(config: PretrainedConfig, name: str) -> Any:  # noqa: ANN401 - whatever a config holds
    try:
        return getattr(config, name, None)
    except Exception:  # a number for each layer, which transformers then refuses to say
        return None


def _unsaid(entry: Mapping[str, Any], config: PretrainedConfig) -> str:
    """Says what no config says of the shape under `"billhook"` in config.json."""
    shape = entry.get("shape", {})
    if shape.get("handed"):
        return "attentions store fewer KV heads than their class computes with"
    alike = defaultdict[str, list[tuple[int, ...]]](list)
    for name, size in shape.get("tensors", {}).items():
        alike[name_pattern(name)].append(tuple(size))
    layers = _field(text_config(config), "num_hidden_layers")
    differ = [name for name, sizes in alike.items() if "*" in name and (len(set(sizes)) > 1 or len(sizes) != layers)]
    return DIFFER if differ else "no field of the config says its sizes"


def _verdict(engine: Engine, kind: str, config: PretrainedConfig, unsaid: str, notes: Sequence[str]) -> Verdict:
    read, sizes = engines(), Sizes.of(config)
    says, release = read["says"], read["releases"][engine]
    if engine == "llama.cpp" and (unsaid == DIFFER or (not unsaid and misread(config))) and refused_by_deci(config) is None:
        return Verdict(engine, True, says["deci"].format(why=unsaid or says["instead_of"], release=release), tuple(notes))
    if unsaid:
        return Verdict(engine, False, says["unsaid"].format(unsaid=unsaid))
    if kind not in read["files"]:
        return Verdict(engine, None, says["unknown"].format(kind=kind))
    files, every = read["files"][kind], read["all_models"]
    file = files.get(engine) or every[engine]
    cited = f"{kind if engine in files else every['class']}, {file} ({release})"
    if kind in read["computes_head_dim"][engine] and not sizes.shared_out:
        return Verdict(engine, False, says["computes_head_dim"].format(cited=cited, **sizes._asdict()))
    if engine != "llama.cpp":
        return Verdict(engine, True, cited, (_parallel(sizes, file in read["copies_no_kv_heads"]), *notes))
    for field in read["has_no_biases"][engine].get(kind, ()):
        if _field(config, field) is True:
            return Verdict(engine, False, says["has_no_biases"].format(cited=cited, field=field))
    window, types = _field(config, "sliding_window"), _field(config, "layer_types")
    seen = type(window) is int and (not isinstance(types, list) or "sliding_attention" in types)
    windows = [says["sees_no_window"].format(window=window)] if seen and kind in read["sees_no_window"][engine] else []
    return Verdict(engine, True, cited, (*windows, _quants(sizes), *notes))


def misread(config: PretrainedConfig) -> bool:
    """Tells whether llama.cpp's converter takes heads for wider or narrower than they are: Phi-3's for hidden size / heads."""
    return config.model_type in engines()["deci"]["instead_of"] and not Sizes.of(config).shared_out


def refused_by_deci(config: PretrainedConfig) -> str | None:
    """Says why llama.cpp's `deci`, whose layers may differ, does not compute a model, by its config; None if it does.

    It computes what a Llama does, and so all families that do, up to the order in which they store it.
    """
    deci, rope = engines()["deci"], getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    needs = {"model_type": config.model_type, "hidden_act": getattr(config, "hidden_act", None)}
    needs |= {"rope_type": rope.get("rope_type", "default"), "partial_rotary_factor": rope.get("partial_rotary_factor", 1)}
    refused = next((field for field, value in needs.items() if value not in deci["takes"][field]), None)
    return deci["refuses"][refused].format(rope=rope, **needs) if refused else None


def _quants(sizes: Sizes) -> str:
    """Names the rows that K-quants do not divide, and what does; what no type divides, llama.cpp keeps in F16."""
    rows = {"hidden size": sizes.hidden or 0, "heads": (sizes.heads or 0) * (sizes.head_dim or 0)}
    rows |= {f"feed-forward width {number}" if number > 1 else "feed-forward width": n for number, n in enumerate(sizes.ffn, 1)}
    best = {name: multiple_of(size) for name, size in rows.items() if size % MULTIPLES[0]}
    if not best:
        return f"K-quants divide all rows by {MULTIPLES[0]}"
    short = [f"{rows[name]:,} ({name}, {f'a multiple of {n}' if n > 1 else 'F16'})" for name, n in best.items()]
    return f"K-quants, for multiples of {MULTIPLES[0]}, give way to types with more bits in rows of {_listed(short)}"


def _parallel(sizes: Sizes, exact: bool) -> str:
    """Says how many GPUs may share each layer, and why others may not; `exact`, if KV heads are not copied."""
    because = defaultdict[str, list[str]](list)
    for gpus in GPUS:
        parts = [f"{sizes.heads} query heads"] if (sizes.heads or 0) % gpus else []
        if sizes.kv_heads and not shares(sizes.kv_heads, gpus, exact):
            parts.append(f"{sizes.kv_heads} KV head{'s' * (sizes.kv_heads > 1)}")
        parts += [f"a feed-forward width of {width:,}" for width in sizes.ffn if width % gpus]
        because[_listed(parts)].append(str(gpus))
    legal = because.pop("", None)
    first = f"tensor parallelism over {_listed(legal, 'or')} GPUs" if legal else "one GPU"
    return ", ".join([first, *(f"not {_listed(gpus, 'or')} ({why})" for why, gpus in because.items())])


def _listed(words: Sequence[str], last: str = "and") -> str:
    *most, end = words or [""]
    return f"{', '.join(most)} {last} {end}" if most else end
