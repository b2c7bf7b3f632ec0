"""What objects show in notebooks: well-formed tables, with the numbers of the text."""

import re
from html.parser import HTMLParser

import pytest
import torch
from billhook.page import ROWS, html_table

import billhook as bh
from billhook.shrinking.shrunk import Choice, Shrunk
from kit.families import llama


class Page(HTMLParser):
    """The text of HTML, its rows of cells, and what is open; an end that nothing has begun is an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.told, self.rows = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.told.append(data)
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def numbers(text):
    """Numbers of two digits and more; those of heads, and of places that are alike, have one."""
    return set(re.findall(r"\d[\d,.]*\d", text))


@pytest.fixture(scope="module")
def shown():
    model = llama(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)
    units = bh.pruning.plan_units(model, {0: [1, 2], 1: [3]})
    blocks = bh.plan(model, bh.importance.BlockInfluence(), [{"input_ids": torch.arange(8)[None]}], blocks=1)
    choices = Choice({}, 12_345, 0.25, 0.125), Choice({}, 6_789, 0.75, 0.5)
    return {
        "UnitPlan": units,
        "UnitPlan of channels": bh.plan(model, bh.importance.WeightNorm(), channels=0.5),
        "BlockPlan": blocks,
        "KVHeadPlan": bh.convert_kv_heads(llama(num_attention_heads=4, num_key_value_heads=4), 2),
        "WeightPlan": bh.prune(model, bh.Magnitude(), sparsity=0.5, dry_run=True),
        "Structure": bh.trace(model),
        "Summary": bh.summary(model),
        "Shrunk": Shrunk(
            units, "params", 10_000, 9_876, {}, 0.5, {"": 0.375}, choices, choices, {"channels": (8_888, 0.625)}, blocks=blocks
        ),
    }


NAMES = "UnitPlan", "UnitPlan of channels", "BlockPlan", "KVHeadPlan", "WeightPlan", "Structure", "Summary", "Shrunk"


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_well_formed_and_says_what_the_text_says(shown, name):
    page = Page(shown[name]._repr_html_())
    assert any(len(row) > 1 for row in page.rows)
    told, text = numbers("\n".join(page.told)), numbers(shown[name].text())
    assert len(text) >= 2
    assert text <= told
    assert told - text == ({"9,876", "10,000"} if name == "Shrunk" else set())


def test_units_before_and_after_are_the_plans(shown):
    plan = shown["UnitPlan of channels"]
    (row,) = Page(plan._repr_html_()).rows[1:]
    (before,), (after,) = (set(own.values()) for own in (plan.before, plan.after))
    assert row == ["model.layers.*.mlp", f"{before[0]} channels", f"{after[0]} channels", str(len(plan.before))]


def test_whatever_is_in_a_cell_is_escaped():
    html = html_table("<b>&", ["<i>"], [["<script>alert(1)</script>"], ['"']], ["<p>"])
    page = Page(html)
    assert page.rows == [["<i>"], ["<script>alert(1)</script>"], ['"']]
    assert "<script>" not in html
    assert "<b>" not in html
    assert {"<b>&", "<p>"} <= set(page.told)


@pytest.mark.parametrize("number", [ROWS, ROWS + 1, 500])
def test_a_long_table_says_how_many_rows_are_left_out_of_its_middle(number):
    page = Page(html_table("", (), [[str(row)] for row in range(number)]))
    assert len(page.rows) == ROWS
    cells = [row[0] for row in page.rows]
    assert (cells[0], cells[-1]) == ("0", str(number - 1))
    told = [cell for cell in cells if cell.startswith("...")]
    left_out = number - ROWS + 1
    assert told == ([f"... {left_out} rows more are in text()"] if number > ROWS else [])
    assert len({*cells} & set(map(str, range(number)))) == number - (left_out if told else 0)
