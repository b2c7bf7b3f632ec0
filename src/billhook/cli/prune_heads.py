"""`billhook prune-heads`: a checkpoint in, one with fewer attention heads out, with its metric before and after."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.arguments import whole
from billhook.checkpoints.place import check_target
from billhook.checkpoints.pretrained import load_tokenizer
from billhook.checkpoints.save import load, save
from billhook.cli.material import Material
from billhook.cli.prune import device_of
from billhook.importance.base import Importance
from billhook.importance.gate_gradient import GateGradient
from billhook.importance.score import run_of, score
from billhook.pruning.amount import Ranking
from billhook.pruning.choice import check_choice, choose
from billhook.pruning.planning import plan_units, prune_units
from billhook.training.rows import Data
from billhook.units.find import find_units
from billhook.units.gates import mask
from billhook.units.units import Per


def prune_heads(
    model: str,
    out: str,
    ratio: float | None = None,
    importance: Importance | None = None,
    ranking: Ranking = "layer",
    per: Per = "head",
    min_heads: int = 1,
    rounds: int = 1,
    normalize: bool = True,
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
    """Removes the least important attention heads of a language model or a text classifier and saves it, verified.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        ratio: Fraction of the heads that go, in [0, 1), rounded down.
        importance: `GateGradient` (1905.10650; the default), `Taylor`, `WeightNorm`, `ActivationNorm`, `Ablation` or
            `RandomUnits`, or a class of your own.
        ranking: "layer": as many in each layer; "global": the lowest of all layers, as in the paper; then the layers differ.
        per: Whether heads are query heads ("head"), or KV heads with the query heads that they serve ("kv_head").
        min_heads: How many stay in each layer, at least.
        rounds: In how many rounds, with scores taken anew in each.
        normalize: Whether the scores of each layer are divided by their L2 norm, as the paper does.
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
        ValueError: If an argument is not legal, or the heads cannot be removed; before anything is written.
    """
    if ratio is None:
        raise ValueError("ratio: say which fraction of the heads goes, in [0, 1)")
    check_choice(ratio, ranking, min_heads, per, "heads")
    whole("min_heads", min_heads)
    check_target(out)
    for name, value in {"rounds": rounds, "examples": examples, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if evaluate < 0:
        raise ValueError(f"evaluate={evaluate} must be at least 0")
    place = device_of(device)
    dense = load(model, dtype)
    dense.to(place)  # type: ignore[arg-type]
    _check(dense, ratio, ranking, per, min_heads)
    given = Material(dense, model, data, column, label_column, length, batch_size)
    before = given.measure(dense, evaluate)
    batches = given.batches(examples, seed)
    chosen = _chosen(dense, importance or GateGradient(), batches, ratio, rounds, ranking, per, min_heads, normalize)
    plan = prune_units(dense, chosen, per=per)
    after = given.measure(dense, evaluate)
    record = {
        "heads": plan.to_json()["units"],
        "importance": {"by": str(importance or GateGradient()), "ranking": ranking, "per": per, "rounds": rounds},
        "calibration": given.said(examples, seed),
        given.metric: {"before": before, "after": after, "examples": evaluate},
    }
    saved = save(dense, out, load_tokenizer(model), record)
    print(plan)
    if before is not None and after is not None:
        print(f"{given.metric} {before:,.4g} before, {after:,.4g} after")
    print(f"{saved.folder} ({saved.megabytes:.1f} MB): {saved.says}; largest difference of logits {saved.difference:.3g}")


def _check(model: PreTrainedModel, ratio: float, ranking: Ranking, per: Per, min_heads: int) -> None:
    """Refuses a ratio that no scores could lead to, and heads that cannot be removed."""
    heads = find_units(model, "head")
    flat = {name: torch.zeros(one.count(per)) for name, one in heads.items()}
    chosen = choose(heads, flat, ratio, ranking, min_heads, per)
    if not chosen:
        raise ValueError(f"ratio={ratio} is not a single head of a layer, so that nothing would be removed")
    plan_units(model, chosen, per=per)


def _chosen(
    model: PreTrainedModel,
    importance: Importance,
    batches: Sequence[Any],
    ratio: float,
    rounds: int,
    ranking: Ranking,
    per: Per,
    min_heads: int,
    normalize: bool,
) -> dict[str, list[int]]:
    """The heads that go: in rounds, scored anew with those masked that have been chosen before."""
    heads, gone = find_units(model, "head"), dict[str, list[int]]()
    trials = [run_of(model, heads, batch) for batch in batches]
    for number in range(1, rounds + 1):
        with mask(model, gone, per=per):
            scores = score(model, heads, importance, trials, None, normalize, per)
        for name, own in gone.items():
            scores[name][own] = -torch.inf
        gone = choose(heads, scores, ratio * number / rounds, ranking, min_heads, per)
    return gone
