"""`billhook export`, `push` and `serve-check`: what becomes of a checkpoint."""

import sys
from pathlib import Path

from billhook.atomic_folder import check_target, replacement_note
from billhook.checkpoints import push as hub
from billhook.checkpoints.export import export as exported
from billhook.serving import check as serving
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
        kind: How the GGUF file keeps weights: "auto" (as saved), "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M" or "Q4_K_M".
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
        if words := replacement_note(others[0]):
            print(f"saves to {others[0]}{words}", flush=True)
        print(exported(first, folder := others[0], tokenizer))
    if gguf is not None:
        print(f"{gguf} ({export_gguf(folder, gguf, kind, converter)})")


def push(folder: str, name: str, private: bool = False, revision: str | None = None) -> None:
    """Pushes a folder that billhook saved and verified to a repository of the Hub, which is made if it is not there.

    All files go in one commit, the model card as the repository's front page. The token is that of `hf auth login`, or HF_TOKEN.

    Args:
        folder: The folder that billhook saved, by a command, `Export` or bh.save.
        name: The repository, as in user/name.
        private: Whether the repository must be private; otherwise a new one is as the account has it by default.
        revision: The branch, which is made if it is not there; by default main.
    """
    print(f"pushed to {hub.push(folder, name, private, revision)}")


def serve_check(
    folder: str,
    engine: serving.EngineName = "llama.cpp",
    converter: str | None = None,
    tokens: int = 128,
    threads: int = 1,
) -> None:
    """Converts a folder for an engine, runs it there, and prints yes or no, and why; it ends with 1 if it is no.

    Yes means that llama.cpp, on a CPU in F32, computes the logits of transformers up to rounding (a thousandth of the largest),
    writes the same 24 greedy tokens, and reads a text as the same tokens. Q8_0 and Q4_K_M follow: how many times the
    perplexity they have on tokens that the model wrote itself, and the bits that a weight takes.

    `pip install 'billhook[serve]'` installs engine and converter.

    Args:
        folder: A Hugging Face checkpoint that billhook or others wrote, or "tiny".
        engine: The engine: llama.cpp.
        converter: llama.cpp's convert_hf_to_gguf.py, or the folder that holds it; by default the installed one.
        tokens: Tokens of the row on which both are compared.
        threads: Threads of the engine.

    Raises:
        ValueError: If the folder is no checkpoint of a model that writes text.
        RuntimeError: If the engine or the converter is not installed; the message says what to install.
    """
    answer = serving.serve_check(folder, engine, converter, tokens, threads=threads)
    print(answer)
    if not answer.supported:
        sys.exit(1)
