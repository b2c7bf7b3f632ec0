"""What is exported computes what was trained: numbers that no state_dict holds are compared with those of the trained model."""

import os

import lightning.pytorch as pl
import pytest
import torch
import transformers

import billhook as bh
from billhook.adapters.checkpoint import save_adapters
from billhook.checkpoints.export import export
from billhook.model.checkpoint_shape import save_shape
from kit.families import build, recompute, tokens
from kit.fits import data, trainer
from kit.weight_pruning import checkpoints

ATTENTION = "model.layers.1.self_attn"


class Own(pl.LightningModule):
    """A user's own module."""

    def __init__(self, model):
        super().__init__()
        self.net = model


def exported(model, folder):
    module = Own(model)
    checkpoint = {"state_dict": module.state_dict()}
    save_shape(module, checkpoint)
    save_adapters(model, checkpoint)
    torch.save(checkpoint, folder / "a.ckpt")
    return export(folder / "a.ckpt", folder / "out")


def scaled(factor):
    """Gemma's embedding holds its scale twice, as a number and as a buffer that is not saved."""

    def change(model):
        model.model.embed_tokens.scalar_embed_scale *= factor
        model.model.embed_tokens.embed_scale *= factor

    return change


def attribute(name, value):
    owner, _, attr = name.rpartition(".")
    return lambda model: setattr(model.get_submodule(owner), attr, value)


def frequencies(*factors):
    return lambda model: model.model.rotary_emb.inv_freq.mul_(torch.tensor(factors))


OTHERS = {
    "scale of embeddings": ("gemma", scaled(2.0), r"model.embed_tokens.scalar_embed_scale was 11.3.* but is 5.65"),
    "scale of attention": ("llama", attribute(f"{ATTENTION}.scaling", 0.75), f"{ATTENTION}.scaling was 0.75 .* is 0.5 according"),
    "frequencies": ("llama", frequencies(0.5), r"checksum of model.rotary_emb.inv_freq \[2\] was 0.51 .* is 1.02 according"),
    "one of the frequencies": ("llama", frequencies(1.0, 0.5), r"inv_freq \[2\] was 1.01 .* is 1.02 according"),
    "experts of a token": ("mixtral", attribute("model.layers.1.mlp.gate.top_k", 1), "gate.top_k was 1 in .* is 2 according"),
    "a flag": ("mixtral", attribute(f"{ATTENTION}.is_causal", False), f"{ATTENTION}.is_causal was 0 in .* is 1 according"),
    "no cap": ("gemma2", attribute(f"{ATTENTION}.attn_logit_softcapping", None), "softcapping was nan in .* is 50 according"),
    "a constant in a norm": ("llama", attribute("model.norm.variance_epsilon", 0.1), "norm.variance_epsilon was 0.1 in .* 1e-06"),
}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("case", OTHERS)
def test_numbers_that_the_config_does_not_make(case, lora, tmp_path):
    """The weights are those that were trained; what a folder of them would compute is not."""
    family, change, message = OTHERS[case]
    attention = "sdpa" if case == "a flag" else "eager"
    model = build(family, attn_implementation=attention)
    change(model)
    module = bh.TransformerModule(model, lora=bh.training.LoRA(r=2, target=["q_proj", "v_proj"]) if lora else None)
    with pytest.raises(
        ValueError, match=f"'.*a.ckpt': the rebuilt {type(model).__name__} differs from the trained model: .*{message}"
    ):
        exported(module.model, tmp_path)
    assert os.listdir(tmp_path) == ["a.ckpt"]


def after_long_inputs(model):
    with torch.no_grad():
        model(tokens(1, 200))
    assert not torch.equal(model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq)


def resized(model):
    model.resize_token_embeddings(70, mean_resizing=False)
    model.config.pad_token_id = 69


def in_training(model):
    model.train()
    recompute(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3


def unmasked(model):
    model.config.output_router_logits = model.output_router_logits = True
    model.router_aux_loss_coef = 0.5


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]}  # fmt: skip
ALIKE = {
    "dynamic frequencies": ("llama", {"rope_parameters": DYNAMIC}, after_long_inputs),
    "long frequencies": ("llama", {"rope_parameters": LONG}, after_long_inputs),
    "more tokens": ("llama", {}, resized),
    "dropout, and activations computed anew": ("llama", {}, in_training),
    "a loss of its own": ("mixtral", {}, unmasked),
    "bfloat16": ("gemma", {}, lambda model: model.bfloat16()),
    "float16": ("gemma3_text", {}, lambda model: model.half()),
    "a number of the user's own": ("llama", {}, lambda model: setattr(model.model.layers[0], "depth", 3.0)),
    "compiled": ("llama", {}, lambda model: model.compile(backend="eager")),
}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("case", ALIKE)
def test_what_may_differ_in_training(case, lora, tmp_path):
    family, options, change = ALIKE[case]
    module = bh.TransformerModule(
        build(family, **options), lora=bh.training.LoRA(r=2, target=["q_proj", "v_proj"]) if lora else None
    )
    change(module.model)
    assert exported(module.model, tmp_path).way == "plain"


@pytest.mark.daily("32-true")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_residual_channels_of_a_model_that_scales_its_embeddings(precision, files, tmp_path):
    module = bh.TransformerModule(build("gemma", vocab_size=2048), lr=1e-2)
    pruning = bh.StructuredPruning(bh.Amount(residual=0.25), at=1, importance=bh.importance.WeightNorm(), measure_batches=0)
    trainer(tmp_path, [pruning, checkpoints(tmp_path)], max_steps=2, precision=precision).fit(module, data(files))
    path = tmp_path / "step=2.ckpt"
    saved, again, ids = export(path, tmp_path / "out"), bh.load(tmp_path / "out"), tokens()
    assert saved.way == "plain" or precision == "bf16-true"
    with torch.no_grad():
        difference = (again(ids).logits - module.model.eval()(ids).logits).abs().max()
    assert difference <= (0 if precision == "32-true" else 0.02)
    checkpoint = torch.load(path, weights_only=True)
    scaled(1.25)(module.model)
    save_shape(module, checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"embed_scale was .* in training, but is"):
        export(path, tmp_path / "other")


def test_numbers_that_a_forward_derives_from_its_inputs(tmp_path):
    sizes = {"d_model": 32, "d_inner": 48, "n_head": 4, "d_head": 8, "block_sizes": [1, 1], "vocab_size": 64}
    model = transformers.FunnelForMaskedLM(transformers.FunnelConfig(**sizes)).eval()
    model(tokens(1, 7))
    assert exported(model, tmp_path).way == "plain"


def test_a_table_in_bfloat16(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "vocab_size": 64}
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes, bos_token_id=1, eos_token_id=2))
    assert exported(model.bfloat16(), tmp_path).way == "plain"
