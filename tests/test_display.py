"""What objects show of themselves: in `print`, in a notebook, and as the string of all lines."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import billhook as bh
from billhook.adapters.merge import Merged
from billhook.checkpoints.save import Saved
from billhook.display import COLUMNS, render, text_table
from billhook.importance.ablation import HeadAblation
from billhook.kv_heads.plan import plan_kv_heads
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan
from billhook.shrinking.result import Candidate, Shrunk
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
    choices = tuple(Candidate({}, number, 0.5, 0.5) for number in range(99))
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
        "Shrunk": Shrunk(plan, "params", 9, 8, {}, 0.5, {WORDS: 0.5}, choices, choices),
        "Merged": Merged(model, errors, tuple(errors)),
        "Saved": Saved("out/" * 50, "plain", 0.0, 1.0, str(errors)),
    }


NAMES = "Structure Group Attention FeedForward Units UnitPlan BlockPlan KVHeadPlan WeightPlan "
NAMES += "Summary HeadAblation Shrunk Merged Saved"


@pytest.mark.parametrize("name", NAMES.split())
def test_print_breaks_long_lines_and_loses_no_word(shown, name):
    lines = str(shown[name]).splitlines()
    assert repr(shown[name]).splitlines() == lines
    assert 0 < max(map(len, lines)) <= COLUMNS
    if hasattr(shown[name], "text"):
        assert "".join("".join(lines).split()).count("0.5") == shown[name].text().count("0.5")
        if max(map(len, shown[name].text().splitlines())) <= COLUMNS:
            assert shown[name].text().splitlines() == lines


def test_what_is_long_goes_on_below_in_its_column():
    first, *rest = render(text_table([("heads", " ".join(map(str, range(200))))], aligns="<", indent=2)).splitlines()
    assert first.startswith("  heads  0 1 2 ")
    assert all(line.startswith(" " * 9) and line[9] != " " for line in rest)
    assert " ".join([first, *rest]).split() == ["heads", *map(str, range(200))]


class Page(HTMLParser):
    """The text of HTML, and what is open; an end that nothing has begun is an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.told = [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.told += data


def html_of(shown):
    return shown._repr_mimebundle_(None, None)["text/html"]


@pytest.fixture(scope="module")
def small():
    model = llama(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)
    units = bh.pruning.plan_units(model, {0: [1, 2], 1: [3]})
    blocks = bh.plan(model, bh.importance.BlockInfluence(), [{"input_ids": torch.arange(8)[None]}], blocks=1)
    choices = Candidate({}, 12_345, 0.25, 0.125), Candidate({}, 6_789, 0.75, 0.5)
    return {
        "UnitPlan": units,
        "UnitPlan of channels": bh.plan(model, bh.importance.WeightNorm(), channels=0.5),
        "BlockPlan": blocks,
        "KVHeadPlan": bh.convert_kv_heads(llama(num_attention_heads=4, num_key_value_heads=4), 2),
        "WeightPlan": bh.prune(model, bh.Magnitude(), sparsity=0.5, dry_run=True),
        "Structure": bh.trace(model),
        "Summary": bh.summary(model),
        "Shrunk": Shrunk(units, "params", 10_000, 9_876, {}, 0.5, {"": 0.375}, choices, choices, blocks=blocks),
    }


@pytest.mark.parametrize(
    "name", [*["UnitPlan", "BlockPlan", "KVHeadPlan", "WeightPlan", "Structure", "Summary", "Shrunk"], "UnitPlan of channels"]
)
def test_a_notebook_shows_well_formed_what_the_text_says(small, name):
    told = Page(html_of(small[name])).told
    said, text = (re.sub(r"[\s-]", "", shown) for shown in (told, small[name].text()))
    assert said == text
    assert len(re.findall(r"\d\d", told)) >= 2


def test_numbers_stay_whole_where_a_table_is_too_wide():
    rows = [["after " + "a long label " * 10, "10,000", "123,456,789"]]
    text = render(text_table(rows, ["", "step", "KV-cache bytes/token in bfloat16"]))
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert re.findall(r"[\d,]{4,}", text) == ["10,000", "123,456,789"]


def test_whatever_is_in_a_cell_is_escaped_and_no_markup():
    html = html_of(Saved("<script>alert(1)</script>[bold]", "plain", 0.0, 1.0))
    assert "<script>" not in html
    assert "<script>alert(1)</script>[bold] (1.0 MB)" in Page(html).told
    assert render(text_table([("[red]", ":smile:")]), "[bold]") == "[red]  :smile:\n[bold]"
