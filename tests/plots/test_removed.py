"""The picture of what a plan removes, against the plan."""

import pytest
import torch

import billhook as bh
from billhook import plots
from kit.families import llama


def bars(axes):
    """Heights before and after, by panel."""
    before, after = axes.containers
    return [bar.get_height() for bar in before], [bar.get_height() for bar in after]


def test_heads_and_their_kv_heads_and_channels():
    model = llama(num_attention_heads=4, num_key_value_heads=2)
    plan = bh.plan(model, bh.importance.WeightNorm(), heads=0.5, channels=0.25)
    panels = {axes.get_ylabel(): bars(axes) for axes in plots.removed(plan).axes}
    assert list(panels) == ["heads", "KV heads", "channels"]
    for what, number in (("heads", 0), ("KV heads", 1), ("channels", 0)):
        own = [name for name, kind in plan.kinds.items() if f"{kind}s" == what.removeprefix("KV ")]
        assert panels[what][0] == [plan.before[name][number] for name in own]
        assert panels[what][1] == [plan.after[name][number] for name in own]


@pytest.mark.parametrize("scores", [None, [0.5, 0.1, 0.4]])
def test_blocks_are_as_tall_as_their_scores(scores):
    model = llama(num_hidden_layers=3)
    plan = bh.plan(model, bh.importance.BlockInfluence(), [{"input_ids": torch.arange(8)[None]}], blocks=1)
    (stack,) = plan.before
    plan = bh.ModelPlan.from_json(plan.to_json() | {"scores": {} if scores is None else {stack: scores}}, model)
    (axes,) = plots.removed(plan).axes
    before, after = bars(axes)
    assert before == (scores or [1, 1, 1])
    assert [block for block, left in enumerate(after) if left == 0] == plan.units[stack]
    assert axes.get_ylabel() == f"{stack}: {'score' if scores else 'blocks'}"
    assert axes.get_title() == "1 of 3 blocks"


def test_kv_heads_of_the_layers_that_are_converted():
    model = llama(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2)
    plan = bh.convert_kv_heads(model, 2)
    figure = plots.removed(plan)
    assert bars(figure.axes[0]) == ([4, 4], [2, 2])
    assert figure.axes[0].get_title() == "4 -> 2 KV heads in 2 attention modules"


def test_a_plan_of_weights_is_refused():
    plan = bh.prune(llama(), bh.Magnitude(), sparsity=0.5, dry_run=True)
    with pytest.raises(ValueError, match="plan="):
        plots.removed(plan)
