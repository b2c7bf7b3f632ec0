"""`billhook export`: a Lightning checkpoint to a Hugging Face folder."""

from billhook.checkpoints.export import export as exported


def export(ckpt: str, out: str, tokenizer: str | None = None) -> None:
    """Turns a Lightning checkpoint that billhook's callbacks or module wrote into a Hugging Face folder, verified.

    Its model card says what callbacks have noted in the checkpoint: events, and what they cost.

    Args:
        ckpt: The Lightning checkpoint, a .ckpt file.
        out: The folder to write; new, empty, or an earlier export.
        tokenizer: The tokenizer to save with the model, a name or folder; by default the one that training started from.
    """
    print(exported(ckpt, out, tokenizer))
