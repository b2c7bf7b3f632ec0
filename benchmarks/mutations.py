"""The share of small mistakes in the source that tests catch: what a smaller test suite must not lose.

    python benchmarks/mutations.py OUT.jsonl [--count 200] [--seed 0] [--folders sparsity engine ...] [--select "not slow"]

Each mutation changes one token of a copy of the source: a comparison, an operator, a truth value or a whole number. The tests of
its folder then run, by pytest's `-x`, and a mutation that they pass has survived. The same seed gives the same mutations of the
same source, so that two suites can be compared. Lines go to OUT as they are found, and a run that was stopped goes on after them.
"""

import argparse
import ast
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tokenize
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ["engine", "kv_heads", "pruning", "repairs", "sparsity"]
TESTS = {"engine": ["engine", "sparsity/test_prune.py"], "repairs": ["repairs", "engine/test_streamed_repair.py"]}
"""Where the tests of a folder are, if not in the folder of its name alone."""
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*", "//": "*",
    "%": "*", "&": "|", "+=": "-=", "-=": "+=", "|=": "&=", "and": "or", "or": "and", "not": "", "True": "False",
    "False": "True", "min": "max", "max": "min", "any": "all", "all": "any",
}  # fmt: skip


def mutations_of(path: Path) -> list[tuple[int, int, str, str]]:
    """Returns for each token that can be mistaken its line, its column, what it is and what it becomes."""
    source = path.read_text()
    kept = {line for node in ast.walk(ast.parse(source)) for line in untouched(node)}
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, column = token.start
        if line in kept:
            continue
        if token.type in (tokenize.OP, tokenize.NAME) and token.string in SWAPS:
            found.append((line, column, token.string, SWAPS[token.string]))
        elif token.type == tokenize.NUMBER and token.string.isdecimal():
            found.append((line, column, token.string, str(int(token.string) + 1)))
    return found


def untouched(node: ast.AST) -> range:
    """Returns the lines of what computes nothing: imports, signatures, which hold defaults and annotations, and raised errors."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise):
        return range(node.lineno, (node.end_lineno or node.lineno) + 1)
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return range(node.lineno, node.body[0].lineno)
    if isinstance(node, ast.AnnAssign):
        return range(node.lineno, node.lineno + 1)
    return range(0)


def sample(folders: list[str], count: int, seed: int) -> list[tuple[str, int, int, str, str]]:
    """Draws mutations, as many of each line of source wherever it is."""
    every = []
    for folder in folders:
        for path in sorted((ROOT / "src" / "billhook" / folder).rglob("*.py")):
            every += [(str(path.relative_to(ROOT)), *mutation) for mutation in mutations_of(path)]
    random.Random(seed).shuffle(every)
    found = (mutation for mutation in every if parses(mutated((ROOT / mutation[0]).read_text(), mutation)))
    return list(islice(found, count))


def mutated(source: str, mutation: tuple[str, int, int, str, str]) -> str:
    """Returns a source with a mutation."""
    _, line, column, before, after = mutation
    lines = source.splitlines(keepends=True)
    text = lines[line - 1]
    lines[line - 1] = text[:column] + after + text[column + len(before) :]
    return "".join(lines)


def parses(source: str) -> bool:
    """Tells whether a source is one, which the star of an argument is not without it."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def tests_of(file: str) -> list[str]:
    """Returns the tests of a file of the source."""
    folder = Path(file).parts[2]
    return [f"tests/{place}" for place in TESTS.get(folder, [folder])]


def caught(copy: Path, mutation: tuple[str, int, int, str, str], select: str, seconds: int) -> bool:
    """Tells whether tests fail, or take too long, with a mutation in the copy of the source."""
    path = copy / Path(mutation[0]).relative_to("src")
    source = path.read_text()
    path.write_text(mutated(source, mutation))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "-m",
        select,
        *tests_of(mutation[0]),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), str(ROOT / "tests")]), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(source)
    return done.returncode != 0


def main() -> None:
    """Prints the share that is caught, and what survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folders", nargs="+", default=FOLDERS)
    parser.add_argument("--select", default="not slow and not sweep and not real", help="which tests run, as for pytest's -m")
    parser.add_argument("--seconds", type=int, default=900, help="after which tests that still run have caught it")
    options = parser.parse_args()
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    done = {tuple(one["mutation"]): one["caught"] for one in known}
    with tempfile.TemporaryDirectory() as folder, options.out.open("a") as out:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        for mutation in sample(options.folders, options.count, options.seed):
            if mutation not in done:
                done[mutation] = caught(copy, mutation, options.select, options.seconds)
                print(json.dumps({"mutation": mutation, "caught": done[mutation]}), file=out, flush=True)
            file, line, _, before, after = mutation
            print(f"{'caught  ' if done[mutation] else 'SURVIVED'} {file}:{line} {before!r} -> {after!r}", flush=True)
    print(f"{sum(done.values())} of {len(done)} caught")


if __name__ == "__main__":
    main()
