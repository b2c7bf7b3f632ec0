"""Reads from a GGUF file how it keeps weights, and how far its attention looks back."""

from pathlib import Path
from typing import Any

from gguf import GGUFReader


def bits_a_weight(file: str | Path) -> float:
    """Returns the bits that a number of the file's tensors takes, on average, scales of quantised blocks counted in."""
    tensors = GGUFReader(file).tensors
    return 8 * sum(int(one.n_bytes) for one in tensors) / sum(int(one.n_elements) for one in tensors)


def window_of(file: str | Path) -> int | None:
    """Returns how many tokens llama.cpp's attention looks back where that is limited; it reads no limit of Phi-3's."""
    fields: Any = GGUFReader(file).fields
    family = fields["general.architecture"].contents()
    found = fields.get(f"{family}.attention.sliding_window")
    return None if found is None or family == "phi3" else int(found.contents()) or None
