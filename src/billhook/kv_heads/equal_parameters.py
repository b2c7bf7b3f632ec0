"""Configs with fewer KV heads and wider MLPs, for comparisons at equal parameter counts.

Reference: Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need" (2019), https://arxiv.org/abs/1911.02150, section
    4.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from billhook.arguments import check_int, check_types
from billhook.kv_heads.config import FIELD
from billhook.model.config_fields import build_on_meta, field, nested_configs, with_fields
from billhook.model.meta import from_config
from billhook.model.shape import KEY
from billhook.tracing.groups import Group
from billhook.tracing.trace import trace
from billhook.units.fields import FieldFinder


def equal_parameters(config: PretrainedConfig, num_key_value_heads: int, multiple_of: int = 1) -> PretrainedConfig:
    """Returns a config with fewer KV heads and wider MLPs with the same number of parameters.

    The MQA paper compares models trained from scratch in this way (section 4: 8 KV heads and d_ff 4096 against 1 and 5440). With
    P(h, w) parameters at h KV heads and MLP width w, the new width is closest to

        w' = w + (P(h, w) - P(h', w)) / (P(h, w + 1) - P(h, w)).

    Parameters are counted on meta models. The count differs by at most half the parameters of `multiple_of` channels in all MLPs:
    `multiple_of` 3 d L / 2 with three matrices of hidden size d in each of L layers.

    Args:
        config: Config with `num_key_value_heads`; it is not changed. In a mixture of experts, all experts become wider, so that
            the total number of parameters stays, not the number that a token uses. Separate configs of encoder and decoder both
        change.
        num_key_value_heads: New number of KV heads: smaller than now, and a divisor of the query heads.
        multiple_of: The new width is a multiple of this; 64 suits GPU kernels.

    Returns:
        The new config.

    Raises:
        ValueError: If a number is not legal, the config has no such field, or its MLPs have several widths or none that a config
            field states.

    Example:
        >>> import billhook as bh
        >>> from billhook.kv_heads.equal_parameters import equal_parameters
        >>> config = equal_parameters(bh.load("tiny").config, 1)
        >>> config.num_key_value_heads, config.intermediate_size
        (1, 533)
    """
    if not isinstance(config, PretrainedConfig):
        raise ValueError(f"config: a transformers config is required, got {type(config).__name__}")
    check_types(equal_parameters, locals())
    check_int("multiple_of", multiple_of)
    if vars(config).get(KEY) is not None:
        raise ValueError(f"config: its layers have widths of their own ('{KEY}' in it says which), so no one field says them")
    heads = dict.fromkeys(_head_fields(config, num_key_value_heads), num_key_value_heads)
    model = from_config(config)
    finder = FieldFinder(model)
    now, fields = _feed_forward(model, finder)

    def params(changed: Mapping[str, Any]) -> int:
        """Counts the parameters of the model that the changed config builds.

        Tied ones count once.
        """
        return sum(p.numel() for p in build_on_meta(model, with_fields(config, changed)).parameters())

    before, fewer = params({}), params(heads)
    channel = (params(finder.values(now, fields, 2 * now)) - before) // now
    if fewer >= before:
        raise ValueError(f"num_key_value_heads={num_key_value_heads}: {type(model).__name__} has no fewer parameters with it")
    low = (now + (before - fewer) // channel) // multiple_of * multiple_of
    width = min((w for w in (low, low + multiple_of) if w), key=lambda w: abs(fewer + (w - now) * channel - before))
    changed = heads | finder.values(now, fields, width)
    if params(changed) != fewer + (width - now) * channel:
        raise ValueError(f"config: the parameters of {type(model).__name__} do not grow evenly with {', '.join(fields)}")
    return with_fields(config, changed)


def _head_fields(config: PretrainedConfig, number: int) -> list[str]:
    """Returns the fields that state how many KV heads there are.

    Refuses if there is none, or the number is not legal for one.
    """
    text = config.get_text_config(decoder=True)
    configs = {
        f"{prefix}{FIELD}": nested
        for prefix, nested in nested_configs(config)
        if (config.is_encoder_decoder or nested is text) and type(field(nested, FIELD)) is int
    }
    if not configs:
        raise ValueError(f"config: {type(config).__name__} has no {FIELD} that is one number, which would say how many KV heads")
    for name, nested in configs.items():
        before, query = getattr(nested, FIELD), nested.num_attention_heads
        legal = [n for n in range(1, before) if query % n == 0]
        if type(number) is not int or number not in legal:
            raise ValueError(
                f"num_key_value_heads={number!r} must be fewer than {name}={before} and divide the {query} query heads: "
                f"legal is {', '.join(map(str, legal)) or 'nothing, one KV head is all there is'}"
            )
    return list(configs)


def _feed_forward(model: PreTrainedModel, finder: FieldFinder) -> tuple[int, tuple[str, ...]]:
    """Returns the common width of all MLPs and its config fields.

    Raises a ValueError if there is none.
    """
    structure = trace(model)
    channels = {feed_forward.channel for feed_forward in structure.feed_forward}
    by_width: dict[int, list[Group]] = defaultdict(list)
    for group in structure.groups:
        if group.leaf in channels:
            by_width[group.size].append(group)
    if len(by_width) != 1:
        widths = ", ".join(map(str, sorted(by_width)))
        several = f"widths {widths}: it must be one" if widths else "no MLP that could become wider"
        raise ValueError(f"config: {type(model).__name__} has {several}")
    ((width, groups),) = by_width.items()
    if not (fields := finder.find(groups)):
        raise ValueError(f"config: no field of {type(model.config).__name__} states only the MLP width {width}")
    return width, fields
