"""Hashes all that decides what a model computes, as far as it can be told: by this, work that was stopped is known again."""

from transformers import PretrainedConfig, PreTrainedModel

from billhook.model.config_fields import nested_configs
from billhook.running.fingerprint import fingerprint
from billhook.versions import versions

UNIMPORTANT = ("_name_or_path", "transformers_version", "architectures")
"""Config fields by which no model computes; the name may be that of the same folder, written otherwise."""


def identity_of(model: PreTrainedModel) -> str:
    """Returns a hash of a model's class, configs, dtypes, sizes and values, and of the versions that compute with it.

    Of parameters on the meta device, such as those of a model that is streamed, names, dtypes and sizes alone are told.
    """
    configs = [
        (prefix, {name: value for name, value in sorted(vars(config).items()) if _decides(name, value)})
        for prefix, config in nested_configs(model.config)
    ]
    buffers = dict(model.named_buffers())  # also those that no file holds, such as frequencies
    return fingerprint(versions(), type(model).__qualname__, configs, model.state_dict(), buffers)


def _decides(name: str, value: object) -> bool:
    return name not in UNIMPORTANT and not isinstance(value, PretrainedConfig)
