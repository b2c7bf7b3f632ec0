"""When weights become zero, how many, and that a run which was stopped goes on as if it had not been."""

import lightning.pytorch as pl
import pytest
import torch

import billhook as bh
from billhook.adapters.lora import attach
from billhook.model.layers import prunable
from kit import fits, prunes
from kit.families import build
from kit.fits import data, same, trainer, weights
from kit.sparsity import weight_named
from kit.weight_pruning import RAMP, ROUNDS, Zeros, checkpoints, module, pruning, zeros

pytestmark = [
    # the resumed runs do without the ModelCheckpoint of the straight one
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:X.T X is not positive definite"),
]


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"sparsity": 0.5}, [0.5] * 8),
        ({"sparsity": 0.5, "at": 3}, [0] * 3 + [0.5] * 5),
        ({"sparsity": 0.5, "at": 0.5}, [0] * 4 + [0.5] * 4),
        ({"sparsity": 0.5, "pattern": "2:4", "at": 1.0}, [0] * 8),
        ({"sparsity": bh.schedules.MultiStep([0.25, 0.5], [2, 0.5])}, [0] * 2 + [0.25] * 2 + [0.5] * 4),
        ({"sparsity": 0.5, "at": bh.schedules.MultiStep([0.5, 1.0], [2, 0.5])}, [0] * 2 + [0.25] * 2 + [0.5] * 4),
        (
            {"sparsity": bh.schedules.Linear(final=0.5, initial=0.25, start=0, end=4, every=2)},
            [0.25] * 2 + [0.375] * 2 + [0.5] * 4,
        ),
    ],
)
def test_it_happens_at_its_step(files, tmp_path, options, seen):
    lit, watch, callback = module(), Zeros(), pruning(**options)
    trainer(tmp_path, [callback, watch]).fit(lit, data(files))
    assert watch.seen == seen
    assert zeros(lit) == (0.5, 0.5)
    assert {m.dtype for m in callback.masks.values()} == {torch.bool}
    assert callback.masks.keys() == prunable(lit.model).keys()


@pytest.mark.parametrize(
    ("criterion", "schedule"),
    [
        (bh.Wanda(), bh.schedules.Linear),
        *((criterion, bh.schedules.Cubic) for criterion in (bh.Wanda(), bh.Magnitude(), bh.SparseGPT())),
    ],
)
def test_rounds_do_not_compound_and_masks_nest(files, tmp_path, criterion, schedule):
    ramp = schedule(final=0.5, start=1, end=7, every=2)
    lit, callback, masks = module(), pruning(criterion, ramp), []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            masks.append(callback.masks)

    trainer(tmp_path, [callback, Keep()]).fit(lit, data(files))
    rounds = list(ramp.changes(8))
    assert [event["step"] for event in callback.events] == rounds
    for event in callback.events:
        assert ramp(event["step"]) - 1 / 32 <= event["after"]["sparsity"] <= ramp(event["step"]) + 1e-9
    if not isinstance(criterion, bh.SparseGPT):
        for earlier, later in zip(masks, masks[1:], strict=False):
            assert all((later[name] <= mask).all() for name, mask in earlier.items())


def test_at_the_start_is_what_pruning_before_the_fit_is(files, tmp_path):
    one, other = module(), module()
    batches = [{"input_ids": torch.randint(3, 60, (4, 9))}]
    trainer(tmp_path, [pruning(sparsity=0.5, calibration=batches)]).fit(one, data(files))
    masks = bh.prune(other.model, bh.Wanda(), batches, 0.5).masks(other.model)

    class ByHand(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, mask in masks.items():
                pl_module.model.get_submodule(name).weight.data[~mask] = 0

    trainer(tmp_path, [ByHand()]).fit(other, data(files))
    assert same(weights(one), weights(other))


def test_checkpoints_are_plain_small_and_zero(files, tmp_path):
    lit, callback = module(), pruning(sparsity=RAMP)
    trainer(tmp_path, [callback, checkpoints(tmp_path)]).fit(lit, data(files))
    linears = prunable(lit.model)
    for step in range(1, 9):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert checkpoint["state_dict"].keys() == module().state_dict().keys()
        masks = next(value for key, value in checkpoint["callbacks"].items() if key.startswith("WeightPruning"))["masks"]
        assert masks.keys() == (linears.keys() if step > 2 else set())
        shares = {(checkpoint["state_dict"][f"model.{name}.weight"] == 0).float().mean().item() for name in linears}
        assert [round(share, 4) for share in shares] == [[*ROUNDS, 0.5][step]]
        for name, mask in masks.items():
            assert mask["bits"].nbytes == linears[name].weight.numel() // 8
            assert mask["shape"] == list(linears[name].weight.shape)
    assert all(mask.nbytes == linears[name].weight.numel() for name, mask in callback.masks.items())


def test_validate_takes_a_checkpoint_as_it_is(files, tmp_path):
    lit = module()
    run = trainer(tmp_path, [pruning(sparsity=0.5, at=4), checkpoints(tmp_path)])
    run.fit(lit, data(files))
    run.validate(lit, data(files), ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
    assert zeros(lit) == (0, 0)
    run.validate(lit, data(files), ckpt_path=tmp_path / "step=6.ckpt", verbose=False)
    assert zeros(lit) == (0.5, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": bh.schedules.Cubic(final=0.5, start=10, end=100)},
        {"sparsity": 0.5, "at": bh.schedules.Linear(final=1.0, start=10, end=100)},
    ],
    ids=["amount", "progress"],
)
def test_fast_dev_run_tries_the_last_round_of_a_schedule(files, tmp_path, options):
    lit = module()
    trainer(tmp_path, [pruning(**options)], max_steps=-1, fast_dev_run=1).fit(lit, data(files))
    assert zeros(lit) == (0.5, 0.5)


def test_shapes_change_before_the_first_mask(files, tmp_path):
    for conversion, at, order in ((2, 4, 1), (4, 4, 1), ("start", "start", 1), ("start", 0, -1), (2, 4, -1)):
        lit, callback = module(), pruning(sparsity=0.5, at=at)
        callbacks = [bh.KVHeadConversion(2, at=conversion, measure_batches=0), callback][::order]
        trainer(tmp_path, callbacks).fit(lit, data(files))
        assert zeros(lit) == (0.5, 0.5), (conversion, at, order)
        assert callback.masks["model.layers.0.self_attn.k_proj"].shape == (8, 32)


def test_masks_follow_shapes_that_change_later(files, tmp_path):
    """What is cut is cut from masks, blocks take theirs along, what is averaged is zero where all of it was."""
    seen = {}

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[trainer.global_step] = dict(callback.masks), weights(pl_module)

    lit, callback = fits.module(num_hidden_layers=3), pruning(sparsity=0.5, at=1, criterion=bh.Magnitude())
    changes = [
        bh.DepthPruning(1, at=2, last=1, measure_batches=0, calibration=4),
        bh.StructuredPruning(bh.Amount(channels=0.25), at=3, measure_batches=0, importance=bh.importance.WeightNorm()),
        bh.KVHeadConversion(2, at=4, measure_batches=0),
    ]
    trainer(tmp_path, [*changes, callback, Note()], max_steps=5).fit(lit, data(files))
    (gone,) = changes[0].plan.units["model.layers"]
    kept = [number for number in range(3) if number != gone]
    for name, mask in seen[2][0].items():
        block = int(name.split(".")[2])
        assert torch.equal(mask, seen[1][0][name.replace(f".{block}.", f".{kept[block]}.", 1)])
    for name, mask in seen[3][0].items():
        before, now = seen[2][0][name], seen[3][1]
        if "mlp" in name:
            assert mask.shape != before.shape
            assert torch.equal(mask, now[f"model.{name}.weight"] != 0)
            assert abs(float(mask.float().mean()) - 0.5) < 0.05
        else:
            assert torch.equal(mask, before)
    heads = seen[3][0]["model.layers.0.self_attn.k_proj"].view(2, 2, -1, 32)
    assert torch.equal(seen[4][0]["model.layers.0.self_attn.k_proj"].view(2, -1, 32), heads.any(1))
    for name, mask in callback.masks.items():
        assert torch.equal(mask, seen[4][0][name])
        assert not lit.model.get_submodule(name).weight[~mask].any()


def test_a_later_round_masks_what_has_been_mixed_anew(files, tmp_path):
    lit, callback = module(), pruning(sparsity=bh.schedules.MultiStep([0.5, 0.6], [1, 5]))
    conversion = bh.KVHeadConversion(2, at=3, method="svd", measure_batches=0, calibration=4)
    trainer(tmp_path, [conversion, callback]).fit(lit, data(files))
    assert zeros(lit) == pytest.approx((0.6, 0.6), abs=0.02)


def test_matched_blocks_are_what_prune_makes_of_them(files, tmp_path):
    class First(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.found = weights(pl_module) if batch_idx == 0 else self.found

    batches = [{"input_ids": ids} for ids in torch.randint(3, 60, (5, 2, 9))]
    lit, first, expected = module(), First(), module()
    how = {"sequential": "layer", "match": bh.criteria.BlockMatching(steps=4)}
    trainer(tmp_path, [pruning(sparsity=0.5, calibration=batches, **how), first]).fit(lit, data(files))
    prunes.prune(expected.model, bh.Wanda(), batches, 0.5, **how)
    assert same(first.found, weights(expected))
    assert zeros(lit) == (0.5, 0.5)


class TestRefused:
    """With a message that says what is legal, before anything has changed."""

    def refused(self, files, folder, callbacks, match, **options):
        lit = module()
        before = weights(lit)
        with pytest.raises(ValueError, match=match):
            trainer(folder, callbacks, **options).fit(lit, data(files))
        assert same(weights(lit), before)

    @pytest.mark.parametrize(("conversion", "at", "order"), [(5, 4, 1), (4, 4, -1), (0, "start", -1), (0.9, 0.5, 1)])
    def test_shapes_that_change_after_the_first_mask_of_a_pattern(self, files, tmp_path, conversion, at, order):
        callbacks = [bh.KVHeadConversion(2, at=conversion, measure_batches=0), pruning(pattern="2:4", at=at)][::order]
        match = (
            r"KVHeadConversion changes shapes at step \S+, after WeightPruning has made masks .*"
            "pattern='2:4' needs consecutive inputs"
        )
        self.refused(files, tmp_path, callbacks, match)

    def test_shapes_that_masks_of_lora_cannot_follow(self, files, tmp_path):
        units = bh.StructuredPruning(bh.Amount(channels=0.25), at=5, measure_batches=0, importance=bh.importance.WeightNorm())
        callbacks = [units, pruning(sparsity=0.5, at=2, mask_adapters=True)]
        lit = module()
        attach(lit.model, bh.training.LoRA(r=2))
        match = "changes shapes at step 5, after WeightPruning has made masks at step 2, and.*masks LoRA in its shape"
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, callbacks).fit(lit, data(files))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"sparsity": 0.5, "at": 9}, "at=9 is past the end of training, which has 8 optimizer steps"),
            ({"sparsity": bh.schedules.Cubic(final=0.5, end=9)}, "end=9 is past the end of training"),
            ({"sparsity": bh.schedules.Linear(initial=0.5, final=0.2, every=2)}, "sparsity: the schedule decreases from 0.5 to"),
            ({"sparsity": bh.schedules.Linear(final=1.5, every=4)}, r"sparsity=1.5 must be .* \(by the schedule, at step 8\)"),
            ({"sparsity": 0.5, "at": 8, "skip": ["*.fc1"]}, r"skip='\*.fc1' matches none"),
            ({"pattern": "5:7", "at": 8}, "model.layers.0.self_attn.q_proj has 32 inputs, not a multiple of 7"),
            ({"pattern": "2:4", "at": 8, "allocation": bh.criteria.OWL()}, "allocation=OWL"),
            ({"sparsity": 0.5, "at": 8, "calibration": []}, "batches is empty: Wanda needs"),
            (
                {
                    "sparsity": 0.5,
                    "at": 8,
                    "match": bh.criteria.BlockMatching(),
                    "calibration": [{"input_ids": torch.ones(1, 9).long()}],
                },
                "match needs at least two batches.* got 1",
            ),
        ],
    )
    def test_before_training(self, files, tmp_path, options, match):
        if "calibration" in options:
            with pytest.raises(ValueError, match=match):
                trainer(tmp_path, [pruning(**options)]).fit(module(), data(files))
        else:
            self.refused(files, tmp_path, [pruning(**options)], match)

    def test_training_without_end(self, files, tmp_path):
        endless = {"max_steps": -1, "max_epochs": -1}
        lit = bh.TransformerModule(module().model, decay="constant", warmup=0)
        for options, match in (
            (
                {"sparsity": 0.5, "at": 0.5},
                r"at=0\.5 is a fraction of an unknown training length\. Set Trainer\(max_steps=\.\.\.\), or use a step",
            ),
            ({"sparsity": RAMP}, r"sparsity: a schedule requires a known training length\. Set Trainer\(max_steps=\.\.\.\)"),
        ):
            with pytest.raises(ValueError, match=match):
                trainer(tmp_path, [pruning(**options)], **endless).fit(lit, data(files))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({}, "sparsity=None requires an N:M pattern"),
            ({"sparsity": 1.0}, "sparsity=1.0 must be"),
            ({"sparsity": 0.7, "pattern": "2:4"}, "sparsity=0.7 contradicts"),
            ({"sparsity": RAMP, "at": 3}, "at=3 conflicts with the schedule"),
            ({"sparsity": RAMP, "pattern": "2:4"}, "pattern='2:4' fixes the sparsity"),
            ({"sparsity": 0.5, "at": 1.5}, "at=1.5 .* must be in 0..1"),
            (
                {"pattern": "2:4", "at": bh.schedules.Linear(final=1.0)},
                "pattern='2:4' fixes the sparsity and cannot follow a schedule",
            ),
            ({"sparsity": 0.5, "at": "end"}, "at='end' must be 'start', an int"),
            ({"sparsity": 0.5, "at": 8, "sequential": "both"}, "sequential='both' must be one of"),
            (
                {"sparsity": 0.5, "match": bh.criteria.BlockMatching(), "sequential": "none"},
                "match cannot be combined with sequential='none'",
            ),
            ({"sparsity": 0.5, "match": "yes"}, "match='yes' must be a BlockMatching or None"),
            ({"sparsity": 0.5, "criterion": "Wanda"}, "criterion='Wanda' must be a Criterion"),
            ({"sparsity": 0.5, "calibration": 0}, "calibration=0 must be a whole number of at least 1"),
            ({"sparsity": 0.5, "measure_batches": -1}, "measure_batches=-1"),
            ({"sparsity": 0.5, "calibration": iter([])}, "calibration=list_iterator can be read only once"),
        ],
    )
    def test_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            pruning(**options)

    def test_deepspeed(self):
        class Trainer:
            strategy = object.__new__(pl.strategies.DeepSpeedStrategy)
            global_step, max_steps, max_epochs, limit_train_batches = 0, 8, None, 1.0

        with pytest.raises(ValueError, match="does not support DeepSpeedStrategy"):
            pruning(sparsity=0.5).setup(Trainer(), module(), "fit")

    def test_masks_of_another_model(self, files, tmp_path):
        trainer(tmp_path, [pruning(sparsity=0.5), checkpoints(tmp_path)], max_steps=2).fit(module(), data(files))
        checkpoint = torch.load(tmp_path / "step=2.ckpt")
        masks = next(value for key, value in checkpoint["callbacks"].items() if key.startswith("WeightPruning"))["masks"]
        masks["model.layers.7.mlp.up_proj"] = masks.pop("model.layers.0.mlp.up_proj")
        torch.save(checkpoint, tmp_path / "other.ckpt")
        with pytest.raises(
            ValueError,
            match=r"the masks belong to another model: this model has no model.layers.7.mlp.up_proj of shape \[32, 32\]",
        ):
            trainer(tmp_path, [pruning(sparsity=0.5)]).fit(module(), data(files), ckpt_path=tmp_path / "other.ckpt")


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


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.SparseGPT()])
def test_a_fit_of_a_mixture_prunes_experts_and_resumes(files, tmp_path, criterion):
    def fit(callbacks, seed=0, **options):
        lit = fits.module(seed)
        lit.model = build("mixtral", vocab_size=2048, intermediate_size=32).train()
        trainer(tmp_path, callbacks).fit(lit, data(files), **options)
        return lit

    callback, again = (pruning(criterion, RAMP) for _ in range(2))
    straight = fit([callback, checkpoints(tmp_path)])
    for step in (2, 4):
        resumed = fit([again], 1, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(weights(resumed), weights(straight))
        assert same(again.masks, callback.masks)
    stacks = [name for name, weight in straight.model.named_parameters() if weight.dim() == 3]
    assert len(stacks) == 4
    assert callback.masks.keys() == {*prunable(straight.model), *stacks}
    for name, mask in callback.masks.items():
        assert not weight_named(straight.model, name)[~mask].any()
        assert mask.float().mean() == 0.5
    assert callback.events[-1]["after"]["sparsity"] == 0.5
    assert callback.metrics(straight.model) == {"sparsity": 0.5}
