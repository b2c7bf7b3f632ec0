"""A generation loop as a good server runs it: prompts in one go, then one token of each sequence at a time, on one cache."""

import inspect
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

CacheKind = Literal["static", "reserved", "dynamic"]


def generates(model: PreTrainedModel) -> bool:
    """Says whether a model predicts next tokens, so that there is something to decode."""
    return "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__


def cache_name(model: PreTrainedModel) -> str | None:
    """Returns the name of a model's cache argument, which changed in transformers 5.20; None if it takes no cache."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


class Generation:
    """Prompts of one length, and the tokens that a model generates after them, greedily.

    As on a server, there is no padding and no mask, and only the last logits of the prompts are computed where the class can
    do so (`logits_to_keep`).

    Attributes:
        model: The model, in eval mode.
        ids: The prompts, `[batch, context]`.
        new_tokens: How many tokens `decode` adds to each.
        kind: How the key/value cache is kept.

            - "static": allocated once, and each step attends over all of it with a mask that hides the part not filled yet.
              Under a mask, transformers hands the query heads that share a KV head to SDPA as the rows of one matrix, so that
              their keys and values are read once. The mask costs a model without shared heads a little.
            - "reserved": allocated once as well, but the model sees only the filled part, without a mask. Transformers then sets
              `enable_gqa`, for which CUDA has a kernel; the CPU's kernel reads keys and values again for each query head.
            - "dynamic", the default of `generate`: like "reserved", but each step copies the whole cache to append a token.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, new_tokens: int, kind: CacheKind = "static") -> None:
        self.model, self.ids, self.new_tokens, self.kind = model, ids, new_tokens, kind
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
        self._name = cache_name(model) or "cache"
        self._cache = self._new_cache() if generates(model) else None
        self._token, self._decoded = ids[:, :1], 0

    def _new_cache(self) -> DynamicCache | StaticCache:
        config = self.model.config.get_text_config(decoder=True)
        if self.kind == "static":
            return StaticCache(config, max_cache_len=self.capacity)
        cache = DynamicCache(config=config)
        if self.kind == "reserved":
            cache.layers = [_Reserved(self.capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    @property
    def capacity(self) -> int:
        """Tokens of each sequence, prompt and new ones."""
        return self.ids.shape[1] + self.new_tokens

    @property
    def _plain(self) -> bool:
        """True if the cache holds keys and values of all tokens and nothing else: no windows, no states."""
        layers = [] if self._cache is None else self._cache.layers
        return all(type(layer) in (StaticLayer, _Reserved, DynamicLayer) for layer in layers)

    @property
    def cached_tokens(self) -> int:
        """Tokens of each sequence that the cache has room for now; a growing cache has none to spare."""
        return self.ids.shape[1] + self._decoded if self.kind == "dynamic" else self.capacity

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the cache."""
        layers = [] if self._cache is None else self._cache.layers
        values = [value for layer in layers for value in vars(layer).values()]
        for states in [value for value in values if isinstance(value, dict)]:  # of linear attention
            values += states.values()
        return list({id(value): value for value in values if isinstance(value, Tensor) and value.ndim > 1}.values())

    def start(self) -> None:
        """Empties the cache; memory that was allocated ahead is kept."""
        self._decoded = 0
        if self._cache is not None:
            self._cache.reset()  # type: ignore[no-untyped-call]

    def prefill(self) -> None:
        """Reads the prompts; the cache must be empty."""
        logits = self._forward(self.ids)
        if self._cache is not None:
            self._token = logits[:, -1:].argmax(-1)

    def fill(self) -> None:
        """Reads one prompt for all sequences where the cache holds nothing but keys and values; otherwise does as `prefill`."""
        if self._cache is None or not self._plain:
            self.prefill()
            return
        first, rows = Generation(self.model, self.ids[:1], 0, "dynamic"), len(self.ids)
        first.prefill()
        cached = [tensor.expand(rows, -1, -1, -1) for tensor in first.tensors]
        for number, (keys, values) in enumerate(zip(cached[::2], cached[1::2], strict=True)):
            self._cache.update(keys, values, number)
        self._token = first._token.expand(rows, 1)

    def decode(self) -> Tensor:
        """Generates `new_tokens` tokens after the one that `prefill` found; returns them all, `[batch, 1 + new_tokens]`."""
        tokens = [self._token]
        for _ in range(self.new_tokens):
            tokens.append(self._forward(tokens[-1])[:, -1:].argmax(-1))
        self._decoded += self.new_tokens
        return torch.cat(tokens, 1)

    def rewind(self) -> None:
        """Forgets the tokens after the prompts; where a cache cannot forget, the prompts are read again."""
        if not self._decoded or self._cache is None:
            return
        if self._plain:
            self._cache.crop(-self._decoded)
            self._decoded = 0
        else:
            self.start()
            self.prefill()

    def _forward(self, ids: Tensor) -> Tensor:
        if self._cache is None:
            hidden: Tensor = self.model(input_ids=ids)[0]
            return hidden
        logits: Tensor = self.model(input_ids=ids, use_cache=True, **{self._name: self._cache}, **self._last).logits
        return logits


class _Reserved(DynamicLayer):
    """A layer that is allocated once and returns the part that is filled."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        keys, values = (self._append(*pair) for pair in ((self.keys, key_states), (self.values, value_states)))
        self.keys, self.values, self.is_initialized = keys, values, True
        self.length += key_states.shape[2]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def _append(self, room: Tensor | None, new: Tensor) -> Tensor:
        if room is None:
            room = new.new_zeros(*new.shape[:2], self.capacity, new.shape[3])
        room[:, :, self.length : self.length + new.shape[2]] = new
        return room

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.length += tokens_to_remove
