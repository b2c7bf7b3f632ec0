"""The share of small mistakes in the source that tests catch: what a smaller test suite must not lose.

    pip install pytest-cov
    python .ci/mutations.py OUT [--count 200] [--seed 0] [--folders sparsity engine ...] [--select "not slow"] [--most 150]

Each mutation changes one token of a copy of the source: a comparison, an operator, a truth value or a whole number. First
all tests of the folders run once, under coverage, which writes down the tests that execute each line. Of the tests that
execute the mutated line, the `--most` quickest run until a test fails; a mutation that they pass, or whose line no test
executes, has survived. The same seed gives the same mutations of the same source, so that two suites, or two selections of
one suite, can be compared. A run that was stopped goes on.
"""

import argparse
import ast
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import tokenize
import xml.etree.ElementTree as ET
from itertools import islice
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parents[1]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["lightning", "peft", "torch", "transformers", "datasets"])
FOLDERS = ["engine", "kv_heads", "pruning", "repairs", "sparsity"]
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*", "//": "*",
    "%": "*", "&": "|", "+=": "-=", "-=": "+=", "|=": "&=", "and": "or", "or": "and", "not": "", "True": "False",
    "False": "True", "min": "max", "max": "min", "any": "all", "all": "any",
}  # fmt: skip
Mutation = tuple[str, int, int, str, str]
"""File, line, column, the token, and the token that it becomes."""


def mutations_of(path: Path) -> list[tuple[int, int, str, str]]:
    """Returns the line and column of each token that can be mutated, the token, and its replacement."""
    source = path.read_text()
    kept = {line for node in ast.walk(ast.parse(source)) for line in untouched(node)}
    mutations = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, column = token.start
        if line in kept:
            continue
        if token.type in (tokenize.OP, tokenize.NAME) and token.string in SWAPS:
            mutations.append((line, column, token.string, SWAPS[token.string]))
        elif token.type == tokenize.NUMBER and token.string.isdecimal():
            mutations.append((line, column, token.string, str(int(token.string) + 1)))
    return mutations


def untouched(node: ast.AST) -> range:
    """Returns the lines that compute nothing: imports, signatures (they hold defaults and annotations), and raised errors."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise):
        return range(node.lineno, (node.end_lineno or node.lineno) + 1)
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return range(node.lineno, node.body[0].lineno)
    if isinstance(node, ast.AnnAssign):
        return range(node.lineno, node.lineno + 1)
    return range(0)


def sample(folders: list[str], count: int, seed: int) -> list[Mutation]:
    """Draws mutations; each token of the folders is as likely as any other."""
    mutations = []
    for folder in folders:
        for path in sorted((ROOT / "src" / "billhook" / folder).rglob("*.py")):
            mutations += [(str(path.relative_to(ROOT)), *mutation) for mutation in mutations_of(path)]
    random.Random(seed).shuffle(mutations)
    legal = (mutation for mutation in mutations if parses(mutated((ROOT / mutation[0]).read_text(), mutation)))
    return list(islice(legal, count))


def mutated(source: str, mutation: Mutation) -> str:
    """Returns the source with the mutation."""
    _, line, column, before, after = mutation
    lines = source.splitlines(keepends=True)
    text = lines[line - 1]
    lines[line - 1] = text[:column] + after + text[column + len(before) :]
    return "".join(lines)


def parses(source: str) -> bool:
    """Tells whether the source is Python: the star of an argument cannot become a plus."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def exit_status(arguments: list[str], source: Path, seconds: float | None = None) -> int:
    """Runs pytest on a copy of the source; returns its exit status, or 1 after so many seconds.

    It runs in a fork of a process that has imported the libraries, since importing them takes longer than most tests.
    """
    imported = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # plugins that the libraries import
    command = ["-q", "-p", "no:cacheprovider", "-W", imported, *arguments]
    process = FORKSERVER.Process(target=run_pytest, args=(command, source))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        return 1
    return process.exitcode or 0


def run_pytest(command: list[str], source: Path) -> None:
    """Runs pytest in this process, without output, and exits with its status."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.chdir(ROOT)
    folders = [str(source), str(ROOT / "tests")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"}  # of processes that a test starts
    sys.dont_write_bytecode = True
    sys.path[:0] = folders
    sys.exit(pytest.main(command))


def measure(out: Path, folders: list[str], select: str) -> None:
    """Runs all tests of the folders once, under coverage: writes which tests execute each line, and how long each test takes."""
    tests = [f"tests/{folder}" for folder in folders]
    os.environ["COVERAGE_FILE"] = str(out / "coverage")
    junit = [f"--junitxml={out / 'tests.xml'}", "-o", "junit_family=xunit1"]
    covered = ["--cov=src/billhook", "--cov-context=test", "--cov-report=", *junit]
    exit_status(["-n", "2", "-m", select, *covered, *tests], ROOT / "src")


def durations(out: Path) -> dict[str, float]:
    """Returns the seconds of each test that passes without a mutation."""
    seconds = {}
    for case in ET.parse(out / "tests.xml").iter("testcase"):
        file = case.get("file", "")
        classes = case.get("classname", "").removeprefix(file.removesuffix(".py").replace("/", ".")).replace(".", "::")
        if len(case) == 0:
            seconds[f"{file}{classes}::{case.get('name')}"] = float(case.get("time", 0))
    return seconds


def tests_of(mutation: Mutation, data: coverage.CoverageData, seconds: dict[str, float]) -> list[str]:
    """Returns the tests that execute the mutated line, the quickest first.

    A line that runs in a fixture's setup counts for all tests of that file, and a line that runs at import (a constant)
    for all tests that execute any line of its file.
    """
    lines = data.contexts_by_lineno(str(ROOT / mutation[0]))
    contexts = set(lines.get(mutation[1], [])) - {""} or {context for line in lines.values() for context in line} - {""}
    names = {context.rpartition("|")[0] for context in contexts}
    files = {context.partition("::")[0] for context in contexts if context.endswith("|setup")}
    return sorted((test for test in seconds if test in names or test.partition("::")[0] in files), key=seconds.__getitem__)


def caught(copy: Path, mutation: Mutation, tests: list[str], select: str, seconds: float) -> bool:
    """Tells whether a test fails, or the tests take longer than that, with the mutation in the copy of the source."""
    path = copy / Path(mutation[0]).relative_to("src")
    source = path.read_text()
    path.write_text(mutated(source, mutation))
    names = copy.parent / "tests.txt"
    names.write_text("\n".join(tests))
    try:
        return exit_status(["-x", "-m", select, f"@{names}"], copy, seconds) != 0
    finally:
        path.write_text(source)


def main() -> None:
    """Prints the share that is caught, and the mutations that survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folders", nargs="+", default=FOLDERS)
    parser.add_argument(
        "--select", default="not slow and not sweep and not nightly and not real", help="which tests run, as for pytest's -m"
    )
    parser.add_argument("--most", type=int, default=150, help="the most tests that run for a mutation")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    if not (options.out / "tests.xml").is_file():
        measure(options.out.resolve(), options.folders, options.select)
    data, seconds = coverage.CoverageData(str(options.out / "coverage")), durations(options.out)
    data.read()
    log = options.out / "mutations.jsonl"
    known = log.read_text().splitlines() if log.is_file() else []
    results = {tuple(line["mutation"]): line["caught"] for line in map(json.loads, known)}
    with tempfile.TemporaryDirectory() as folder, log.open("a") as file:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        for mutation in sample(options.folders, options.count, options.seed):
            if mutation not in results:
                tests = tests_of(mutation, data, seconds)[: options.most]
                results[mutation] = bool(tests) and caught(
                    copy, mutation, tests, options.select, 60 + 6 * sum(map(seconds.__getitem__, tests))
                )
                print(json.dumps({"mutation": mutation, "caught": results[mutation], "tests": len(tests)}), file=file, flush=True)
            print(f"{'caught  ' if results[mutation] else 'SURVIVED'} {':'.join(map(str, mutation))}", flush=True)
    print(f"{sum(results.values())} of {len(results)} caught")


if __name__ == "__main__":
    main()
