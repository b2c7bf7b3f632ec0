"""The model that a name, a folder, a config.json or a config means, in the class that a task needs."""

from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from billhook.assets import model_path
from billhook.structure.meta import check_checkpoint
from billhook.structure.shaped import load_shaped, says_shape

Task = Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification", "image-classification"]
AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
}


def load_model(
    model: str | PretrainedConfig,
    task: str,
    options: dict[str, Any],
    num_labels: int | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """The model that a name, a folder, a config.json or a config means (see `TransformerModule`)."""
    options = {k: v for k, v in options.items() if v is not None}
    labels = {} if num_labels is None else {"num_labels": num_labels}
    auto = AUTO_CLASSES[task]
    if isinstance(model, str) and model.endswith(".json"):
        if not Path(model).is_file():
            raise ValueError(f"model: there is no config file '{model}'")
        model = transformers.AutoConfig.from_pretrained(model)
    if isinstance(model, PretrainedConfig):
        for name, value in labels.items():
            setattr(model, name, value)
        from_config: PreTrainedModel = auto.from_config(model, **options)
        return from_config
    name = model_path(model)
    if gguf_file is None:
        check_checkpoint(name)
        if says_shape(name):
            kind = _class_for(auto, transformers.AutoConfig.from_pretrained(name), task)
            return load_shaped(kind, name, options.get("dtype", "auto"), options.get("attn_implementation"), num_labels)
    loaded: PreTrainedModel = auto.from_pretrained(name, gguf_file=gguf_file, **options, **labels)
    return loaded if gguf_file is None else _plain(loaded)


def _class_for(auto: Any, config: PretrainedConfig, task: str) -> type[PreTrainedModel]:  # noqa: ANN401 - an auto class
    """The class that an auto class takes for a config: of several, the one that it names, or else the first.

    Raises:
        ValueError: If it has none.
    """
    found = auto._model_mapping.get(type(config), ())
    kinds: list[type[PreTrainedModel]] = list(found) if isinstance(found, tuple | list) else [found]
    if not kinds:
        raise ValueError(f"task={task!r}: transformers has no class for it of the family '{config.model_type}'")
    return next((kind for kind in kinds if kind.__name__ in (config.architectures or ())), kinds[0])


def _plain(loaded: PreTrainedModel) -> PreTrainedModel:
    """A copy that no longer says it was quantised: a model loaded from GGUF refuses to be saved."""
    config = loaded.config
    del config.quantization_config
    plain: PreTrainedModel = type(loaded)._from_config(config, dtype=loaded.dtype)  # type: ignore[no-untyped-call]
    plain.load_state_dict(loaded.state_dict())
    return plain
