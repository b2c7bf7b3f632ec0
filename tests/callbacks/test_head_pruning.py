"""Heads that are masked, ranked again and removed in a fit: when, how many, which, and what the model computes then."""

import copy
import json

import lightning.pytorch as pl
import pytest
import torch
import transformers

import billhook as bh
from billhook.checkpoints.export import export
from billhook.pruning.choice import choose
from billhook.units.find import find_units
from kit.families import llama, tokens
from kit.fits import data, same, trainer, weights
from kit.head_pruning import LAYERS, REMOVE, Acting, acting, bare, module, pruning, scripted, silent, transformer
from kit.weight_pruning import checkpoints

# the resumed runs do without the ModelCheckpoint of the straight one
pytestmark = [pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")]
WHEN = {
    "start": ({"ratio": 0.25}, [12] * 8),
    "a step": ({"ratio": 0.3, "at": 3}, [16] * 3 + [12] * 5),
    "a fraction": ({"ratio": 0.5, "at": 0.5}, [16] * 4 + [8] * 4),
    "the end": ({"ratio": 0.5, "at": 8}, [16] * 8),
    "progress": ({"ratio": 0.5, "at": bh.schedules.MultiStep([0.5, 1.0], [2, 5])}, [16] * 2 + [12] * 3 + [8] * 3),
    "steps": ({"ratio": bh.schedules.MultiStep([0.25, 0.3, 0.8], [2, 4, 0.75])}, [16] * 2 + [12] * 4 + [4] * 2),
    "ramp": ({"ratio": bh.schedules.Linear(final=0.75, initial=0.25, start=0, end=4, every=2)}, [12] * 2 + [8] * 2 + [4] * 4),
    "cubic": ({"ratio": bh.schedules.Cubic(final=0.5, start=1, end=7, every=2)}, [16] * 3 + [12] * 2 + [10] * 2 + [8]),
}


@pytest.mark.daily("*-rounds", "start-never", "progress-end")
@pytest.mark.parametrize(
    ("when", "remove"), [(w, r) for i, w in enumerate(WHEN) for r in (REMOVE if w in ("steps", "ramp") else [REMOVE[i % 3]])]
)
def test_it_happens_at_its_step_and_rounds_do_not_compound(files, tmp_path, when, remove):
    options, seen = WHEN[when]
    lit, watch, callback = module(), Acting(), pruning(**options, remove=remove, importance=bh.importance.WeightNorm())
    trainer(tmp_path, [callback, watch]).fit(lit, data(files))
    assert watch.seen == seen
    left = {"the end": 8}.get(when, seen[-1])
    assert [one.count() for one in find_units(lit, "head").values()] == ([8, 8] if remove == "never" else [left / 2] * 2)
    assert silent(lit) == (16 - left if remove == "never" else 0)
    assert bare(lit)
    gone = callback.record.inactive(callback.heads)
    assert [len(gone[name]) for name in LAYERS] == [8 - left / 2] * 2


def test_global_rounds_come_to_the_same_share_whatever_layers_lose(files, tmp_path):
    for remove in ("never", "rounds"):
        lit, watch = module(), Acting()
        callback = pruning(bh.schedules.MultiStep([0.2, 0.4, 0.7], [1, 3, 5]), ranking="global", remove=remove, min_heads=2)
        trainer(tmp_path, [callback, watch]).fit(lit, data(files))
        assert watch.seen == [16] + [13] * 2 + [10] * 2 + [5] * 3
        assert min(8 - len(own) for own in callback.record.inactive(callback.heads).values()) >= 2


class AgainstMasks(pl.Callback):
    """Compares each training loss with that of an explicitly masked copy of the weights, in a fresh model."""

    def __init__(self, callback, build, per="head"):
        self.callback, self.build, self.per, self.steps = callback, build, per, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        other = self.build()
        other.load_state_dict(transformer(pl_module).state_dict())
        with bh.mask(other, self.callback.heads, per=self.per):
            self.expected = other.train()(**batch).loss.detach()

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        assert torch.equal(outputs["loss"], self.expected)
        self.steps += 1


@pytest.mark.parametrize(("per", "kv", "ratio"), [("head", 8, 0.375), ("head", 4, 0.5), ("kv_head", 4, 0.5), ("kv_head", 1, 0)])
def test_between_rounds_the_masked_heads_do_not_act(files, tmp_path, per, kv, ratio):
    lit = module(num_key_value_heads=kv)
    callback = pruning(bh.schedules.MultiStep([ratio / 2, ratio], [2, 4]), per=per, remove="never")
    watch = AgainstMasks(callback, lambda: llama(vocab_size=2048, num_key_value_heads=kv), per)
    trainer(tmp_path, [callback, watch]).fit(lit, data(files))
    assert watch.steps == 8
    assert {len(own) for own in callback.heads.values()} == ({int(ratio * (8 if per == "head" else kv))} if ratio else set())


@pytest.mark.parametrize("per", ["head", "kv_head"])
def test_heads_that_stay_masked_are_not_read_after_the_fit(files, tmp_path, per):
    """What is exported computes what the masked model did at the end."""
    lit = module(num_key_value_heads=8 if per == "head" else 4)
    callback, trained = pruning(0.25, at=4, remove="never", per=per), {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trained.update(weights(pl_module))

    trainer(tmp_path, [callback, Keep(), bh.Export(str(tmp_path / "out"))]).fit(lit, data(files))
    assert silent(lit, per) == (4 if per == "head" else 2)
    other = module(1, num_key_value_heads=8 if per == "head" else 4)
    other.load_state_dict(trained)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokens(4)
    with torch.no_grad():
        dense = other.model.eval()(ids).logits
        with bh.mask(other.model, callback.heads, per=per):
            masked = other.model(ids).logits
        torch.testing.assert_close(exported(ids).logits, masked)
        torch.testing.assert_close(lit.model.eval()(ids).logits, masked)
    assert not torch.allclose(masked, dense)


@pytest.mark.daily("end-layer", "rounds-global")
@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("remove", ["end", "rounds"])
def test_removed_heads_are_gone_and_training_goes_on(files, tmp_path, ranking, remove):
    lit, callback = module(), pruning(bh.schedules.MultiStep([0.25, 0.5], [2, 5]), ranking=ranking, remove=remove)
    run = trainer(tmp_path, [callback, bh.Export(str(tmp_path / "out"))])
    run.fit(lit, data(files))
    stay = [8 - len(own) for own in callback.record.inactive({}).values()]
    assert sum(stay) == 8
    for layer, heads in zip(lit.model.model.layers, stay, strict=True):
        assert layer.self_attn.q_proj.weight.shape == (4 * heads, 32)
        assert layer.self_attn.o_proj.weight.shape == (32, 4 * heads)
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in lit.parameters()} == {id(p) for p in run.optimizers[0].state}
    for parameter, state in run.optimizers[0].state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert state["step"] == 8
    if ranking == "layer":
        exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert exported.config.num_attention_heads == 4
    else:
        exported = bh.load(tmp_path / "out")
    ids = tokens(4)
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, lit.model.eval()(ids).logits)
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert [event["step"] for event in record["events"]] == [2, 5]
    assert record["events"] == callback.events


def test_removal_is_what_removing_by_hand_is(files, tmp_path):
    """Independent of the callback: the same steps in a plain loop, with masks and then a removal."""
    lit, batches, callback = (
        module(),
        [],
        pruning(bh.schedules.MultiStep([0.25, 0.5], [2, 5]), importance=bh.importance.WeightNorm()),
    )

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch)

    trainer(tmp_path, [callback, Keep()]).fit(lit, data(files))
    model = module().model.train()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) is wide]} for wide in (True, False)]
    optimizer = torch.optim.AdamW([groups[0] | {"weight_decay": 0.01}, groups[1] | {"weight_decay": 0.0}], 1e-2, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 8)
    mask = bh.mask(model, {})
    for step, batch in enumerate(batches):
        if step in (2, 5):
            scores = bh.score(model, bh.find_units(model, "head"), bh.importance.WeightNorm(), normalize=True)
            for name, own in mask.units.items():
                scores[name][own] = -1
            mask.remove()
            chosen = choose(bh.find_units(model, "head"), scores, {2: 0.25, 5: 0.5}[step])
            assert all(set(mask.units.get(name, ())) <= set(own) for name, own in chosen.items())
            if step == 2:
                mask = bh.mask(model, chosen)
            else:
                bh.pruning.prune_units(model, chosen, optimizer)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(lit.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)


class TestScores:
    """They are those of `score` on the same batches, and lead to the heads of `choose`."""

    @pytest.mark.parametrize(
        ("importance", "per", "ranking"),
        [
            (bh.importance.GateGradient(), "head", "layer"),
            (bh.Taylor("first"), "kv_head", "global"),
            (bh.importance.Ablation(), "head", "global"),
        ],
        ids=str,
    )
    def test_of_batches_that_are_given(self, files, tmp_path, importance, per, ranking):
        lit, dense = (module(num_key_value_heads=4) for _ in range(2))
        batches = [{"input_ids": ids, "labels": ids} for ids in (tokens(4, 9), tokens(2, 12))]
        normalize = per == "head"
        callback = pruning(
            0.5, importance=importance, per=per, ranking=ranking, calibration=batches, normalize=normalize, remove="never"
        )
        trainer(tmp_path, [callback], max_steps=1).fit(lit, data(files))
        scores = bh.score(dense.model, bh.find_units(dense.model, "head"), importance, batches, normalize=normalize, per=per)
        assert callback.record.scores.keys() == scores.keys()
        for name, own in scores.items():
            torch.testing.assert_close(callback.record.scores[name], own)
        assert callback.heads == choose(bh.find_units(dense.model, "head"), scores, 0.5, ranking=ranking, per=per, remove=False)

    def test_of_heads_that_act_beside_masked_ones(self, files, tmp_path):
        ids = tokens(4, 9)
        batches = [{"input_ids": ids, "labels": ids}]
        kept = {}
        callback = pruning(bh.schedules.MultiStep([0.25, 0.5], [2, 4]), calibration=batches, remove="rounds")

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                if trainer.global_step in (3, 4):
                    kept[trainer.global_step] = copy.deepcopy(pl_module.model), copy.deepcopy(callback.record)

        # before the second round the copy is of the model without the heads of the first
        trainer(tmp_path, [Keep(), callback]).fit(module(), data(files))
        (_, first), (model, _) = kept[3], kept[4]
        scores = bh.score(model, bh.find_units(model, "head"), bh.importance.GateGradient(), batches, normalize=True)
        for name, own in scores.items():
            torch.testing.assert_close(callback.record.scores[name][first.numbers[name]], own)
            assert callback.record.scores[name].isnan().sum() == 2
        again = choose(bh.find_units(model, "head"), scores, 1 / 3)
        gone = {name: [first.numbers[name][head] for head in own] for name, own in again.items()}
        assert all(set(gone[name]) < set(own) for name, own in callback.record.inactive({}).items())

    def test_of_training_data(self, files, tmp_path):
        """All of it, one row at a time, so that it does not matter in which order it is drawn."""
        lit, dense, given = module(), module(), data(files, batch_size=1)
        callback = pruning(0.25, remove="never", calibration=1000)
        trainer(tmp_path, [callback], max_steps=1).fit(lit, given)
        rows = given.splits["train"]
        batches = [given.collate()([row]) for row in rows]
        assert len(batches) == 43
        for name, own in bh.score(
            dense.model, bh.find_units(dense.model, "head"), bh.importance.GateGradient(), batches, normalize=True
        ).items():
            torch.testing.assert_close(callback.record.scores[name], own)

    def test_scoring_and_measuring_leave_no_trace(self, files, tmp_path):
        """A mask of nothing, in a model with dropout."""
        plain, scored = (module(attention_dropout=0.1) for _ in range(2))
        torch.manual_seed(1)
        trainer(tmp_path, []).fit(plain, data(files))
        torch.manual_seed(1)
        callback = pruning(0.0, at=3, measure_batches=None)
        trainer(tmp_path, [callback]).fit(scored, data(files))
        assert same(weights(plain), weights(scored))
        assert callback.events[0]["before"]["val_perplexity"] == callback.events[0]["after"]["val_perplexity"] > 1


class TestMonitor:
    """A round that makes a value worse is taken back, and is the last."""

    SCHEDULE = bh.schedules.MultiStep([0.25, 0.5, 0.75], [1, 3, 5])

    @pytest.mark.daily("rounds-*")
    @pytest.mark.parametrize(
        ("remove", "monitor", "mode", "keep"),
        [("never", "val_share", "max", 0.6), ("end", "val_cost", "min", 0.6), ("rounds", "val_debt", "max", 0.4)],
    )
    def test_it_is_as_if_that_round_had_not_been(self, files, tmp_path, remove, monitor, mode, keep):
        options = {"remove": remove, "importance": bh.importance.WeightNorm()}
        lit, watch = scripted(), Acting()
        callback = pruning(self.SCHEDULE, monitor=monitor, mode=mode, keep=keep, measure_batches=1, **options)
        run = trainer(tmp_path, [callback, watch])
        run.fit(lit, data(files))
        assert watch.seen == [16] + [12] * 7
        other, same_heads = scripted(), Acting()
        straight = trainer(tmp_path, [pruning(bh.schedules.MultiStep([0.25], [1]), **options), same_heads])
        straight.fit(other, data(files))
        assert same_heads.seen == watch.seen
        if remove != "end":  # in which heads are removed at another step
            assert same(weights(lit), weights(other))
            for mine, theirs in zip(run.optimizers[0].state.values(), straight.optimizers[0].state.values(), strict=True):
                assert same(mine, theirs)
        assert acting(lit) == (16 if remove == "never" else 12)
        assert [event["step"] for event in callback.events] == [1, 3]
        masked = 4 if remove == "rounds" else 8
        assert f"{masked} heads masked, undone: {monitor} " in callback.events[1]["what"]
        assert ("16 -> 12 attention heads" in callback.events[1]["what"]) == (remove == "end")

    def test_masks_of_the_round_before_are_removed_at_the_end(self, files, tmp_path):
        """Removed when the round is taken back, the model computes on as it does masked."""
        lit, other = scripted(), scripted()
        options = {"importance": bh.importance.WeightNorm(), "measure_batches": 1}
        callback = pruning(self.SCHEDULE, monitor="val_share", mode="max", keep=0.7, **options)
        trainer(tmp_path, [callback]).fit(lit, data(files))
        masked = pruning(self.SCHEDULE, monitor="val_share", mode="max", keep=0.7, remove="never", **options)
        trainer(tmp_path, [masked]).fit(other, data(files))
        assert callback.record.inactive(callback.heads) == masked.record.inactive(masked.heads)
        bh.pruning.prune_units(other.model, masked.heads)
        for name, value in other.state_dict().items():
            torch.testing.assert_close(lit.state_dict()[name], value, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize(("monitor", "mode", "keep", "seen"), [
        ("val_share", "max", 0.75, [16] + [12] * 7),  # just as good as it must be
        ("val_share", "max", 0.76, [16] * 8),
        ("val_share", "max", 1, [16] * 8),
        ("val_cost", "min", 0.75, [16] + [12] * 7),
        ("val_share", "min", 1, [16] + [12] * 2 + [8] * 2 + [4] * 3),  # it gets better all the time
        ("val_nan", "max", 0.01, [16] * 8),
    ])  # fmt: skip
    def test_where_the_limit_is(self, files, tmp_path, monitor, mode, keep, seen):
        lit, watch = scripted(), Acting()
        callback = pruning(self.SCHEDULE, monitor=monitor, mode=mode, keep=keep, measure_batches=1, remove="never")
        trainer(tmp_path, [callback, watch]).fit(lit, data(files))
        assert watch.seen == seen

    @pytest.mark.parametrize(("values", "rounds"), [
        ([0.69, 0.06, 0.06, 0.0015, 0.0015, 0.0014], 3),  # it falls all the time
        ([0.69, 0.65, 0.5, 0.5, 0.4, 0.68], 3),  # better than that of chance, worse than the best
        ([0.69, 0.8], 1),
    ])  # fmt: skip
    def test_a_loss_must_be_low_and_the_best_so_far_counts(self, files, tmp_path, values, rounds):
        class Told(bh.TransformerModule):
            def validation_step(self, batch, batch_idx):
                self.log("val_loss", values[min(self.asked, len(values) - 1)])

            def on_validation_epoch_end(self):
                self.asked += 1

        lit = Told(scripted().model, lr=1e-2, warmup=2)
        lit.asked = -1  # what is logged is found out first
        callback = pruning(
            self.SCHEDULE, monitor="val_loss", measure_batches=1, remove="never", importance=bh.importance.WeightNorm()
        )
        trainer(tmp_path, [callback], limit_val_batches=1, val_check_interval=4).fit(lit, data(files))
        assert ["undone" in event["what"] for event in callback.events] == [False] * (rounds - 1) + [values[-1] > 0.6]

    @pytest.mark.parametrize(("at", "limit", "logs"), [(5, 1.0, "val_loss, val_perplexity"), ("start", 0, "nothing")])
    def test_what_is_not_logged_is_refused_before_training(self, files, tmp_path, at, limit, logs):
        lit = module()
        before = weights(lit)
        callback = pruning(0.25, at=at, monitor="val_accuracy", measure_batches=None)
        run = trainer(tmp_path, [callback], limit_val_batches=limit)
        with pytest.raises(ValueError, match=f"monitor='val_accuracy' is not logged in validation. Logged: {logs}.$"):
            run.fit(lit, data(files))
        assert run.global_step == 0
        assert same(weights(lit), before)
        assert bare(lit)


class TestRefused:
    """With a message that says what is legal, before anything has changed."""

    def refused(self, files, folder, callbacks, match, lit=None, **options):
        lit = lit or module()
        before = weights(lit)
        run = trainer(folder, callbacks, **options)
        with pytest.raises(ValueError, match=match):
            run.fit(lit, data(files))
        assert run.global_step == 0
        assert same(weights(lit), before)
        assert bare(lit)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"ratio": 1}, r"ratio=1 must be a fraction of the heads in \[0, 1\)"),
            ({"ratio": True}, "ratio=True must be"),
            ({"ratio": "0.5"}, "ratio='0.5' must be"),
            ({"ratio": bh.schedules.Linear(final=0.5), "at": 3}, "at=3 conflicts with the schedule"),
            ({"ranking": "all"}, "ranking='all' must be one of layer, global"),
            ({"per": "layer"}, "per='layer' must be one of head, kv_head"),
            ({"min_heads": 0}, "min_heads=0 must be at least 1 if heads are removed"),
            ({"min_heads": -1}, "min_heads=-1 must be a whole number"),
            ({"remove": "x"}, "remove='x' must be one of end, rounds, never"),
            ({"monitor": "val_loss", "keep": 0}, r"keep=0 must be in \(0, 1\]"),
            ({"monitor": "val_loss", "mode": "low"}, "mode='low' must be one of max, min"),
            (
                {"monitor": "val_loss", "measure_batches": 0},
                "measure_batches=0 disables the validation that monitor='val_loss' needs",
            ),
            ({"monitor": "val_share"}, "cannot infer from monitor='val_share' .* Use mode='max' or mode='min'"),
            ({"monitor": "val_loss_accuracy"}, "mode=None: cannot infer"),
        ],
    )
    def test_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            pruning(**{"ratio": 0.5, "measure_batches": None} | options)

    @pytest.mark.parametrize(
        ("options", "changes", "match"),
        [
            ({"ratio": 0.5, "at": bh.schedules.Linear(final=0.5, every=2)}, {}, "is the share of the amount .* must reach 1"),
            ({"ratio": 0.1}, {}, "ratio=0.1 removes no head. The smallest ratio that removes a head is 0.125"),
            ({"ratio": 0.05, "ranking": "global"}, {}, "ratio=0.05 removes no head. The smallest .* is 0.0625"),
            ({"ratio": 0.25}, {"num_key_value_heads": 4}, "ratio=0.25 removes no head. The smallest .* is 0.5"),
            ({"ratio": 0.2, "per": "kv_head"}, {"num_key_value_heads": 4}, "0.2 removes no head. .* is 0.25"),
            ({"ratio": 0.5}, {"num_attention_heads": 1, "num_key_value_heads": 1}, "No ratio removes a head"),
            ({"ratio": 0.9, "min_heads": 2}, {}, "would remove 7 of 8 heads of model.layers.0.self_attn. At most 6"),
            ({"ratio": 0.9, "min_heads": 2, "ranking": "global"}, {}, "14 of 16 heads of all layers. At most 12"),
            ({"ratio": bh.schedules.Linear(final=1.0, every=4)}, {}, r"ratio=1.0 must be .* \(by the schedule, at step 8"),
        ],
    )  # fmt: skip
    def test_before_training(self, files, tmp_path, options, changes, match):
        self.refused(files, tmp_path, [pruning(**options)], match, module(**changes))

    @pytest.mark.parametrize(
        ("ratio", "at", "options", "step"),
        [
            (bh.schedules.MultiStep([0.25, 0.5], [2, 6]), 4, {}, 4),
            (bh.schedules.MultiStep([0.25, 0.5], [2, 6]), 4, {"remove": "rounds"}, 4),
            (bh.schedules.MultiStep([0.25, 0.5], [2, 6]), 2, {}, 2),
            (0.25, 0.5, {"at": 2, "remove": "never"}, 4),
        ],
    )
    def test_shapes_that_change_in_between(self, files, tmp_path, ratio, at, options, step):
        match = f"KVHeadConversion changes shapes at step {step}, after HeadPruning has masked heads at step 2. Move it"
        callbacks = [pruning(ratio, per="kv_head", **options), bh.KVHeadConversion(4, at=at, measure_batches=0)]
        self.refused(files, tmp_path, callbacks, match)

    def test_an_export_that_would_come_too_early(self, files, tmp_path):
        callbacks = [bh.Export(str(tmp_path / "out")), pruning(0.25, remove="never")]
        self.refused(files, tmp_path, callbacks, "must be listed before Export")

    def test_heads_that_are_not_there_or_cannot_be_removed(self, files, tmp_path):
        config = transformers.MambaConfig(vocab_size=2048, hidden_size=32, num_hidden_layers=1)
        self.refused(files, tmp_path, [pruning(0.5)], "MambaForCausalLM has no heads", bh.TransformerModule(config))
        for remove in ("end", "rounds"):
            self.refused(files, tmp_path, [pruning(0.5, at=8, remove=remove)], "cannot be removed.*mask", bloom())

    def test_no_batches(self, files, tmp_path):
        self.refused(files, tmp_path, [pruning(0.5, calibration=[])], "calibration: GateGradient needs at least one batch")


def bloom():
    torch.manual_seed(0)
    return bh.TransformerModule(transformers.BloomConfig(vocab_size=2048, hidden_size=32, n_layer=2, n_head=4), lr=1e-2)


def test_heads_that_cannot_be_removed_can_stay_masked(files, tmp_path):
    """ALiBi gives each head a slope by its number."""
    lit, watch = bloom(), Acting()
    trainer(tmp_path, [pruning(0.5, at=4, remove="never"), watch]).fit(lit, data(files))
    assert watch.seen == [8] * 4 + [4] * 4
    assert silent(lit) == 4


def test_a_layer_may_lose_all_its_heads_where_none_is_removed(files, tmp_path):
    class First(bh.importance.WeightNorm):
        def sums(self, model, heads, per, trials):
            sums = super().sums(model, heads, per, trials)
            for number, total in enumerate(sums.totals.values()):
                total[:] = number + 1
            return sums

    lit, watch = module(), Acting()
    callback = pruning(0.5, ranking="global", min_heads=0, normalize=False, importance=First(), remove="never")
    trainer(tmp_path, [callback, watch]).fit(lit, data(files))
    assert callback.heads == {LAYERS[0]: list(range(8))}
    assert watch.seen == [8] * 8
    assert not lit.model.model.layers[0].self_attn.o_proj.weight.any()


def test_checkpoints_are_plain_and_carry_masks(files, tmp_path):
    lit, callback = module(), pruning(bh.schedules.MultiStep([0.25, 0.5], [2, 5]))
    trainer(tmp_path, [callback, checkpoints(tmp_path)]).fit(lit, data(files))
    for step, masked, width in ((1, 0, 32), (2, 4, 32), (4, 4, 32), (5, 0, 16), (8, 0, 16)):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert checkpoint["state_dict"].keys() == module().state_dict().keys()
        assert len(checkpoint["state_dict"][f"model.{LAYERS[0]}.q_proj.weight"]) == width
        state = next(value for key, value in checkpoint["callbacks"].items() if key.startswith("HeadPruning"))
        assert sum(map(len, state["heads"].values())) == masked
    loaded = bh.TransformerModule.load_from_checkpoint(tmp_path / "step=8.ckpt", model=module().model)
    assert same(weights(loaded), weights(lit))


def test_a_checkpoint_in_which_heads_are_masked_is_exported_as_it_computes(files, tmp_path):
    lit, callback = module(), pruning(0.25, at=2, remove="never")
    trainer(tmp_path, [callback, checkpoints(tmp_path)], max_steps=4).fit(lit, data(files))
    export(tmp_path / "step=4.ckpt", tmp_path / "out", tokenizer="tiny")
    ids = tokens()
    assert torch.equal(bh.load(tmp_path / "out")(ids).logits, transformer(lit).eval()(ids).logits)
    hostile = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    hostile["billhook_masked_heads"]["heads"] = {LAYERS[0]: [99]}
    torch.save(hostile, tmp_path / "hostile.ckpt")
    with pytest.raises(ValueError, match="has no head 99"):
        export(tmp_path / "hostile.ckpt", tmp_path / "other")


@pytest.mark.daily("matched-at once", "refitted-in rounds")
@pytest.mark.parametrize(
    "how", [{}, {"ratio": bh.schedules.Linear(final=0.5, end=0.5, every=2), "remove": "rounds"}], ids=["at once", "in rounds"]
)
@pytest.mark.parametrize("match", [None, bh.criteria.BlockMatching(steps=20)], ids=["refitted", "matched"])
def test_consumers_make_up_for_heads_that_go(files, tmp_path, how, match):
    def after(repair):
        callback = pruning(**{"ratio": 0.5, "calibration": 24} | how, repair=repair)
        lit = module()
        lit.lr = 0.0
        before = [copy.deepcopy(lit.model), tokens(8, 16)]
        trainer(tmp_path, [callback], max_steps=6).fit(lit, data(files))
        with torch.no_grad():
            return float((lit.model(before[1]).logits - before[0].eval()(before[1]).logits).norm()), callback.events[-1]["what"]

    (plain, told_plainly), (repaired, told) = after(None), after(bh.RepairConfig(match=match))
    assert "repaired" in told
    assert "repaired" not in told_plainly
    assert repaired < plain


@pytest.mark.parametrize("how", [{"remove": "never"}, {"ratio": bh.schedules.Linear(final=0.5), "remove": "end"}])
def test_a_repair_of_masked_heads_is_refused(how):
    with pytest.raises(ValueError, match=r"repair='auto' cannot be combined with remove='(never'|end' and several rounds)"):
        pruning(**{"ratio": 0.5} | how, repair="auto")
