"""Ways to a real model of 85 % of its parameters, each as its authors do it, at equal size and equal tokens, on three texts.

`pip install torch-pruning`; `OMP_NUM_THREADS=1 python benchmarks/peers.py MODEL DATA WORK --out peers.md` writes the table;
`measured.py` says what is in DATA, and `kv_texts.py` on what perplexity is measured. All rows but LLM-Pruner's see 64 windows of
512 tokens of two training texts, then `--steps` steps of 2 x 128 tokens of the rest, in which the dense model is the teacher, and
all weights are trained. LLM-Pruner's sees 10 windows of 64 tokens, as in its paper, and as many more steps as are tokens left; it
trains LoRA (r = 8, alpha = 16, dropout 0.05, on all linear layers) on the text alone. torch-pruning ranks the same channels that
billhook ranks, by its own scores. What WORK holds is not measured again.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from kv_texts import SEEN, tests
from measured import CALIBRATION, TESTS, Lines, perplexity, shown, windows
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

import billhook as bh
from billhook.cli.shrink import Recovery
from kv_heads import train

QUARTER = bh.Amount(channels=0.25, round_to=1)
LENGTH, BATCH = 128, 2


def repaired(model, seen, repair):
    """A quarter of the channels removed, and the rest repaired."""
    plan = bh.plan(model, importance=bh.OutputNorm(), batches=seen, amount=QUARTER)
    bh.apply(model, plan, weights=bh.repair(model, plan, seen, repair))


def llm_pruner(model, seen):
    """A fifth of the channels and a KV head of three removed in blocks 4 to 27, by the paper's score and settings."""
    rows = torch.cat([batch["input_ids"][:, :64] for batch in seen[:: len(seen) // 10]])[:10]
    amount = bh.Amount(channels=0.2006, kv_heads=0.34, first=4, last=2, round_to=1)
    batches = [{"input_ids": rows, "labels": rows}]
    bh.apply(model, bh.plan(model, importance=bh.Taylor("first"), batches=batches, amount=amount))


def short_gpt(model, seen):
    """Six blocks removed, by the angle between a block's input and output."""
    importance = bh.importance.BlockInfluence()
    bh.apply(model, bh.plan(model, importance=importance, batches=seen, amount=bh.Amount(blocks=6)))


def torch_pruning(model, seen, hessian=False):
    """A quarter of the channels removed by torch-pruning."""
    import torch_pruning as tp  # only these rows need it

    importance = tp.importance.GroupHessianImportance() if hessian else tp.importance.GroupTaylorImportance()
    pruned = {getattr(layer.mlp, name) for layer in model.model.layers for name in ("gate_proj", "up_proj")}
    others = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Embedding) and layer not in pruned]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs={"input_ids": seen[0]["input_ids"][:, :8], "use_cache": False},
        importance=importance,
        output_transform=lambda output: output.logits,
        pruning_ratio=0.25,
        ignored_layers=others,
        root_module_types=[nn.Linear],
    )
    for batch in seen:
        if hessian:
            model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        if hessian:
            importance.accumulate_grad(model)
    pruner.step()
    model.zero_grad()
    model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features


ROWS = {
    "nothing": None,
    "billhook, repaired": lambda model, seen: repaired(model, seen, bh.RepairConfig()),
    "billhook, repaired and matched": lambda model, seen: repaired(
        model, seen, bh.RepairConfig(match=bh.criteria.BlockMatching())
    ),
    "LLM-Pruner and LoRA": llm_pruner,
    "ShortGPT": short_gpt,
    "torch-pruning, Taylor": torch_pruning,
    "torch-pruning, Hessian": lambda model, seen: torch_pruning(model, seen, hessian=True),
}


def trained(options, name, model, seen):
    """The model after the steps of its row."""
    rest = [windows(options, text, None)[SEEN:].flatten() for text in CALIBRATION.values()]
    shortest = min(map(len, rest))
    ids = torch.cat([text[:shortest] for text in rest])
    if name == "LLM-Pruner and LoRA":
        more = (sum(batch["input_ids"].numel() for batch in seen) - 640) // (LENGTH * BATCH)
        settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
        adapted = get_peft_model(model, settings)
        train(adapted, ids, argparse.Namespace(steps=options.steps + more, batch=BATCH, length=LENGTH, lr=options.lora_lr))
        return adapted.merge_and_unload()
    order = torch.randperm(len(ids) // LENGTH, generator=torch.Generator().manual_seed(0))[: options.steps * BATCH]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[order]
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], BATCH)
    recovery = Recovery(recover=options.steps, recover_lr=options.lr)
    recovery.train(model, str(options.model), loader, torch.device("cpu"), 0, lambda *_: None)
    return model


def measured(options, name):
    """The perplexities of a row before and after training, measured once."""
    file = options.work / f"{name} {' '.join(options.texts)} {options.steps}.json".replace(":", "_")
    if not file.exists():
        torch.manual_seed(0)
        model, seen, rows = bh.load(str(options.model), dtype="float32"), shown(options), tests(options, left_out=False)
        known, start = {}, time.process_time()
        if ROWS[name] is not None:
            ROWS[name](model, seen)
        known["seconds"] = time.process_time() - start
        known["parameters"] = model.num_parameters()
        known["before"] = {text: perplexity(model, ids) for text, ids in rows.items()}
        start, model = time.process_time(), trained(options, name, model, seen)
        known["training"] = time.process_time() - start
        known["after"] = {text: perplexity(model, ids) for text, ids in rows.items()}
        file.write_text(json.dumps(known))
    return json.loads(file.read_text())


def main():
    """Every row that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--texts", nargs="*", default=["foldoc:32", "wikitext:32"])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--only", nargs="*", default=list(ROWS)[1:], choices=list(ROWS)[1:])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    columns = ("way", "parameters", "tokens", *TESTS, "Python")
    lines = Lines(options.out, (*columns, *(f"{text}, trained" for text in columns[3:]), "CPU s", "of training"))
    tokens, dense = 512 * len(shown(options)) + options.steps * LENGTH * BATCH, measured(options, "nothing")
    for name in ("nothing", *options.only):
        row = measured(options, name)
        cells = [
            f"{row[state][text]:.2f} ({row[state][text] / dense[state][text]:.2f})"
            for state in ("before", "after")
            for text in (*TESTS, "python")
        ]
        share, seconds = row["parameters"] / dense["parameters"], (f"{row[key]:.0f}" for key in ("seconds", "training"))
        lines.add([name, f"{share:.1%}", f"{tokens:,}", *cells, *seconds])


if __name__ == "__main__":
    main()
