"""LoRA on pruned weights: zeros stay through a merge, and masked adapters merge without error."""

import copy

import peft
import pytest
import torch
import transformers
from families import llama

import billhook as bh
from billhook.sparsity.adapters import mask_adapters, merge, unmask_adapters
from billhook.sparsity.linears import prunable

IDS = torch.arange(3, 35).view(2, 16)


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def pruned(build, **options):
    """A half-empty model with LoRA that does something."""
    torch.manual_seed(0)
    model = (llama if build == "llama" else gpt2)()
    model.eval()
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=build == "gpt2", **options)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return wrapped.eval(), masks


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_zeros_stay_and_the_rest_is_merged(build):
    model, masks = pruned(build)
    plain = copy.deepcopy(model).merge_and_unload()
    result = merge(model)
    assert not any("lora" in name for name, _ in result.model.named_parameters())
    expected = prunable(plain)
    for name, one in prunable(result.model).items():
        torch.testing.assert_close(one.weight, expected[name].weight * masks[name])
        assert (one.weight == 0).sum() == (~masks[name]).sum()
    assert all(0.5 < share < 0.9 for share in result.error.values())  # about sqrt(1/2): half of the entries
    assert "zeros kept" in str(result)


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_masked_adapters_merge_without_error(build):
    model, masks = pruned(build)
    before = logits(model)
    mask_adapters(model)
    masked = logits(model)
    assert (masked - before).abs().max() > 1e-3
    result = merge(model)
    torch.testing.assert_close(logits(result.model), masked, atol=1e-5, rtol=1e-4)
    assert set(result.error.values()) == {0.0}
    assert all((one.weight == 0).sum() == (~masks[name]).sum() for name, one in prunable(result.model).items())


def test_masked_adapters_are_trained_through_the_mask():
    model, masks = pruned("llama", lora_dropout=0.1)
    mask_adapters(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, layer.in_features)
    out = layer(x)
    out.square().sum().backward()
    a, b = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    mask = masks["model.layers.0.self_attn.q_proj"]
    scale = layer.scaling["default"]
    own_a, own_b = (t.detach().clone().requires_grad_() for t in (a, b))
    weight = layer.base_layer.weight.detach() + scale * (own_b @ own_a) * mask
    expected = x @ weight.t()
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(a.grad, own_a.grad)
    torch.testing.assert_close(b.grad, own_b.grad)
    assert layer.base_layer.weight.grad is None


def test_masks_leave_no_trace():
    model, _ = pruned("llama")
    before, keys = logits(model), list(model.state_dict())
    mask_adapters(model)
    assert list(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), logits(model))
    unmask_adapters(model)
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        off = logits(model)
        mask_adapters(model)
        assert torch.equal(logits(model), off)


def test_adapters_without_a_wrapper_of_peft():
    model, masks = pruned("llama")
    merged = merge(model.get_base_model())
    assert merged.model is model.get_base_model()
    assert all((one.weight == 0).sum() == (~masks[name]).sum() for name, one in prunable(merged.model).items())
    assert type(merged.model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_masks_of_ones_own():
    model, masks = pruned("llama")
    name, other = list(masks)[:2]
    result = merge(model, {name: torch.ones_like(masks[name]), "base_model.model." + other: masks[other]})
    weights = prunable(result.model)
    assert (weights[name].weight != 0).all()
    assert (weights[other].weight == 0).sum() == (~masks[other]).sum()


def test_refusals():
    model, masks = pruned("llama")
    with pytest.raises(ValueError, match="no adapters are attached"):
        merge(llama())
    name = "base_model.model." + next(iter(masks))
    with pytest.raises(ValueError, match=f"masks: that of {name} must be bool"):
        merge(model, {name: torch.ones(3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="masks: none is of a linear with adapters"):
        merge(model, {"elsewhere": masks[next(iter(masks))]})
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged already"):
        merge(model)
    dora, _ = pruned("llama", use_dora=True)
    with pytest.raises(ValueError, match="not plain LoRA"):
        mask_adapters(dora)
