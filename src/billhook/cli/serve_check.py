"""`billhook serve-check`: whether an engine runs a folder and computes what transformers does."""

import sys

from billhook.serving.check import EngineName
from billhook.serving.check import serve_check as checked


def serve_check(
    folder: str,
    engine: EngineName = "llama.cpp",
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
    found = checked(folder, engine, converter, tokens, threads=threads)
    print(found)
    if not found.yes:
        sys.exit(1)
