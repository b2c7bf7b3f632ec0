"""A model as a good generation loop runs it: prompts in one go, then a token of each sequence at a time, on one cache."""

import inspect
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

CacheKind = Literal["static", "reserved", "dynamic"]


def generates(model: PreTrainedModel) -> bool:
    """Whether a model predicts next tokens, so that there is something to decode."""
    return "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__


def cache_name(model: PreTrainedModel) -> str | None:
    """What a model calls the cache that it takes: as transformers says now, or said before 5.20; None if it takes none."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


class Generation:
    """Prompts of one length, and the tokens that a model says after them, greedily.

    No padding and no mask are given, and of the prompts only the last logits are asked for where the class can
    (`logits_to_keep`): both are what a server does.

    Attributes:
        model: The model, in eval mode.
        ids: The prompts, `[batch, context]`.
        new_tokens: How many tokens `decode` adds to each.
        kind: How the key/value cache is kept.

            - "static": all its room is allocated once, and each step attends over all of it with a mask that hides what is not
              filled yet. Under a mask, transformers hands the query heads that share a KV head to SDPA as the rows of one matrix,
              so that their keys and values are read once. The mask costs a model without shared heads a little.
            - "reserved": allocated once as well, but the model sees the filled part alone, without a mask. Transformers then says
              `enable_gqa`, for which CUDA has a kernel, whereas the CPU's reads keys and values anew for each query head.
            - "dynamic", what `generate` does by default: as "reserved", but each step copies the whole cache to append a token.
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
            cache.layers = [_Reserved(self.capacity) if type(one) is DynamicLayer else one for one in cache.layers]
        return cache

    @property
    def capacity(self) -> int:
        """Tokens of each sequence, all in all."""
        return self.ids.shape[1] + self.new_tokens

    @property
    def _plain(self) -> bool:
        """Whether all that the cache holds is keys and values of all tokens: no windows, no states."""
        layers = [] if self._cache is None else self._cache.layers
        return all(type(layer) in (StaticLayer, _Reserved, DynamicLayer) for layer in layers)

    @property
    def cached_tokens(self) -> int:
        """Tokens of each sequence that the cache has room for now; what grows has none to spare."""
        return self.ids.shape[1] + self._decoded if self.kind == "dynamic" else self.capacity

    @property
    def tensors(self) -> list[Tensor]:
        """What the cache holds."""
        layers = [] if self._cache is None else self._cache.layers
        held = [value for layer in layers for value in vars(layer).values()]
        held += [state for value in held if isinstance(value, dict) for state in value.values()]  # what linear attention keeps
        return list({id(one): one for one in held if isinstance(one, Tensor) and one.ndim > 1}.values())

    def start(self) -> None:
        """Empties the cache; what was allocated ahead stays."""
        self._decoded = 0
        if self._cache is not None:
            self._cache.reset()  # type: ignore[no-untyped-call]

    def prefill(self) -> None:
        """Reads the prompts; the cache must be empty."""
        logits = self._forward(self.ids)
        if self._cache is not None:
            self._token = logits[:, -1:].argmax(-1)

    def fill(self) -> None:
        """As `prefill`, of one prompt whose keys and values then stand for all sequences, where the cache holds nothing else."""
        if self._cache is None or not self._plain:
            self.prefill()
            return
        one, rows = Generation(self.model, self.ids[:1], 0, "dynamic"), len(self.ids)
        one.prefill()
        held = [tensor.expand(rows, -1, -1, -1) for tensor in one.tensors]
        for number, (keys, values) in enumerate(zip(held[::2], held[1::2], strict=True)):
            self._cache.update(keys, values, number)
        self._token = one._token.expand(rows, 1)

    def decode(self) -> Tensor:
        """Says `new_tokens` tokens after the prompts and the one that `prefill` found.

        Returns:
            All these tokens, `[batch, 1 + new_tokens]`.
        """
        said = [self._token]
        for _ in range(self.new_tokens):
            said.append(self._forward(said[-1])[:, -1:].argmax(-1))
        self._decoded += self.new_tokens
        return torch.cat(said, 1)

    def rewind(self) -> None:
        """Forgets what was said after the prompts; where a cache cannot forget, the prompts are read anew."""
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
    """A layer whose room is allocated once; it hands out the part that is filled."""

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
