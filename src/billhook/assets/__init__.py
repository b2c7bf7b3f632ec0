"""The embedded default: a tiny pretrained Llama with its tokenizer, and public-domain text (see README.md beside this file)."""

from pathlib import Path

_HERE = Path(__file__).parent


def model_path(name: str) -> str:
    """Returns the folder of the embedded model for `"tiny"`, and any other name as it is."""
    return str(_HERE / "model") if name == "tiny" else name


def text_files() -> dict[str, str]:
    """Returns the embedded text as Parquet files by split, one work per row in the column `text`."""
    return {split: str(_HERE / f"{split}.parquet") for split in ("train", "validation")}
