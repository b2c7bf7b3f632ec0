"""Autocast keeps what it has cast of parameters, by tensor and not by value: nothing that billhook does takes that for true."""

import peft
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import billhook as bh
from billhook.engine.sharding import unsharded
from billhook.engine.walk import Site, Visitor, Walk
from billhook.repairs.matching import BlockMatching
from billhook.units.gates import zero_units
from kit import prunes, shrinks
from kit.families import llama, tokens


def batches():
    torch.manual_seed(5)
    return [{"input_ids": own, "labels": own} for own in (tokens(2, 16) for _ in range(4))]


def pruned(criterion, **how):
    def act(model):
        prunes.prune(model, criterion, batches(), sparsity=0.5, **how)

    return act


def repaired(model):
    plan = bh.plan(model, bh.importance.WeightNorm(), heads=0.5, channels=0.5)
    bh.apply(model, plan, weights=bh.repair(model, plan, batches()))


def converted(**how):
    return lambda model: bh.convert_kv_heads(model, 2, batches=batches(), **how)


def scored(importance, kind):
    def act(model):
        return bh.score(model, bh.find_units(model, kind), importance, batches())

    return act


def zeroed(model):
    zero_units(model, {0: [0, 1], 1: [3]})


def started(model):
    plan = bh.pruning.plan_units(model, {0: [0, 1]})
    bh.apply(model, plan, weights={"lm_head.weight": 2 * model.lm_head.weight.detach()})


def merged(model):
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.requires_grad_(True)
    adapted(tokens())
    bh.training.merge(adapted)


ACTS = {
    "walk by block": pruned(bh.Wanda()),
    "walk by layer": pruned(bh.Wanda(), sequential="layer"),
    "walk of the dense model": pruned(bh.Wanda(), sequential="none"),
    "no data": pruned(bh.Magnitude()),
    "SparseGPT": pruned(bh.SparseGPT()),
    "ALPS": pruned(bh.criteria.ALPS(steps=20)),
    "Refit": pruned(bh.criteria.Refit(bh.Wanda())),
    "blocks that come and go": pruned(bh.Wanda(), offload="cpu"),
    "BlockMatching": pruned(bh.Wanda(), match=BlockMatching(steps=4)),
    "RepairConfig": repaired,
    "svd": converted(method="svd"),
    "svd, repaired": converted(method="svd", repair=bh.RepairConfig()),
    "svd, matched": converted(method="svd", repair=bh.RepairConfig(match=BlockMatching(steps=4))),
    "Taylor": scored(bh.Taylor(), "head"),
    "OBS": scored(bh.OBS(), "channel"),
    "Ablation": scored(bh.importance.Ablation(), "head"),
    "shrink": lambda model: shrinks.shrink(model, batches(), params=0.8, generations=1, candidates=1),
    "zeros for units": zeroed,
    "other weights": started,
    "merge": merged,
}


def acted(act, cache):
    """What an act gives, and the logits of a forward after it, where the caller's autocast keeps casts, or does not."""
    torch.manual_seed(3)
    model, ids = llama(), tokens()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        model(ids)
        found = act(model)
        logits = model(ids).logits
    return (found if isinstance(found, dict) else {}), logits.detach(), model.state_dict()


@pytest.mark.daily(
    "walk by block",
    "walk by layer",
    "SparseGPT",
    "BlockMatching",
    "RepairConfig",
    "svd",
    "svd, matched",
    "Taylor",
    "shrink",
    "zeros for units",
)
@pytest.mark.parametrize("name", ACTS)
def test_what_autocast_keeps_changes_nothing(name):
    (plain, expected, weights), (found, logits, own) = (acted(ACTS[name], cache) for cache in (False, True))
    assert own.keys() == weights.keys()
    assert [key for key, value in weights.items() if not torch.equal(own[key], value)] == []
    assert all(torch.equal(found[place], value) for place, value in plain.items())
    assert torch.equal(logits, expected)


class Block(nn.Sequential):
    """A block that enters autocast."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Casting(nn.Module):
    """Blocks of one linear each, which enter autocast, or the model does."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.blocks = nn.ModuleList((Block if inside else nn.Sequential)(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.inside):
            for block in self.blocks:
                x = block(x)
        return x.float()


class Zeroing(Visitor):
    """Has weights become zero, but in the second run."""

    untouched, ends = (1,), 2

    def parameters(self, site):
        return {name: {"weight": torch.zeros_like(linear.weight)} for name, linear in site.linears.items()}


def test_runs_of_the_dense_model_keep_its_weights_where_its_own_forward_enters_autocast():
    model, x, given = Casting(inside=False), torch.randn(3, 8), []
    expected = model(x).detach()
    sites = [Site(block, {f"blocks.{number}.0": block[0]}) for number, block in enumerate(model.blocks)]
    with torch.no_grad():
        Walk(sites, Zeroing())([lambda: given.append(model(x))] * 2)
    assert torch.equal(given[1], expected)
    assert torch.equal(given[0], model.blocks[1][0].bias.bfloat16().float().expand(3, 8))


def test_blocks_that_enter_autocast_are_tuned_as_without_its_cache():
    found = []
    for cache in (False, True):
        torch.manual_seed(3)
        model, inputs = Casting(inside=True), [torch.randn(5, 8) for _ in range(6)]
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            prunes.prune(model, bh.Wanda(), inputs, sparsity=0.5, match=BlockMatching(steps=6, lr=0.1))
        found.append(model.state_dict())
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_autocast_in_the_place_of_fsdps_dtype_keeps_nothing(mesh):
    policy, how = MixedPrecisionPolicy(torch.bfloat16), {"sparsity": 0.5, "match": BlockMatching(steps=4)}
    plain, sharded = llama(), llama()
    sharded.load_state_dict(plain.state_dict())
    for part in (*sharded.model.layers, sharded):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    with unsharded(sharded):
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
    prunes.prune(sharded, bh.Wanda(), batches(), reduce=lambda tensor: tensor, **how)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        prunes.prune(plain, bh.Wanda(), batches(), **how)
    own = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
