"""Seconds in which one linear is refitted, part by part, from random moments: `OMP_NUM_THREADS=1 python benchmarks/refit.py`.

By default it is the last linear of a feed-forward of Llama 13B, 5,120 x 13,824, that keeps three quarters of its inputs, with
moments of two parts of a text; with `--files FOLDER` these lie in files, as they do where a streamed model's memory is limited.
Moments are random, as time and memory do not depend on them.
"""

import argparse
import time
from functools import partial

import torch

from billhook.engine.memory import resident
from billhook.engine.passes import ActivationFiles
from billhook.repairs import least_squares
from billhook.repairs.residuals import ResidualStatistics


def moments(rows, columns, files):
    """Random moments of as many tokens as inputs."""
    part = ResidualStatistics(rows, columns, "cpu", files)
    part.tokens += columns
    for sums in (part.products, part.owed_products):
        sums.copy_(torch.randn(sums.shape)).mul_(columns**0.5)
    part.products.diagonal().add_(3 * columns)
    part.owed_squares += rows * columns
    return part


def timed(what, act):
    """Does something, and prints its CPU seconds."""
    start = time.process_time()
    found = act()
    print(f"{what}: {time.process_time() - start:.1f} CPU s", flush=True)
    return found


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5120, help="outputs of the linear")
    parser.add_argument("--columns", type=int, default=10368, help="inputs that it keeps")
    parser.add_argument("--files", help="a folder for moments to rest in; by default they are in memory")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    files = ActivationFiles(options.files) if options.files else None
    parts = [moments(options.rows, options.columns, files) for _ in range(2)]
    ((fitted, held_out),) = timed("mixtures of the outputs", lambda: least_squares._mixed([([parts[0]], parts[1])]))
    tried = partial(least_squares.solve_ridge, fitted, False, 0.1)
    timed("each ridge that is tried", lambda: least_squares.residual_error(tried(), fitted, held_out, False))
    weight = torch.zeros(options.rows, options.columns, dtype=torch.bfloat16)
    refit = partial(least_squares.refit_linear, weight, None, [([parts[0]], parts[1])], parts, [0.1])
    timed("a refit with one ridge", refit)
    if files is not None:
        files.close()
    print(f"peak: {(resident('VmHWM') or 0) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
