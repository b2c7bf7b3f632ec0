"""Runs the core of the tests with the lowest, the middle and the newest versions of what billhook needs.

    python .ci/matrix.py OUT
    python .ci/matrix.py OUT --sets floors middle --torch any --python python3.11

Each set is a fresh virtual environment in OUT, with this clone installed as it is. `floors` are the lowest versions that
pyproject.toml allows, `middle` has the transformers that engines pin, `newest` what pip gives. `--torch any` leaves torch to pip,
where its lowest wheel is too large. One fit of each callback, and a case of each test of sparsity, KV heads, units, plans and
saved models, are what `pytest -m fast` takes of these folders. Writes OUT/matrix.md, and each set's log beside it.
"""

import argparse
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
MIDDLE = "transformers==5.20.2"
SETS = "floors", "middle", "newest"
CORE = ["sparsity", "kv_heads", "units", "pruning", "checkpoints", "callbacks", "report/test_generation.py"]
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "jsonschema", "gguf", "sentencepiece", "onnx"]
SHOWN = ["torch", "transformers", "lightning", "peft", "datasets", "torchmetrics"]
ASK = "import sys, importlib.metadata as m; print(sys.version.split()[0], *(m.version(p) for p in sys.argv[1:]))"


def main() -> None:
    """Runs each set, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environments")
    parser.add_argument("--torch", choices=["floor", "any"], default="floor", help="which torch the set `floors` has")
    parser.add_argument("--processes", default="2", help="of pytest, for each set")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [f"| set | Python | {' | '.join(SHOWN)} | tests | on |", f"|{'---|' * (len(SHOWN) + 4)}"]
    failed = 0
    with ThreadPoolExecutor() as pool:  # pip needs one core
        made = [pool.submit(make, name, options.out / name, options.python, options.torch) for name in options.sets]
    for name, versions in zip(options.sets, made, strict=True):
        cells = versions.result()
        code, tests = run(options.out / name, options.processes)
        lines.append(f"| {' | '.join([name, *cells, tests, time.strftime('%Y-%m-%d')])} |")
        print(lines[-1], flush=True)
        failed = failed or code
    (options.out / "matrix.md").write_text("\n".join(lines) + "\n")
    sys.exit(failed)


def make(name: str, folder: Path, python: str, torch: str) -> list[str]:
    """Makes the environment of a set, and returns its versions."""
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    own, pins = python_in(folder), folder / "pins.txt"
    pins.write_text("\n".join(constraints(name, torch)) + "\n")
    pip = [own, "-m", "pip", "install", "-q", "-c", str(pins)]
    subprocess.run([*pip, "-e", str(ROOT), *TOOLS], check=True)
    return subprocess.run([own, "-c", ASK, *SHOWN], check=True, capture_output=True, text=True).stdout.split()


def python_in(folder: Path) -> str:
    """Returns the interpreter of an environment."""
    return str(folder / "bin" / "python")


def run(folder: Path, processes: str) -> tuple[int, str]:
    """Tests with an environment; returns pytest's exit code, and how many tests passed."""
    command = [python_in(folder), "-m", "pytest", "-m", "fast", "-W", "default", "-n", processes, "-p", "no:cacheprovider"]
    tests = subprocess.run(
        [*command, *(f"tests/{one}" for one in CORE)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    folder.with_suffix(".log").write_text(tests.stdout)
    last = tests.stdout.strip().splitlines()[-1]
    if tests.returncode:
        print(tests.stdout[-6000:], flush=True)
    return tests.returncode, ", ".join(re.findall(r"\d+ (?:passed|failed|errors?)", last)) or last


def constraints(name: str, torch: str) -> list[str]:
    """Returns what pip is held to: exact versions of a set."""
    if name != "floors":
        return [MIDDLE] if name == "middle" else []
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = {re.split(r"[\[<>=]", one)[0]: re.findall(r">=([\d.]+)", one)[0] for one in needed}
    return [f"{package}=={version}" for package, version in lowest.items() if package != "torch" or torch == "floor"]


if __name__ == "__main__":
    main()
