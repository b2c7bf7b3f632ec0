"""Seconds for Wanda's masks with all blocks on a GPU, and with one at a time from memory or from files: `benchmarks/offload.py`.

By default the model is a Llama of 16 random blocks, 4,096 wide, in bfloat16, and there are 8 batches of 2,048 tokens. The next
block is on its way, or read from its file, while one computes, or not; what each takes longer than where all blocks are on the
GPU is what copying costs that computing does not hide. Peaks are of the GPU's memory. It needs CUDA, and says so where there is
none.
"""

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import billhook as bh
from billhook.engine.device import DeviceCopies

DEVICE = torch.device("cuda")


def random_llama(options):
    """A Llama with random weights in the CPU's memory."""
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=7 * options.width // 2,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.width // 128,
        vocab_size=4096,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def timed(model, batches, **how):
    """Seconds, and bytes of the GPU's memory at most, of a walk over all blocks."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    bh.prune(model, bh.Wanda(), batches, sparsity=0.5, dry_run=True, **how)
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated()


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=16, help="blocks of the model")
    parser.add_argument("--width", type=int, default=4096, help="its hidden size, a multiple of 128")
    parser.add_argument("--batches", type=int, default=8, help="batches of calibration data")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=3, help="the least of how many times counts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA here: what is measured is how much of copying blocks to a GPU is hidden by computing there.")
        return
    model = random_llama(options)
    batches = [{"input_ids": torch.randint(4096, (1, options.length))} for _ in range(options.batches)]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, ahead in (("", False), (", the next on its way", True)):
            with mock.patch.object(DeviceCopies, "prefetches", return_value=ahead):
                found[f"one at a time{name}"] = [timed(model, batches, offload=DEVICE) for _ in range(options.rounds)]
                streamed = bh.stream(folder, Path(folder, "out"), device=DEVICE)
                found[f"from files{name}"] = [timed(streamed, batches) for _ in range(options.rounds)]
    model.to(DEVICE)
    found["all on the GPU"] = [timed(model, batches) for _ in range(options.rounds)]
    print(f"{torch.cuda.get_device_name()}; {model.num_parameters():,} parameters\n")
    print("| blocks | seconds | GiB |\n|---|---:|---:|")
    for where, rounds in found.items():
        print(f"| {where} | {min(seconds for seconds, _ in rounds):.2f} | {max(peak for _, peak in rounds) / 2**30:.2f} |")


if __name__ == "__main__":
    main()
