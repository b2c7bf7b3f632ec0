"""A run whose event comes in several rounds, or lasts, and was stopped at any of its steps goes on as if it had not been."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from kit import prunes
from kit.events import FEW, Own, loader, other
from kit.fits import same, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:X.T X is not positive definite"),
]
HALF, WHOLE = (bh.schedules.MultiStep([end / 2, end], [1, 3]) for end in (0.5, 1.0))
ROUNDS = {
    "weights, unevenly": lambda: prunes.WeightPruning(sparsity=HALF, allocation=bh.criteria.OWL(), **FEW),
    "weights, solved for": lambda: prunes.WeightPruning(bh.SparseGPT(), HALF, **FEW),
    "weights, matched": lambda: prunes.WeightPruning(sparsity=HALF, match=bh.criteria.BlockMatching(), sequential="layer", **FEW),
    "masked heads": lambda: bh.HeadPruning(HALF, remove="never", **FEW),
    "heads": lambda: bh.HeadPruning(
        HALF, remove="rounds", options=bh.HeadOptions(ranking="global"), importance=bh.importance.Taylor(), **FEW
    ),
    "heads at the end": lambda: bh.HeadPruning(HALF, remove="end", options=bh.HeadOptions(per="kv_head"), **FEW),
    "channels": lambda: bh.StructuredPruning(bh.Amount(channels=0.5, kv_heads=0.5), at=WHOLE, **FEW),
    "a target": lambda: bh.StructuredPruning(bh.Amount(params=0.9, ranking="global"), at=2, rounds=2, **FEW),
    "hidden dimensions": lambda: bh.StructuredPruning(
        bh.Amount(residual=0.25), at=2, importance=bh.importance.WeightNorm(), **FEW
    ),
    "the worst blocks": lambda: bh.DepthPruning(1, at="start", importance=bh.importance.Ablation(), greedy=True, **FEW),
    "KV heads": lambda: bh.KVHeadConversion([2, 1], at=[1, 3], method="svd", **FEW),
    "the best KV heads": lambda: bh.KVHeadConversion([2, 1], at=[1, 3], method="auto", **FEW),
}


def optimizer_state(run):
    return [value for state in run.optimizers[0].state.values() for value in state.values()]


@pytest.mark.daily("weights, matched", "heads", "channels")
@pytest.mark.parametrize("name", ROUNDS)
def test_resumed_equals_straight_through(tmp_path, name):
    straight, callback = Own(), ROUNDS[name]()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    first = trainer(tmp_path, [callback, saves], max_steps=4)
    first.fit(straight, loader(), loader(4, 4))
    for stop in (1, 2, 3):
        resumed, again = other(), ROUNDS[name]()
        run = trainer(tmp_path, [again], max_steps=4)
        run.fit(resumed, loader(), loader(4, 4), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert same(weights(resumed), weights(straight)), stop
        assert repr(again.events) == repr(callback.events)
        assert all(torch.equal(*pair) for pair in zip(optimizer_state(run), optimizer_state(first), strict=True))
        for mask in getattr(callback, "masks", {}):
            assert torch.equal(again.masks[mask], callback.masks[mask])
