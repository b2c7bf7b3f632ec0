"""Runs README's commands, and fills the cells of its table with what they measure.

`OMP_NUM_THREADS=1 python benchmarks/readme.py WORK --model MODEL --mixture MIXTURE --data FOLDOC WIKITEXT` takes hours, and goes
on where it stopped. MODEL is SmolLM2-135M-Instruct, MIXTURE what `train_mixture.py` trains, and the files are training text. Rows
of other models are left out. Cells are what the commands' own tables say: the ratio after / before on held-out examples of each
file of --data, and on packaged text of two kinds (code and fiction) that no calibration reads. `--write` changes README.
"""

import argparse
import json
import re
import shlex
import subprocess
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
ROW = re.compile(
    r"^\| (?P<goal>[^|]+) \| \[`billhook (?P<command>[^`]+)`\]\((?P<page>[^)]+)\)"
    r" \| (?P<size>[^|]+) \| .* \| (?P<loads>[^|]+) \|$"
)
OTHER = ("mixed", "generated", "unseen")
"""Names of texts that are no files."""


def model_of(goal, options):
    """The model that a row is about."""
    if "mixture" in goal:
        return options.mixture
    return None if "heads matter" in goal else options.model


def run(row, options):
    """Runs a row's command, unless its folder is there, and returns the record."""
    out = options.work / row["goal"].replace(" ", "-")
    named = {"MODEL": [str(model_of(row["goal"], options))], "OUT": [str(out)], "FILE": list(map(str, options.data))}
    words = [part for word in shlex.split(row["command"]) for part in named.get(word, [word])]
    if not (out / "billhook.json").exists():
        print("billhook", shlex.join(words), flush=True)
        subprocess.run(["billhook", *words], check=True)
    return json.loads((out / "billhook.json").read_text())


def cells(record):
    """The cells of the calibrated texts and of the text that nothing saw."""
    shown = {}
    for text in record["degradation"]:
        ratio, error = text["ratio"], text["ratio_error"]
        if "bits_per_byte" in text:
            before, after = text["bits_per_byte"]
            shown[text["source"]] = f"{after / before:.3f}x bits per byte"
        else:
            digits = 2 if error >= 0.005 else 3
            shown[text["source"]] = f"{ratio:.{digits}f}x ± {error:.{digits}f}"
    return " and ".join(value for name, value in shown.items() if name not in OTHER), shown["unseen"]


def main():
    """Runs each row's command in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mixture", type=Path)
    parser.add_argument("--data", type=Path, nargs=2, required=True)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = README.read_text().splitlines()
    for number, line in enumerate(lines):
        if (row := ROW.match(line)) and model_of(row["goal"], options) is not None:
            seen, unseen = cells(run(row, options))
            link = f"[`billhook {row['command']}`]({row['page']})"
            lines[number] = f"| {row['goal']} | {link} | {row['size']} | {seen} | {unseen} | {row['loads']} |"
            print(lines[number], flush=True)
    if options.write:
        README.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
