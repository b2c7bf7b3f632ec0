"""How many files of billhook a call enters, and how often it comes back to one: what a reader has to open to follow it.

    python .ci/files_entered.py [--only NAME ...] [--list NAME]

Each flow runs in a process of its own on a Llama of 4 layers (64 wide, vocabulary 128) with 4 batches of 8 rows. All modules are
imported before. Counted by `sys.setprofile` within the library call alone: files, functions, and entries, which are calls whose
nearest caller in billhook is in another file. `--list` prints the files of one flow with their entries.
"""

import argparse
import importlib
import json
import logging
import pkgutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import billhook
import billhook as bh

FLOWS = ["prune", "prune, streamed", "KVHeadConversion, svd", "StructuredPruning, repaired", "shrink", "save"]


def main() -> None:
    """Prints the table, or the files of one flow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FLOWS, default=FLOWS)
    parser.add_argument("--list", choices=FLOWS)
    parser.add_argument("--run", choices=FLOWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(counted(options.run)))
        return
    if not options.list:
        print("| flow | files | functions | entries from another file | most often |\n|---|---|---|---|---|")
    for flow in [options.list] if options.list else options.only:
        command = [sys.executable, "-W", "ignore", __file__, "--run", flow]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        functions, entries = json.loads(lines[-1])
        if options.list:
            print("\n".join(f"{number:7,} {file}" for file, number in sorted(entries.items())))
            continue
        most = ", ".join(f"{file.removesuffix('.py')} {number:,}" for file, number in Counter(entries).most_common(4))
        print(f"| {flow} | {len(entries)} | {functions:,} | {sum(entries.values()):,} | {most} |", flush=True)


def counted(flow: str) -> tuple[int, dict[str, int]]:
    """Returns how many functions a flow calls, and by file how often it is entered from another."""
    logging.disable(logging.WARNING)
    for module in pkgutil.walk_packages(billhook.__path__, "billhook."):  # or imports would be counted, too
        if not module.name.startswith(("billhook.__main__", "billhook.serving.workers", "billhook.integrations.axolotl")):
            importlib.import_module(module.name)
    with tempfile.TemporaryDirectory() as folder:
        call = prepared(flow, Path(folder))
        watch = Watch()
        sys.setprofile(watch)
        try:
            call()
        finally:
            sys.setprofile(None)
    return len(watch.functions), dict(watch.entries)


class Watch:
    """Sees the calls of Python functions in the source of billhook."""

    def __init__(self) -> None:
        self._root = str(Path(billhook.__file__).parent) + "/"
        self.functions, self.entries = set[Any](), Counter[str]()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Counts a call if its nearest caller in billhook is in another file."""
        if event != "call" or not (here := frame.f_code.co_filename).startswith(self._root):
            return
        self.functions.add(frame.f_code)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(self._root):
            caller = caller.f_back
        if caller is None or caller.f_code.co_filename != here:
            self.entries[here.removeprefix(self._root)] += 1


def prepared(flow: str, folder: Path) -> Callable[[], object]:
    """Returns the call of a flow, with all that is made before it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=4, **sizes)).eval()
    batches = [{"input_ids": torch.randint(3, 128, (8, 32))} for _ in range(4)]
    if flow == "prune":
        return partial(bh.prune, model, bh.Wanda(), batches, sparsity=0.5)
    if flow == "save":
        return partial(bh.save, model, folder / "saved")
    if flow == "prune, streamed":
        model.save_pretrained(folder / "dense")
        return lambda: bh.prune(bh.stream(folder / "dense", folder / "out"), bh.Wanda(), batches, sparsity=0.5)
    if flow == "shrink":
        return partial(
            bh.shrink, model, bh.Budget(params=0.85), batches, layers="free", search=bh.Search(generations=2, candidates=2)
        )
    callback = {
        "KVHeadConversion, svd": partial(bh.KVHeadConversion, 1, method="svd"),
        "StructuredPruning, repaired": partial(bh.StructuredPruning, bh.Amount(channels=0.25), repair=bh.RepairConfig()),
    }[flow](at=1, calibration=batches, measure_batches=0)
    return fit(model, callback, batches, folder)


def fit(model: Any, callback: Any, batches: list[Any], folder: Path) -> Callable[[], object]:  # noqa: ANN401
    """Returns a fit of four steps with a callback."""
    import lightning.pytorch as pl
    import torch

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.train()

        def train_dataloader(self) -> Any:  # noqa: ANN401
            return torch.utils.data.DataLoader(batches, batch_size=None)

        def training_step(self, batch: Any, _: int) -> Any:  # noqa: ANN401
            return self.model(**batch, labels=batch["input_ids"]).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=4, accelerator="cpu", default_root_dir=folder, callbacks=[callback], **quiet)
    return partial(trainer.fit, Module())


if __name__ == "__main__":
    main()
