"""Loads a checkpoint of which one block at a time is in memory."""

from contextlib import suppress
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from billhook.arguments import check_types
from billhook.assets import model_path
from billhook.atomic_folder import check_target
from billhook.engine.device import check_device
from billhook.engine.files import FileStore
from billhook.engine.parts import Parts
from billhook.engine.store import store_of
from billhook.engine.tensors import TensorFiles
from billhook.model.complete import check_shards
from billhook.model.meta import check_checkpoint, model_class, read_config
from billhook.model.shaped import load_on_meta, readable


def stream(
    folder: str | Path, out: str | Path | None = None, dtype: str = "auto", device: str | torch.device | None = None
) -> PreTrainedModel:
    """Loads a checkpoint of which one block at a time is in memory: it comes from the files when it computes, then goes.

    What is in no block, such as embeddings, stays. `prune` and `convert_kv_heads` write each block as soon as it has changed,
    into a folder next to `out`; `save` to `out` makes the checkpoint of it, verifies it block by block, and moves it into place.
    A process that is stopped goes on where it was when the same calls are made again. The model gives what it gives in memory,
    bit for bit; what needs gradients, or the values of all weights at once, is refused, or finds tensors on the meta device.

    Args:
        folder: A folder with safetensors files, a hub name, or `"tiny"`. Of a hub's, each file is fetched when it is needed.
        out: The folder that will be saved to; None for a model that does not change.
        dtype: The dtype of the weights, `"auto"` for the checkpoint's own.
        device: Where blocks compute, one at a time, such as `"cuda"`; what they give goes back to the CPU, on which the rest of
            the model stays; of a linear in no block a copy is on the device for each call. By default all computes on the CPU.

    Returns:
        The model, in evaluation mode, whose blocks have parameters on the meta device while they are not there.

    Raises:
        ValueError: If there are no safetensors files, they are quantised or lack tensors of the model, something that billhook
            did not write stands at `out` or at `.OUT.parts` beside it, or, as for `load`, the config names no class that
            transformers has.

    Example:
        >>> import billhook as bh
        >>> model = bh.stream("tiny")
        >>> model(torch.arange(8)[None]).logits.shape, sum(p.is_meta for p in model.model.layers.parameters())
        (torch.Size([1, 8, 2048]), 27)
    """
    check_types(stream, locals())
    if out is not None:
        check_target(out)
    computes_on = check_device(device, "device")
    name = model_path(str(folder))
    check_checkpoint(name)
    parts = None if out is None else Parts(Path(out).resolve())
    with readable(name):
        model = load_streamed(model_class(read_config(name), name), name, dtype, parts)
    store_of(model).device = None if computes_on is None or computes_on.type == "cpu" else computes_on
    return model


def load_streamed(
    kind: type[PreTrainedModel],
    name: str,
    dtype: str | torch.dtype,
    parts: Parts | None = None,
    beside: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Loads a folder or a hub name in a class, as `load_as` does, with one block at a time in memory.

    What stays in memory is not loaded where a model beside this one has the same values: both then hold the same tensors.
    """
    stream = _stream(kind, name, dtype, parts)
    stream.open(beside)
    return stream.model


def outline(folder: str) -> PreTrainedModel:
    """Returns a model on meta that knows its files, of which only headers are read; in memory, if it has no blocks to stream."""
    name = model_path(folder)
    check_checkpoint(name)
    with readable(name):
        stream = _stream(model_class(read_config(name), name), name, "auto")
        if not stream.blocks:
            stream.open()
        return stream.model


def _stream(kind: type[PreTrainedModel], name: str, dtype: str | torch.dtype, parts: Parts | None = None) -> FileStore:
    check_shards(name)
    files = TensorFiles(name)
    model = load_on_meta(kind, name, files.sizes(), dtype)
    model.config._name_or_path = model.name_or_path = name
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(name)
    return FileStore(model, files, parts)
