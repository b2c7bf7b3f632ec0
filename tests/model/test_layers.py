"""Which linears are found, under which names, and how their weights lie."""

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import billhook as bh
from billhook.model.layers import matrix_of, prunable, to_layout, to_parameters, weight_of
from kit import families

SEVEN = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}


def lora(model, **changes):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def in_llama(prefix="model."):
    return {f"{prefix}layers.{block}.{name}" for block in range(2) for name in SEVEN}


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder(tied):
    model = families.llama(tie_word_embeddings=tied)
    assert set(prunable(model)) == in_llama()
    assert set(prunable(model, output_embeddings=True)) == in_llama() | {"lm_head"}
    assert list(prunable(model.model.layers[0])) == SEVEN
    assert all(model.get_submodule(name) is linear for name, linear in prunable(model).items())


def test_a_model_inside_a_module():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = families.llama()

    assert set(prunable(Holder())) == in_llama("model.model.")


def test_conv1d():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    found = prunable(model)
    assert list(found) == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert weight_of(found["transformer.h.0.mlp.c_fc"]).shape == (64, 16)


def test_encoders():
    masked = prunable(BertForMaskedLM(BertConfig(**BERT)))
    assert "cls.predictions.transform.dense" in masked
    assert "cls.predictions.decoder" not in masked
    assert len(masked) == 7


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"])
def test_heads_of_classifiers_are_asked_for(kind):
    model = getattr(transformers, f"BertFor{kind}")(BertConfig(**BERT))
    body, head = set(prunable(model.base_model)), "qa_outputs" if kind == "QuestionAnswering" else "classifier"
    assert set(prunable(model)) == {f"bert.{name}" for name in body}
    assert set(prunable(model, output_embeddings=True)) == set(prunable(model)) | {head}


def test_heads_of_images_and_heads_of_several_layers():
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT))
    assert not [name for name in prunable(model) if name.startswith("classifier")]
    assert {"classifier.dense", "classifier.out_proj"} < set(prunable(model, output_embeddings=True))
    assert "classifier" not in prunable(transformers.ViTForImageClassification(transformers.ViTConfig(**families.VIT)))


def test_a_pooler_that_is_new_is_asked_for(tmp_path):
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path)
    new = bh.TransformerModule(str(tmp_path), "sequence-classification").model
    assert "bert.pooler.dense" not in prunable(new)
    assert "bert.pooler.dense" in prunable(new, output_embeddings=True)
    new.save_pretrained(tmp_path)
    assert "bert.pooler.dense" in prunable(bh.load(tmp_path))


def test_under_lora_it_is_the_base_layer():
    model = families.llama()
    q_proj = model.model.layers[0].self_attn.q_proj
    adapted = lora(model)
    found = prunable(adapted)
    assert set(found) == in_llama("base_model.model.model.")
    assert found["base_model.model.model.layers.0.self_attn.q_proj"] is q_proj
    assert list(prunable(model.model.layers[0])) == SEVEN


def test_lora_on_the_output_embedding_leaves_it_out():
    adapted = lora(families.llama(tie_word_embeddings=False), target_modules=["lm_head", "embed_tokens"])
    assert set(prunable(adapted)) == in_llama("base_model.model.model.")
    assert "base_model.model.lm_head" in prunable(adapted, output_embeddings=True)


def test_what_peft_trains_as_a_copy_is_left_out():
    adapted = lora(families.llama(), modules_to_save=["down_proj"])
    assert not any("down_proj" in name for name in prunable(adapted))
    assert len(prunable(adapted)) == 12


def test_a_shared_weight_comes_once():
    linear, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.weight = linear.weight
    embedding, output = nn.Embedding(3, 3), nn.Linear(3, 3)
    output.weight = embedding.weight
    assert list(prunable(nn.Sequential(linear, linear, twin, embedding, output))) == ["0"]
    assert prunable(linear) == {"": linear}


@pytest.mark.parametrize("linear", [nn.Linear(5, 3), Conv1D(3, 5)])
def test_the_weight_is_a_view(linear):
    weight = weight_of(linear)
    assert weight.shape == (3, 5)
    assert not weight.requires_grad
    weight[1].zero_()
    inputs = torch.randn(2, 4, 5)
    torch.testing.assert_close(linear(inputs), inputs @ weight.T + linear.bias)
    assert linear(inputs)[..., 1].eq(linear.bias[1]).all()


@pytest.mark.parametrize("linear", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), Conv1D(3, 5)])
def test_matrices_are_laid_as_the_weight_lies(linear):
    weight, bias = matrix_of(linear)
    assert torch.equal(to_layout(linear, weight), linear.weight)
    for name, value in to_parameters(linear.half(), weight, bias).items():
        assert torch.equal(value, linear.get_parameter(name))
        assert value.dtype == torch.half
        assert value.is_contiguous()


def quantised(dtype):
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    return linear


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, dtype=torch.int32))


class Marked(torch.Tensor):
    """As torchao's, a weight that only looks like floating-point numbers."""


def marked():
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Marked))
    return linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantised(torch.int8), r"block\.fc is quantized \(Linear, Tensor of torch.int8\)\. Prune the model before"),
        (lambda: quantised(torch.float8_e4m3fn), r"block\.fc is quantized \(Linear, Tensor of torch.float8_e4m3fn\)"),
        (marked, r"block\.fc is quantized \(Linear, Marked of torch.float32\)"),
        (Packed, r"block\.fc is quantized \(Packed\)\. Prune the model before it is quantized"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "the weight of block.fc is computed"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        prunable(nn.ModuleDict({"block": nn.ModuleDict({"fc": make()})}))
