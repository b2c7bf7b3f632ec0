"""`billhook export`: a Lightning checkpoint to a Hugging Face folder, or either to a GGUF file."""

from pathlib import Path

from billhook.checkpoints.export import export as exported
from billhook.place import check_target, replaced
from billhook.serving.written import GGUFKind, check_gguf, export_gguf


def export(
    paths: list[str],
    tokenizer: str | None = None,
    gguf: str | None = None,
    kind: GGUFKind = "auto",
    converter: str | None = None,
) -> None:
    """Turns a Lightning checkpoint that billhook's callbacks or module wrote into a Hugging Face folder, verified.

    `billhook export last.ckpt OUT` writes the folder. Its model card says what callbacks have noted in the checkpoint: events,
    and what they cost. With `--gguf out.gguf`, a GGUF file of it follows, for llama.cpp and what is built on it; and
    `billhook export FOLDER --gguf out.gguf` makes one of a folder that is there. `billhook serve-check` runs it.

    Args:
        paths: The Lightning checkpoint, a .ckpt file, and the folder to write: new, empty, or an earlier export. Or the folder
            of a Hugging Face checkpoint alone, for `--gguf`.
        tokenizer: The tokenizer to save with the model, a name or folder; by default the one that training started from.
        gguf: The GGUF file to write: by llama.cpp's converter (`pip install 'billhook[serve]'`), or, where layers differ, by
            billhook, as llama.cpp's architecture deci.
        kind: How the GGUF file keeps weights: "auto" (as saved), "F32", "F16", "BF16", "Q8_0" or "Q4_K_M".
        converter: llama.cpp's convert_hf_to_gguf.py, or the folder that holds it; by default the installed one.
    """
    first, *others = paths
    folder = first if Path(first).is_dir() and not others else None
    if len(others) > 1 or (folder is None and not others):
        raise ValueError("paths: give a Lightning checkpoint and the folder to write, or a folder alone, with --gguf")
    if folder is not None and gguf is None:
        raise ValueError(f"paths: '{first}' is a folder, of which --gguf makes a GGUF file: add --gguf FILE.gguf")
    if folder is not None and tokenizer is not None:
        raise ValueError(f"tokenizer={tokenizer!r}: a folder is made a GGUF file with the tokenizer in it: leave --tokenizer out")
    if gguf is not None:
        check_gguf(gguf, kind)
    if folder is None:
        check_target(others[0])
        if words := replaced(others[0]):
            print(f"saves to {others[0]}{words}", flush=True)
        print(exported(first, folder := others[0], tokenizer))
    if gguf is not None:
        print(f"{gguf} ({export_gguf(folder, gguf, kind, converter)})")
