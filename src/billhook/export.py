"""From a Lightning checkpoint to a Hugging Face folder, without the training script."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from billhook.assets import model_path
from billhook.checkpoint import WAYS, Saved, check_target, model_class, save
from billhook.structure.shape import KEY, load_shape


def export(ckpt: str, out: str, tokenizer: str | None = None) -> None:
    """Turns a Lightning checkpoint that billhook's callbacks or module wrote into a Hugging Face folder, verified.

    Args:
        ckpt: The Lightning checkpoint, a .ckpt file.
        out: The folder to write; new, empty, or an earlier export.
        tokenizer: The tokenizer to put beside the model, a name or folder; by default the one the training started from.
    """
    saved = export_checkpoint(ckpt, out, tokenizer)
    print(f"{saved.folder} ({saved.megabytes:.1f} MB): {WAYS[saved.way]}; largest difference of logits {saved.difference:.3g}")


def export_checkpoint(ckpt: str | Path, out: str | Path, tokenizer: str | None = None) -> Saved:
    """What `export` does.

    Raises:
        ValueError: If the file is not a Lightning checkpoint that billhook can read, or `out` holds something else.
    """
    check_target(out)
    checkpoint = read_checkpoint(ckpt)
    model = build_model(checkpoint, str(ckpt))
    name = tokenizer or checkpoint[KEY]["name_or_path"]
    found = AutoTokenizer.from_pretrained(model_path(name)) if name else None
    return save(model, out, found, {"exported_from": str(ckpt), "steps": int(checkpoint.get("global_step", 0))})


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Lightning checkpoint as data; nothing in it can run code.

    Raises:
        ValueError: If the file does not exist, is not such a checkpoint, or does not say what model it holds.
    """
    if not Path(path).is_file():
        raise ValueError(f"'{path}' is not a file: a Lightning checkpoint (.ckpt) is needed")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as a Lightning checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"'{path}' is not a Lightning checkpoint: it has no state_dict")
    if not isinstance(checkpoint.get(KEY), dict) or not checkpoint[KEY].get("config"):
        raise ValueError(f"'{path}' was not written with a billhook callback or module: it does not say what model it holds")
    return checkpoint


def build_model(checkpoint: dict[str, Any], name: str) -> PreTrainedModel:
    """The Hugging Face model that a Lightning checkpoint holds.

    Raises:
        ValueError: If its class is unknown, or its weights are not where that class has them.
    """
    held = checkpoint[KEY]
    fields = json.loads(held["config"])
    if "model_type" not in fields:
        raise ValueError(f"the config in '{name}' has no model_type")
    fields["architectures"] = [held["class"]]
    config: PretrainedConfig = transformers.AutoConfig.for_model(**fields)
    model = model_class(config, name)(config)
    load_shape(model, checkpoint)
    wanted, prefix = model.state_dict().keys(), held["prefix"]
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if missing := sorted(wanted - state.keys()):
        raise ValueError(f"'{name}' holds no {missing[0]} (and {len(missing) - 1} more) of {held['class']}")
    dtype = state[next(iter(wanted))].dtype
    model.to(dtype).load_state_dict({key: state[key] for key in wanted})
    model.train(False)
    return model
