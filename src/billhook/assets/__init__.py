"""Packaged defaults: a tiny pretrained Llama, its training text, and calibration text."""

from pathlib import Path

_HERE = Path(__file__).parent


def model_path(name: str) -> str:
    """Returns the folder of the packaged model for `"tiny"`, and any other name unchanged."""
    return str(_HERE / "model") if name == "tiny" else name


def text_files(name: str = "tiny") -> dict[str, str]:
    """Returns the files of a packaged text by split; empty for any other name.

    Each row of `text` is a document. `"tiny"` is Shakespeare's works, on which the tiny model was trained. `"mixed"` is
    calibration text of eight kinds, and `"unseen"` text of two more, to evaluate on, which no command calibrates on.
    """
    if name == "unseen":
        return {"train": str(_HERE / "unseen.jsonl")}
    files = {"tiny": "{}.parquet", "mixed": "mixed_{}.jsonl"}.get(name)
    return {split: str(_HERE / files.format(split)) for split in ("train", "validation")} if files else {}
