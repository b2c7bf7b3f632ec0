"""`billhook export`, `push`, and `serve-check`: convert, publish, and check a checkpoint."""

import sys
from pathlib import Path

from billhook.atomic_folder import check_target, replacement_note
from billhook.checkpoints import push as hub
from billhook.checkpoints.export import export as export_checkpoint
from billhook.progress import progress_bar
from billhook.serving import check as serving
from billhook.serving.written import GGUFKind, check_gguf, export_gguf


def export(
    paths: list[str], tokenizer: str | None = None, gguf: str | None = None, kind: GGUFKind = "auto", converter: str | None = None
) -> None:
    """Converts a Lightning checkpoint to a Hugging Face folder, or a folder to a GGUF file.

    `billhook export last.ckpt OUT` writes the folder and verifies it; the model card lists the events of the training run and the
    degradation. With `--gguf FILE`, it also writes a GGUF file for llama.cpp. `billhook export FOLDER --gguf FILE` converts an
    existing folder. Check the outputs with `billhook serve-check`.

    Args:
        paths: The Lightning checkpoint (.ckpt) and the output folder, which must be new, empty, or an earlier export. With
            `--gguf`, alternatively the folder of a Hugging Face checkpoint.
        tokenizer: Name or folder of the tokenizer to save. Defaults to the tokenizer of the base model.
        gguf: GGUF file to write, with llama.cpp's converter (`pip install 'billhook[serve]'`). Non-uniform models are written by
            billhook, as llama.cpp's architecture deci.
        kind: Data type of the GGUF file: "auto" (as saved), "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", or "Q4_K_M".
        converter: llama.cpp's convert_hf_to_gguf.py, or its folder. Defaults to the installed converter.
    """
    first, *others = paths
    folder = first if Path(first).is_dir() and not others else None
    if len(others) > 1 or (folder is None and not others):
        raise ValueError("paths: pass a Lightning checkpoint and an output folder, or a folder with --gguf FILE.gguf.")
    if folder is not None and gguf is None:
        raise ValueError(f"paths: '{first}' is a folder. Add --gguf FILE.gguf to convert it.")
    if folder is not None and tokenizer is not None:
        raise ValueError(f"tokenizer={tokenizer!r}: a folder is converted with its own tokenizer. Remove --tokenizer.")
    if gguf is not None:
        check_gguf(gguf, kind)
    if folder is None:
        check_target(others[0])
        if note := replacement_note(others[0]):
            print(f"Saving to {others[0]}{note}", flush=True)
        print(export_checkpoint(first, folder := others[0], tokenizer))
    if gguf is not None:
        with progress_bar(f"writing {gguf}"):
            written = export_gguf(folder, gguf, kind, converter)
        print(f"Saved to {gguf} ({written})")


def push(folder: str, name: str, private: bool = False, revision: str | None = None) -> None:
    """Pushes a folder that billhook saved to a Hub repository, which may be new.

    All files go into one commit, with the model card as the repository's README. The token is that of `hf auth login`, or
    HF_TOKEN.

    Args:
        folder: Folder that a command, `Export`, or bh.save wrote.
        name: Repository name, such as user/name.
        private: If true, requires a private repository. Otherwise a new repository uses the account's default.
        revision: Branch, created if it does not exist. Defaults to main.
    """
    print(f"Pushed to {hub.push(folder, name, private, revision)}")


def serve_check(
    folder: str, engine: serving.EngineName = "llama.cpp", converter: str | None = None, tokens: int = 128, threads: int = 1
) -> None:
    """Runs a checkpoint in llama.cpp and compares its outputs with transformers.

    The outputs agree if llama.cpp (CPU, F32) computes the same logits within 1e-3 of the largest, generates the same 24 greedy
    tokens, and tokenizes text identically. The command also reports the perplexity ratio of Q8_0 and Q4_K_M, on self-generated
    tokens, and their bits per weight. Install the engine and converter with `pip install 'billhook[serve]'`.

    Args:
        folder: A Hugging Face checkpoint, or "tiny".
        engine: Inference engine: llama.cpp.
        converter: llama.cpp's convert_hf_to_gguf.py, or its folder. Defaults to the installed converter.
        tokens: Number of tokens to compare logits on.
        threads: Number of CPU threads of the engine.

    Raises:
        ValueError: If the folder is not a checkpoint of a model that generates text.
        RuntimeError: If the engine or the converter is not installed.
    """
    with progress_bar(f"comparing outputs in {engine}"):
        result = serving.serve_check(folder, engine, converter, tokens, threads=threads)
    print(result)
    if not result.supported:
        sys.exit(1)
