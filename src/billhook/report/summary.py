"""Size and cost of a model, and the table of a training run."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType
from torch import nn

from billhook.adapters.merge import adapters_removed
from billhook.arguments import check_types
from billhook.display import Printable, render, text_table
from billhook.engine import cpu_by_default, is_sharded, reshard, sizes_only, zeros_of
from billhook.kv_heads.config import heads_by_layer, heads_of
from billhook.model import costs_of, find_transformer


@dataclass(frozen=True, repr=False)
class Summary(Printable):
    """Size and cost of a model; `print` shows a table.

    Attributes:
        model: Class of the model.
        params: Number of parameters without adapters; tied weights count once.
        zeros: Number of parameters that are exactly zero; None for a streamed model with files still on the Hub.
        bytes: Bytes of the parameters.
        query_heads: Query heads per block; None if blocks differ.
        kv_heads: KV heads per block; None if blocks differ.
        kv_cache_bytes: KV-cache bytes per token until sliding windows are full, in the dtype of the weights, after saving and
            loading (a converted GPT-2 keeps all heads in memory until then).
        flops: Floating-point operations of the forward pass, per token at `context` tokens, or per image.
        context: Tokens for which `flops` holds; 0 for image models.
        adapters: Parameters of PEFT adapters, such as LoRA, which no other number includes: a saved model has them merged.
        heads: Query heads and KV heads of each block, if blocks differ.
        dtype: Dtype of the weights and the KV cache.
    """

    model: str
    params: int
    zeros: int | None
    bytes: int
    query_heads: int | None
    kv_heads: int | None
    kv_cache_bytes: int | None
    flops: int | None
    context: int
    adapters: int = 0
    heads: tuple[tuple[int, int], ...] = ()
    dtype: str = ""

    def numbers(self) -> dict[str, Any]:
        """Returns the numbers that pruning and conversion change."""
        return {key: getattr(self, key) for key in ("params", "zeros", "kv_cache_bytes", "flops")}

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-compatible data."""
        return asdict(self)

    def _renderables(self) -> list[RenderableType]:
        dtype = f" in {self.dtype}" if self.dtype else ""
        per = f"token at {self.context}" if self.context else "image"
        heads = f"{self.query_heads or '?'} / {self.kv_heads or '?'}"
        if self.heads:  # blocks differ
            ranges = [(min(counts), max(counts)) for counts in zip(*self.heads, strict=True)]
            heads = " / ".join(str(most) if least == most else f"{least} to {most}" for least, most in ranges)
        adapters = [("adapter parameters", f"{self.adapters:,}")] if self.adapters else []
        rows = [
            ("model", self.model),
            ("parameters", f"{self.params:,}"),
            *adapters,
            ("zeros", "not counted" if self.zeros is None else f"{self.zeros:,} ({self.zeros / max(self.params, 1):.1%})"),
            ("size of the weights", f"{self.bytes / 1e6:,.1f} MB"),
            ("query heads / KV heads", heads),
            ("KV cache per token", "unknown" if self.kv_cache_bytes is None else f"{self.kv_cache_bytes:,} bytes{dtype}"),
            (f"forward FLOPs per {per}", "unknown" if self.flops is None else f"{self.flops:,}"),
        ]
        return [text_table(rows, aligns="<")]


@cpu_by_default()
def summary(model: nn.Module) -> Summary:
    """Counts parameters, zeros, KV-cache bytes per token, and FLOPs per token or image.

    KV-cache bytes and FLOPs come from a run on meta tensors. With PEFT adapters, the numbers are of the base model, as after
    merging. If the model is sharded, all ranks must call this together.

    Args:
        model: A Hugging Face model, or a module that contains one.

    Example:
        >>> import billhook as bh
        >>> print(bh.summary(bh.load("tiny")))
        model                           LlamaForCausalLM
        parameters                      2,754,816
        zeros                           3 (0.0%)
        size of the weights             5.5 MB
        query heads / KV heads          8 / 8
        KV cache per token              4,096 bytes in float16
        forward FLOPs per token at 512  7,602,176
    """
    check_types(summary, locals())
    model = find_transformer(model)
    reshard(model)
    every = sum(parameter.numel() for parameter in model.parameters())
    with adapters_removed(model):
        zeros = zeros_of(model)
        with sizes_only(model) if is_sharded(model) else nullcontext():
            figures = asdict(costs_of(model))
            name = type(model).__name__
            query_heads, kv_heads = heads_of(model)
            heads = () if query_heads else tuple(heads_by_layer(model))
    counted: dict[str, Any] = {"zeros": zeros, "query_heads": query_heads, "kv_heads": kv_heads, "heads": heads}
    return Summary(model=name, **figures, **counted, adapters=every - figures["params"])


def parameter_count(model: nn.Module) -> int:
    """Returns the number of parameters without adapters."""
    model = find_transformer(model)
    with adapters_removed(model):
        return sum(parameter.numel() for parameter in model.parameters())  # as `Summary.params`


@dataclass(frozen=True)
class ReportRow:
    """A row of the table: the model at a step of a training run."""

    name: str
    step: int
    numbers: dict[str, float | None]


def report_table(rows: Sequence[ReportRow], notes: Sequence[tuple[str, str]], metric: str | None, dtype: str) -> str:
    """Formats a table of rows, with their numbers and `metric` as columns, and notes below.

    Args:
        rows: The rows.
        notes: Names and texts of the notes.
        metric: Name of another metric, in the first column.
        dtype: The dtype of the KV cache.
    """
    keys = {
        "perplexity": "val_perplexity",
        "accuracy": "val_accuracy",
        "val_loss": "val_loss",
        "sparsity": "sparsity",
        "zeros": "zeros",
        "parameters": "params",
        f"KV-cache bytes/token{f' in {dtype}' if dtype else ''}": "kv_cache_bytes",
    }
    if metric is not None and metric not in keys.values():
        keys = {metric: metric} | keys
    shown = {head: key for head, key in keys.items() if any(row.numbers.get(key) is not None for row in rows)}
    if next(iter(shown), None) not in ("val_loss", "parameters"):
        shown.pop("val_loss", None)
    if "sparsity" not in shown:
        shown.pop("zeros", None)
    cells = [[row.name, row.step, *map(_number, map(row.numbers.get, shown.values()))] for row in rows]
    return render(text_table(cells, ["", "step", *shown]), *(["", text_table(notes, aligns="<")] if notes else []))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
