"""BlockMatching: blocks whose kept weights are tuned give what the dense ones gave, and zeros stay where they are."""

import copy

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.model.layers import prunable, weight_of
from billhook.repairs.matching import ADAM_BETAS, BlockMatching, BlockSample, BlockTuning
from billhook.sparsity.masks import sparsity_of
from kit import prunes
from kit.families import llama, tokens
from kit.sparsity import batches_of, family, masks_of, weight_named

FEW = BlockMatching(steps=10, lr=0.02)


def small():
    """The same model, whenever it is asked for."""
    torch.manual_seed(3)
    return llama()


class Line(nn.Module):
    """Blocks of one linear each, so that matching is least squares."""

    def __init__(self, count=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12, bias=False)) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def passages(block, inputs):
    return [BlockSample(((one,), {}), block(one).detach(), None) for one in inputs]


def problem(seed=0):
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(12, 8, bias=False))
    keep = torch.rand(8, 12) > 0.5
    mix = torch.eye(12) + 0.3 * torch.randn(12, 12)
    return block, keep, [torch.randn(1, 40, 12) @ mix for _ in range(6)]


def by_hand(weight, keep, tune, goals, matching):
    """Adam as its paper says it, on the mean over tokens of |V x - W x|^2 / |W x|^2."""
    size = weight[keep].square().mean().sqrt()
    own, first, second = weight.double(), torch.zeros(8, 12).double(), torch.zeros(8, 12).double()
    order, queue = torch.Generator().manual_seed(matching.seed), []
    for step in range(1, matching.steps + 1):
        queue = queue or torch.randperm(len(tune), generator=order).tolist()
        number = queue.pop()
        x, goal = tune[number][0].double(), goals[number][0].double()
        wrong = (x @ own.t() - goal) / goal.square().sum(-1, keepdim=True)
        slope = 2 * wrong.t() @ x / len(x) * keep
        first = ADAM_BETAS[0] * first + (1 - ADAM_BETAS[0]) * slope
        second = ADAM_BETAS[1] * second + (1 - ADAM_BETAS[1]) * slope.square()
        down = (second / (1 - ADAM_BETAS[1] ** step)).sqrt() + 1e-8
        own = (
            own - matching.lr * size * (1 - abs((2 * step - 1) / matching.steps - 1)) * first / (1 - ADAM_BETAS[0] ** step) / down
        )
    return own


def test_it_is_adam_on_what_a_block_gives():
    block, keep, inputs = problem()
    pruned, matching = block[0].weight.detach() * keep, BlockMatching(steps=25, lr=0.01)
    tune = passages(block, inputs)
    found = BlockTuning(matching, block, {"0.weight": pruned}, {"0.weight": keep})(tune[:5], tune[5:])["0.weight"]
    expected = by_hand(pruned, keep, inputs[:5], [one.goal for one in tune], matching)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-4)


def test_by_default_each_batch_is_taken_once():
    block, keep, inputs = problem()
    pruned, tune = block[0].weight.detach() * keep, passages(block, inputs)
    once, five, six = (
        BlockTuning(BlockMatching(steps), block, {"0.weight": pruned}, {"0.weight": keep})(tune[:5], tune[5:])["0.weight"]
        for steps in (None, 5, 6)
    )
    assert torch.equal(once, five)
    assert not torch.equal(once, six)


@pytest.mark.nightly
def test_a_block_of_one_linear_reaches_least_squares():
    block, keep, inputs = problem()
    dense = block[0].weight.detach()
    tune = passages(block, inputs)
    matching = BlockMatching(steps=3000, lr=0.05)
    found = BlockTuning(matching, block, {"0.weight": dense * keep}, {"0.weight": keep})(tune, tune)["0.weight"]
    x = torch.cat([one[0] for one in inputs]).double()
    goal = x @ dense.double().t()
    weights = goal.square().sum(-1, keepdim=True).rsqrt()  # a token counts by what the dense block gave it
    for row, kept in enumerate(keep):
        exact = torch.linalg.lstsq(weights * x[:, kept], weights * goal[:, row : row + 1]).solution[:, 0]
        torch.testing.assert_close(found[row, kept].double(), exact, atol=2e-3, rtol=0)
    assert not found[~keep].any()


def test_what_is_held_out_is_never_worse():
    block, keep, inputs = problem()
    pruned, tune = block[0].weight.detach() * keep, passages(block, inputs)
    wild = BlockTuning(BlockMatching(steps=20, lr=100.0), block, {"0.weight": pruned}, {"0.weight": keep})
    assert torch.equal(wild(tune[:5], tune[5:])["0.weight"], pruned)


def test_tokens_that_do_not_count_change_nothing():
    block, keep, inputs = problem()
    counts = torch.ones(1, 40, dtype=torch.bool)
    counts[:, 30:] = False

    def tuned(scale):
        odd = [torch.cat([one[:, :30], scale * one[:, 30:]], 1) for one in inputs]
        tune = [BlockSample(one.inputs, one.goal, counts) for one in passages(block, odd)]
        return BlockTuning(FEW, block, {"0.weight": block[0].weight * keep}, {"0.weight": keep})(tune[:5], tune[5:])["0.weight"]

    assert torch.equal(tuned(1), tuned(7))


@pytest.mark.daily("Wanda-*", "ALPS-block-amount0", "Magnitude-layer-amount1")
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("sequential", ["block", "layer"])
@pytest.mark.parametrize("criterion", [bh.Magnitude(), bh.Wanda(), bh.criteria.ALPS(steps=9)], ids=lambda one: type(one).__name__)
def test_masks_are_kept_and_the_model_is_nearer_to_the_dense_one(criterion, sequential, amount):
    dense, batches = small(), [{"input_ids": tokens()} for _ in range(4)]
    pruned, matched = copy.deepcopy(dense), copy.deepcopy(dense)
    prunes.prune(pruned, criterion, batches, sequential=sequential, **amount)
    plan = prunes.prune(matched, criterion, batches, sequential=sequential, match=FEW, **amount)
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(masks_of(pruned)[first], masks_of(matched)[first]), "the first linears see the same"
    assert sparsity_of(plan.masks(matched).values()) == sparsity_of(masks_of(pruned).values()) == 0.5
    if "pattern" in amount:
        for linear in prunable(matched).values():
            assert ((weight_of(linear) != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all()
    assert all(parameter.isfinite().all() for parameter in matched.parameters())
    with torch.no_grad():
        far = [sum(float((model(**one)[0] - dense(**one)[0]).norm()) for one in batches) for model in (pruned, matched)]
    assert far[1] < 0.95 * far[0]


def test_both_streams_are_what_plain_runs_give():
    """Of the second block, the input comes from the matched first one, and the goal from the dense model."""
    torch.manual_seed(0)
    model, seen = Line(), []
    dense, batches = copy.deepcopy(model), [torch.randn(2, 5, 12) for _ in range(3)]

    class Seen(BlockMatching):
        def is_held_out(self, sources):
            return [number == 1 for number, _ in enumerate(sources)]

    original = BlockTuning.__call__

    def noted(self, tune, held_out):
        seen.append([*tune, *held_out])
        return original(self, tune, held_out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockTuning, "__call__", noted)
        prunes.prune(model, bh.Wanda(), batches, 0.5, match=Seen(steps=5))
    for one, batch in zip(seen[1], [batches[0], batches[2], batches[1]], strict=True):
        torch.testing.assert_close(one.inputs[0][0], model.blocks[0](batch))
        torch.testing.assert_close(one.goal, dense(batch))


def test_one_block_of_several_is_matched_alone():
    model, dense, batches = small(), small(), [{"input_ids": tokens()} for _ in range(3)]
    plan = prunes.prune(model, bh.Wanda(), batches, 0.5, skip="model.layers.0.*", match=FEW)
    masks = plan.masks(model)
    assert all(".layers.1." in name for name in masks)
    linears = prunable(dense)
    assert all(not torch.equal(prunable(model)[name].weight, linears[name].weight * mask) for name, mask in masks.items())


def test_it_is_the_same_by_the_same_seed_and_disturbs_nothing():
    batches = [{"input_ids": tokens()} for _ in range(4)]
    states, models = [], [small().train() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(5)
        prunes.prune(model, bh.Wanda(), batches, 0.5, match=BlockMatching(steps=5, seed=seed))
        states.append(torch.get_rng_state())
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    weights = [torch.cat([weight_of(one).flatten() for one in prunable(model).values()]) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(states[0], torch.Generator().manual_seed(5).get_state())


def test_weights_of_bfloat16_are_tuned_in_float32_and_rounded_once():
    model = small().bfloat16()
    wide = copy.deepcopy(model).float()
    batches = [{"input_ids": tokens()} for _ in range(4)]
    seen = []
    original = BlockTuning.__call__

    def noted(self, tune, held_out):
        seen.append(original(self, tune, held_out))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockTuning, "__call__", noted)
        prunes.prune(model, bh.Wanda(), batches, 0.5, match=FEW)
    assert wide.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    last = seen[-1]["mlp.down_proj.weight"]
    assert last.dtype == torch.float32
    assert torch.equal(model.model.layers[-1].mlp.down_proj.weight, last.bfloat16())
    assert not torch.equal(last, last.bfloat16().float())


@pytest.mark.daily("block-*", "layer-mixtral", "layer-t5")
@pytest.mark.filterwarnings("ignore:no calibration batch called")
@pytest.mark.parametrize("name", ["mixtral", "t5", "bart", "gpt2", "bert", "vit", "whisper", "mamba", "convnext"])
@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_families(name, sequential):
    model = family(name)
    before = copy.deepcopy(model)
    more = {"convolutions": "all"} if name == "convnext" else {}
    plan = prunes.prune(model, bh.Wanda(), batches_of(model), 0.5, sequential=sequential, match=BlockMatching(steps=3), **more)
    masks = plan.masks(model)
    weights = {name: (weight_named(model, name), weight_named(before, name)) for name in masks}
    assert all(abs(float(mask.float().mean()) - 0.5) < 0.05 for mask in masks.values())
    assert all(torch.equal(weights[name][0] != 0, mask) for name, mask in masks.items())
    moved = [name for name, mask in masks.items() if not torch.equal(weights[name][0], weights[name][1] * mask)]
    assert len(moved) >= len(masks) / 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_under_inference_mode():
    model, other = small(), small()
    batches = [{"input_ids": tokens()} for _ in range(4)]
    prunes.prune(other, bh.Wanda(), batches, 0.5, match=FEW)
    with torch.inference_mode():
        prunes.prune(model, bh.Wanda(), batches, 0.5, match=FEW)
    for linear, expected in zip(prunable(model).values(), prunable(other).values(), strict=True):
        torch.testing.assert_close(linear.weight, expected.weight)


def test_a_plan_is_made_first_and_applied_later():
    model, other = small(), small()
    batches = [{"input_ids": tokens()} for _ in range(4)]
    plan = prunes.prune(model, bh.Wanda(), batches, 0.5, match=FEW, dry_run=True)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), small().parameters(), strict=True))
    bh.apply(model, bh.ModelPlan.from_json(plan.to_json(), model))
    prunes.prune(other, bh.Wanda(), batches, 0.5, match=FEW)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_saved_and_loaded_it_gives_the_same_logits(tmp_path):
    model, batch = small(), {"input_ids": tokens()}
    prunes.prune(model, bh.Wanda(), [batch, {"input_ids": tokens()}], 0.5, match=FEW)
    bh.save(model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], bh.load(tmp_path / "out")(**batch)[0])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: BlockMatching(steps=0), r"steps=0 must be a whole number of at least 1"),
    (lambda: BlockMatching(lr=0.0), r"lr=0.0 must be a number above 0"),
    (lambda: BlockMatching(held_out=0.0), r"held_out=0.0 must be a fraction of the batches in \(0, 1\)"),
    (lambda: BlockMatching(seed=-1), r"seed=-1 must be a whole number of at least 0"),
    (lambda: BlockMatching(lr="much"), r"lr='much' must be a number"),
])  # fmt: skip
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("settings", "message"), [
    ({"match": 3}, r"match=3 must be a BlockMatching or None"),
    ({"match": FEW, "sequential": "none"}, r"match cannot be combined with sequential='none'"),
    ({"match": FEW, "batches": [{"input_ids": tokens()}]}, r"batches: match needs at least two batches .* got 1"),
    (
        {"match": FEW, "criterion": bh.Magnitude(compares="global")},
        r"match cannot be combined with criterion=.*, which prunes all blocks at once",
    ),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_changes(settings, message):
    model = small()
    given = {"criterion": bh.Wanda(), "batches": [{"input_ids": tokens()}] * 2, "sparsity": 0.5} | settings
    with pytest.raises(ValueError, match=message):
        prunes.prune(model, **given)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), small().parameters(), strict=True))


def test_a_block_that_is_called_again_is_refused():
    model = Line()
    model.blocks[1] = model.blocks[0]
    with pytest.raises(ValueError, match=r"match: blocks.0.0 is called again after its block"):
        prunes.prune(model, bh.Wanda(), [torch.randn(2, 5, 12) for _ in range(3)], 0.5, match=FEW)


def test_a_layer_that_torch_has_compiled_is_tuned_as_it_is_in_eager_mode():
    plain, compiled = small(), small()
    compiled.model.layers[0] = torch.compile(compiled.model.layers[0], backend="eager")
    batches = batches_of(plain, 4)
    for model in (plain, compiled):
        prunes.prune(model, bh.Wanda(), batches, sparsity=0.5, match=FEW)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))
