"""Token ids in configs, and their numbers in a smaller vocabulary."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from billhook.linalg import Indices
from billhook.model.config_fields import Fields, fields_of, nested_configs

NAMES = ("token_id", "token_ids", "token_index", "lang_to_id", "task_to_id")  # endings of fields whose tokens stay
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Fields whose tokens may go, because they only name what is not generated."""
UNKNOWN = ("forced_decoder_ids", "force_words_ids", "sequence_bias")  # fields that mix token ids with other numbers
COPIED = "vocabulary_map"  # field of which models copy token ids: the tokens of image codes


def named_token_ids(model: PreTrainedModel, size: int) -> dict[int, str]:
    """Returns the token ids in the config and generation config, each with its field.

    Raises if no config has a vocabulary of this size, a field mixes token ids with other numbers, or images are tokens.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> named_token_ids(LlamaForCausalLM(LlamaConfig(**sizes)), 32)
    {1: 'config.bos_token_id', 2: 'config.eos_token_id'}
    """
    if not _of_vocabulary(model.config, size):
        raise ValueError(f"tokens: {type(model).__name__} has embeddings of {size:,} tokens, and no config says so.")
    named = dict[int, str]()
    fields: Fields = {}
    for prefix, nested in _of_vocabulary(model.config, size):
        fields |= {f"config.{prefix}{name}": value for name, value in fields_of(nested).items() if "." not in name}
    generation: Any = getattr(model, "generation_config", None)
    fields |= {f"generation_config.{name}": value for name, value in vars(generation or PretrainedConfig()).items()}
    for name, value in fields.items():
        if name.endswith(UNKNOWN) and value:
            raise ValueError(f"tokens: {name}={value} mixes token ids with other numbers. Unset it, and set it again afterwards.")
        if name.endswith(COPIED) and value:
            raise ValueError(f"tokens: {name} names the tokens of images, which do not follow. Keep all tokens of this model.")
        if name.endswith(NAMES):
            named = dict.fromkeys(_ids(value, size), name) | named
    return dict(sorted(named.items()))


def with_kept_tokens(config: PretrainedConfig, kept: Indices, size: int) -> Fields:
    """Returns the config fields of a smaller vocabulary: its size, and new token ids."""
    fields: Fields = {}
    for prefix, nested in _of_vocabulary(config, size):
        fields |= {f"{prefix}{name}": len(kept) for name, value in vocabulary_sizes(nested).items() if value == size}
        fields |= _renumbered({f"{prefix}{name}": value for name, value in vars(nested).items()}, kept)
    return fields


def renumber_generation_config(model: PreTrainedModel, kept: Indices) -> None:
    """Replaces the generation config of a model by one with the new numbers of the kept ids."""
    config: Any = getattr(model, "generation_config", None)
    if config is not None:
        changed: Any = type(config).from_dict(config.to_dict())
        vars(changed).update(_renumbered(vars(config), kept))
        model.generation_config = changed  # a new object, so that an error restores the old one


def _of_vocabulary(config: PretrainedConfig, size: int) -> list[tuple[str, PretrainedConfig]]:
    """Returns the configs with a vocabulary of this size, or the outermost without any."""
    configs = []
    for prefix, nested in nested_configs(config):
        sizes = vocabulary_sizes(nested).values()
        if size in sizes or not (prefix or sizes):
            configs.append((prefix, nested))
    return configs


def vocabulary_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Returns the sizes of vocabularies, but not of types of segments, such as BERT's."""
    sizes = {name: value for name, value in vars(config).items() if "vocab_size" in name and name != "type_vocab_size"}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _ids(value: Any, size: int) -> list[int]:  # noqa: ANN401 - any field
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in _ids(item, size)]
    return [value] if type(value) is int and 0 <= value < size else []


def _renumbered(fields: Mapping[str, Any], kept: Indices) -> Fields:
    """Returns the fields with token ids, with their new numbers."""
    new = {int(old): number for number, old in enumerate(kept)}

    def renumbered(value: Any) -> Any:  # noqa: ANN401 - any field
        if isinstance(value, Mapping):
            return {key: renumbered(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [renumbered(item) for item in value]
        return new.get(value, value) if type(value) is int else value

    changed: Fields = {}
    for name, value in fields.items():
        if name.endswith(NAMES):
            changed[name] = renumbered(value)
        elif name.endswith(SUPPRESSED) and value:
            items = [item for item in value if all(number in new for number in (item if isinstance(item, list) else [item]))]
            changed[name] = renumbered(items) or None
    return {name: value for name, value in changed.items() if value != fields[name]}
