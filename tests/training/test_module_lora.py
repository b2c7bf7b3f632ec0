"""LoRA in the LightningModule: what trains, what is saved, and pruning before and after it is put on."""

import copy
import json
import re
import shlex
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from billhook.adapters.checkpoint import ADAPTERS, base_checkpoint, restore_adapters
from billhook.checkpoints.export import build_model, read_checkpoint
from billhook.cli.main import main
from billhook.model.layers import prunable
from kit.adapters import gpt2
from kit.cli import QUICK, ROOT, callbacks_in
from kit.cli import pytestmark as quiet
from kit.families import BERT, T5, VIT, llama, tokens
from kit.fits import data, same, trainer, weights, write_text

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")]
CLASSES = {"num_labels": 3}
# what trains beside adapters
HEAD = {
    "sequence-classification": {"classifier.weight", "classifier.bias"},
    "image-classification": {"classifier.weight", "classifier.bias"},
}
BUILD = {
    "causal-lm": lambda: llama(),
    "masked-lm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "seq2seq-lm": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "sequence-classification": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, **CLASSES)),
    "image-classification": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, **CLASSES)),
}
IDS = torch.arange(3, 35).view(2, 16)


def module(seed=0, model=None, **options):
    torch.manual_seed(0)
    model = model or llama(vocab_size=2048, num_key_value_heads=8)
    torch.manual_seed(seed)
    return bh.TransformerModule(model, lr=1e-2, warmup=2, **{"lora": bh.training.LoRA(r=2)} | options)


def logits(model, ids=IDS):
    evaluated = copy.deepcopy(model).eval()
    with torch.no_grad():
        return evaluated(input_ids=ids).logits


def stirred(lit):
    """With adapters that add something."""
    with torch.no_grad():
        for name, parameter in lit.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return lit


def every_step(folder):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def exported(path):
    """What `billhook export` is to make of a checkpoint with adapters, before it is saved."""
    checkpoint = read_checkpoint(path)
    model = build_model(base_checkpoint(checkpoint, str(path)), str(path))
    restore_adapters(model, checkpoint, str(path))
    return model


@pytest.mark.parametrize("task", BUILD)
def test_adapters_train_on_every_linear_and_nothing_else_does_but_the_head_of_a_classifier(task):
    model = BUILD[task]()
    linears, before = set(prunable(model)), copy.deepcopy(model.state_dict())
    heads = HEAD.get(task, set())
    lit = bh.TransformerModule(model, task, lora=bh.training.LoRA())
    adapted = {name for name, part in lit.model.named_modules() if isinstance(part, peft.tuners.lora.Linear)}
    assert adapted == linears - {name.rpartition(".")[0] for name in heads}
    trained = {name for name, parameter in lit.model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{one}.default.weight" for name in adapted for one in "AB"} | heads
    assert len(adapted) > 3
    layer = lit.model.get_submodule(min(adapted))
    assert (layer.scaling["default"], layer.lora_dropout["default"].p, layer.r["default"]) == (2.0, 0.05, 8)
    now = {name.replace(".base_layer.", "."): value for name, value in lit.model.state_dict().items() if ".lora_" not in name}
    assert same(now, before)


def test_gpt2_lies_the_other_way_round():
    model = gpt2().eval()
    expected = logits(model)
    lit = stirred(bh.TransformerModule(model, lora=bh.training.LoRA(r=2)))
    assert {part.fan_in_fan_out for part in lit.model.modules() if isinstance(part, peft.tuners.lora.Linear)} == {True}
    assert not torch.equal(logits(lit.model), expected)


def test_only_some_linears():
    lit = module(lora=bh.training.LoRA(r=4, alpha=2, dropout=0.0, target=["q_proj", "v_proj"]))
    adapted = {name.rpartition(".")[2] for name, part in lit.model.named_modules() if isinstance(part, peft.tuners.lora.Linear)}
    assert adapted == {"q_proj", "v_proj"}


def test_pefts_own_config_is_taken_as_it_stands():
    lit = module(lora=peft.LoraConfig(r=3, target_modules=["down_proj"], use_rslora=True))
    layer = lit.model.model.layers[0].mlp.down_proj
    assert layer.scaling["default"] == pytest.approx(8 / 3**0.5)


def test_half_weights_have_adapters_in_float32():
    lit = module(model=llama().bfloat16())
    assert {p.dtype for p in lit.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lit.parameters() if not p.requires_grad} == {torch.bfloat16}
    lit.model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.isfinite().all() for p in lit.parameters() if p.requires_grad)


class TestAFit:
    def test_the_optimizer_has_the_adapters_alone_and_decays_them(self, files, tmp_path):
        lit = module(weight_decay=0.1)
        before = weights(lit)
        run = trainer(tmp_path, [])
        run.fit(lit, data(files))
        (group,) = run.optimizers[0].param_groups
        assert group["weight_decay"] == 0.1
        assert {id(p) for p in group["params"]} == {id(p) for name, p in lit.named_parameters() if ".lora_" in name}
        moved = {name for name, value in weights(lit).items() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if ".lora_" in name}

    def test_resumed_equals_straight_through_with_dropout(self, files, tmp_path):
        """At the end of an epoch (12 steps), too."""
        straight = module(lora=bh.training.LoRA(r=2, dropout=0.3))
        trainer(tmp_path, [every_step(tmp_path)], max_steps=15).fit(straight, data(files))
        for stop in (5, 12, 13):
            resumed = module(seed=stop, lora=bh.training.LoRA(r=2, dropout=0.3))
            trainer(tmp_path, [], max_steps=15).fit(resumed, data(files), ckpt_path=tmp_path / f"step={stop}.ckpt")
            assert same(weights(resumed), weights(straight)), stop

    @pytest.mark.parametrize(
        "lora", [bh.training.LoRA(r=2), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])], ids=["ours", "peft"]
    )
    def test_load_from_checkpoint(self, lora, files, tmp_path):
        lit = module(lora=lora)
        run = trainer(tmp_path, [], max_steps=2)
        run.fit(lit, data(files))
        run.save_checkpoint(tmp_path / "a.ckpt")
        loaded = bh.TransformerModule.load_from_checkpoint(
            tmp_path / "a.ckpt", model=llama(vocab_size=2048, num_key_value_heads=8), weights_only=True
        )
        assert same(weights(loaded), weights(lit))
        assert torch.equal(logits(loaded.model), logits(lit.model))


class TestSaved:
    def checked(self, lit, folder):
        """Plain transformers computes what the model in training does."""
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert not any("lora" in name for name in loaded.state_dict())
        expected = logits(lit.model)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)
        base = copy.deepcopy(lit.model)
        for part in base.modules():
            if isinstance(part, peft.tuners.lora.Linear):
                part.enable_adapters(False)
        assert (logits(base) - expected).abs().max() > 1e-2

    def test_by_the_callback_and_from_the_checkpoint(self, files, tmp_path):
        lit = module()
        trainer(tmp_path, [bh.Export(str(tmp_path / "out")), every_step(tmp_path)]).fit(lit, data(files))
        self.checked(lit, tmp_path / "out")
        model = exported(tmp_path / "step=8.ckpt")
        assert torch.equal(logits(model), logits(lit.model))
        bh.save(model, tmp_path / "again")
        self.checked(lit, tmp_path / "again")

    @pytest.mark.daily("rounds")
    @pytest.mark.parametrize("remove", ["rounds", "end"])
    def test_heads_that_are_removed_while_it_is_on(self, remove, files, tmp_path):
        lit, out = module(), tmp_path / "out"
        pruning = bh.HeadPruning(
            bh.schedules.MultiStep([0.25, 0.5], [2, 4]), remove=remove, importance=bh.Taylor(), calibration=4
        )
        trainer(tmp_path, [pruning, bh.Export(str(out)), every_step(tmp_path)]).fit(lit, data(files))
        layer = lit.model.model.layers[0].self_attn
        assert [tuple(layer.q_proj.lora_B["default"].weight.shape), tuple(layer.o_proj.lora_A["default"].weight.shape)] == [
            (16, 2), (2, 16)
        ]  # fmt: skip
        assert not any(parameter.requires_grad for name, parameter in lit.named_parameters() if ".lora_" not in name)
        self.checked(lit, out)
        if remove == "rounds":
            bh.save(exported(tmp_path / "step=8.ckpt"), tmp_path / "again")
            self.checked(lit, tmp_path / "again")

    def test_a_folder_that_was_cut_before(self, files, tmp_path):
        dense = llama(vocab_size=2048, num_key_value_heads=8)
        bh.pruning.prune_units(dense, {name: [1, 5] for name in ("model.layers.0.self_attn", "model.layers.1.self_attn")})
        bh.save(dense, tmp_path / "cut")
        lit = module(model=str(tmp_path / "cut"))
        trainer(tmp_path, [bh.Export(str(tmp_path / "out"))]).fit(lit, data(files))
        assert lit.model.model.layers[1].self_attn.v_proj.weight.shape == (24, 32)
        self.checked(lit, tmp_path / "out")

    def test_masked_adapters_on_pruned_weights(self, files, tmp_path):
        lit = module()
        pruning = bh.WeightPruning(bh.Magnitude(), 0.5, at=2, measure_batches=0, mask_adapters=True)
        trainer(tmp_path, [pruning, every_step(tmp_path)]).fit(lit, data(files))
        model = exported(tmp_path / "step=8.ckpt")
        assert torch.equal(logits(model), logits(lit.model))
        assert {entry["masked"] for entry in read_checkpoint(tmp_path / "step=8.ckpt")[ADAPTERS].values()} == {True}
        assert not any(bh.training.merge(model).error.values())

    def test_other_adapters_are_not_told(self, files, tmp_path):
        for lora in (peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), None):
            run = trainer(tmp_path, [], max_steps=1)
            run.fit(module(lora=lora), data(files))
            run.save_checkpoint(tmp_path / "a.ckpt")
            checkpoint = read_checkpoint(tmp_path / "a.ckpt")
            assert ADAPTERS not in checkpoint
            assert base_checkpoint(checkpoint, "a.ckpt") is checkpoint

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"rank": "2"}, "has a malformed entry .billhook_adapters. for its adapters"),
            ({"scaling": None}, "has a malformed entry .billhook_adapters. for its adapters"),
            ({"rank": 10**9}, r"has adapters on .*q_proj that do not fit its LlamaForCausalLM"),
        ],
    )
    def test_a_checkpoint_that_says_something_else(self, change, match, files, tmp_path):
        run = trainer(tmp_path, [], max_steps=1)
        run.fit(module(lora=bh.training.LoRA(target=["q_proj"])), data(files))
        run.save_checkpoint(tmp_path / "a.ckpt")
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        name = next(iter(checkpoint[ADAPTERS]))
        checkpoint[ADAPTERS][name] |= change
        torch.save(checkpoint, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=match):
            exported(tmp_path / "b.ckpt")


class TestYaml:
    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @pytest.fixture
    def quick(self, tmp_path):
        files = ", ".join(f"{split}: {path}" for split, path in write_text(tmp_path).items())
        return f"{QUICK} --data.data '{{{files}}}' --trainer.logger false"

    def fit(self, line):
        short = "--trainer.max_steps 2 --trainer.val_check_interval 1"
        main(shlex.split(f"fit --config {ROOT}/examples/base.yaml {line} {short}"))

    def test_the_fragment_composes_with_others_and_a_teacher(self, quick):
        fragments = " ".join(f"--config {ROOT}/callbacks/{name}.yaml" for name in ("export", "lora"))
        self.fit(f"{fragments} --model.distillation '{{weight: 0.8}}' {quick}")
        assert callbacks_in("config.yaml") == ["Export", "Report"]
        held = yaml.safe_load(Path("config.yaml").read_text())["model"]["init_args"]
        assert held["lora"] == {"r": 8, "alpha": 16.0, "dropout": 0.05, "target": "all-linear"}
        assert held["distillation"] == {"teacher": None, "temperature": 1.0, "weight": 0.8, "hidden": 0.0}
        assert transformers.AutoModelForCausalLM.from_pretrained("outputs/model")
        saved = json.loads(Path("outputs/model/billhook.json").read_text())["saved"]
        assert saved["adapters"] == "merged adapters of 28 layers in place, all in full, because none is sparse"

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("--model.lora '{rank: 3}'", ["LoRA has no argument 'rank'"]),
            ("--model.lora '{r: 0}'", ["r=0 must be a whole number of at least 1"]),
            ("--model.distillation '{temprature: 3}'", ["has no argument 'temprature'. Did you mean 'temperature'?"]),
            ("--model.distillation '{weight: 3}'", ["weight=3.0 must be in [0, 1]"]),
        ],
    )
    def test_refused(self, line, words, quick, capsys):
        with pytest.raises(SystemExit) as stopped:
            self.fit(f"{line} {quick}")
        told = capsys.readouterr().err + str(stopped.value.code)
        assert [word for word in words if word not in told] == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"alpha": 0}, "alpha=0 must be a number above 0"),
        ({"dropout": 1.0}, re.escape("dropout=1.0 must be in [0, 1)")),
        ({"target": []}, "must be 'all-linear' or name endings of linear layers"),
    ],
)
def test_refused(options, match):
    with pytest.raises(ValueError, match=match):
        bh.training.LoRA(**options)


def test_a_target_that_is_not_there_and_adapters_that_are():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(?s)lora=LoRA.*query.* not found"):
        bh.TransformerModule(model, lora=bh.training.LoRA(target=["query"]))
    assert same(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    bh.TransformerModule(model, lora=bh.training.LoRA())
    with pytest.raises(ValueError, match=r"lora: the model already has adapters. Merge them first"):
        bh.TransformerModule(model, lora=bh.training.LoRA())
