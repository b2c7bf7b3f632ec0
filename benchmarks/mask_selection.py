"""What choosing a mask costs, beside a full stable sort and a scatter, on one matrix as large as those of a 7B model.

`python benchmarks/mask_selection.py --out mask_selection.md` writes the table. Set OMP_NUM_THREADS=1.

Each figure is from a fresh process: the least CPU time of some repetitions, and by how much its memory grows at most, the mask
included. The masks of both ways are compared.
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import torch

from billhook.sparsity.masks import keep_layer, keep_n_of_m, keep_rows

HEADER = "4096 x 11008, float32 | stable sort, CPU s | billhook, CPU s | times faster | stable sort, MB | billhook, MB | memory"


def sort_rows(scores, count):
    """The mask of a full stable sort of each row."""
    lowest = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)


CASES = {
    "half of each row": (lambda s: sort_rows(s, s.shape[1] // 2), lambda s: keep_rows(s, 0.5)),
    "half of the matrix": (lambda s: sort_rows(s.view(1, -1), s.numel() // 2).view_as(s), lambda s: keep_layer(s, 0.5)),
    "2:4": (lambda s: sort_rows(s.view(-1, 4), 2).view_as(s), lambda s: keep_n_of_m(s, 2, 4)),
    "16:32": (lambda s: sort_rows(s.view(-1, 32), 16).view_as(s), lambda s: keep_n_of_m(s, 16, 32)),
}


def resident(peak=False):
    """Megabytes of resident memory, now or at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024


def measure(case, which, repetitions, pipe):
    """Sends CPU seconds, megabytes and a fingerprint of the mask."""
    torch.set_num_threads(1)
    scores = torch.rand(4096, 11008, generator=torch.Generator().manual_seed(0))
    select = CASES[case][which]
    select(scores[:8])  # what the first call imports
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, seconds = resident(), []
    for _ in range(repetitions):
        start = time.process_time()
        keep = select(scores)
        seconds.append(time.process_time() - start)
        if len(seconds) == 1:
            grown = resident(peak=True) - before
    where = keep.nonzero()
    pipe.send((min(seconds), grown, int((where[:, 0] * 11008 + where[:, 1]).sum())))


def run(case, which, repetitions):
    """What a fresh process has measured."""
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(case, which, repetitions, sender))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def main():
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the table is written")
    arguments = parser.parse_args()
    lines = [f"| {HEADER} |", "|---|" + "---:|" * HEADER.count("|")]
    print("\n".join(lines))
    for case in CASES:
        slow, much, expected = run(case, 0, arguments.repetitions)
        fast, little, found = run(case, 1, arguments.repetitions)
        assert found == expected, f"{case}: the masks differ"
        lines.append(
            f"| {case} | {slow:.2f} | {fast:.2f} | {slow / fast:.1f} | {much:.0f} | {little:.0f} | 1/{much / little:.1f} |"
        )
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
