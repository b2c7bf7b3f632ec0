"""Asks pip whether billhook installs beside engines, trainers and other tools; nothing is installed or built.

    python benchmarks/coinstall.py OUT

The newest release of each tool is resolved together with a wheel of this clone (`pip install --dry-run --only-binary :all:`), for
the Python that runs this. Writes OUT/coinstall.md: yes, with the versions of torch and transformers that both get, or which
requirement stops it. Pip's own settings (`PIP_CONFIG_FILE`, constraints) count.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ["vllm", "sglang", "axolotl", "unsloth", "llmcompressor", "trl", "lm-eval", "nvidia-modelopt", "llamafactory"]
SHOWN = "torch", "transformers"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
RESOLVE = [*PIP, "install", "--dry-run", "--ignore-installed", "--only-binary", ":all:", "--progress-bar", "off", "--report"]
SECONDS = 1200.0
"""How long pip may look for versions that fit together."""


def main() -> None:
    """Resolves each tool alone, and with billhook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tools", nargs="+", default=TOOLS, help="what to install beside billhook, as pip names it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    subprocess.run([*PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(options.out), str(ROOT)], check=True)
    wheel = max(options.out.glob("billhook-*.whl"), key=lambda path: path.stat().st_mtime)
    lines = [
        f"Python {platform.python_version()}, pip's resolver, {time.strftime('%Y-%m-%d')}.",
        "",
        "| tool | beside billhook | with, or what stops it |",
        "|---|---|---|",
    ]
    for tool in options.tools:
        lines.append(f"| {' | '.join(beside(tool, wheel, options.out / f'{tool}.json'))} |")
        print(lines[-1], flush=True)
        (options.out / "coinstall.md").write_text("\n".join(lines) + "\n")


def beside(tool: str, wheel: Path, report: Path) -> tuple[str, str, str]:
    """Returns a tool with its newest version, whether that installs beside billhook, and with what or why not."""
    newest, error = resolved([tool, "--no-deps"], report)
    if not newest:
        return tool, "unknown", why(error)
    asked = f"{tool}=={newest[canonical(tool)]}"
    both, error = resolved([asked, str(wheel)], report)
    if both:
        return asked, "yes", ", ".join(f"{name} {both[name]}" for name in SHOWN if name in both)
    alone, of_alone = resolved([asked], report)
    return asked, "no" if alone else "not even alone", why(error if alone else of_alone)


def resolved(asked: list[str], report: Path) -> tuple[dict[str, str], str]:
    """Returns the version of each package that pip would install, none if it cannot; and what it says then."""
    sources = list[str]()  # packages of which there are no wheels: pip asks their own build for what they require
    while True:
        try:
            options = [f"--no-binary={package}" for package in sources]
            done = subprocess.run([*RESOLVE, str(report), *options, *asked], capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return {}, f"no answer in {SECONDS:.0f} s"
        if not done.returncode:
            break
        lacking = re.findall(r"No matching distribution found for ([\w.-]+)", done.stderr)
        if not set(lacking) - set(sources):
            return {}, done.stdout + done.stderr
        sources += lacking
    found = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    return {canonical(one["name"]): one["version"] for one in found}, ""


def why(error: str) -> str:
    """Returns the requirements that contradict each other, or pip's last words."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    conflict = [line for line in lines if " depends on " in line]
    return "; ".join(dict.fromkeys(conflict)) or (lines[-1] if lines else "pip says nothing").removeprefix("ERROR: ")


def canonical(name: str) -> str:
    """Returns a package's name as reports and requirements may both write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
