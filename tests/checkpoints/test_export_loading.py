"""Checkpoints of fits with callbacks, loaded in every other way than to resume; and those that do not fit."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from billhook.kv_heads.config import kv_heads_of
from kit import prunes
from kit.families import build, llama
from kit.fits import data, same, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
SIZES = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
FEW = {"measure_batches": 0, "calibration": 4}


def module(seed=0, family="llama", lora=None, **changes):
    torch.manual_seed(seed)
    return bh.TransformerModule(build(family, **SIZES | changes), lr=1e-2, lora=lora)


class Plain(pl.LightningModule):
    """A module of a user's own, that says something of itself in checkpoints."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.word = llama(**SIZES).train(), None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["word"] = "gnarled"

    def on_load_checkpoint(self, checkpoint):
        self.word = checkpoint["word"]

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(**batch).loss)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.net(**batch).loss)

    def predict_step(self, batch, batch_idx):
        return self.net(**batch).logits

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Mixed(bh.training.ShapeInCheckpoint, Plain):
    pass


def kept(folder, **options):
    return ModelCheckpoint(folder, filename="{step}", **{"every_n_train_steps": 1, "save_top_k": -1, **options})


def cut(remove="rounds", heads=0.5):
    return [bh.HeadPruning(heads, at=1, remove=remove, **FEW), bh.WeightPruning(bh.Magnitude(), 0.5, at=2, measure_batches=0)]


@pytest.fixture(scope="module")
def fitted(files, tmp_path_factory):
    """By what was fitted: the module, and the checkpoint of its last step."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("fitted")
            lit = {"plain": Plain, "mixed": Mixed}.get(kind, module)
            lit = module(lora=bh.training.LoRA(r=2)) if kind == "lora" else lit()
            callbacks = {"kv": [bh.KVHeadConversion(1, at=1, measure_batches=0)], "masked": cut("never")}.get(kind, cut())
            run = trainer(folder, [*callbacks, kept(folder)], max_steps=4)
            run.fit(lit, data(files))
            made[kind] = lit, folder / "step=4.ckpt"
        return made[kind]

    return make


def probe(lit):
    model = lit.model if hasattr(lit, "model") else lit.net
    with torch.no_grad():
        return model.eval()(torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_a_class_of_ones_own_is_loaded(fitted, kind):
    lit, path = fitted(kind)
    loaded = bh.training.load_from_checkpoint(type(lit), path, seed=1)
    assert type(loaded) is type(lit)
    assert loaded.word == "gnarled"
    assert same(weights(loaded), weights(lit))
    assert torch.equal(probe(loaded), probe(lit))


def test_ours_is_loaded_either_way(fitted):
    lit, path = fitted("kv")
    for load in (
        lambda **o: bh.training.load_from_checkpoint(bh.TransformerModule, path, **o),
        lambda **o: bh.TransformerModule.load_from_checkpoint(path, **o),
    ):
        loaded = load(model=module(1).model)
        assert same(weights(loaded), weights(lit))


def test_masked_heads_do_nothing_in_a_module_that_is_loaded(fitted, files, tmp_path):
    """Nor where it is validated without the callback; both say what they said in the fit."""
    lit, path = fitted("masked")
    loaded = bh.TransformerModule.load_from_checkpoint(path, model=module(1).model)
    torch.testing.assert_close(probe(loaded), probe(lit))
    before = weights(loaded)
    loaded.load_state_dict({name: torch.ones_like(value) for name, value in before.items()})
    assert all(bool((value == 1).all()) for value in weights(loaded).values())
    losses = []
    for callbacks in (cut("never"), []):
        (found,) = trainer(tmp_path, callbacks).validate(module(1), data(files), ckpt_path=path, verbose=False)
        losses.append(found["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("kind", "callbacks"), [("kv", []), ("plain", cut()), ("plain", cut()[1:]), ("mixed", [])])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_take_it_with_and_without_callbacks(fitted, files, tmp_path, kind, callbacks, stage):
    lit, path = fitted(kind)
    fresh = module(1) if kind == "kv" else type(lit)(1)
    given = data(files | {"test": files["validation"]})
    loaders = {
        "dataloaders": torch.utils.data.DataLoader([torch.arange(3, 9)], collate_fn=lambda rows: {"input_ids": torch.stack(rows)})
    }
    own = {"datamodule": given, "verbose": False} if stage != "predict" else loaders
    getattr(trainer(tmp_path, callbacks), stage)(fresh, ckpt_path=path, **own)
    assert same(weights(fresh), weights(lit))
    assert not [name for name in vars(fresh) if name.startswith("_billhook")]


def test_a_model_without_what_takes_the_shape_says_what_lightning_says(fitted, files, tmp_path):
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(tmp_path, []).validate(Plain(), data(files), ckpt_path=fitted("plain")[1], verbose=False)


def test_last_and_best(files, tmp_path):
    def saver():
        return ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, monitor="train_loss", save_top_k=1)

    resumed = module(1)
    trainer(tmp_path, [*cut(), saver()], max_steps=4).fit(module(), data(files))
    run = trainer(tmp_path, [*cut(), saver()], max_steps=6)
    run.fit(resumed, data(files), ckpt_path="last")
    assert run.global_step == 6
    trained = weights(resumed)
    for path in ("best", "last"):
        run.validate(resumed, data(files), ckpt_path=path, verbose=False)
    assert same(weights(resumed), trained)


def test_weights_alone_are_validated_and_begin_a_new_fit(files, tmp_path):
    """A fit does not go on with them; a new one does all of its events on what there is."""
    lit = module()
    callbacks = [bh.KVHeadConversion(2, at=1, measure_batches=0), *cut()[1:]]
    trainer(tmp_path, [*callbacks, kept(tmp_path, save_weights_only=True)], max_steps=3).fit(lit, data(files))
    path, fresh = tmp_path / "step=3.ckpt", module(1)
    trainer(tmp_path, []).validate(fresh, data(files), ckpt_path=path, verbose=False)
    assert same(weights(fresh), weights(lit))
    again = [bh.KVHeadConversion(2, at=1, measure_batches=0), *cut()[1:]]
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer(tmp_path, again).fit(module(1), data(files), ckpt_path=path)
    loaded = bh.TransformerModule.load_from_checkpoint(path, model=module(1).model)
    trainer(tmp_path, again, max_steps=3).fit(loaded, data(files))
    assert [[event["step"] for event in callback.events] for callback in again] == [[], [2]]
    assert kv_heads_of(loaded) == 2
    zeros = [float((layer.mlp.up_proj.weight == 0).float().mean()) for layer in loaded.model.model.layers]
    assert zeros == [0.5, 0.5]


class TestRefused:
    """Before weights are loaded, with what the checkpoint holds and what the run has."""

    def refused(self, fitted, files, folder, kind, match, callbacks=None, lit=None):
        lit = lit or module(1)
        before, path = weights(lit), fitted(kind)[1]
        with pytest.raises(ValueError, match=match):
            trainer(folder, cut() if callbacks is None else callbacks).fit(lit, data(files), ckpt_path=path)
        assert same(weights(lit), before)
        assert not [name for name in vars(lit) if name.startswith("_billhook") or name.startswith("on_")]

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            (
                {"family": "mistral", "sliding_window": None, "head_dim": 4},
                "its model_type is 'llama' instead of 'mistral'; .*contains LlamaForCausalLM",
            ),
            (
                {"hidden_size": 32},
                r"self_attn has head dimension 4 instead of 8; .*hidden_size 16.* the run has .*hidden_size 32",
            ),
            ({"num_hidden_layers": 3}, "it lacks model.layers.2.*num_hidden_layers 2.* the run has .*num_hidden_layers 3"),
            ({"tie_word_embeddings": True}, "its tie_word_embeddings is False instead of True"),
            ({"attention_bias": True}, "it lacks model.layers.0.self_attn.k_proj.bias"),
        ],
        ids=["family", "heads", "blocks", "tied", "biases"],
    )
    def test_another_model(self, fitted, files, tmp_path, changes, match):
        self.refused(fitted, files, tmp_path, "ours", match, lit=module(1, **changes))
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, []).validate(module(1, **changes), data(files), ckpt_path=fitted("ours")[1], verbose=False)
        with pytest.raises(ValueError, match=match):
            bh.TransformerModule.load_from_checkpoint(fitted("ours")[1], model=module(1, **changes).model)

    def test_adapters_that_one_of_both_has(self, fitted, files, tmp_path):
        self.refused(
            fitted,
            files,
            tmp_path,
            "lora",
            r"the checkpoint contains LlamaForCausalLM with LoRA \(.*the run has LlamaForCausalLM \(",
        )
        lit = module(1, lora=bh.training.LoRA(r=2))
        self.refused(
            fitted,
            files,
            tmp_path,
            "ours",
            r"contains LlamaForCausalLM \(.*the run has LlamaForCausalLM with LoRA",
            lit=lit,
        )

    @pytest.mark.parametrize(
        ("callbacks", "match"),
        [
            (
                [prunes.WeightPruning(bh.criteria.RIA(), 0.5, at=2, **FEW)],
                r"run has WeightPruning\{'criterion': 'Magnitude'.*this run has WeightPruning\{'criterion': 'RIA'",
            ),
            ([prunes.WeightPruning(bh.Magnitude(), 0.5, at=2, skip=["*.mlp.*"])], r"'skip': \[\]\}, but this run has .*\*.mlp"),
            (
                [bh.HeadPruning(0.5, at=1, options=bh.HeadOptions(per="kv_head"), **FEW)],
                "'per': 'head'}, but this run has .*'per': 'kv_head'}",
            ),
        ],
        ids=["criterion", "skip", "unit"],
    )
    def test_another_callback_of_the_same_kind(self, fitted, files, tmp_path, callbacks, match):
        self.refused(fitted, files, tmp_path, "ours", match, callbacks)

    def test_fewer_kv_heads_than_the_run_leads_to(self, fitted, files, tmp_path):
        with pytest.raises(ValueError, match="the checkpoint has 1 KV heads, fewer than the 2"):
            trainer(tmp_path, [bh.KVHeadConversion(2, at=1)]).fit(module(1), data(files), ckpt_path=fitted("kv")[1])
        lit, stages = (
            module(1),
            [bh.KVHeadConversion(2, at=1, measure_batches=0), bh.KVHeadConversion(1, at=2, measure_batches=0)],
        )
        trainer(tmp_path, stages, max_steps=5).fit(lit, data(files), ckpt_path=fitted("kv")[1])
        assert kv_heads_of(lit) == 1


class TestWarned:
    def test_masks_that_nothing_holds(self, fitted, files, tmp_path):
        with pytest.warns(UserWarning, match="run has WeightPruning.* which this run lacks. The weights that it masked"):
            trainer(tmp_path, cut()[:1], max_steps=5).fit(module(1), data(files), ckpt_path=fitted("ours")[1])
        lit = module(1)
        with pytest.warns(UserWarning, match="run has HeadPruning.* which this run lacks. The heads that it masked"):
            trainer(tmp_path, cut()[1:], max_steps=5).fit(lit, data(files), ckpt_path=fitted("masked")[1])

    def test_a_config_that_says_something_else(self, fitted, files, tmp_path):
        with pytest.warns(
            UserWarning, match="config differs: rms_norm_eps 1e-06 instead of 0.1. The values of this run are used"
        ):
            trainer(tmp_path, []).validate(module(1, rms_norm_eps=0.1), data(files), ckpt_path=fitted("kv")[1], verbose=False)

    @pytest.mark.parametrize("kind", ["weights", "heads"])
    def test_what_is_pruned_does_not_come_back_in_a_longer_fit(self, files, tmp_path, kind):
        """A schedule in fractions asks for less, at the same step of a fit that is longer."""

        def callback():
            if kind == "heads":
                return bh.HeadPruning(bh.schedules.MultiStep([0.25, 0.5], [0.2, 0.5]), remove="never", **FEW)
            return bh.WeightPruning(bh.Magnitude(), bh.schedules.Cubic(final=0.5, every=1), measure_batches=0)

        def fractions(lit):
            if kind == "heads":
                return sum(int(layer.self_attn.o_proj._forward_pre_hooks != {}) for layer in lit.model.model.layers)
            return float((lit.model.model.layers[0].mlp.up_proj.weight == 0).float().mean())

        trainer(tmp_path, [callback(), kept(tmp_path)], max_steps=4).fit(module(), data(files))
        lit, watch, own = module(1), Least(fractions), callback()
        with pytest.warns(UserWarning, match="reached 0.5 at step .*Pruning is not undone, and rounds below"):
            trainer(tmp_path, [own, watch], max_steps=12).fit(lit, data(files), ckpt_path=tmp_path / "step=4.ckpt")
        assert min(watch.seen) == max(watch.seen) == (0.5 if kind == "weights" else 2)
        if kind == "heads":
            assert sum(map(len, own.heads.values())) == 4


class Least(pl.Callback):
    def __init__(self, what):
        self.what, self.seen = what, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(self.what(pl_module))
