"""docs/migrate.md: the old lines and the new ones do the same work on the same data."""

import json
import re
import shlex

import datasets
import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import billhook as bh
from billhook.cli.main import main
from kit.cli import pytestmark as quiet
from kit.fits import trainer
from kit.pages import ROOT, blocks_in

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:::lightning.*")]
BLOCKS = blocks_in(ROOT / "docs" / "migrate.md")


def code(words):
    """The block of the page that contains these words."""
    (block,) = [block.code for block in BLOCKS if words in block.code]
    return block


def run(words, **names):
    """Executes a block of the page, and returns the names that it made."""
    names |= {"bh": bh, "torch": torch}
    exec(code(words), names)
    return names


def tiny():
    return bh.load("tiny", dtype="float32")


def layers(model):
    return {name: module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}


def magnitudes(model):
    """All magnitudes in order: of weights with the same magnitude it does not matter which one is kept."""
    return torch.cat([module.weight.detach().flatten() for module in layers(model).values()]).abs().sort().values


class HeadMask:
    """What `head_mask` of transformers v4 was: a factor of each head's output, `[layers, heads]`."""

    def __init__(self, model, mask):
        self.mask, self.handles = mask, []
        for layer, block in enumerate(model.model.layers):
            projection = block.self_attn.o_proj
            self.handles.append(
                projection.register_forward_pre_hook(lambda _, given, layer=layer: (self.scaled(given[0], layer),))
            )

    def scaled(self, states, layer):
        return (states.unflatten(-1, (self.mask.shape[1], -1)) * self.mask[layer, :, None].to(states.dtype)).flatten(-2)

    def remove(self):
        for handle in self.handles:
            handle.remove()


def with_head_mask(model, inputs, mask):
    hooks = HeadMask(model, mask)
    try:
        return model(**inputs)
    finally:
        hooks.remove()


def head_mask(model, heads):
    mask = torch.ones(model.config.num_hidden_layers, model.config.num_attention_heads)
    for layer, some in heads.items():
        mask[layer, some] = 0
    return mask


@torch.no_grad()
def test_prune_heads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    expected = with_head_mask(model, model.dummy_inputs, head_mask(model, {0: [1, 2], 3: [0]})).logits
    run("bh.pruning.prune_units(model, {0: [1, 2], 3: [0]})", model=model)
    torch.testing.assert_close(model(**model.dummy_inputs).logits, expected)


@torch.no_grad()
def test_masked_heads():
    made = run("with bh.mask(model, {0: [1, 2]})")
    expected = with_head_mask(made["model"], made["inputs"], head_mask(made["model"], {0: [1, 2]}))
    torch.testing.assert_close(made["outputs"].logits, expected.logits)


@pytest.mark.nightly
def test_the_importance_of_heads():
    model, text = tiny(), bh.Calibration("tiny", tokens=2 * 16, length=16)
    inputs = model.dummy_inputs
    made = run("importance = {layer: gate.grad.abs()", model=model, inputs=inputs, text=text)
    mask = torch.ones(4, 8, requires_grad=True)
    with_head_mask(model, inputs | {"labels": inputs["input_ids"]}, mask).loss.backward()
    torch.testing.assert_close(torch.stack(list(made["importance"].values())), mask.grad.abs())


class Idle(pl.LightningModule):
    """Training that changes nothing, so that a callback alone does."""

    def __init__(self, model):
        super().__init__()
        self.net = model

    def train_dataloader(self):
        ids = torch.arange(3, 19).repeat(4, 1)
        return DataLoader([{"input_ids": row, "labels": row} for row in ids], 2)

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_model_pruning_of_lightning(tmp_path):
    found = []
    for words in (
        "from lightning.pytorch.callbacks import ModelPruning",
        'WeightPruning(bh.Magnitude(compares="global"), sparsity=0.5)',
    ):
        model = tiny()
        callbacks = run(words, model=model)["callbacks"]
        trainer(tmp_path, callbacks, max_steps=-1, max_epochs=1).fit(Idle(model))
        found.append(magnitudes(model))
    assert torch.equal(*found)
    assert float((found[0] == 0).float().mean()) == pytest.approx(0.5, abs=1e-6)


def test_torchs_prune():
    made = run("prune.global_unstructured(linears")
    run('bh.prune(new, bh.Magnitude(compares="global"), sparsity=0.5)', **{name: made[name] for name in ("old", "new")})
    assert torch.equal(magnitudes(made["old"]), magnitudes(made["new"]))


@pytest.mark.filterwarnings("ignore:::torch_pruning.*")
def test_torch_pruning():
    pytest.importorskip("torch_pruning")
    model, new = tiny(), run("amount=bh.Amount(kv_heads=0.25, channels=0.25, residual=0.25)")["model"]
    model.config.use_cache = False  # as torch-pruning follows tensors alone
    names = {"model": model, "inputs": model.dummy_inputs["input_ids"], "torch": torch}
    exec(code("import torch_pruning as tp"), names)
    assert model.config.hidden_size == new.config.hidden_size
    for layer, other in zip(layers(model).values(), layers(new).values(), strict=True):
        assert layer.weight.shape == other.weight.shape


@pytest.mark.nightly
@pytest.mark.slow
def test_llm_pruner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Count to {n}.", "input": "" if n % 2 else "Slowly.", "output": "one two three"} for n in range(32)]
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
        run("rows.map(lambda row")
    written = [json.loads(line) for line in (tmp_path / "alpaca.jsonl").read_text().splitlines()]
    assert written[0]["prompt"].endswith("Count to 0.\n\n### Input:\nSlowly.\n\n### Response:\n")
    assert written[0]["response"] == "one two three"
    (tmp_path / "bookcorpus.txt").write_text("the heads of a hydra were pruned with a billhook and none grew back again " * 90)
    prune, fit = re.sub(r"\\\n\s*", " ", code("billhook prune-structure meta-llama")).splitlines()
    smaller = {
        "meta-llama/Llama-2-7b-hf": "tiny",
        "--first 4 --last 2": "--first 1 --last 1",
        "accumulate_grad_batches 16": "accumulate_grad_batches 2",
    }
    for old, new in smaller.items():
        assert old in prune + fit
        prune, fit = prune.replace(old, new), fit.replace(old, new)
    main(shlex.split(prune)[1:])
    main(
        [*shlex.split(fit)[1:], "--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=1"]
    )
    model = bh.load("outputs/model")
    heads = [block.self_attn.q_proj.out_features // 32 for block in model.model.layers]
    assert heads == [8, 6, 6, 8]
