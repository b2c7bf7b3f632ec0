"""`billhook export`: a Lightning checkpoint to a Hugging Face folder."""

from billhook.checkpoints.export import export

__all__ = ["export"]
