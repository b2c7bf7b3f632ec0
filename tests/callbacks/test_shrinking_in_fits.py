"""The search for a smaller model in a fit: the same as without one, at its step, and what is saved of it."""

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
import transformers
from peft import LoraConfig

import billhook as bh
from billhook.checkpoints.export import export
from billhook.fit.resume import check_callbacks
from kit import shrinks
from kit.families import llama, tokens
from kit.fits import data, module, same, trainer, weights
from kit.weight_pruning import checkpoints

pytestmark = [pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")]


def shrinking(**options):
    return shrinks.Shrinking(**{"generations": 1, "candidates": 2, "calibration": 8, "measure_batches": 0} | options)


class Watch(pl.Callback):
    """What the model is at each training forward: its weights, and its layers' channels and KV heads."""

    def __init__(self):
        self.weights, self.seen = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append(weights(pl_module))
        layers = pl_module.model.model.layers
        self.seen.append([(one.mlp.down_proj.in_features, one.self_attn.k_proj.out_features // 4) for one in layers])


@pytest.mark.daily("free")
@pytest.mark.parametrize("layers", ["uniform", "free"])
def test_it_finds_what_shrink_finds_on_the_same_batches(files, tmp_path, layers):
    lit, batches = module(), [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 2000, (5, 4, 9))]
    dense, watch = copy.deepcopy(lit.model), Watch()
    callback = shrinking(params=0.94, layers=layers, calibration=batches)
    trainer(tmp_path, [callback, watch], max_steps=2).fit(lit, data(files))
    shrunk = shrinks.shrink(dense, batches, params=0.94, layers=layers, generations=1, candidates=2)
    assert callback.shrunk.to_json() == shrunk.to_json()
    assert same(watch.weights[0], {f"model.{name}": value for name, value in dense.state_dict().items()})
    assert shrunk.left == bh.summary(lit).params <= shrunk.limit
    assert callback.events[0]["after"]["params"] == shrunk.left


def test_too_few_tokens_for_any_refit_are_told_or_where_one_is_asked_for_refused(files, tmp_path):
    how = {"params": 0.94, "calibration": [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (3, 1, 7))]}
    how |= {"importance": bh.importance.WeightNorm(), "generations": 0}
    callback, few = shrinking(**how), r"repair of \S+ needs at least \d+ non-padding tokens"
    with pytest.warns(UserWarning, match=f"Shrinking: not repaired: {few}"):
        trainer(tmp_path, [callback], max_steps=1).fit(module(), data(files))
    assert callback.events[0]["not_refitted"] == callback.shrunk.not_refitted
    assert re.match(f"not repaired: {few}", callback.shrunk.not_refitted)
    with pytest.raises(ValueError, match=few):
        trainer(tmp_path, [shrinking(**how, repair=bh.RepairConfig())], max_steps=1).fit(module(), data(files))


@pytest.mark.daily("start-0", "0.5-4")
@pytest.mark.parametrize(("at", "step"), [("start", 0), (3, 3), (0.5, 4), (8, 8)])
def test_it_happens_at_its_step_and_training_goes_on(files, tmp_path, at, step):
    lit, watch, callback = module(), Watch(), shrinking(params=0.97, at=at)
    trainer(tmp_path, [callback, watch]).fit(lit, data(files))
    assert watch.seen[:step] == [[(48, 4)] * 2] * step
    assert all(shapes == watch.seen[-1] != [(48, 4)] * 2 for shapes in watch.seen[step:])
    assert [event["step"] for event in callback.events] == [step]
    assert all(torch.isfinite(value).all() for value in weights(lit).values())
    assert not {"log", "on_save_checkpoint", "on_load_checkpoint"} & vars(lit).keys()


def test_the_dense_model_teaches_the_smaller_one_which_is_saved(files, tmp_path):
    torch.manual_seed(0)
    lit = bh.TransformerModule(llama(vocab_size=2048), lr=1e-2, distillation=bh.training.Distillation())
    dense = lit.teacher.model.num_parameters()
    trainer(tmp_path, [shrinking(params=0.97), bh.Export(str(tmp_path / "out"))], max_steps=3).fit(lit, data(files))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.num_parameters() <= 0.97 * dense < dense == lit.teacher.model.num_parameters()
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, lit.model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "exactly one of params, bytes"),
        ({"params": 0.8, "bytes": 0.8}, "exactly one of .*; got params and bytes"),
        ({"params": 0.8, "generations": -1}, "generations=-1 must be a whole number of at least 0"),
        ({"params": 0.8, "candidates": 0}, "candidates=0 must be a whole number of at least 1"),
        ({"params": 0.8, "layers": "all"}, "layers='all' must be one of uniform, free"),
    ],
)
def test_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        shrinking(**options)


LORA = {"lora": bh.training.LoRA(r=2)}
DORA = {"lora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)}


@pytest.mark.parametrize(
    ("options", "given", "match"),
    [
        ({"params": 10}, {}, r"params=10 \(10\) is out of reach. Reachable: [\d,]+ to [\d,]+"),
        ({"params": 0.94, "at": 3}, LORA, "at=3 must be 'start' if the model has adapters"),
        ({"params": 0.94}, DORA, "Shrinking: the adapter of model.layers.0.self_attn.q_proj is trained or is not plain LoRA"),
        ({"params": 0.94, "calibration": 2}, {}, "calibration: at least 3 examples, .* got 2"),
    ],
)
def test_what_is_refused_changes_nothing(files, tmp_path, options, given, match):
    lit = bh.TransformerModule(llama(vocab_size=2048), **given)
    before = weights(lit)
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, [shrinking(**options)]).fit(lit, data(files))
    assert same(weights(lit), before)


@pytest.mark.nightly
def test_a_budget_in_quality(files, tmp_path):
    lit, batches = module(), [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 2000, (5, 4, 9))]
    dense, callback = copy.deepcopy(lit.model), shrinking(max_loss=1.001, generations=0, calibration=batches)
    trainer(tmp_path, [callback], max_steps=1).fit(lit, data(files))
    shrunk = shrinks.shrink(dense, batches, max_loss=1.001, generations=0)
    assert callback.shrunk.to_json() == shrunk.to_json()
    assert shrunk.ratio <= 1.001
    assert bh.summary(lit).params == shrunk.left


def adapted(seed=0, **changes):
    torch.manual_seed(seed)
    return bh.TransformerModule(llama(vocab_size=2048, **changes), lora=bh.training.LoRA(r=2), lr=1e-2)


@pytest.mark.nightly
@pytest.mark.parametrize(("params", "layers"), [(0.94, 2), (0.84, 4)], ids=["units", "blocks"])
def test_lora_trains_what_is_left_and_is_merged(files, tmp_path, params, layers):
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 2000, (5, 4, 9))]
    options, shape = {"params": params, "layers": "free"}, {"num_hidden_layers": layers}
    lit, callback = adapted(**shape), shrinking(**options, calibration=batches)
    torch.manual_seed(0)
    dense = llama(vocab_size=2048, **shape).eval()
    straight = trainer(tmp_path, [callback, checkpoints(tmp_path), bh.Export(str(tmp_path / "out"))], max_steps=4)
    straight.fit(lit, data(files))
    shrunk = shrinks.shrink(dense, batches, **options, generations=1, candidates=2)
    assert callback.shrunk.to_json() == shrunk.to_json()
    assert (shrunk.blocks is not None) == (layers == 4)
    frozen = {name.replace(".base_layer", ""): value for name, value in lit.model.state_dict().items() if "lora" not in name}
    assert same(frozen, dense.state_dict())
    again, ids = bh.load(tmp_path / "out"), tokens()
    assert again.num_parameters() == shrunk.left
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, lit.model.eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(again(ids).logits, dense(ids).logits, atol=1e-3)
    resumed, later = adapted(seed=1, **shape), shrinking(**options, calibration=batches)
    trainer(tmp_path, [later], max_steps=4).fit(resumed, data(files), ckpt_path=tmp_path / "step=2.ckpt")
    assert same(weights(resumed), weights(lit))
    assert repr(later.events) == repr(callback.events)


def test_adapters_that_have_learned_are_refused_when_it_comes_late(files, tmp_path):
    trainer(tmp_path, [checkpoints(tmp_path)], max_steps=2).fit(adapted(), data(files))
    run = trainer(tmp_path, [shrinking(params=0.94)], max_steps=4)
    with pytest.raises(ValueError, match="is trained or is not plain LoRA. Merge it"):
        run.fit(adapted(), data(files), ckpt_path=tmp_path / "step=2.ckpt")


def test_a_kv_head_goes_with_all_its_query_heads_beneath_lora_too(files, tmp_path):
    lit, callback = adapted(), shrinking(params=0.99, round_to=1, repair=None, generations=0)
    with torch.no_grad():
        for name, parameter in lit.model.named_parameters():
            if "lora" not in name and "o_proj" in name:
                parameter[:, :8] = 0  # nothing reads the two query heads of the first KV head
    run = trainer(tmp_path, [callback, bh.Export(str(tmp_path / "out"))], max_steps=2)
    run.fit(lit, data(files))
    assert [heads for name, heads in callback.shrunk.plan.units.items() if name.endswith("attn")] == [[0, 1]] * 2
    assert callback.shrunk.kept["model.layers.0.self_attn"] == (4, 3)
    again, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tokens()
    assert again.config.num_key_value_heads == 3
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, lit.model.eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_another_search_is_refused_on_resume():
    earlier, callback = shrinking(params=0.8), shrinking(params=0.7)
    states = {earlier.state_key: {}}
    with pytest.raises(ValueError, match=r"run has Shrinking\{.*0\.8.*, but this run has Shrinking\{.*0\.7"):
        check_callbacks([callback], states)
    check_callbacks([callback], {callback.state_key: {}})


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "blocks"),
    [({"params": 0.94, "layers": "free"}, 2), ({"params": 0.84, "layers": "free"}, 4), ({"params": 0.82, "round_to": 1}, 4)],
    ids=["free", "free, without blocks", "alike, without blocks"],
)
def test_resumed_equals_straight_through_and_a_checkpoint_is_exported(files, tmp_path, options, blocks):
    options = options | {"at": 3}
    lit, whole, watch = module(num_hidden_layers=blocks), shrinking(**options), Watch()
    first = trainer(tmp_path, [whole, watch, checkpoints(tmp_path)])
    first.fit(lit, data(files))
    assert (whole.shrunk.blocks is not None) == (blocks == 4) == (len(lit.model.model.layers) < blocks)
    for stop in (1, 4):
        resumed, again, later = module(seed=1, num_hidden_layers=blocks), shrinking(**options), Watch()
        torch.manual_seed(stop)
        run = trainer(tmp_path, [again, later])
        run.fit(resumed, data(files), ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert same(weights(resumed), weights(lit)), stop
        assert later.seen == watch.seen[stop:]
        assert repr(again.events) == repr(whole.events)
        for left, right in zip(run.optimizers[0].state.values(), first.optimizers[0].state.values(), strict=True):
            assert same(left, right)
    export(tmp_path / "step=8.ckpt", tmp_path / "out")
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(bh.load(tmp_path / "out")(ids).logits, lit.model.eval()(ids).logits)
