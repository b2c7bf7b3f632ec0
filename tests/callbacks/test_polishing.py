"""A polish at the end of an event, beside the same steps by hand."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

import billhook as bh
from billhook.model.find import find_transformer
from kit.events import Own, loader
from kit.fits import same, trainer, weights

POLISH = bh.PolishConfig(steps=6, lr=1e-3, trains="all")
ALL = {
    "weights": lambda **options: bh.WeightPruning(sparsity=0.5, **options),
    "structure": lambda **options: bh.StructuredPruning(bh.Amount(channels=0.5), **options),
    "heads": lambda **options: bh.HeadPruning(0.5, **options),
    "depth": lambda **options: bh.DepthPruning(1, **options),
    "KV heads": lambda **options: bh.KVHeadConversion(2, method="mean", **options),
    "shrink": lambda **options: bh.Shrinking(bh.Budget(params=0.8), search=bh.Search(generations=0), **options),
}


class Sharp(Own):
    """Predicts unlike for unlike tokens, so that what is removed is missed."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)


def dense():
    return find_transformer(Sharp())


ROWS = [dict(batch) for batch in loader()]


def fitted(folder, make, lr=0.0, **options):
    lit = Sharp()
    lit.lr = lr
    callback = make(calibration=ROWS, **options)
    trainer(folder, [callback], max_steps=2).fit(lit, loader(), loader(4, 4))
    return lit, callback


@pytest.mark.parametrize("kind", ALL)
def test_an_event_ends_with_the_polish_that_a_call_makes(kind, tmp_path):
    plain, _ = fitted(tmp_path, ALL[kind])
    lit, callback = fitted(tmp_path, ALL[kind], polish=POLISH)
    event = callback.events[-1]
    smaller = find_transformer(plain)  # as no step has changed it
    result = bh.polish(smaller, dense(), ROWS, POLISH)
    assert event["polish"] == result.to_json()
    assert event["what"].endswith(f"; {result.words}")
    assert event["after"]["val_loss"] != event["before"]["val_loss"]
    assert result.share > 0
    assert all(
        torch.equal(a, b) for a, b in zip(find_transformer(lit).state_dict().values(), smaller.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("at", [0.5, "start"])
def test_kv_heads_that_need_no_data_are_converted_where_there_is_some(at, tmp_path):
    _, callback = fitted(tmp_path, ALL["KV heads"], polish=POLISH, at=at)
    assert [event["step"] for event in callback.events] == [0 if at == "start" else 1]
    assert callback.events[0]["polish"]["taken"] == POLISH.steps


def test_training_goes_on_from_the_polished_weights(tmp_path):
    lit, callback = fitted(tmp_path, ALL["KV heads"], polish=POLISH, at=1, lr=1e-2)
    plain, _ = fitted(tmp_path, ALL["KV heads"], at=1, lr=1e-2)
    assert callback.events[0]["polish"]["share"] > 0
    assert not same(weights(lit), weights(plain))
    assert all(value.isfinite().all() for value in weights(lit).values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remove": "never"}, r"polish=PolishConfig\(.*\) cannot be combined with remove='never'. Use remove='rounds'"),
        ({"at": bh.schedules.MultiStep([0.5, 1.0], [1, 2])}, "cannot be combined with remove='end' and several rounds"),
    ],
)
def test_heads_that_training_adapts_to_cannot_be_polished(options, said):
    with pytest.raises(ValueError, match=said):
        ALL["heads"](polish=POLISH, **options)


def test_what_cannot_be_polished_is_refused_before_the_first_step(tmp_path):
    lit = bh.TransformerModule(dense(), lora=bh.training.LoRA(r=2))
    callback = ALL["structure"](polish=POLISH, calibration=ROWS)
    with pytest.raises(ValueError, match="polish: the model has adapters. Merge them first with bh.training.merge"):
        trainer(tmp_path, [callback], max_steps=2).fit(lit, loader(), loader(4, 4))
    assert callback.events == []


def test_a_step_that_uses_parts_of_a_model_needs_other_batches(tmp_path):
    class Parts(Sharp):
        def training_step(self, batch, batch_idx):
            states = self.net.model(input_ids=batch["input_ids"]).last_hidden_state
            return self.net.lm_head(states).logsumexp(-1).mean()

    callback = bh.StructuredPruning(bh.Amount(channels=0.5), importance=bh.importance.WeightNorm(), polish=POLISH, calibration=4)
    rows = DataLoader([{**row, "weights": torch.ones(1)} for row in loader().dataset], batch_size=2)
    with pytest.raises(ValueError, match="polish: Parts does not call the model as a whole in its training step. Pass batches"):
        trainer(tmp_path, [callback], max_steps=2).fit(Parts(), rows, loader(4, 4))


@pytest.mark.filterwarnings("ignore:.*SLURM")
def test_a_cluster_of_several_tasks_is_not_asked_for_devices(tmp_path, monkeypatch):
    expected = copy.deepcopy(dense())
    bh.apply(expected, bh.plan(expected, bh.importance.WeightNorm(), channels=0.5))
    polished = copy.deepcopy(expected)
    bh.polish(expected, dense(), ROWS, POLISH)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NAME": "fit", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    bh.polish(polished, dense(), ROWS, POLISH)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), polished.parameters(), strict=True))
