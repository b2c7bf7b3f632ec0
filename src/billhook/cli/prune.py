"""`billhook prune`: a checkpoint in, a pruned checkpoint out, with its perplexity before and after."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from billhook.assets import model_path
from billhook.checkpoints.place import check_target
from billhook.checkpoints.pretrained import load_tokenizer
from billhook.checkpoints.save import load, save
from billhook.model.linears import prunable
from billhook.running.offload import offloaded
from billhook.running.walk import Sequential, find_sites
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.calibration import Progress as Tell
from billhook.sparsity.checks import check_device, check_folder
from billhook.sparsity.criteria import Criterion
from billhook.sparsity.masks import check_amount, sparsity_of
from billhook.sparsity.prune import prune as prune_weights
from billhook.training.data import DatasetModule, TextDataModule
from billhook.training.rows import Data, Rows

LONGEST = 2048  # tokens of a calibration example, unless another length is asked for


def prune(
    model: str,
    out: str,
    criterion: Criterion | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    data: Data = "tiny",
    column: str = "text",
    length: int | None = None,
    examples: int = 128,
    evaluate: int = 64,
    sequential: Sequential = "block",
    allocation: Allocation | None = None,
    skip: str | list[str] | None = None,
    output_embeddings: bool = False,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    offload: bool = False,
    activations: str | None = None,
) -> None:
    """Zeroes the least important weights of a language model and saves it, verified, with its perplexity before and after.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        criterion: `Wanda` (the default), `Magnitude`, `SparseGPT`, `Refit`, `RIA`, `WandaAlpha` or `Random`, or a class of your
            own.
        sparsity: Fraction of each linear's weights that become zero, in [0, 1); not with a pattern N:M.
        pattern: "unstructured", or "N:M": N are kept of every M consecutive inputs, as in 2:4.
        data: Text to calibrate on (split train) and to measure on (split test, or else validation): "tiny", a hub name, a folder,
            or files by split, as in '{train: a.txt, test: b.txt}'.
        column: The column that holds the text.
        length: Tokens of an example; by default 2048, or as many as the model reads.
        examples: Calibration examples, drawn by `seed`; the papers take 128.
        evaluate: Examples on which the perplexity is measured, the first ones; 0 for none.
        sequential: What a layer's statistics are taken from. "block", the papers': the dense block, on the outputs of pruned
            blocks before it. "layer": each linear on the outputs of all pruned ones before it, in one pass. "none": the dense
            model.
        allocation: How much each linear gives: `Uniform` (the default), `OWL` or `ByPattern`.
        skip: A glob pattern of linears to leave alone, such as "*.down_proj", or a list of them.
        output_embeddings: Whether an untied output embedding is pruned too.
        seed: Which calibration examples.
        dtype: Of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: Where it is computed: "auto" takes an accelerator if there is one.
        offload: Whether the model stays in the CPU's memory, and its blocks go to the device one at a time.
        activations: A folder in which what blocks hand on rests during calibration; by default memory.

    Raises:
        ValueError: If an argument is not legal or two contradict each other; before anything is written.
    """
    check_amount(sparsity, pattern)
    check_target(out)
    if examples < 1 or evaluate < 0:
        raise ValueError(f"examples={examples} must be at least 1, evaluate={evaluate} at least 0")
    there, activations = device_of(device), check_folder(activations)
    dense = load(model, dtype)
    if not offload:
        dense.to(there)  # type: ignore[arg-type]
    tokens = length_of(dense, length)
    tokenizer = load_tokenizer(model)
    text = TextDataModule(data, model_path(model), block_size=tokens, column=column)
    train, held_out = splits_of(text)
    place = there if offload else None
    before = _perplexity(dense, held_out, evaluate, place)
    with _bar() as tell:
        plan = prune_weights(
            dense,
            criterion,
            _drawn(train, examples, seed),
            sparsity,
            pattern,
            allocation=allocation,
            skip=skip or (),
            output_embeddings=output_embeddings,
            sequential=sequential,
            progress=tell,
            offload=place,
            activations=activations,
        )
    after = _perplexity(dense, held_out, evaluate, place)
    zeros = sparsity_of(plan.masks(dense).values())
    record = {
        "pruned": {"criterion": plan.criterion, "pattern": pattern, "sparsity": zeros, "sequential": sequential},
        "calibration": {"data": data, "examples": examples, "length": tokens, "seed": seed},
        "perplexity": {"before": before, "after": after, "examples": evaluate},
    }
    saved = save(dense, out, tokenizer, record)
    print(plan)
    if before is not None and after is not None:
        print(f"perplexity {before:,.2f} before, {after:,.2f} after")
    print(f"{saved.folder} ({saved.megabytes:.1f} MB): {saved.says}; largest difference of logits {saved.difference:.3g}")


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Rows | None, examples: int) -> float | None:
    """Exp of the mean negative log-likelihood of each next token of the first examples; None of a model that predicts none.

    Args:
        model: A causal language model.
        rows: Rows of `input_ids`.
        examples: At most so many of them.
    """
    if rows is None or not examples or "CausalLM" not in type(model).__name__ and "LMHead" not in type(model).__name__:
        return None
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids in _blocks(rows, range(examples)):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += cross_entropy(logits, ids[0, 1:], reduction="none").double().sum().cpu()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def _perplexity(model: PreTrainedModel, rows: Rows | None, examples: int, offload: torch.device | None) -> float | None:
    blocks = [] if offload is None else [site.module for site in find_sites(model, prunable(model), "block")]
    with offloaded(blocks, offload or model.device):
        return perplexity(model, rows, examples)


def _drawn(rows: Rows, examples: int, seed: int) -> list[dict[str, Tensor]]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids} for ids in _blocks(rows, order[:examples].tolist())]


def _blocks(rows: Any, numbers: Sequence[int]) -> Iterator[Tensor]:  # noqa: ANN401 - `datasets` types rows as a list too
    for number in numbers:
        if number < len(rows):
            yield torch.tensor([rows[number]["input_ids"]])


def splits_of(given: DatasetModule) -> tuple[Rows, Rows | None]:
    """The rows to calibrate on, and those to measure on, if there are any.

    Raises:
        ValueError: If there are none to calibrate on.
    """
    given.setup("fit")
    if "train" not in given.splits:
        raise ValueError(f"data: calibration needs a split 'train'; there is {', '.join(given.splits)}")
    return given.splits["train"], next((given.splits[name] for name in ("test", "validation") if name in given.splits), None)


def length_of(model: PreTrainedModel, asked: int | None, longest: int = LONGEST) -> int:
    """How many tokens an example has.

    Raises:
        ValueError: If the model does not read as many as are asked for.
    """
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(longest, most or longest)
    if asked < 2 or (most and asked > most):
        raise ValueError(f"length={asked} must be in 2..{most or 'any'}: the model reads no more tokens at once")
    return asked


def device_of(asked: str) -> torch.device:
    """The device of that name; of "auto", an accelerator if there is one.

    Raises:
        ValueError: If there is none of that name here.
    """
    if asked == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return cast(torch.device, check_device(asked, "device"))


@contextmanager
def _bar() -> Iterator[Tell]:
    """A progress bar that says how many linears are done."""
    columns = ("pruning", BarColumn(), MofNCompleteColumn(), "linears", TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
