"""What ranks send each other in an event, in bytes, as `docs/evidence/distributed.md` reckons it: what is sent is counted."""

import copy

import pytest
from torch.distributed.tensor import DTensor

import billhook as bh
from billhook.engine.comm import MESSAGE, Comm
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.convert import equal_heads
from kit import prunes
from kit.families import tokens
from kit.fits import trainer
from kit.ranks import Ranks
from kit.sent import linears, solved, wanda
from kit.sent import model as make
from kit.sharding import Own


@pytest.fixture(scope="module")
def model():
    return make()


def batches():
    return [{"input_ids": ids, "labels": ids} for ids in (tokens(4) for _ in range(4))]


def sent_in(model, work):
    """Bytes of each sum over two ranks in a piece of work on a model."""
    copies, found = [copy.deepcopy(model) for _ in range(2)], []

    def counted(rank, comm):
        def add(tensor):
            if not rank:
                found.append(tensor.numel() * tensor.element_size())
            return comm(tensor)

        work(copies[rank], Comm(add, rank, 2))

    Ranks(2).run(counted)
    return found


@pytest.mark.parametrize(
    ("criterion", "reckoned"),
    [(bh.Magnitude(), lambda _: 0), (bh.Wanda(), wanda), (bh.SparseGPT(), solved), (bh.criteria.Refit(), solved)],
)
def test_criteria(model, criterion, reckoned):
    found = sent_in(model, lambda model, comm: bh.prune(model, criterion, batches(), sparsity=0.5, reduce=comm, dry_run=True))
    blocks, number = len(model.model.layers), len(linears(model))
    numbers = 48 * number + blocks * 2 * MESSAGE if criterion.needs else 0  # of tokens, and of which linears read the same
    assert reckoned(model) <= sum(found) <= reckoned(model) + numbers
    # of each block: where runs wait, which linears read the same, and statistics (tokens are integers); of each linear that
    # is solved for, its weights and its mask; of all: how many batches there are, how many tokens, and where runs wait
    assert len(found) <= (4 * blocks + 2 * number * criterion.updates + 4) * bool(criterion.needs)


def test_matching(model):
    given = {"sparsity": 0.5, "dry_run": True}
    without, found = (
        sum(
            sent_in(
                model,
                lambda model, comm, match=match: prunes.prune(
                    model, bh.Wanda(), batches(), match=match, **given | {"reduce": comm}
                ),
            )
        )
        for match in (None, bh.criteria.BlockMatching(steps=3))
    )
    reckoned = 3 * 4 * sum(weight.numel() for _, weight in linears(model))
    assert reckoned <= found - without <= reckoned + 1000


@pytest.mark.parametrize("importance", [bh.OutputNorm(), bh.OBS(), bh.Taylor()])
def test_importances(model, importance):
    found = sent_in(model, lambda model, comm: bh.plan(model, importance, batches(), channels=0.25, reduce=comm))
    units = sum(layer.mlp.down_proj.in_features for layer in model.model.layers)
    assert found[0] == 16 * units  # what is summed; then the first rank's scores
    assert len(found) <= 3
    assert 4 * units <= sum(found[1:]) <= 4 * units + 2 * MESSAGE


def test_repair(model):
    plan = bh.plan(model, bh.importance.WeightNorm(), channels=0.25)
    found = sent_in(model, lambda model, comm: bh.repair(model, plan, batches(), reduce=comm))
    reckoned = 0
    for layer in model.model.layers:
        out, kept = layer.mlp.down_proj.out_features, layer.mlp.down_proj.in_features * 3 // 4
        reckoned += 2 * 8 * (kept**2 + out * kept)  # of two parts
        reckoned += 4 * out * kept  # what each has solved for
    assert reckoned <= sum(found) <= 1.1 * reckoned
    refits = len(model.model.layers)
    # of each refit: where runs wait, what tokens lack, moments, what ridges err, the ridge, whether it solves, and new weights;
    # of all: sources, how linears are called (in two), whether tokens are enough, and where runs wait at the end
    assert len(found) <= 7 * refits + 6


def test_heads(model):
    """The moments of a block go together, after a flag for each block; twice the number of batches, and what is called again."""
    groups = {f"model.layers.{number}.self_attn": 2 for number in range(len(model.model.layers))}
    found = sent_in(
        model,
        lambda model, comm: equal_heads(
            Attentions(model, groups, comm), bh.kv_methods.SVD(frequencies="fixed"), [(batch, None) for batch in batches()], None
        ),
    )
    assert len(found) <= 2 * len(groups) + 4
    heads, width, group = 4, 8, 2
    reckoned = len(groups) * (8 * (2 * 2 * (group * width) ** 2 + heads * width**2) + 16)
    assert reckoned <= sum(found) <= reckoned + 2 * MESSAGE + 8 * len(found)


@pytest.fixture
def sent(monkeypatch):
    """Bytes of what is gathered, one number for each tensor."""
    found, full = [], DTensor.full_tensor

    def counted(tensor, **how):
        found.append(tensor.numel() * tensor.element_size())
        return full(tensor, **how)

    monkeypatch.setattr(DTensor, "full_tensor", counted)
    return found


BITS = 1 / 32
"""Of a weight in float32, which is a bit of a mask."""
MASKS, VALUES = 2 * BITS, 2 * BITS + 0.5
"""What is gathered of each linear to hold its mask and to put it in place; with new values of half of its weights."""
ZEROS = {  # how often all blocks are gathered, and what of their linears
    "magnitude": (bh.Magnitude(), {}, 1, MASKS),
    "magnitude, global": (bh.Magnitude(compares="global"), {}, 3, MASKS),
    "wanda": (bh.Wanda(), {}, 1, MASKS),
    "wanda, global": (bh.Wanda(compares="global"), {"sequential": "none"}, 4, MASKS),
    "owl": (bh.Wanda(), {"allocation": bh.criteria.OWL()}, 2, MASKS),
    "sparsegpt": (bh.SparseGPT(), {}, 1, VALUES),
    "matched": (bh.Wanda(), {"match": bh.criteria.BlockMatching()}, 1, VALUES),
    "matched, solved": (bh.SparseGPT(), {"match": bh.criteria.BlockMatching()}, 1, VALUES),
}


@pytest.mark.parametrize("name", ZEROS)
def test_weights_become_zero_where_blocks_are_gathered_in_turn(tmp_path, alone, sent, name):
    (criterion, options, blocks, linears), lit = ZEROS[name], Own()
    own = {name: 4 * parameter.numel() for name, parameter in lit.named_parameters()}
    inside = sum(size for name, size in own.items() if ".layers." in name)
    pruned = sum(size for name, size in own.items() if "_proj." in name)
    given = [(tokens(4),), (tokens(4),)]
    callback = prunes.WeightPruning(criterion, 0.5, at=1, calibration=given, measure_batches=0, **options)
    trainer(tmp_path, [callback], max_steps=2, strategy=alone, limit_val_batches=0).fit(lit)
    assert len(callback.events) == 1
    zeros = 8 * 4 * len(own)  # are counted at the beginning, before and after the event, and at the end
    reckoned = sum(own.values()) - inside + blocks * inside + int(linears * pruned)
    assert sum(sent) - reckoned in range(zeros + 1)


FIXED = bh.kv_methods.SVD(frequencies="fixed")
KV = {
    "mean": (lambda given: bh.KVHeadConversion(2, at=1, measure_batches=0), 1, 0),
    "svd": (lambda given: bh.KVHeadConversion(2, 1, FIXED, calibration=given, measure_batches=0), 6, 2),
    "repair": (lambda given: bh.KVHeadConversion(2, 1, FIXED, bh.RepairConfig(), calibration=given, measure_batches=0), 8, 6),
}  # fmt: skip


@pytest.mark.parametrize("name", KV)
def test_fewer_kv_heads_gather_blocks_in_turn(tmp_path, alone, sent, name):
    make, often, again = KV[name]
    lit, callback = Own(), make([(tokens(4),), (tokens(4),)])
    own = {name: 4 * parameter.numel() for name, parameter in lit.named_parameters()}
    blocks = sum(size for name, size in own.items() if ".layers." in name)
    new = sum(size for name, size in own.items() if "_proj." in name and (".self_attn." in name or "down" in name and again > 2))
    trainer(tmp_path, [callback], max_steps=2, strategy=alone, limit_val_batches=0).fit(lit)
    moments = sum(2 * size for name, size in own.items() if "k_proj" in name or "v_proj" in name)  # of AdamW
    assert len(callback.events) == 1
    bound = sum(own.values()) - blocks + often * blocks + again * new + moments + 8 * 4 * len(own)
    assert bound - 2 * blocks < sum(sent) <= bound


@pytest.mark.parametrize("repair", [None, bh.RepairConfig()], ids=["no repair", "repair"])
def test_shapes_that_change_gather_blocks_in_turn_and_what_optimizers_keep_of_what_is_cut(tmp_path, alone, sent, repair):
    lit = Own()
    blocks = sum(4 * parameter.numel() for parameter in lit.net.model.layers.parameters())
    around = sum(4 * parameter.numel() for parameter in lit.parameters()) - blocks
    cut = sum(4 * parameter.numel() for name, parameter in lit.named_parameters() if ".mlp." in name)
    given = [(tokens(4),), (tokens(4),)]
    callback = bh.StructuredPruning(bh.Amount(channels=0.5), at=1, repair=repair, calibration=given, measure_batches=0)
    trainer(tmp_path, [callback], max_steps=2, strategy=alone, limit_val_batches=0).fit(lit)
    assert len(callback.events) == 1
    scored, carried_out, moments = (1 + len(given)) * blocks, 3 * blocks - cut // 2, 2 * cut  # of AdamW
    repaired = 2 * blocks + 2 * cut // 3 if repair else 0  # seen, refitted; what is new is compared and cut
    zeros = 8 * 4 * len(list(lit.parameters()))  # are counted at the beginning, before and after the event, and at the end
    assert sum(sent) - 2 * around - scored - repaired - carried_out - moments in range(zeros + 1)
