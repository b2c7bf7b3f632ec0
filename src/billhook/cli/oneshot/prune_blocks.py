"""`billhook prune-blocks`: a checkpoint in, one with fewer blocks out, with its metric before and after."""

from billhook.cli.oneshot.prune_structure import Removed, prune_structure
from billhook.cli.oneshot.text import Examples
from billhook.importance.score import Importance


def prune_blocks(
    model: str,
    out: str,
    given: Examples,
    blocks: int | float | None = None,
    importance: Importance | None = None,
    greedy: bool = False,
    first: int = 0,
    last: int = 0,
    dry_run: bool = False,
) -> None:
    """Removes the least important blocks of a language model or a text classifier and saves it, verified.

    The method is Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (2024),
    https://arxiv.org/abs/2403.03853. `billhook prune-structure` removes units within the blocks that stay, too.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        given: Examples to score and to measure on, and the place to compute.
        blocks: How many blocks to remove (int), or the fraction (float, in [0, 1), rounded down); of a model with an encoder and
            a decoder, from each.
        importance: How much a block matters: `BlockInfluence` (the paper's; the default), `Ablation`, one forward a block, or any
            other `Importance`, also a class of your own.
        greedy: Whether blocks are removed one at a time, and the others scored again without it; as many times the work.
        first: So many first blocks are kept.
        last: So many last blocks are kept.
        dry_run: Print the plan and write nothing.

    Raises:
        ValueError: If an argument is not legal, or so many blocks cannot be removed; before anything is written.
    """
    if not blocks:
        raise ValueError(f"blocks={blocks}: say how many blocks to remove, or which fraction of them, in (0, 1)")
    amount = Removed(blocks=blocks, first=first, last=last, greedy=greedy)
    prune_structure(model, out, amount, given, block_importance=importance, repair=None, dry_run=dry_run)
