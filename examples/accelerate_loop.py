"""A plain training loop with accelerate: sparse at the start, fewer KV heads in the middle, stopped, and resumed.

Without accelerate, the same calls work on the model and the optimizer themselves.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import billhook as bh


def train(steps: range, folder: Path, resume: bool) -> torch.nn.Module:
    """Trains from one step to another, converts before the fifth, and saves what a resumed run needs."""
    accelerator = Accelerator()
    model = bh.load(folder / "model" if resume else "tiny", dtype="float32").train()
    batches = bh.Calibration("tiny", tokens=64 * 128, length=128, tokenizer="tiny").read(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    saved = torch.load(folder / "state.pt", weights_only=True) if resume else None
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    loader = DataLoader(batches, batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    inner = accelerator.unwrap_model(model)
    plan = bh.prune(inner, bh.Wanda(), batches, sparsity=0.5) if saved is None else None
    held = bh.hold_masks(inner, optimizer, saved["masks"] if plan is None else plan.masks(inner))
    for step, batch in zip(steps, list(loader)[steps.start :], strict=False):
        if step == 5:
            bh.convert_kv_heads(inner, 2, "mean", optimizers=[optimizer.optimizer])
            held.follow()
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    torch.save({"optimizer": optimizer.optimizer.state_dict(), "masks": held.state_dict()}, folder / "state.pt")
    held.detach()
    bh.save(inner, folder / "model")
    return inner


def main(folder: str) -> None:
    """Trains for ten steps, in two parts."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for steps, resume in ((range(6), False), (range(6, 10), True)):
        model = train(steps, Path(folder), resume)
    print(bh.summary(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="outputs/accelerate_loop")
    main(**vars(parser.parse_args()))
