"""A generation loop as in a server: prefill, then a token per sequence and step."""

import inspect
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

CacheKind = Literal["static", "reserved", "dynamic"]


def generates(model: PreTrainedModel) -> bool:
    """Returns whether a model predicts next tokens."""
    return "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__


def cache_name(model: PreTrainedModel) -> str | None:
    """Returns the name of the forward's cache argument, renamed in transformers 5.20."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in names), None)


class Generation:
    """Greedy generation after prompts of equal length.

    As in a server, there is no padding mask, and only the last logits of the prompts are computed if the class supports it
    (`logits_to_keep`).

    Attributes:
        model: The model, in eval mode.
        ids: The prompts, `[batch, context]`.
        new_tokens: Number of tokens that `decode` adds to each prompt.
        kind: Kind of the KV cache.

            - "static": allocated once; each step attends to all of it with a mask that hides the unfilled part. With a mask,
              transformers passes the query heads of a group to SDPA as rows of one matrix, so that keys and values are read
              once. The mask costs a little time for models without query groups.
            - "reserved": allocated once, but the model attends to the filled part only, without a mask. Transformers then sets
              `enable_gqa`, which has a kernel on CUDA; the CPU kernel reads keys and values again for each query head.
            - "dynamic", the default of `generate`: like "reserved", but each step copies the cache to append a token.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, new_tokens: int, kind: CacheKind = "static") -> None:
        self.model = model
        self.ids = ids
        self.new_tokens = new_tokens
        self.kind = kind
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._name = cache_name(model) or "cache"
        self._cache = self._new_cache() if generates(model) else None
        self._token = ids[:, :1]
        self._decoded = 0

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
        """Tokens per sequence: prompt and new tokens."""
        return self.ids.shape[1] + self.new_tokens

    @property
    def _plain(self) -> bool:
        """True if the cache stores keys and values of all tokens: no windows, no recurrent states."""
        layers = [] if self._cache is None else self._cache.layers
        return all(type(layer) in (StaticLayer, _Reserved, DynamicLayer) for layer in layers)

    @property
    def cached_tokens(self) -> int:
        """Number of tokens per sequence for which the cache has memory now."""
        return self.ids.shape[1] + self._decoded if self.kind == "dynamic" else self.capacity

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the cache."""
        layers = [] if self._cache is None else self._cache.layers
        tensors = dict[int, Tensor]()  # by id, each once
        for value in [value for layer in layers for value in vars(layer).values()]:
            states = value.values() if isinstance(value, dict) else [value]  # a dictionary for linear attention
            tensors |= {id(state): state for state in states if isinstance(state, Tensor) and state.ndim > 1}
        return list(tensors.values())

    def start(self) -> None:
        """Empties the cache and keeps its memory, except that of layers which grow with each token."""
        self._decoded = 0
        if self._cache is None:
            return
        self._cache.reset()  # type: ignore[no-untyped-call]
        if self.kind != "static":  # in transformers 5.16, what grows only becomes zero
            layers = self._cache.layers
            self._cache = self._new_cache()
            pairs = zip(layers, self._cache.layers, strict=True)
            self._cache.layers = [layer if isinstance(layer, _Reserved) else new for layer, new in pairs]

    def prefill(self) -> None:
        """Processes the prompts; the cache must be empty."""
        logits = self._forward(self.ids)
        if self._cache is not None:
            self._token = logits[:, -1:].argmax(-1)

    def fill(self) -> None:
        """Fills the cache from the first prompt if possible; otherwise runs `prefill`."""
        if self._cache is None or not self._plain:
            self.prefill()
            return
        first = Generation(self.model, self.ids[:1], 0, "dynamic")
        rows = len(self.ids)
        first.prefill()
        cached = [tensor.expand(rows, -1, -1, -1) for tensor in first.tensors]
        for number, (keys, values) in enumerate(zip(cached[::2], cached[1::2], strict=True)):
            self._cache.update(keys, values, number)
        self._token = first._token.expand(rows, 1)

    def decode(self) -> Tensor:
        """Generates `new_tokens` after `prefill`; returns all, `[batch, 1 + new_tokens]`."""
        tokens = [self._token]
        for _ in range(self.new_tokens):
            tokens.append(self._forward(tokens[-1])[:, -1:].argmax(-1))
        self._decoded += self.new_tokens
        return torch.cat(tokens, 1)

    def rewind(self) -> None:
        """Removes the generated tokens from the cache, or processes the prompts again."""
        if not self._decoded or self._cache is None:
            return
        if self._plain and all(hasattr(layer, "crop") for layer in self._cache.layers):  # not static ones in transformers 5.16
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
    """A cache layer that is allocated once and returns the filled part."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states))
        keys = self.keys
        values = self.values
        start = self.length
        self.is_initialized = True
        self.length += key_states.shape[2]
        keys[:, :, start : self.length] = key_states
        values[:, :, start : self.length] = value_states
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.length += tokens_to_remove
