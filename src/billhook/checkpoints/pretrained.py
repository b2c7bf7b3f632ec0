"""Loading of models from a name, folder, config.json, or config, in the class of a task."""

import copy
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from billhook.assets import model_path
from billhook.model import (
    build_class,
    check_checkpoint,
    check_shards,
    classes_of,
    has_shape_entry,
    load_complete,
    load_shaped,
    read_config,
    readable,
)

Task = Literal[
    "causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification", "image-classification", "speech-seq2seq",
    "feature-extraction",
]  # fmt: skip
AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
    "speech-seq2seq": transformers.AutoModelForSpeechSeq2Seq,
    "feature-extraction": transformers.AutoModel,
}


def load_model(
    model: str | PretrainedConfig, task: str, options: dict[str, Any], num_labels: int | None = None, gguf_file: str | None = None
) -> PreTrainedModel:
    """Loads or builds a model from a name, folder, config.json, or config."""
    options = {k: v for k, v in options.items() if v is not None}
    labels = {} if num_labels is None else {"num_labels": num_labels}
    auto = AUTO_CLASSES[task]
    if isinstance(model, str) and model.endswith(".json"):
        if not Path(model).is_file():
            raise ValueError(f"model: the config file '{model}' does not exist")
        with readable(file := model):
            return _built(auto, read_config(file), options, labels)
    if isinstance(model, PretrainedConfig):
        return _built(auto, copy.deepcopy(model), options, labels)  # events change the config, which the caller may use again
    name = model_path(model)
    with readable(name):
        if gguf_file is None:
            check_checkpoint(name)
            check_shards(name)
            config = None if options.get("trust_remote_code") else read_config(name)
            if config is not None and has_shape_entry(name):
                kinds = classes_of(auto, config)
                if not kinds:
                    missing = f"transformers has no such class for model type '{config.model_type}'"
                    raise ValueError(f"task={task!r} is not supported: {missing}")
                kind = next((kind for kind in kinds if kind.__name__ in (config.architectures or ())), kinds[0])
                return load_shaped(kind, name, options.get("dtype", "auto"), options.get("attn_implementation"), num_labels)
        loaded = load_complete(auto, name, gguf_file=gguf_file, **options, **labels)
    if gguf_file is None:
        return loaded
    del loaded.config.quantization_config  # a dequantized model with a quantization config could not be saved
    dequantized = build_class(type(loaded), loaded.config, loaded.dtype)
    dequantized.load_state_dict(loaded.state_dict())
    return dequantized


def _built(auto: Any, config: PretrainedConfig, options: dict[str, Any], labels: dict[str, Any]) -> PreTrainedModel:  # noqa: ANN401
    for name, value in labels.items():
        setattr(config, name, value)
    built: PreTrainedModel = auto.from_config(config, **options)
    return built
