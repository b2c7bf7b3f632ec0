"""Heads and channels that are removed in a fit: when, how many, and what the model is then."""

import copy
from dataclasses import fields

import lightning.pytorch as pl
import pytest
import torch
import transformers

import billhook as bh
from billhook.checkpoints.export import export
from billhook.model.find import find_transformer
from kit.families import llama, tokens
from kit.fits import data, module, same, trainer, weights
from kit.weight_pruning import checkpoints

# the resumed runs do without the ModelCheckpoint of the straight one
pytestmark = [pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")]


def pruning(**options):
    amount = {field.name: options.pop(field.name) for field in fields(bh.Amount) if field.name in options}
    return bh.StructuredPruning(bh.Amount(**amount), **{"calibration": 6, "measure_batches": 0} | options)


def widths(lit):
    """Channels and KV heads of each layer, by the sizes of its tensors."""
    layers = find_transformer(lit).model.layers
    return [(layer.mlp.down_proj.weight.shape[1], layer.self_attn.k_proj.weight.shape[0] // 4) for layer in layers]


class Widths(pl.Callback):
    """What the first layer is at each training forward."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(widths(pl_module)[0])


DENSE = (48, 4)
WHEN = {
    "start": ({"channels": 0.25}, [(36, 4)] * 8),
    "a step": ({"channels": 0.25, "kv_heads": 0.5, "at": 3}, [DENSE] * 3 + [(36, 2)] * 5),
    "a fraction": ({"kv_heads": 0.25, "at": 0.5}, [DENSE] * 4 + [(48, 3)] * 4),
    "the end": ({"channels": 0.5, "at": 8}, [DENSE] * 8),
    "rounds": ({"channels": 0.5, "kv_heads": 0.5, "at": 2, "rounds": 3}, [DENSE] * 2 + [(24, 2)] * 6),
    "a schedule": (
        {"channels": 0.5, "kv_heads": 0.5, "at": bh.schedules.Linear(final=1.0, start=0, end=6, every=2)},
        [DENSE] * 2 + [(40, 4)] * 2 + [(32, 3)] * 2 + [(24, 2)] * 2,
    ),
    "a multiple": ({"channels": 0.3, "round_to": 8, "at": 1}, [DENSE] + [(40, 4)] * 7),
}


@pytest.mark.daily("start", "rounds", "a schedule")
@pytest.mark.parametrize("when", WHEN)
def test_it_happens_at_its_step_and_rounds_do_not_compound(files, tmp_path, when):
    options, seen = WHEN[when]
    lit, watch, callback = module(), Widths(), pruning(**options, importance=bh.importance.WeightNorm())
    trainer(tmp_path, [callback, watch]).fit(lit, data(files))
    assert watch.seen == seen
    left = (24, 4) if when == "the end" else seen[-1]
    assert widths(lit) == [left, left]
    assert all(torch.isfinite(value).all() for value in weights(lit).values())
    assert not {"log", "on_save_checkpoint", "on_load_checkpoint"} & vars(lit).keys()


@pytest.mark.daily("global")
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_target_is_met_in_parts(files, tmp_path, ranking):
    lit = module()
    dense = bh.summary(lit)
    callback = pruning(params=0.95, at=bh.schedules.MultiStep([0.5, 1.0], [2, 4]), ranking=ranking)
    trainer(tmp_path, [callback]).fit(lit, data(files))
    one, two = (event["after"]["params"] for event in callback.events)
    assert two == bh.summary(lit).params <= 0.95 * dense.params
    unit = 3 * 32 * 2  # a channel in both layers
    assert two > 0.95 * dense.params - unit - (0 if ranking == "layer" else unit)
    assert 0.95 * dense.params < one <= 0.975 * dense.params


REPAIRED = {
    "enough": ({"channels": 0.25}, {"calibration": 16}, "OutputNorm, repaired"),
    "too few": ({"channels": 0.25}, {"calibration": 2}, "OutputNorm, not repaired: repair needs at least two batches, "),
    "nothing reads": ({"residual": 0.25}, {}, "OutputNorm, not repaired: repair: no linear layer consumes the removed units"),
    "no examples": ({"channels": 0.25}, {"importance": bh.importance.WeightNorm()}, "WeightNorm)"),
    "not asked": ({"channels": 0.25}, {"repair": None}, "OutputNorm)"),
}


@pytest.mark.parametrize("case", REPAIRED)
def test_what_can_be_repaired_is_unless_it_is_not_to_be(files, tmp_path, case, caplog):
    amount, options, said = REPAIRED[case]
    fits = []
    for repair in ({}, {"repair": bh.RepairConfig() if case == "enough" else None}):
        lit = module()
        trainer(tmp_path, [pruning(**amount, **options | repair)], max_steps=1).fit(lit, data(files))
        fits.append(weights(lit))
    assert same(*fits)
    assert said in caplog.text


def test_it_removes_what_the_plan_of_the_same_batches_says(files, tmp_path):
    lit, batches = module(), [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (3, 2, 9))]
    dense = copy.deepcopy(lit.model).eval()
    plan = bh.plan(dense, bh.OutputNorm(), batches, channels=0.25, kv_heads=0.5)
    callback = pruning(channels=0.25, kv_heads=0.5, importance=bh.OutputNorm(), repair=None, calibration=batches)
    trainer(tmp_path, [callback], max_steps=1).fit(lit, data(files))
    bh.apply(dense, plan)
    pruned = module()
    by_default = pruning(channels=0.25, kv_heads=0.5, repair=None, calibration=batches)
    trainer(tmp_path, [by_default], max_steps=1).fit(pruned, data(files))
    assert same(weights(lit), weights(pruned))
    assert [tuple(p.shape) for p in dense.parameters()] == [tuple(p.shape) for p in lit.model.parameters()]
    unit = plan.units["model.layers.0.mlp"]
    stays = [i for i in range(48) if i not in unit]
    start = module().model.model.layers[0].mlp.down_proj.weight[:, stays]
    torch.testing.assert_close(lit.model.model.layers[0].mlp.down_proj.weight, start, atol=2e-2, rtol=0)  # a step away


class TestResume:
    def straight(self, files, folder, callback, build=module):
        lit, whole, watch = build(), callback(), Widths()
        run = trainer(folder, [whole, watch, checkpoints(folder)])
        run.fit(lit, data(files))
        return lit, whole, watch, run

    @pytest.mark.nightly
    def test_widths_that_are_rounded_are_planned_from_the_first_also_where_it_is_resumed(self, files, tmp_path):
        def build(seed=0):
            return module(seed, intermediate_size=1536)

        options = {
            "channels": 0.2,
            "at": bh.schedules.Linear(final=1.0, start=0, end=6, every=2),
            "importance": bh.importance.WeightNorm(),
        }
        lit, whole, watch, _ = self.straight(files, tmp_path, lambda: pruning(**options), build)
        # of 1,536: 1,434, 1,332 and 1,229 are asked for, and become multiples of 128, 64 and 64
        assert [width for width, _ in watch.seen] == [1536] * 2 + [1408] * 2 + [1344] * 2 + [1216] * 2
        assert "channels: 1,216 (rounded from 1,229 to a multiple of 64)" in whole.events[-1]["what"]
        resumed, again, later = build(1), pruning(**options), Widths()
        trainer(tmp_path, [again, later]).fit(resumed, data(files), ckpt_path=tmp_path / "step=4.ckpt")
        assert later.seen == watch.seen[4:]
        assert same(weights(resumed), weights(lit))

    def test_a_lightning_checkpoint_is_exported(self, files, tmp_path):
        lit, *_ = self.straight(files, tmp_path, lambda: pruning(channels=0.25, kv_heads=0.5, at=3))
        export(tmp_path / "step=8.ckpt", tmp_path / "out")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        ids = tokens()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, lit.model.eval()(ids).logits)


def test_adapters_are_cut_and_merged(files, tmp_path):
    lit = bh.TransformerModule(llama(vocab_size=2048), lora=bh.training.LoRA(r=2), lr=1e-2)
    callback = pruning(channels=0.25, kv_heads=0.5, at=2, importance=bh.Taylor("first"))
    trainer(tmp_path, [callback, bh.Export(str(tmp_path / "out"))], max_steps=5).fit(lit, data(files))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (again.config.intermediate_size, again.config.num_key_value_heads) == (36, 2)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, lit.model.eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({}, r"nothing to remove: set a ratio \(heads, kv_heads, channels"),
            ({"channels": 1.0}, r"channels=1.0 must be a fraction of these units in \[0, 1\)"),
            ({"heads": 0.1, "kv_heads": 0.1}, "heads=0.1 and kv_heads=0.1 cannot be combined"),
            ({"params": 0.8, "flops": 0.8}, "params and flops cannot be combined"),
            ({"params": 1.5}, r"params=1.5 must be a whole number above 0, or a fraction of the model in \(0, 1\)"),
            ({"channels": 0.1, "rounds": 0}, "rounds=0 must be a whole number of at least 1"),
        ],
    )
    def test_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            pruning(**options)

    def test_tokens(self):
        with pytest.raises(ValueError, match=r"amount: tokens=0.3 cannot be removed in training.* with bh.plan\(tokens=\) or"):
            pruning(tokens=0.3, channels=0.5)

    def test_a_schedule_in_the_place_of_an_amount(self):
        with pytest.raises(ValueError, match="amount=Linear.* must be an Amount, .* Pass a schedule as at"):
            bh.StructuredPruning(bh.schedules.Linear(final=0.5))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"params": 10}, r"params=10 \(10\) is out of reach. Reachable: [\d,]+ to [\d,]+\."),
            ({"channels": 0.01}, "channels=0.01 removes no unit from any module"),
            ({"experts": 0.5}, "experts=0.5: the model has no prunable units"),
            ({"channels": 0.5, "first": 1, "last": 1}, "channels=0.5: all are in protected blocks"),
            (
                {"channels": 0.5, "at": bh.schedules.Linear(final=0.5, start=0, end=4)},
                "is the share of the amount to prune and must reach 1",
            ),
        ],
    )
    def test_before_training(self, files, tmp_path, options, match):
        lit = module()
        before = weights(lit)
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, [pruning(**options)]).fit(lit, data(files))
        assert same(weights(lit), before)
