"""What objects show of themselves, in `print` and at the end of a notebook's cell: a page, however large the model is."""

import numpy as np
import pytest
import torch

import billhook as bh
from billhook.adapters.merge import Merged
from billhook.checkpoints.save import Saved
from billhook.importance.ablation import HeadAblation
from billhook.kv_heads.plan import plan_kv_heads
from billhook.page import COLUMNS, LINES, page
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan
from billhook.shrinking.shrunk import Choice, Shrunk
from billhook.units.find import find_units
from kit.families import llama

LAYERS = 48
WORDS = "a_name_of_a_module_that_is_as_long_as_names_are_in_models_of_several_parts"


@pytest.fixture(scope="module")
def shown():
    """What functions return; what shows a line for each layer is of many layers, no two alike."""
    model = llama()
    structure, channels = bh.trace(model), find_units(model, "channel")
    layers = {f"model.layers.{number}.mlp": number for number in range(LAYERS)}
    numbers = {name: (100 + number,) for name, number in layers.items()}
    plan = UnitPlan(
        "M",
        dict.fromkeys(layers, "channel"),
        {name: [0] for name in layers},
        numbers,
        numbers,
        {("w", 0): np.arange(9000)},
        (9, 8),
        structure,
        {},
    )
    heads = {f"{WORDS}.{number}": torch.rand(64, dtype=torch.float64) for number in range(LAYERS)}
    choices = tuple(Choice({}, number, 0.5, 0.5) for number in range(99))
    errors = {f"{WORDS}.{number}": 0.5 for number in range(9)}
    return {
        "Structure": structure,
        "Group": structure.groups[-1],
        "Attention": structure.attention[0],
        "FeedForward": structure.feed_forward[0],
        "Units": next(iter(channels.values())),
        "UnitPlan": plan,
        "BlockPlan": BlockPlan("M", "", {"h": list(range(98))}, {"h": (99,)}, {}, {}, (9, 8), {"h": [0.5] * 99}),
        "KVHeadPlan": plan_kv_heads(model, 1),
        "WeightPlan": bh.prune(model, bh.Magnitude(), sparsity=0.5, dry_run=True),
        "Summary": bh.summary(model),
        "HeadAblation": HeadAblation("without", 1.0, heads),
        "Shrunk": Shrunk(plan, "params", 9, 8, {}, 0.5, {WORDS: 0.5}, choices, choices, {}),
        "Merged": Merged(model, errors, tuple(errors)),
        "Saved": Saved("out/" * 50, "plain", 0.0, 1.0, str(errors)),
    }


NAMES = "Structure Group Attention FeedForward Units UnitPlan BlockPlan KVHeadPlan WeightPlan "
NAMES += "Summary HeadAblation Shrunk Merged Saved"


@pytest.mark.parametrize("name", NAMES.split())
def test_shows_a_page_at_most(shown, name):
    for text in (repr(shown[name]), str(shown[name])):
        lines = text.splitlines()
        assert 0 < len(lines) <= LINES
        assert max(map(len, lines)) <= COLUMNS


def test_what_does_not_fit_is_left_out_of_the_middle_and_is_in_the_text(shown):
    plan = shown["UnitPlan"]
    whole, part = plan.text().splitlines(), str(plan).splitlines()
    assert len(whole) > LINES == len(part)
    told = next(line for line in part if line.startswith("... "))
    place = part.index(told)
    left = len(whole) - (LINES - 1)
    assert told == f"... {left} lines more are in text()"
    assert part == [*whole[:place], told, *whole[place + left :]]


def test_long_lines_go_on_below_without_losing_a_word():
    line = "  heads: " + " ".join(map(str, range(200)))
    shown = page(line)
    assert shown.split() == line.split()
    first, *rest = shown.splitlines()
    assert first.startswith("  heads:")
    assert all(one.startswith(" " * 6) for one in rest)
