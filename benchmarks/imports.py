"""How long billhook takes to import beyond torch, Lightning and transformers.

    python benchmarks/imports.py [--rounds 5]

Each figure is the median of fresh processes, in which the three are imported, their garbage is collected and frozen, and then
billhook and one name of it are imported. A full collection of what transformers alone has put on the heap takes longer than any
of these imports, and falls into whichever import comes next: its time is a row of its own.
"""

import argparse
import subprocess
import sys
from statistics import median

NAMES = ["WeightPruning", "KVHeadConversion", "StructuredPruning", "HeadPruning", "DepthPruning", "Shrinking", "Export", "Report"]
SCRIPT = """
import gc, sys, time
import torch, lightning.pytorch, transformers
from transformers import PreTrainedModel
begin = time.perf_counter()
gc.collect()
collected = time.perf_counter() - begin
gc.freeze()
begin = time.perf_counter()
import billhook
getattr(billhook, sys.argv[1])
print(time.perf_counter() - begin, collected, sum(name.startswith("billhook") for name in sys.modules))
"""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds, collections = parser.parse_args().rounds, []
    print("| imported | seconds | modules of billhook |\n|---|---|---|")
    for name in NAMES:
        command = [sys.executable, "-c", SCRIPT, name]
        processes = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(rounds)]
        seconds, collected, modules = zip(*(map(float, process.stdout.split()) for process in processes), strict=True)
        collections += collected
        print(f"| `{name}` | {median(seconds):.2f} | {modules[0]:.0f} |", flush=True)
    print(f"| garbage of the three, collected | {median(collections):.2f} | |")


if __name__ == "__main__":
    main()
