"""What `Export` saves under FSDP2."""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

import billhook as bh
from billhook.adapters.merge import has_adapters
from billhook.engine.sharding import full_tensor
from kit.families import llama
from kit.fits import trainer
from kit.sharding import Own, sharding


def experts():
    """They are one tensor, and several in files."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **small))


def adapted(**options):
    from peft import LoraConfig, inject_adapter_in_model

    made = llama()
    bh.prune(made, bh.Magnitude(), sparsity=0.5)
    torch.manual_seed(1)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "up_proj", "lm_head"], **options)
    inject_adapter_in_model(config, made)
    return made


def masked():
    made = adapted()
    bh.training.mask_adapters(made)
    return made


MODELS = {
    "tied": lambda: llama(tie_word_embeddings=True),
    "experts": experts,
    "adapted": adapted,
    "masked adapters": masked,
    "trained copies": partial(adapted, modules_to_save=["norm"]),
}


class Noted(bh.Export):
    """Notes the weights that it begins with."""

    def on_train_end(self, run, module):
        self.state = {name: full_tensor(value).clone() for name, value in module.net.state_dict().items()}
        self.parts = [name for name, _ in module.net.named_modules()]
        super().on_train_end(run, module)


@dataclass(frozen=True)
class Exported:
    """How a model was saved, and what it held then."""

    saved: Any
    state: dict[str, torch.Tensor]
    unchanged: bool  # the module, in its parts and values


def exported(folder, name, ranks=1):
    """Fits for a step."""
    lit, callback = Own(MODELS[name]), Noted(str(folder / name))
    several = {"devices": ranks, "use_distributed_sampler": False} if ranks > 1 else {}
    trainer(folder, [callback], max_steps=1, strategy=sharding(ranks), limit_val_batches=0, **several).fit(lit)
    now = {name: full_tensor(value) for name, value in lit.net.state_dict().items()}
    unchanged = [name for name, _ in lit.net.named_modules()] == callback.parts
    unchanged &= all(torch.equal(now[name], value) for name, value in callback.state.items())
    return Exported(callback.saved, callback.state, unchanged)


def merged(name, state):
    """The model as it was exported, in memory, without adapters."""
    made = MODELS[name]().eval()
    made.load_state_dict(state)
    return bh.training.merge(made).model if has_adapters(made) else made


def export_all():
    """What each of two processes runs."""
    (out,) = map(Path, json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    for name in MODELS:
        own, gathered = exported(out, name, 2), [None, None]
        torch.distributed.all_gather_object(gathered, own)
        torch.save(gathered, out / f"{name}.pt")
    failing(out)


def failing(out):
    """The first rank cannot save; all keep their shards."""
    callback, lit = bh.Export(str(out / "failing"), rehearse=False), Own()

    try:
        with mock.patch("billhook.callbacks.export.save", side_effect=RuntimeError("other logits")):
            trainer(out, [callback], max_steps=1, strategy=sharding(2), devices=2, use_distributed_sampler=False).fit(lit)
    except RuntimeError as error:
        state = {name: full_tensor(value) for name, value in lit.net.state_dict().items()}
        gathered = [None, None]
        torch.distributed.all_gather_object(gathered, str(error))
        torch.save([gathered, state], out / "failing.pt")
