"""A run that was stopped, at whatever step, goes on as if it had not been."""

import pytest

import billhook as bh
from kit.fits import data, same, trainer, weights
from kit.weight_pruning import checkpoints, module, pruning, zeros

pytestmark = [
    # the resumed runs do without the ModelCheckpoint of the straight one
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:X.T X is not positive definite"),
]


def test_two_callbacks_each_have_their_own_linears(files, tmp_path):
    callbacks = [pruning(sparsity=0.75, skip=["*.mlp.*"]), pruning(pattern="2:4", skip=["*.self_attn.*"], at=2)]
    straight, resumed = module(), module(seed=1)
    trainer(tmp_path, [*callbacks, checkpoints(tmp_path)]).fit(straight, data(files))
    assert zeros(straight) == (0.5, 0.75)
    assert [len(callback.masks) for callback in callbacks] == [8, 6]
    again = [pruning(sparsity=0.75, skip=["*.mlp.*"]), pruning(pattern="2:4", skip=["*.self_attn.*"], at=2)]
    trainer(tmp_path, again).fit(resumed, data(files), ckpt_path=tmp_path / "step=5.ckpt")
    assert same(weights(resumed), weights(straight))


class OfMyOwn(bh.Wanda):
    """A criterion without settings, whose repr says where it lies in memory."""

    __repr__ = object.__repr__


def test_a_criterion_of_the_users_own_resumes(files, tmp_path):
    straight, resumed = module(), module(seed=1)
    trainer(tmp_path, [pruning(OfMyOwn(), 0.5), checkpoints(tmp_path)]).fit(straight, data(files))
    callback = pruning(OfMyOwn(), 0.5)
    trainer(tmp_path, [callback]).fit(resumed, data(files), ckpt_path=tmp_path / "step=3.ckpt")
    assert same(weights(resumed), weights(straight))
    assert [event["step"] for event in callback.events] == [0]
