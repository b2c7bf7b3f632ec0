"""What cannot be done with a streamed model is refused before a block of it is read."""

import weakref
from dataclasses import dataclass
from typing import ClassVar

import lightning as L
import peft
import pytest
import torch

import billhook as bh
from billhook.cli.main import main
from billhook.engine.tensors import TensorFiles
from kit import shrinks, stopped


@dataclass(frozen=True)
class Steep(bh.OutputNorm):
    """An importance of a user's own, with gradients."""

    needs_gradients: ClassVar[bool] = True


def scored(kind, importance):
    return lambda model: bh.score(model, bh.find_units(model, kind), importance, stopped.batches())


def planned(importance=None, **amounts):
    return lambda model: bh.plan(model, importance, stopped.batches(), **amounts)


def adapted(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def trained(model, *callbacks):
    trainer = L.Trainer(max_steps=1, callbacks=[*callbacks], logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(bh.TransformerModule(model), [{"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}])


GRADIENTS = r"importance=\w+\(.*\) needs gradients, which a streamed model does not have"
WEIGHTS = r"has no values \(it is on the meta device\). Load all weights first"
TRAINING = "model: training needs all weights in memory, but the model is streamed"
ADDED = r"model: model.layers.0.self_attn.q_proj.lora_A.default was added to a streamed model"
BOTH = (
    "residual is combined with heads or channels, which a streamed model does not support. "
    "Load the model in memory with bh.load, or remove them one after the other"
)
REFUSED = {
    "heads by Taylor": (scored("head", bh.Taylor()), GRADIENTS),
    "channels by GateGradient": (scored("channel", bh.importance.GateGradient()), GRADIENTS),
    "channels by an own importance": (scored("channel", Steep()), GRADIENTS),
    "planned by Taylor": (planned(bh.Taylor(), params=0.8), GRADIENTS),
    "planned by an own importance": (planned(Steep(), kv_heads=0.5), GRADIENTS),
    "blocks by Taylor": (planned(bh.Taylor(), blocks=1), GRADIENTS),
    "residual and channels": (planned(bh.importance.WeightNorm(), residual=0.25, channels=0.25), BOTH),
    "residual and heads": (lambda model: bh.pruning.plan_units(model, {0: [0]}, ["residual", "head"]), BOTH),
    "shrink": (lambda model: shrinks.shrink(model, stopped.batches(), params=0.8), WEIGHTS),
    "ablated heads": (lambda model: bh.importance.ablate_heads(model, stopped.batches()), WEIGHTS),
    "what it writes": (lambda model: bh.prune(model, bh.Wanda(), bh.Calibration(tokens=64, length=16), sparsity=0.5), WEIGHTS),
    "adapters": (lambda model: bh.prune(adapted(model), bh.Wanda(), stopped.batches(), sparsity=0.5), ADDED),
    "scores of adapters": (lambda model: scored("channel", bh.OutputNorm())(adapted(model)), ADDED),
    "training": (trained, TRAINING),
    "weight pruning in training": (lambda model: trained(model, bh.WeightPruning(sparsity=0.5)), TRAINING),
    "LoRA in training": (lambda model: bh.TransformerModule(model, lora=bh.training.LoRA()), TRAINING),
}
SCORED = "needs gradients, which a streamed model does not have"
COMMANDS = {
    "shrink": (
        ["shrink", "--params", "0.8"],
        "stream=True is not supported by this command, which needs gradients or all weights. Remove --stream",
    ),
    "Taylor": (["prune-structure", "--channels", "0.25", "--importance", "Taylor"], SCORED),
    "blocks, and then Taylor": (
        ["prune-structure", "--blocks", "1", "--residual", "0.25", "--importance", "Taylor"],
        SCORED,
    ),
    "both": (
        ["prune-structure", "--residual", "0.25", "--channels", "0.25", "--importance", "WeightNorm"],
        "residual is combined with heads or channels, which a streamed model does not support",
    ),
    "heads by default": (["prune-heads", "--ratio", "0.5"], SCORED),
}


@pytest.fixture
def read(monkeypatch):
    """The names of tensors of blocks that are read, as a whole or in rows."""
    found = []

    def counting(original):
        def counted(self, names, *arguments):
            found.extend(name for name in ([names] if isinstance(names, str) else names) if ".layers." in name)
            return original(self, names, *arguments)

        return counted

    for name in ("slices", "rows"):
        monkeypatch.setattr(TensorFiles, name, counting(getattr(TensorFiles, name)))
    return found


@pytest.mark.parametrize(("call", "refusal"), REFUSED.values(), ids=REFUSED)
def test_refused_before_a_block_is_read(tmp_path, read, call, refusal):
    model = bh.stream("tiny", tmp_path / "out")
    read.clear()
    with pytest.raises(ValueError, match=refusal):
        call(model)
    assert read == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("asked", "refusal"), COMMANDS.values(), ids=COMMANDS)
def test_commands_refuse_before_a_block_is_read(tmp_path, read, asked, refusal):
    with pytest.raises(SystemExit) as refused:
        main([asked[0], "tiny", str(tmp_path / "out"), *asked[1:], "--data", "tiny", "--stream"])
    assert refusal in str(refused.value)
    assert read == []
    assert list(tmp_path.iterdir()) == []


def loss_of(model, **given):
    return model(**given, labels=torch.arange(8)[None]).loss


@pytest.mark.parametrize("embedded", [False, True])
def test_gradients_are_refused(embedded):
    model, ids = bh.stream("tiny"), torch.arange(8)[None]
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    with pytest.raises(ValueError, match="model is streamed one block at a time, but gradients need all weights in memory"):
        loss_of(model, **({"inputs_embeds": inputs} if embedded else {"input_ids": ids})).backward()
    assert inputs.grad is None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bh.load("tiny")(ids).logits)


def test_a_model_that_is_called_with_gradients_keeps_no_block():
    model, were = bh.stream("tiny"), []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda mlp, _: were.append(weakref.ref(mlp.down_proj.weight)))
    loss = loss_of(model, input_ids=torch.arange(8)[None])
    assert loss.requires_grad
    assert len(were) == len(model.model.layers)
    assert sum(one() is not None for one in were) <= 1  # the last, which nothing has followed
