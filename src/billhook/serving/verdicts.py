"""Says which engines serve a checkpoint and why, by its config and by what was read in their code; nothing is run."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from billhook.model.config_fields import text_config
from billhook.serving.readings import (
    FOLDERS,
    GPUS,
    MULTIPLES,
    READ_IN,
    Engine,
    Reading,
    multiple_of,
    reading,
    refused_by_deci,
    shares,
)
from billhook.tracing.show import pattern

FFN = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")
NO_WINDOW = ("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Classes whose windows llama.cpp does not know."""
DIFFER = "layers differ in size"
MISREAD = "its converter takes the width of heads for hidden size / heads"
OUTPUT_BIASES = ("attention_out_bias", "mlp_bias")


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


@dataclass(frozen=True)
class Sizes:
    """The sizes that engines read of a config: numbers of heads, width of one, hidden size, widths of feed-forward layers."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden: int | None
    ffn: tuple[int, ...]

    @property
    def shared_out(self) -> bool:
        """True if heads are as wide as the hidden size shared among them, and where a config says no heads."""
        return None in (self.heads, self.head_dim, self.hidden) or (self.heads or 0) * (self.head_dim or 0) == self.hidden

    @property
    def rows(self) -> dict[str, int]:
        """How many numbers a row of the weights has, by what it belongs to."""
        together = (self.heads or 0) * (self.head_dim or 0)
        found = {"hidden size": self.hidden or 0, "heads": together, "feed-forward width": 0}
        found |= {"feed-forward width" if i == 0 else f"feed-forward width {i + 1}": width for i, width in enumerate(self.ffn)}
        return {name: size for name, size in found.items() if size}


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
    return [Verdict("transformers", not unsaid, loads), *(_verdict(one, kind, config, unsaid, notes) for one in get_args(Engine))]


def told(found: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Returns names of engines and what is said of them, once where that is the same."""
    alike: dict[str, list[str]] = {}
    for one in found:
        alike.setdefault(str(one), []).append(one.engine)
    return [(", ".join(engines), text) for text, engines in alike.items()]


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Returns what engines read of a config, or of the text model's in it."""
    text = text_config(config)

    def number(*names: str) -> int | None:
        return next((value for name in names if type(value := _field(text, name)) is int), None)

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    computed = hidden // heads if heads and hidden else None
    kv_heads = 1 if _field(text, "multi_query") is True else number("num_key_value_heads") or heads
    ffn = tuple(value for name in FFN if type(value := _field(text, name)) is int)
    return Sizes(heads, kv_heads, number("head_dim") or computed, hidden, ffn)


def _field(config: PretrainedConfig, name: str) -> object:
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
        alike[pattern(name)].append(tuple(size))
    layers = _field(text_config(config), "num_hidden_layers")
    differ = [name for name, found in alike.items() if "*" in name and (len(set(found)) > 1 or len(found) != layers)]
    return DIFFER if differ else "no field of the config says its sizes"


def _verdict(engine: Engine, kind: str, config: PretrainedConfig, unsaid: str, notes: Sequence[str]) -> Verdict:
    found, sizes = reading(kind, engine), sizes_of(config)
    other = unsaid == DIFFER or (not unsaid and misread(config))
    if engine == "llama.cpp" and other and refused_by_deci(config) is None:
        file = f"{FOLDERS[engine]}/deci.cpp ({READ_IN[engine]})"
        why = f"{unsaid or MISREAD}, as GGUF of its architecture deci, {file}, which billhook export --gguf writes"
        return Verdict(engine, True, why, tuple(notes))
    if unsaid:
        return Verdict(engine, False, f"{unsaid}, and what it builds follows from config.json alone, the same for all layers")
    if found is None:
        return Verdict(engine, None, f"{kind} was not looked up")
    cited = f"{found.kind}, {found.file} ({READ_IN[engine]})"
    if not (sizes.shared_out or found.reads_head_dim):
        width = f"hidden size / heads, {sizes.hidden:,} / {sizes.heads:,}"
        return Verdict(engine, False, f"heads are {sizes.head_dim:,} wide, and {cited} takes {width}")
    if engine != "llama.cpp":
        return Verdict(engine, True, cited, (_parallel(sizes, found, engine), *notes))
    extra = [name for name in OUTPUT_BIASES if kind == "SeedOssForCausalLM" and _field(config, name) is True]
    if extra:
        return Verdict(engine, False, f"{cited} has no biases for {extra[0]}")
    return Verdict(engine, True, cited, (*_windows(kind, config), _quants(sizes), *notes))


def misread(config: PretrainedConfig) -> bool:
    """Tells whether llama.cpp's converter takes heads for wider or narrower than they are: Phi-3's for hidden size / heads."""
    return config.model_type == "phi3" and not sizes_of(config).shared_out


def _windows(kind: str, config: PretrainedConfig) -> Iterator[str]:
    """Says to how many tokens llama.cpp is right, where it sees through no window."""
    window, types = _field(config, "sliding_window"), _field(config, "layer_types")
    everywhere = not isinstance(types, list) or "sliding_attention" in types
    if kind in NO_WINDOW and type(window) is int and everywhere:
        yield f"right up to {window:,} tokens, as it sees through no window"


def _quants(sizes: Sizes) -> str:
    """Names the rows that K-quants do not divide, and what does."""
    short = [f"{size:,} ({name}, {_multiple(size)})" for name, size in sizes.rows.items() if size % MULTIPLES[0]]
    if not short:
        return f"K-quants divide all rows by {MULTIPLES[0]}"
    return f"K-quants, for multiples of {MULTIPLES[0]}, give way to types with more bits in rows of {_listed(short)}"


def _multiple(size: int) -> str:
    """Says what a row is a multiple of; where it is of none, llama.cpp keeps it in F16."""
    multiple = multiple_of(size)
    return f"a multiple of {multiple}" if multiple > 1 else "F16"


def _parallel(sizes: Sizes, found: Reading, engine: Engine) -> str:
    """Says how many GPUs may share each layer, and what is in the way of others."""
    exact = found.generic and engine == "SGLang"  # srt/models/transformers.py divides the KV heads
    refused = {gpus: why for gpus in GPUS if (why := _unshared(sizes, gpus, exact))}
    legal = [gpus for gpus in GPUS if gpus not in refused]
    parts = [f"tensor parallelism over {_listed([str(gpus) for gpus in legal], 'or')} GPUs"] if legal else ["one GPU"]
    because = dict[str, list[str]]()
    for gpus, why in refused.items():
        because.setdefault(why, []).append(str(gpus))
    return ", ".join([*parts, *(f"not {_listed(gpus, 'or')} ({why})" for why, gpus in because.items())])


def _unshared(sizes: Sizes, gpus: int, exact: bool = False) -> str:
    """Says what a number of GPUs cannot share; `exact`, if KV heads are not copied where they are fewer."""
    parts = []
    if sizes.heads and sizes.heads % gpus:
        parts.append(f"{sizes.heads} query heads")
    if sizes.kv_heads and not shares(sizes.kv_heads, gpus, exact):
        parts.append(f"{sizes.kv_heads} KV head{'s' * (sizes.kv_heads > 1)}")
    parts += [f"a feed-forward width of {width:,}" for width in sizes.ffn if width % gpus]
    return _listed(parts)


def _listed(words: Sequence[str], last: str = "and") -> str:
    *most, end = words or [""]
    return f"{', '.join(most)} {last} {end}" if most else end
