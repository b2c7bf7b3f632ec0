"""Fits under FSDP2 on two ranks again and again, under a checker of the heap.

    python benchmarks/heap.py OUT --minutes 30 --checker malloc
    python benchmarks/heap.py OUT --minutes 30 --checker asan --work tests
    python benchmarks/heap.py OUT --fits 2 --checker valgrind

Twice in months a rank ended in such a sequence: with "malloc(): unaligned tcache chunk detected", and by a fault in a thread of
gloo that had just begun. `--work searches` makes searches in one process, live tensors counted; `tests` makes the fits of
tests/fit/test_model_parallel.py, processes begun anew for each round. `malloc` is glibc's own checker
(`MALLOC_CHECK_=3`, freed memory overwritten), `asan` preloads AddressSanitizer's allocator, which finds double and invalid frees
and what `memcpy` and its like write outside of a block; `valgrind` checks each access, some fifty times slower, on one rank.
Prints how many fits each rank has made; ends with the rank's exit status.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
TWO = """
from kit import beside, loads, settings, sharding
sharding.fit_all()
settings.fit_all()
beside.measure_all()
loads.load_all()
"""
LAYERS = 8
CHECKERS = {
    "none": {},
    "malloc": {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3", "GLIBC_TUNABLES": "glibc.malloc.perturb=165"},
    "asan": {
        "LD_PRELOAD": "libasan.so.8:libstdc++.so.6",  # or it finds no way to throw
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:new_delete_type_mismatch=0",
    },
    "valgrind": {"PYTHONMALLOC": "malloc"},
}


def main() -> None:
    """Starts the ranks, and waits for them, until the time is over or one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--fits", type=int, default=1_000_000)
    parser.add_argument("--checker", choices=CHECKERS, default="malloc")
    parser.add_argument("--work", choices=["searches", "tests"], default="searches")
    parser.add_argument("--ranks", type=int, default=2, help="of searches; tests have two")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end, rounds, codes = time.time() + 60 * options.minutes, 0, [0]
    while time.time() < end and not any(codes) and (rounds == 0 or options.work == "tests"):
        codes, rounds = run(options, end), rounds + 1
        print(f"round {rounds}, exit {codes}", flush=True)
    for rank, code in enumerate(codes):
        print(f"rank {rank}: exit {code}: {(options.out / f'rank{rank}.log').read_text().strip().splitlines()[-1]}")
    sys.exit(max(map(abs, codes)))


def run(options: argparse.Namespace, end: float) -> list[int]:
    """Starts all ranks once, and returns how each ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | CHECKERS[options.checker] | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
    before = ["valgrind", "--error-limit=no", "--num-callers=40"] if options.checker == "valgrind" else []
    if options.work == "tests":
        sys.path.insert(0, str(TESTS))
        from kit import beside, loads, settings, sharding
        from kit.fits import write_text

        fits = [*sharding.MASKS, *sharding.SHAPES, *sharding.RESUMED, *sharding.CHANGED, "adapted", "rounded otherwise"]
        fits += [*settings.SETTINGS, *settings.MASKED, *beside.ON_TWO, *loads.SAVED]
        (options.out / "tests.py").write_text(TWO)
        what = [str(options.out / "tests.py"), json.dumps([write_text(options.out), str(options.out), fits])]
    else:
        what = [__file__, "--rank", json.dumps([str(options.out), end, options.fits, options.ranks])]
    count, ranks = 2 if options.work == "tests" else options.ranks, []
    for rank in range(count):
        own = environment | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(count), "RANK": str(rank)}
        log = open(options.out / f"rank{rank}.log", "w")  # noqa: SIM115  # the process has it to its end
        ranks.append(subprocess.Popen([*before, sys.executable, *what], env=own, stdout=log, stderr=log))
    return [rank.wait() for rank in ranks]


def fit_again(out: str, end: float, fits: int, ranks: int) -> None:
    """What each rank runs: the events whose memory is measured, in turn, a search after each two others."""
    import torch

    from kit.beside import beside
    from kit.sharding import sharding

    torch.set_num_threads(1)
    others = ["channels, repaired", "KV heads, with data", "zeros, SparseGPT", "zeros, ALPS", "hidden dimensions, by gradients"]
    made, going = 0, True
    while made < fits and going:
        name = ("a smaller model", "a smaller cache", others[made // 3 % len(others)])[made % 3]
        beside(Path(out), name, sharding(ranks), ranks=ranks, layers=LAYERS)
        made += 1
        print(f"{made} fits, the last: {name}", flush=True)
        answers = [None] * ranks
        torch.distributed.all_gather_object(answers, time.time() < end)
        going = all(answers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        fit_again(*json.loads(sys.argv[2]))
    else:
        main()
