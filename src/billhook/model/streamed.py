"""Loads a checkpoint as a streamed model."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from billhook.arguments import check_types
from billhook.assets import model_path
from billhook.atomic_folder import check_target
from billhook.engine import (
    Parts,
    Quantization,
    Run,
    TensorFiles,
    check_device,
    cpu_by_default,
    one_thread,
    runs_of,
    store_of,
    tree_map_only,
)
from billhook.engine.files import FileStore
from billhook.model.complete import check_shards
from billhook.model.meta import check_checkpoint, model_class, read_config, to_meta
from billhook.model.shaped import load_on_meta, readable
from billhook.model.transformers_internals import compute_every_expert


@cpu_by_default()
@one_thread()
def stream(
    folder: str | Path, out: str | Path | None = None, dtype: str = "auto", device: str | torch.device | None = None
) -> PreTrainedModel:
    """Loads a checkpoint as a streamed model, with a single block in memory at a time.

    Parameters outside of blocks, such as embeddings, stay in memory. `prune` and `convert_kv_heads` write each changed block to a
    folder next to `out`. `save` to `out` then assembles the checkpoint, verifies it block by block, and moves it into place. An
    interrupted process is resumed by making the same calls again. Outputs are bitwise identical to those in memory. Methods that
    need gradients or all weights at once raise, or find tensors on the meta device. From quantized files, only experts and blocks
    can be removed. `save` writes the format of the files.

    Args:
        folder: A folder with safetensors files, a Hub name, or `"tiny"`. Hub files are downloaded when needed.
        out: Output folder for `save`. None for a read-only model.
        dtype: Dtype of the weights. `"auto"` uses the checkpoint's dtype.
        device: Device on which blocks run one at a time, such as `"cuda"`. Outputs return to the CPU, where the rest of the model
            stays. Linear layers outside of blocks are copied to the device for each call. Defaults to the CPU.

    Returns:
        The model in eval mode. Parameters of blocks that are not loaded are on the meta device.

    Raises:
        ValueError: If there are no safetensors files, if they lack tensors or are quantized in another format than FP8 with block
            scales and MXFP4, if `out` or `.OUT.parts` was not written by billhook, or if transformers does not have the class in
            the config.

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
    share_with: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Loads a folder or Hub name in a class as a streamed model.

    Args:
        kind: The class.
        name: A folder or Hub name.
        dtype: Dtype of the weights.
        parts: Writes changed blocks. None for a read-only model.
        share_with: A model in memory, with which bitwise identical parameters are shared.
    """
    stream = _stream(kind, name, dtype, parts)
    stream.open(share_with)
    return stream.model


def outline(folder: str) -> PreTrainedModel:
    """Returns a meta model with its files, or a model in memory if it has no blocks."""
    name = model_path(folder)
    check_checkpoint(name)
    with readable(name):
        stream = _stream(model_class(read_config(name), name), name, "auto")
        if not stream.blocks:
            stream.open()
        return stream.model


def _stream(kind: type[PreTrainedModel], name: str, dtype: str | torch.dtype, parts: Parts | None = None) -> FileStore:
    check_shards(name)
    files, config = TensorFiles(name), PretrainedConfig.get_config_dict(name)[0]
    quantization = Quantization(name, config.get("quantization_config"))
    sizes = {key: size[...] for key, size in quantization.dequantized(files.sizes()).items()}
    if bare := next((key for key, size in sizes.items() if size.dtype == torch.float8_e4m3fn), None):
        raise ValueError(f"'{name}': {bare} is quantized and has no scales, so it cannot be streamed. Dequantize it first.")
    model = load_on_meta(kind, name, sizes, dtype)
    model.config._name_or_path = model.name_or_path = name
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(name)
    store = FileStore(model, files, parts, quantization)
    if not store.blocks and quantization.method:
        raise ValueError(f"'{name}': its files are quantized, and {kind.__name__} has no blocks to stream. Dequantize it first.")
    return store


def check_called_once(model: nn.Module, runs: Sequence[Run]) -> None:
    """Raises if a run on the meta device shows that a streamed model calls a block twice."""
    batch, store = next((run.batch for run in runs if run.batch is not None), None), store_of(model)
    if not store.in_files or batch is None:
        return
    empty, calls = to_meta(store.model), Counter[str]()
    for name in store.blocks:
        empty.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    compute_every_expert(empty)  # of which a router chooses none on the meta device
    batch = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), batch)
    with suppress(Exception), torch.no_grad():  # code that needs values fails on the meta device
        runs_of(empty, [batch])[0].visit()
    if again := next((name for name in store.blocks if calls[name] > 1), None):
        raise_called_again(again)


def raise_called_again(block: str) -> NoReturn:
    """Raises for a block that is called again although blocks are loaded on demand."""
    raise ValueError(f"model: {block} is called twice, but blocks are loaded one at a time. Use bh.load.")
