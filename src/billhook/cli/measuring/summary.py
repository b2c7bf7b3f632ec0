"""`billhook summary`: what a checkpoint weighs."""

from billhook.checkpoints.save import load
from billhook.cli.reading import files
from billhook.report.summary import summary as summarise


def summary(model: str) -> None:
    """Prints what a checkpoint weighs: parameters, zeros, heads, KV-cache bytes per token, FLOPs.

    Args:
        model: A folder, a hub name, or "tiny".
    """
    with files(f"loading {model}"):
        found = load(model)
    print(summarise(found))
