"""Callbacks in transformers' Trainer change the model as they do in Lightning's, resume, and refuse what cannot be."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import billhook as bh
from billhook.fit.callback import FitCallback
from billhook.integrations.transformers import Callbacks
from billhook.integrations.transformers_fit import TransformersFit
from billhook.model.layers import prunable
from kit import prunes, trainer_ddp
from kit.events import END, EVENTS, FEW, Own, figures, loader
from kit.families import BERT, t5
from kit.fits import same, trainer
from kit.trainers import SETTINGS, Ordered, calibration, train


class Plain(Own):
    """The module of the Lightning fit, whose optimizer is the Trainer's."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def close(model, other):
    """Equal but for rounding."""
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, others[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.daily("*-later", "structure-start", "svd-start")
@pytest.mark.parametrize("at", ["start", 2], ids=["start", "later"])
@pytest.mark.parametrize("event", EVENTS)
def test_events_are_those_of_lightning(tmp_path, event, at):
    callback, other, lit = EVENTS[event](at), EVENTS[event](at), Plain()
    model, _ = train(tmp_path, [callback], validation=loader(4, 4))
    trainer(tmp_path, [other], max_steps=4).fit(lit, loader(), loader(4, 4))
    assert figures(model) == figures(lit) == END[event]
    close(model, lit.net)
    assert [own["step"] for own in callback.events] == [0 if at == "start" else 2]
    for own, others in zip(callback.events, other.events, strict=True):
        assert own["what"] == others["what"]
        assert ("val_loss" in own["after"]) == ("val_loss" in others["after"]) == ((event, at) != ("mean", "start"))
        assert own["after"].get("val_loss", 0) == pytest.approx(others["after"].get("val_loss", 0), rel=1e-4)


class Killed(Exception):
    """What ends a run."""


class Stop(TrainerCallback):
    """A run that is killed after its second step, which is saved."""

    def on_save(self, args, state, control, **_):
        if state.global_step == 2:
            raise Killed


RECOMPUTES = "activation_checkpointing"
if RECOMPUTES not in TrainingArguments.__dataclass_fields__:  # before transformers 5.20
    RECOMPUTES = "gradient_checkpointing"
MIDDLE = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 5}


@pytest.mark.daily("wanda-2", "masked-start", "structure-3", "svd-2", "shrink-1", "depth-2")
@pytest.mark.parametrize("at", ["start", 1, 2, 3])
@pytest.mark.parametrize("event", EVENTS)
def test_a_resumed_run_ends_as_the_straight_one(tmp_path, event, at):
    straight, callback = EVENTS[event](at), EVENTS[event](at)
    model, _ = train(tmp_path / "a", [straight], **MIDDLE)
    with pytest.raises(Killed):
        train(tmp_path / "b", [EVENTS[event](at)], others=[Stop()], **MIDDLE)
    folder = tmp_path / "b" / "hf" / "checkpoint-2"
    assert (folder / "billhook_fit.pt").is_file()
    again, run = train(tmp_path / "b", [callback], bh.load(folder, dtype="float32").train(), str(folder), **MIDDLE)
    assert figures(again) == figures(model)
    assert same(again.state_dict(), model.state_dict())
    assert [own["what"] for own in callback.events] == [own["what"] for own in straight.events]
    assert [own["step"] for own in callback.events] == [0 if at == "start" else at]
    saved = run.state.stateful_callbacks["Callbacks"]["attributes"]["events"]
    assert [own["what"] for own in saved] == [own["what"] for own in straight.events]


def test_dense_weights_do_not_resume_a_smaller_model(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, [EVENTS["mean"](1)], others=[Stop()], **MIDDLE)
    with pytest.raises(ValueError, match="because an event changed it. Load the model from the checkpoint folder .bh.load."):
        train(tmp_path, [EVENTS["mean"](1)], resume=str(tmp_path / "hf" / "checkpoint-2"), **MIDDLE)


def test_masks_of_dense_weights_resume(tmp_path):
    """Masks change no shape, so that the model need not come from the checkpoint."""
    model, _ = train(tmp_path / "a", [EVENTS["wanda"](1)], **MIDDLE)
    with pytest.raises(Killed):
        train(tmp_path / "b", [EVENTS["wanda"](1)], others=[Stop()], **MIDDLE)
    again, _ = train(tmp_path / "b", [EVENTS["wanda"](1)], resume=True, **MIDDLE)
    assert same(again.state_dict(), model.state_dict())


KEPT = MIDDLE | {"save_total_limit": None}


def lora(target="all-linear", **options):
    """The dense model with adapters, equal in each call."""
    torch.manual_seed(0)
    return get_peft_model(Own().net, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=target, **options))


ADAPTED = {
    "q and v": lambda: lora(["q_proj", "v_proj"]),
    "all": lora,
    "trained copies": lambda: lora(["q_proj"], modules_to_save=["lm_head"]),
}
OF_BASE = {name: EVENTS[name] for name in ("structure", "depth", "heads", "masked")} | {
    "wanda": lambda at: prunes.WeightPruning(sparsity=0.5, at=at, mask_adapters=True, **FEW),
    "sparsegpt": lambda at: prunes.WeightPruning(bh.SparseGPT(), sparsity=0.5, at=at, mask_adapters=True, **FEW),
}


@pytest.mark.daily("structure-q*", "sparsegpt-q*", "masked-trained*")
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("event", OF_BASE)
def test_a_resumed_run_with_adapters_has_the_base_that_events_left(tmp_path, event, adapted):
    """PEFT's checkpoints hold adapters alone."""
    straight, folder = ADAPTED[adapted](), tmp_path / "a" / "hf" / "checkpoint-2"
    train(tmp_path / "a", [OF_BASE[event](1), bh.Export(str(tmp_path / "straight"))], straight, **KEPT)
    with pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(bh.load\('.*/base_model'\), '.*', is_trainable=True\)"):
        train(tmp_path / "b", [OF_BASE[event](1)], ADAPTED[adapted](), str(folder), resume_from_checkpoint=str(folder), **KEPT)
    again = PeftModel.from_pretrained(bh.load(folder / "base_model", dtype="float32"), folder, is_trainable=True).train()
    callbacks = [OF_BASE[event](1), bh.Export(str(tmp_path / "resumed"))]
    train(tmp_path / "b", callbacks, again, str(folder), **KEPT)
    assert same(again.state_dict(), straight.state_dict())
    exported = [bh.load(tmp_path / name, dtype="float32").state_dict() for name in ("straight", "resumed")]
    assert same(*exported)
    assert len(callbacks[0].events) == 1


def test_adapters_name_the_base_that_events_left(tmp_path):
    """Loaded by PEFT alone, they find it; save_model, which saves adapters alone, is warned of."""
    model = lora(["q_proj"])
    with pytest.warns(UserWarning, match="changed the base model of the adapters, which save_model does not save"):
        train(tmp_path, [EVENTS["wanda"](1)], model, **KEPT | {"max_steps": 2})
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "hf" / "checkpoint-2")
    assert same(loaded.state_dict(), model.state_dict())


def test_adapters_of_a_base_that_starts_pruned_resume_without_a_copy(tmp_path):
    """Events that happen when the Trainer is created happen again."""
    cut = lambda: bh.StructuredPruning(bh.Amount(channels=0.5), calibration=calibration(), measure_batches=0)  # noqa: E731
    straight, again, folder = lora(), lora(), tmp_path / "hf" / "checkpoint-2"
    train(tmp_path, [cut()], straight, **KEPT)
    assert not (folder / "base_model").exists()
    train(tmp_path, [cut()], again, str(folder), **KEPT)
    assert same(again.state_dict(), straight.state_dict())


def test_an_export_refuses_a_model_that_lost_its_event(tmp_path):
    class Undo(FitCallback):
        """Puts the dense channels back after the event."""

        def end_training(self, fit):
            for layer in fit.model.model.layers:
                layer.mlp = copy.deepcopy(Own().net.model.layers[0].mlp)

    callbacks = [bh.StructuredPruning(bh.Amount(channels=0.5), at=1, **FEW), Undo(), bh.Export(str(tmp_path / "out"))]
    told = "the event at step 1 left 5,328 parameters, but the model has 6,480, so the event"
    with pytest.raises(ValueError, match=told), pytest.warns(UserWarning, match="The unverified weights are in"):
        train(tmp_path, callbacks)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", [True, False], ids=["in arguments", "in the call"])
def test_a_run_resumes_with_its_own_state(tmp_path, named):
    """Not with that of an earlier run, which left a checkpoint of the same step in the output folder."""
    first, second = Own().net, Own().net
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.randn_like(parameter))
    for folder, model in (("out", first), ("backup", second)):
        train(tmp_path / folder, [EVENTS["wanda"](1)], model, **MIDDLE | {"max_steps": 2})
    folder, callback = str(tmp_path / "backup" / "hf" / "checkpoint-2"), EVENTS["wanda"](1)
    settings = MIDDLE | ({"resume_from_checkpoint": folder} if named else {})
    if not named:
        with pytest.raises(ValueError, match="there is no billhook_fit.pt of that run and step. Pass the checkpoint folder as"):
            train(tmp_path / "out", [callback], Own().net, folder, **settings)
        return
    train(tmp_path / "out", [callback], Own().net, folder, **settings)
    saved = bh.load(folder, dtype="float32")
    for name, mask in callback.masks.items():
        assert torch.equal(mask, saved.get_submodule(name).weight != 0), name


@pytest.mark.parametrize("late", [False, True], ids=["at once", "added later"])
def test_two_of_them_are_refused(tmp_path, late):
    both = [Callbacks([EVENTS["wanda"](2)]), Callbacks([EVENTS["mean"](3)])]
    args = TrainingArguments(str(tmp_path), **SETTINGS)
    told = "2 Callbacks in one Trainer would overwrite each other's state. Pass one"
    if not late:
        with pytest.raises(ValueError, match=told):
            Ordered(Own().net, args, train_dataset=loader().dataset, callbacks=both)
        return
    run = Ordered(Own().net, args, train_dataset=loader().dataset, callbacks=both[:1])
    run.add_callback(both[1])
    with pytest.raises(ValueError, match=told):
        run.train()


def test_an_optimizer_that_exists_follows_events_at_the_start(tmp_path):
    model, args = Own().net, TrainingArguments(str(tmp_path), **SETTINGS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    run = Ordered(
        model,
        args,
        train_dataset=loader().dataset,
        optimizers=(optimizer, schedule),
        callbacks=[Callbacks([bh.KVHeadConversion(2, at="start", method="mean")])],
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run.train()
    assert model.config.num_key_value_heads == 2
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "max_steps": 4},
        {"max_grad_norm": 0.5},
        {"bf16": True},
        {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "lr_scheduler_type": "linear"},
        {RECOMPUTES: True},
    ],
    ids=["accumulated", "clipped", "bfloat16", "adam", "recomputed"],
)
@pytest.mark.daily("wanda-*", "structure-accumulated", "svd-adam")
@pytest.mark.parametrize("event", ["wanda", "structure", "svd"])
def test_settings_of_the_trainer(tmp_path, event, settings):
    callback = EVENTS[event](1)
    model, run = train(tmp_path, [callback], validation=loader(4, 4), num_train_epochs=9, **settings)
    assert figures(model) == END[event]
    assert callback.events[0]["step"] == 1
    assert run.state.global_step == 4
    held = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_report_and_export_at_the_end(tmp_path, capsys):
    callbacks = [
        bh.StructuredPruning(bh.Amount(channels=0.5), at=2, calibration=4),
        bh.Export(str(tmp_path / "out")),
        bh.Report(str(tmp_path / "plot.png")),
    ]
    model, run = train(tmp_path, callbacks, validation=loader(4, 4), eval_strategy="steps", eval_steps=1)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(saved.state_dict(), model.state_dict())
    told = capsys.readouterr().out
    assert "dense" in told
    assert "end of training" in told
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert any("params" in line for line in run.state.log_history)
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert record["training"]["seed"] == 42
    assert record["events"][0]["step"] == 2


@pytest.mark.parametrize("how", ["eval_on_start", "validation", "neither"])
def test_the_report_has_the_dense_perplexity_or_says_how_to_get_it(tmp_path, capsys, how):
    model = Own().net
    expected = float(model(**next(iter(DataLoader(loader().dataset, batch_size=len(loader().dataset))))).loss.detach().exp())
    callbacks = [bh.StructuredPruning(bh.Amount(channels=0.5), at=2, calibration=4), bh.Report(str(tmp_path / "plot.png"))]
    options = {"eval_on_start": True} if how == "eval_on_start" else {"validation": loader(4, 4)} if how == "validation" else {}
    train(tmp_path, callbacks, model, eval_strategy="steps", eval_steps=1, **options)
    said = capsys.readouterr().out
    (row,) = re.findall(r"\ndense +0 +(\S+) ", said)
    note = "not validated. Pass eval_on_start=True to the Trainer, or validation= to Callbacks."
    assert (note in said) == (how == "neither")
    if how == "neither":
        assert row == "-"
    elif how == "eval_on_start":
        assert float(row.replace(",", "")) == pytest.approx(expected, rel=1e-3)


def test_events_and_the_table_count_no_adapters(tmp_path, capsys):
    model = get_peft_model(Own().net, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    pruning = bh.StructuredPruning(bh.Amount(channels=0.5), at=2, calibration=4)
    with pytest.warns(UserWarning, match="changed the base model of the adapters"):
        train(tmp_path, [pruning, bh.Report(str(tmp_path / "plot.png"))], model, validation=loader(4, 4))
    (event,) = pruning.events
    before, after = f"{event['before']['params']:,}", f"{event['after']['params']:,}"
    assert event["what"].startswith(f"{before} -> {after} parameters (")
    assert f" {before} " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:(Degradation, step|Export failed)")
def test_a_broken_limit_ends_training(tmp_path):
    stops = bh.Degradation(bh.Calibration(tokens=48, length=12), examples=3, stop=bh.Limits(max_ratio=1 + 1e-6))
    callbacks, model = [EVENTS["mean"](2), stops, bh.Export(str(tmp_path / "out"))], Own().net
    told = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            told.append(state.global_step)

    with (
        pytest.warns(UserWarning, match="max_ratio=1: generated.*Training ends"),
        pytest.raises(ValueError, match="Export: the model breaks a limit of Degradation"),
    ):
        train(tmp_path, callbacks, model, others=[Counts()], max_steps=9)
    assert told == [1, 2, 3]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="Degradation, step 0, after 4 -> 2 KV heads .*: the model breaks a limit"):
        train(tmp_path, [EVENTS["mean"]("start"), stops])


def test_monitors(tmp_path):
    """A round that the metric forbids is undone."""
    stop = bh.StopWhenWorse("val_loss", keep=1.0)
    callback = bh.HeadPruning(0.5, at=1, stop=stop, calibration=4)
    train(tmp_path, [callback], validation=loader(4, 4))
    assert len(callback.events) == 1
    with pytest.raises(ValueError, match="monitor='val_loss' is not logged in validation"):
        train(tmp_path, [bh.HeadPruning(0.5, at=1, stop=stop, calibration=4)])


REFUSED = {
    "lightning's": (lambda: [pl.callbacks.ModelCheckpoint()], {}, "ModelCheckpoint is not one of billhook's callbacks"),
    "fsdp": (lambda: [EVENTS["mean"](2)], {"fsdp": "full_shard"}, "at step 2, which is not possible with FSDP"),
    "masks in fsdp": (lambda: [EVENTS["wanda"](2)], {"fsdp": "full_shard"}, "WeightPruning does not support FSDP"),
    "compiled": (lambda: [EVENTS["mean"](2)], {"torch_compile": True}, "at step 2, which is not possible with torch_compile"),
    "vllm": (lambda: [EVENTS["mean"](2)], {"use_vllm": True}, "at step 2, which is not possible with colocated vLLM, whose copy"),
    "best": (lambda: [EVENTS["mean"](2)], {"load_best_model_at_end": True}, "load_best_model_at_end=True may load weights from"),
    "best masks": (lambda: [EVENTS["wanda"](2)], {"load_best_model_at_end": True}, "load_best_model_at_end=True may load"),
    "no step": (lambda: [EVENTS["mean"](2)], {"max_steps": -1, "num_train_epochs": 0}, "takes no training step"),
    "restored": (
        lambda: [EVENTS["mean"](2)],
        {"restore_callback_states_from_checkpoint": True},
        "restore_callback_states_from_checkpoint=True replaces Callbacks",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_training(tmp_path, name, monkeypatch):
    callbacks, settings, told = REFUSED[name]
    if "fsdp" in settings:  # no process group here
        monkeypatch.setattr(TransformersFit, "sharding", "FSDP")
        settings = {}
    if "use_vllm" in settings:  # of TRL's arguments
        monkeypatch.setattr(TrainingArguments, "use_vllm", True, raising=False)
        settings = {}
    if "load_best_model_at_end" in settings:
        settings = settings | {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    model = Own().net
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=told):
        train(tmp_path, callbacks(), model, **settings)
    assert same(model.state_dict(), before)


def test_a_callback_that_comes_late(tmp_path):
    args = TrainingArguments(str(tmp_path), **SETTINGS)
    run = Ordered(Own().net, args, train_dataset=loader().dataset)
    run.add_callback(Callbacks([EVENTS["mean"]("start")]))
    with pytest.raises(
        ValueError, match=r"KVHeadConversion has an event at the start, so Callbacks must be in Trainer\(callbacks"
    ):
        run.train()
    run = Ordered(Own().net, args, train_dataset=loader().dataset)
    run.add_callback(Callbacks([EVENTS["mean"](2)]))
    run.train()
    assert figures(run.model) == END["mean"]


def test_the_wrong_trainer(tmp_path):
    with pytest.raises(ValueError, match="Callbacks is for transformers' Trainer. Pass its callbacks to Lightning's Trainer"):
        trainer(tmp_path, [Callbacks([EVENTS["mean"](2)])]).fit(Own(), loader(), loader())
    with pytest.raises(ValueError, match=r"KVHeadConversion is for Lightning's Trainer. .* callbacks=\[Callbacks\(\[KVHead"):
        Trainer(Own().net, TrainingArguments("out", **SETTINGS), callbacks=[EVENTS["mean"](2)])


@pytest.mark.slow
def test_two_processes_do_as_one(tmp_path):
    script = Path(trainer_ddp.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, timeout=300)
    found = torch.load(tmp_path / "result.pt", weights_only=False)
    callbacks = trainer_ddp.callbacks()
    model, _ = train(tmp_path / "one", callbacks, validation=loader(4, 4))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found["weights"][name], value, atol=1e-5, rtol=1e-4, msg=name)
    events = [event for callback in callbacks for event in callback.events]
    assert [event["what"] for event in found["events"]] == [event["what"] for event in events]
    for own, others in zip(found["events"], events, strict=True):
        assert own["after"].get("val_loss", 0) == pytest.approx(others["after"].get("val_loss", 0), rel=1e-4)
    assert "KVHeadConversion changes shapes at step 2, which is not possible with DDP" in found["later"]


def classifier():
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 64, (10,)), "labels": torch.tensor(row % 2)} for row in range(8)]
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=2)), rows


def seq2seq():
    torch.manual_seed(0)
    return t5(), [{"input_ids": torch.randint(3, 60, (10,)), "labels": torch.randint(3, 60, (6,))} for _ in range(8)]


def images():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_labels=2)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(row % 2)} for row in range(8)]
    return transformers.ViTForImageClassification(config), rows


@pytest.mark.parametrize(
    ("make", "kind", "settings"),
    [
        (classifier, Trainer, TrainingArguments),
        (seq2seq, transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments),
        (images, Trainer, TrainingArguments),
    ],
    ids=["classifier", "seq2seq", "images"],
)
def test_other_tasks(tmp_path, make, kind, settings):
    """What the Trainer trains, callbacks change: masks and shapes, measured on labels, saved, and loaded."""
    model, rows = make()
    before = sum(parameter.numel() for parameter in model.parameters())
    structure = bh.StructuredPruning(bh.Amount(channels=0.5), at=1, calibration=8)
    zeros = prunes.WeightPruning(sparsity=0.5, at=3, calibration=8)
    unseen = [{name: value[None] for name, value in row.items()} for row in rows[:4]]
    callbacks = Callbacks([structure, zeros, bh.Export(str(tmp_path / "out"))], validation=unseen)
    run = kind(model, settings(str(tmp_path / "hf"), **SETTINGS), train_dataset=rows, callbacks=[callbacks])
    run.train()
    saved = bh.load(tmp_path / "out", dtype="float32")
    assert same(saved.state_dict(), model.state_dict())
    assert sum(parameter.numel() for parameter in saved.parameters()) < before
    assert all(event["after"]["val_loss"] > 0 for event in (*structure.events, *zeros.events))
    sparse = [linear for name, linear in prunable(saved).items() if "classifier" not in name]
    assert all(0.4 < float((linear.weight == 0).float().mean()) < 0.6 for linear in sparse)
