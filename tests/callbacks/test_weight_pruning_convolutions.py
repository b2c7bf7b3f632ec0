"""Convolutions are pruned in a fit as linears are, by a user's own module: what is zero stays zero, and resumes as zero."""

import pytest

import billhook as bh
from billhook.model.layers import prunable
from kit import prunes
from kit.fits import same, trainer, weights
from kit.weight_pruning import Classifier, checkpoints, images


def pruning(**options):
    return prunes.WeightPruning(sparsity=bh.schedules.MultiStep([0.25, 0.5], [1, 3]), calibration=4, measure_batches=0, **options)


@pytest.mark.parametrize("convolutions", ["mixing", "all", "none"])
def test_zeros_are_held_in_those_that_were_asked_for(tmp_path, convolutions):
    lit, callback = Classifier(), pruning(convolutions=convolutions, output_embeddings=True)
    trainer(tmp_path, [callback], max_steps=5).fit(lit, images())
    every, asked = (prunable(lit.net, output_embeddings=True, convolutions=which) for which in ("all", convolutions))
    assert callback.masks.keys() == asked.keys()
    for name, one in every.items():
        share = float((one.weight == 0).float().mean())
        assert (share == pytest.approx(0.5, abs=0.03)) if name in asked else share == 0, name
    assert [event["step"] for event in callback.events] == [1, 3]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_resumed_fit_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    lit = Classifier()
    trainer(tmp_path, [pruning(), checkpoints(tmp_path)], max_steps=5, limit_train_batches=2).fit(lit, images())
    resumed = Classifier()
    last = {"ckpt_path": tmp_path / "step=2.ckpt", "weights_only": False}
    trainer(tmp_path, [pruning()], max_steps=5, limit_train_batches=2).fit(resumed, images(), **last)
    assert same(weights(lit), weights(resumed))
