"""Size and cost of a model, and a table of them before and after."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType
from torch import nn

from billhook.adapters.merge import adapters_removed
from billhook.arguments import check_types
from billhook.checkpoints.equivalent import cache_as_saved
from billhook.display import Printable, render, text_table
from billhook.engine.sharding import is_sharded, reshard, sizes_only
from billhook.engine.zeros import zeros_of
from billhook.kv_heads.config import heads_by_layer, heads_of
from billhook.model.costs import costs_of
from billhook.model.find import find_transformer


@dataclass(frozen=True, repr=False)
class Summary(Printable):
    """Size and cost of a model; `print` shows a table.

    Attributes:
        model: The model's class.
        params: Parameters, without those of adapters; tied ones count once.
        zeros: Parameters that are exactly zero; None for a streamed model of which files are still on a hub.
        bytes: Bytes of these parameters.
        query_heads: Query heads of a layer, where all layers have the same number.
        kv_heads: Key/value heads of a layer, where all layers have the same number.
        kv_cache_bytes: Bytes that the key/value cache grows by with each token, until sliding windows are full, in the dtype of
            the weights, once the model is saved and loaded: a GPT-2 with one KV head keeps all its heads in memory until then.
        flops: Floating-point operations of the forward pass, per token, at `context` tokens; of a model of images, of one image.
        context: Tokens for which `flops` holds; 0 for a model of images.
        adapters: Parameters of PEFT's adapters, such as LoRA's, which no other number counts: a saved model has them merged.
        heads: Query heads and key/value heads of each layer, where layers differ.
        dtype: The dtype of the weights, in which the key/value cache is counted.
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
        """Returns the numbers that change when a model is pruned or converted."""
        return {key: getattr(self, key) for key in ("params", "zeros", "kv_cache_bytes", "flops")}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)

    def _renderables(self) -> list[RenderableType]:
        dtype = f" in {self.dtype}" if self.dtype else ""
        per = f"token at {self.context}" if self.context else "image"
        adapters = [("of adapters, besides", f"{self.adapters:,}")] if self.adapters else []
        rows = [
            ("model", self.model),
            ("parameters", f"{self.params:,}"),
            *adapters,
            ("zeros", "not counted" if self.zeros is None else f"{self.zeros:,} ({self.zeros / max(self.params, 1):.1%})"),
            ("size of the weights", f"{self.bytes / 1e6:,.1f} MB"),
            ("query heads / KV heads", self._heads()),
            ("KV cache per token", "unknown" if self.kv_cache_bytes is None else f"{self.kv_cache_bytes:,} bytes{dtype}"),
            (f"forward FLOPs per {per}", "unknown" if self.flops is None else f"{self.flops:,}"),
        ]
        return [text_table(rows, aligns="<")]

    def _heads(self) -> str:
        """Returns how many heads of each kind layers have, from the fewest to the most."""
        if not self.heads:
            return f"{self.query_heads or '?'} / {self.kv_heads or '?'}"
        ranges = [(min(counts), max(counts)) for counts in zip(*self.heads, strict=True)]
        return " / ".join(str(most) if least == most else f"{least} to {most}" for least, most in ranges)


def summary(model: nn.Module) -> Summary:
    """Counts parameters, zeros, KV-cache bytes per token and FLOPs per token or image, the last two by a run on meta tensors.

    With PEFT's adapters attached, these are numbers of the model beneath, which has as many once they are merged. If the model is
    sharded, all ranks must call this together.

    Args:
        model: A Hugging Face model, or a module that holds one.

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
            figures, name = asdict(costs_of(model)) | {"kv_cache_bytes": cache_as_saved(model)}, type(model).__name__
            query_heads, kv_heads = heads_of(model)
            heads = () if query_heads else tuple(heads_by_layer(model))
    counted: dict[str, Any] = {"zeros": zeros, "query_heads": query_heads, "kv_heads": kv_heads, "heads": heads}
    return Summary(model=name, **figures, **counted, adapters=every - figures["params"])


@dataclass(frozen=True)
class Stage:
    """One row of the table: the model at some point of a run."""

    name: str
    step: int
    numbers: dict[str, float | None]


def stage_table(
    stages: Sequence[Stage], notes: Sequence[tuple[str, str]] = (), metric: str | None = None, dtype: str | None = None
) -> str:
    """Shows stages as rows and their numbers as columns (`metric` too, if it is none of the usual ones), and notes below.

    The dtype is the one that bytes of the key/value cache are counted in.
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
    shown = {head: key for head, key in keys.items() if any(stage.numbers.get(key) is not None for stage in stages)}
    if next(iter(shown), None) not in ("val_loss", "parameters"):
        shown.pop("val_loss", None)
    if "sparsity" not in shown:
        shown.pop("zeros", None)
    rows = [[stage.name, stage.step, *(_number(stage.numbers.get(key)) for key in shown.values())] for stage in stages]
    return render(text_table(rows, ["", "step", *shown]), *(["", text_table(notes, aligns="<")] if notes else []))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
