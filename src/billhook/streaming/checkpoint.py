"""Writes the checkpoint of a model whose blocks come from files."""

import sys
from pathlib import Path

from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from billhook.model.transformers_internals import everything_saved, is_joined_unevenly
from billhook.streaming.files import write_index
from billhook.streaming.parts import link
from billhook.streaming.stream import Stream


def write_checkpoint(stream: Stream, folder: Path) -> None:
    """Writes config, a file for what is in no block, a file for each block, and the index."""
    stream.leave()
    model, blocks = stream.model, len(stream.blocks)
    rest = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    with everything_saved(model):
        model.save_pretrained(
            folder, state_dict=rest, max_shard_size=sys.maxsize, save_original_format=not is_joined_unevenly(model)
        )
    (folder / SAFE_WEIGHTS_NAME).rename(folder / _named(0, blocks))
    for number, name in enumerate(stream.blocks, 1):
        file = folder / _named(number, blocks)
        if name in stream.adopted:
            link(stream.adopted[name], file)
        else:
            save_file(stream.files.read(stream.keys[name]), file, {"format": "pt"})
    write_index(folder)


def _named(number: int, blocks: int) -> str:
    """Names a file of the checkpoint as transformers does; the first holds what is in no block."""
    return f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors" if blocks else SAFE_WEIGHTS_NAME
