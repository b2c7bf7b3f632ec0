"""`billhook prune-structure`: a checkpoint in, a smaller one out, without its least important coupled structures."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.checkpoints.place import check_target
from billhook.checkpoints.pretrained import load_tokenizer
from billhook.checkpoints.save import load, save
from billhook.cli.material import Material
from billhook.cli.prune import device_of
from billhook.importance.base import Importance
from billhook.importance.taylor import Taylor
from billhook.model.plan import apply
from billhook.pruning.amount import Amount, Ranking
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan
from billhook.pruning.planning import plan as planned
from billhook.pruning.progress import First
from billhook.pruning.repair import repair as repair_weights
from billhook.pruning.target import Search
from billhook.repairs.repair import Repair
from billhook.training.rows import Data

REPAIR = Repair()


def prune_structure(
    model: str,
    out: str,
    params: int | float | None = None,
    flops: int | float | None = None,
    kv_cache_bytes: int | float | None = None,
    bytes: int | float | None = None,
    heads: float | None = None,
    kv_heads: float | None = None,
    channels: float | None = None,
    residual: float | None = None,
    experts: float | None = None,
    blocks: int = 0,
    block_importance: Importance | None = None,
    importance: Importance | None = None,
    ranking: Ranking = "layer",
    first: int = 0,
    last: int = 0,
    round_to: int = 1,
    normalize: bool = False,
    rounds: int = 1,
    repair: Repair | None = REPAIR,
    dry_run: bool = False,
    data: Data = "tiny",
    column: str = "text",
    label_column: str = "label",
    length: int | None = None,
    examples: int = 128,
    batch_size: int = 8,
    evaluate: int = 64,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Removes the least important coupled structures of a language model or a text classifier and saves it, verified.

    What belongs together is found by itself, on any architecture. What goes is printed before it goes.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        params: Target: parameters that are left at most, a number (107000000) or a fraction (0.8). KV heads and channels go for
            it in equal ratios, unless theirs is given.
        flops: Target: operations of the forward pass, per token.
        kv_cache_bytes: Target: bytes that the key/value cache takes for each token; KV heads go for it.
        bytes: Target: bytes of all parameters.
        heads: Fraction of the query heads that go, as many of each KV head, in [0, 1).
        kv_heads: Fraction of the KV heads that go, with the query heads that they serve.
        channels: Fraction of the channels of feed-forward blocks.
        residual: Fraction of the channels of the residual stream (the hidden size).
        experts: Fraction of the experts.
        blocks: How many whole blocks go of each stack, before anything else.
        block_importance: What a block is worth: `BlockInfluence` (ShortGPT, 2403.03853; the default), or `Ablation`, one forward
            a block.
        importance: `Taylor` (LLM-Pruner, 2305.11627; the default), `OBS`, `OutputNorm`, `GateGradient`, `WeightNorm`,
            `ActivationNorm` or `RandomUnits`, or a class of your own.
        ranking: "layer": as many go in each layer; "global": the lowest of all layers; then the layers differ.
        first: Blocks at the beginning that keep their heads, channels and experts; then the layers differ.
        last: Blocks at the end that do.
        round_to: The number of channels that stay is a multiple of it.
        normalize: Whether the scores of each place are divided by their L2 norm.
        rounds: In how many rounds, with scores taken anew in each.
        repair: How the linears that read what goes make up for it, by least squares on the examples; null: they do not.
        dry_run: Print the first plan and write nothing.
        data: What scores are taken from (split train) and the metric (split test, or else validation): "tiny", a hub name, a
            folder, or files by split, as in '{train: a.txt, test: b.txt}'. Of a classifier, tables with a text and a label.
        column: The column that holds the text.
        label_column: The column that holds a classifier's labels, whole numbers from 0.
        length: Tokens of an example; by default 512, or as many as the model reads.
        examples: Examples that scores are taken from, drawn by `seed`.
        batch_size: Examples in a batch.
        evaluate: Examples on which the metric is taken, the first ones: perplexity, or accuracy; 0 for none.
        seed: Which examples.
        dtype: Of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: Where it is computed: "auto" takes an accelerator if there is one.

    Raises:
        ValueError: If an argument is not legal, or the model cannot give what is asked; before anything is written.
    """
    ratios = (heads, kv_heads, channels, residual, experts, None)
    asked = any(given is not None for given in (*ratios, params, flops, kv_cache_bytes, bytes))
    how = (ranking, normalize, first, last, round_to)
    amount = Amount(*ratios, params, flops, kv_cache_bytes, bytes, *how) if asked or not blocks else None
    if blocks < 0:
        raise ValueError(f"blocks={blocks} must be at least 0")
    for name, value in {"rounds": rounds, "examples": examples, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if evaluate < 0:
        raise ValueError(f"evaluate={evaluate} must be at least 0")
    check_target(out)
    dense, importance = load(model, dtype), importance or Taylor()
    dense.to(device_of(device))  # type: ignore[arg-type]
    if amount is not None:
        Search(dense, amount)
    given = Material(dense, model, data, column, label_column, length, batch_size)
    batches = given.batches(examples, seed)
    before = None if dry_run else given.measure(dense, evaluate)
    plans: list[dict[str, Any]] = []
    lost = Amount(blocks=blocks, first=first, last=last) if blocks else None
    for plan in _plans(dense, batches, amount, lost, block_importance, importance, rounds):
        print(plan)
        if dry_run:
            return
        apply(dense, plan, weights=repair_weights(dense, plan, batches, repair) if repair and plan.kind == "units" else None)
        plans.append(plan.to_json())
    after = given.measure(dense, evaluate)
    record = {
        "plans": plans,
        "importance": {"by": str(importance), "ranking": ranking, "rounds": rounds, "repair": str(repair) if repair else None},
        "calibration": given.said(examples, seed),
        given.metric: {"before": before, "after": after, "examples": evaluate},
    }
    saved = save(dense, out, load_tokenizer(model), record)
    if before is not None and after is not None:
        print(f"{given.metric} {before:,.4g} before, {after:,.4g} after")
    print(f"{saved.folder} ({saved.megabytes:.1f} MB): {saved.says}; largest difference of logits {saved.difference:.3g}")


def _plans(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    amount: Amount | None,
    blocks: Amount | None,
    block_importance: Importance | None,
    importance: Importance,
    rounds: int,
) -> Iterator[BlockPlan | UnitPlan]:
    """Yields one plan after the other, each of the model as it is when the one before has been carried out."""
    if blocks is not None:
        yield planned(model, block_importance, batches, amount=blocks)
    if amount is None:
        return
    start = First.of(model, amount)
    for number in range(1, rounds + 1):
        if (due := start.part(model, amount, number / rounds)) is not None:
            yield planned(model, importance, batches, amount=due)
