"""`billhook summary`: what a checkpoint weighs."""

from billhook.checkpoints.save import load
from billhook.cli.bars import files
from billhook.model.streamed import outline
from billhook.report.summary import summary as summarise


def summary(model: str, stream: bool = False) -> None:
    """Prints what a checkpoint weighs: parameters, zeros, heads, KV-cache bytes per token, FLOPs.

    Args:
        model: A folder, a hub name, or "tiny".
        stream: Whether the model stays in its files: only zeros are counted in them, a few rows at a time; not in those that are
            still on a hub.
    """
    with files(f"{'opening' if stream else 'loading'} {model}"):
        found = summarise(outline(model) if stream else load(model))
    print(found)
