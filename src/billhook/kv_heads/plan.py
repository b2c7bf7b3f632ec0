"""Plans for fewer KV heads, with a proof that the model's own code follows."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from rich.console import RenderableType
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.adapters.merge import MERGE_HINT, adapter_layers, base_layer_name, without_adapters
from billhook.arguments import check_int
from billhook.display import text_table
from billhook.engine import LazyTensors, store_of
from billhook.kv_heads.config import check_each, check_kv_heads, choose, config_heads, cut_by_config, inside_encoder
from billhook.kv_heads.layout import find_kv
from billhook.kv_heads.methods import KVMethod, Name, method_of
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.kv_heads.proof import cut_by_groups
from billhook.model import (
    Change,
    RopeParameters,
    Shape,
    ShapePlan,
    UpdateOptimizers,
    Weights,
    are_rope_parameters,
    change_blockwise,
    check_plain,
    check_weights,
    find_transformer,
    kv_cache_bytes,
    record_shape,
    restored_on_error,
    set_shape,
    shape_of,
    subclasses,
    to_meta,
    update_optimizers,
)
from billhook.model import field as config_field
from billhook.tracing.show import name_pattern

T = TypeVar("T")

UNCHANGED = Change(lambda old: old, lambda _, value: value)


@dataclass(frozen=True, repr=False)
class KVHeadPlan(ShapePlan):
    """A KV-head conversion as plain data; `print` shows a table.

    Attributes:
        model: Name of the model's class.
        before: Current number of KV heads; if layers differ, the largest.
        after: New number of KV heads.
        method: Pooling method.
        parameters: The parameters that shrink, with their pooling.
        shape: New shape of the model.
        saves_cache: Whether the KV cache of transformers shrinks. Falcon repeats heads before caching them.
        layers: Names of the attention modules to convert.
        restart: Parameters whose optimizer state restarts, because they are refitted or in a new basis.
        rope: New rotary parameters of the config; empty if they stay.
    """

    kind: ClassVar[str] = "kv_heads"
    model: str
    before: int
    after: int
    method: KVMethod
    parameters: dict[str, Pooled]
    shape: Shape
    saves_cache: bool
    layers: tuple[str, ...]
    restart: tuple[str, ...] = ()
    rope: RopeParameters = field(default_factory=dict)

    def starting_from(self, restart: Iterable[str], rope: RopeParameters | None) -> Self:
        """Returns the plan for new values of parameters and new rotary parameters."""
        shape = replace(self.shape, rope=dict(rope or self.shape.rope))
        return replace(self, restart=tuple(restart), rope=rope or {}, shape=shape)

    @property
    def words(self) -> str:
        """A summary of the conversion."""
        return f"{self.before} -> {self.after} KV heads in {len(self.layers)} attention modules"

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data for `ModelPlan.from_json`."""
        return {
            "kind": self.kind,
            "model": self.model,
            "before": self.before,
            "after": self.after,
            "method": {type(self.method).__name__: dict(vars(self.method))},
            "layers": list(self.layers),
            "restart": list(self.restart),
            "rope": dict(self.rope),
        }

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        layers = plain.get("layers")
        restart = plain.get("restart")
        for names in (layers, restart):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("plan: layers and restart must be lists of names, as KVHeadPlan.to_json makes them")
        known = {kind.__name__: kind for kind in subclasses(KVMethod)[1:]}
        chosen = plain.get("method")
        arguments = next(iter(chosen.values())) if isinstance(chosen, Mapping) and len(chosen) == 1 else None
        if not isinstance(chosen, Mapping) or not isinstance(arguments, Mapping):
            raise ValueError(f"plan: method is {chosen!r}, and must be a class's name with its arguments, as to_json makes it")
        (name,) = chosen
        if name not in known:
            raise ValueError(f"plan: there is no method {name!r} among {', '.join(sorted(known))}: import what defines it first")
        plan = plan_kv_heads(model, plain.get("after", 0), known[name](**arguments), layers)
        if (plan.model, plan.before, plan.layers) != (plain.get("model"), plain.get("before"), tuple(layers or ())):
            raise ValueError(f"plan: it was made for a different model than this {plan.model} with {plan.before} KV heads")
        rope = plain.get("rope", {})
        if not isinstance(rope, dict) or (rope and not are_rope_parameters(rope)):
            raise ValueError("plan: rope must be the rope_parameters of a config, as KVHeadPlan.to_json makes them")
        return plan.starting_from(restart or (), rope)  # type: ignore[return-value]

    def _renderables(self) -> list[RenderableType]:
        cache = "the KV cache shrinks" if self.saves_cache else "the KV cache stays as it is"
        alike = Counter[tuple[str, str]]()
        for name, pooled in self.parameters.items():
            alike[name_pattern(name), f"{len(pooled.index)} -> {len(pooled.counts)} along dimension {pooled.dim}"] += 1
        rows = [(name, f"{change}, in each of {count}") for (name, change), count in alike.items()]
        return [f"{self.model}: {self.words} ({self.method}); {cache}", text_table(rows, aligns="<", indent=2)]

    def check_made_for(self, model: nn.Module) -> None:
        """Raises a ValueError if the plan was made for another class or other shapes."""
        model = find_transformer(model)
        sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, pooled in self.parameters.items():
            if name not in sizes or sizes[name][pooled.dim] != len(pooled.index):
                raise ValueError(f"plan: it was made for a different model: {name} is {list(sizes.get(name, ())) or 'not there'}")
        if self.model != type(model).__name__ or self.shape.tensors.keys() != shape_of(model).tensors.keys():
            raise ValueError(f"plan: it was made for a different model than this {type(model).__name__}")

    def change(self, model: nn.Module, weights: Weights | None = None) -> UpdateOptimizers:
        """Applies the plan to a model in place; see `ShapePlan.change`.

        Args:
            model: The model that the plan was made for.
            weights: New values of parameters, in the old sizes, from which the conversion starts; also of parameters that do not
                shrink, such as queries and outputs.
        """
        model = find_transformer(model)
        new = LazyTensors.of(weights or {})
        check_weights(model, weights)
        changes = dict.fromkeys([*new, *self.restart], UNCHANGED) | self.method.changes(model, self.parameters)
        for name, change in changes.items():
            change = starting(new.reads[name], change) if name in new else change
            changes[name] = replace(change, state=None) if name in self.restart else change
        with store_of(model).restored_on_error(), restored_on_error(model):
            swaps = change_blockwise(model, changes, str(self.to_json()), self.shape.tensors, lambda: new.key)
            set_shape(model, self.shape)
            record_shape(model)
        return partial(update_optimizers, swaps)


def starting(values: Callable[[], Tensor], change: Change) -> Change:
    """Returns a change that starts from other values, which are read on demand."""
    return replace(change, weight=lambda old: change.weight(values().to(old)))


def plan_kv_heads(
    model: nn.Module,
    num_key_value_heads: int,
    method: KVMethod | Name = "mean",
    layers: Collection[int | str] | None = None,
    encoder: bool = False,
) -> KVHeadPlan:
    """Plans a KV-head conversion, and proves that the model's own code computes the same.

    No names of architectures or projections are needed. The first of two ways that works is used: the class builds the model
    from a changed config (also with fused projections), or the code reads any number of KV heads, which is proved on a small copy
    of the model. The plan pools heads; `weights` passed when it is applied can make them equal before.

    Raises:
        ValueError: If the number, method, or layers are not legal, or the model cannot be converted.
    """
    check_int("num_key_value_heads", num_key_value_heads)
    heads = num_key_value_heads
    method = method_of(method)
    model = find_transformer(model)
    check_plain(model, "Convert the model before it is")
    if adapter_layers(model):
        if not method.pools_adapters:
            raise ValueError(f"method='{method.name}' does not pool adapters like weights: {MERGE_HINT}")
        from peft.tuners.lora import LoraLayer

        for name, layer in adapter_layers(model).items():
            parts = {part.partition(".")[0] for part, _ in layer.named_parameters()} - {"base_layer"}
            if not isinstance(layer, LoraLayer) or parts - {"lora_A", "lora_B"}:
                listed = ", ".join(sorted(parts))
                raise ValueError(f"model: {name} has adapters that are not plain LoRA ({listed}): {MERGE_HINT}")
        plan = plan_kv_heads(without_adapters(model), heads, method, layers, encoder)
        parameters, shape = with_adapters(model, plan.parameters, plan.shape)
        return replace(plan, model=type(model).__name__, parameters=parameters, shape=shape)
    stated = config_heads(model) if layers is None else None
    if stated is not None:
        check_kv_heads(heads, stated, config_field(model.config.get_text_config(decoder=True), "num_attention_heads") or stated)
    attentions = find_kv(model)
    chosen = choose(model, attentions, heads, layers, encoder)
    if stated is None:
        check_each(attentions, chosen, heads)
    inside = encoder or bool(inside_encoder(model, chosen))
    built = cut_by_config(model, attentions, chosen, heads, inside, every=layers is not None)
    if built is not None:
        chosen, (parameters, shape) = built
    else:
        check_each(attentions, chosen, heads)
        parameters, shape = cut_by_groups(model, attentions, chosen, heads)
    before = max(attentions[name].heads for name in chosen)
    meta_model = to_meta(model)
    set_shape(meta_model, shape)
    cached = kv_cache_bytes(model)
    cached_then = kv_cache_bytes(meta_model)
    saves = cached is None or cached_then is None or cached_then < cached
    return KVHeadPlan(type(model).__name__, before, heads, method, parameters, shape, saves, tuple(chosen))


def with_adapters(model: PreTrainedModel, parameters: Mapping[str, Pooled], shape: Shape) -> Shrunk:
    """Extends changes to adapters; a ValueError if an adapter's input would shrink."""
    layers = adapter_layers(model)
    now = shape_of(model)

    def renamed(entries: Mapping[str, T]) -> dict[str, T]:
        return {base_layer_name(name, layers): entry for name, entry in entries.items()}

    cuts = renamed(parameters)
    tensors = renamed(shape.tensors)
    attributes = renamed(shape.attributes)
    for name, layer in layers.items():
        if (cut := parameters.get(f"{name}.weight")) is None:
            continue
        if cut.dim != 0:
            raise ValueError(f"model: {name}.weight shrinks along the inputs of its adapters: {MERGE_HINT}")
        size = shape.tensors[f"{name}.weight"][0]
        attributes[f"{name}.out_features"] = size
        for adapter, second in layer.lora_B.items():
            part = f"{name}.lora_B.{adapter}"
            cuts[f"{part}.weight"] = Pooled(0, cut.index)
            tensors[f"{part}.weight"] = (size, second.weight.shape[1])
            attributes[f"{part}.out_features"] = size
    attributes = {name: value for name, value in attributes.items() if name in now.attributes or name in shape.attributes}
    return cuts, replace(now, tensors=now.tensors | tensors, attributes=now.attributes | attributes, config=shape.config)
