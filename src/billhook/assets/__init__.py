"""Packaged defaults: a tiny pretrained Llama with tokenizer, and public-domain text."""

from pathlib import Path

_HERE = Path(__file__).parent


def model_path(name: str) -> str:
    """Returns the folder of the packaged model for `"tiny"`, and any other name unchanged."""
    return str(_HERE / "model") if name == "tiny" else name


def text_files() -> dict[str, str]:
    """Returns the packaged text as Parquet files by split, with a work per row of `text`."""
    return {split: str(_HERE / f"{split}.parquet") for split in ("train", "validation")}
