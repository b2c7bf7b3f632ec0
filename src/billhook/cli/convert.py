"""`billhook convert`: a checkpoint in, one with fewer key/value heads out, with its metric before and after."""

from billhook.arguments import check_int
from billhook.callbacks.kv_heads import HINT
from billhook.cli.examples import NONE, Examples
from billhook.cli.machine import over
from billhook.cli.one_shot import OneShot
from billhook.cli.refit import check_examples, meta_batches, refits
from billhook.cli.streamed import bytes_of_refit
from billhook.kv_heads.convert import batches_needed, check_ready, check_repair, ready
from billhook.kv_heads.methods import KVMethod, Mean, Name, method_of
from billhook.kv_heads.plan import plan_kv_heads
from billhook.model.plan import apply
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import in_rows

REFIT = "refit what reads the heads, and the feed-forwards, by least squares"


def convert(
    model: str,
    out: str,
    examples: Examples,
    num_key_value_heads: int | None = None,
    method: KVMethod | Name = "mean",
    repair: RepairConfig | None = None,
    layers: list[int | str] | None = None,
    encoder: bool = False,
    dry_run: bool = False,
) -> None:
    """Turns a model's attention into grouped-query or multi-query attention, with fewer KV heads, and saves it, verified.

    The paper is Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (2023),
    https://arxiv.org/abs/2305.13245. It trains the model afterwards, as `billhook fit --config recipe:gqa` does.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        examples: Examples for methods that need some, and to measure on, and the place to compute.
        num_key_value_heads: KV heads afterwards, 1 for multi-query attention; divides both those now and the query heads.
        method: How the heads of a group become one: "mean" (the paper's), "first" or "random", which need no data;
            "aligned", which does without; "svd" or "auto", which stay nearest to the dense model; or any `KVMethod`, also a
            class of your own.
        repair: How what reads the heads, and the feed-forwards, make up for what is lost: least squares on the examples (see
            `RepairConfig`); by default they keep their weights.
        layers: The attentions to convert, by name or by their place in the order in which they run, from 0, as in `0 1`; by
            default all.
        encoder: Whether the self-attention of an encoder-decoder's encoder is converted too; as in the paper it is not.
        dry_run: Print the plan and write nothing.

    Raises:
        ValueError: If an argument is not legal, or the model cannot be converted; before anything is written.
    """
    if num_key_value_heads is None:
        raise ValueError("num_key_value_heads: say how many KV heads are left, such as 1 for multi-query attention")
    check_int("num_key_value_heads", num_key_value_heads)
    method = method_of(method)
    check_repair(method, repair)
    least, needing = batches_needed(method, repair)
    calibrates = least > 0 or (method.turns and examples.data is not None)
    work = OneShot(model, out, examples, refits=repair is not None, calibrates=calibrates, streams=True)
    plan = plan_kv_heads(work.model, num_key_value_heads, method, layers, encoder)
    passes, moments, known = 1, 0, None
    if calibrates:
        check_examples(work, least, needing)
    if method.turns or repair is not None:
        known = check_ready(work.model, dict.fromkeys(plan.layers, plan.after), method, repair)
        passes += known.passes(method, repair)
        moments = known.bytes(method)
    short = refits(work, known.widths, meta_batches(work), must=True) if repair is not None and known is not None else ""
    solved, sums = (0, 0) if repair is None else bytes_of_refit(work.model, work.parts)
    work.rest(max(moments, solved), sums, 0 if repair is None else 2)
    steps = [f"turn {plan.before} KV heads into {plan.after} in {len(plan.layers)} attentions, by {plan.method}"]
    steps += [short or REFIT] if repair is not None else []
    work.tell(*steps, f"shown {work.shown if calibrates else NONE}", passes=passes)
    if dry_run:
        work.tell_dry(plan.text())
        return
    print(plan.text())
    if type(method) is Mean and repair is None:
        print(HINT.removeprefix("billhook: "))
    batches = work.batches() if calibrates else None
    if repair is not None and known is not None and batches is not None:
        refits(work, known.widths, batches, must=True)  # a text may be shorter than what was asked for
    if batches is not None and len(batches) < least:
        batches = in_rows(batches)
    before = work.measure()
    with over(work.model, "converting", "attentions"):
        plan, weights, how = ready(work.model, plan, batches, repair, known)
        apply(work.model, plan, weights=weights)
    work.save(before, f"{plan.words} ({how})", {"plans": [plan.to_json()], "repair": repair and str(repair)})
