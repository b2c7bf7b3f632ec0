"""Matrices of stacked experts as linear layers: they compute, route, and leave the model as transformers does."""

import pytest
import torch

import billhook as bh
from billhook.engine.store import store_of
from billhook.model.experts import ExpertLinear, expert_layers
from billhook.model.layers import prunable, size_of, weight_of
from kit.sparsity import batches_of, family

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3", "nemotron_h", "muse_spark_text", "aria_text"]
pytestmark = pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation")


def experts_of(model):
    return {name: layer for name, layer in prunable(model).items() if isinstance(layer, ExpertLinear)}


def state(model):
    """All that the context may not change."""
    implementations = [
        vars(module.config)["_experts_implementation_internal"] for module in model.modules() if hasattr(module, "config")
    ]
    return [list(model.named_modules()), list(model.named_parameters()), list(model.state_dict()), implementations]


@pytest.mark.daily("mixtral", "gpt_oss", "glm4_moe", "nemotron_h", "muse_spark_text")
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_those_of_eager_experts(name):
    model = family(name)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms, too
    batch, found = batches_of(model)[0], []
    for context in (torch.enable_grad, lambda: expert_layers(model)):
        with context():
            output = model(**batch)[0]
            output.square().mean().backward()
        found.append([output.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
        model.zero_grad()
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "glm4_moe"])
def test_the_model_is_as_before_after_an_error_and_after_a_nested_context(name):
    model = family(name)
    before = state(model)

    def use():
        names = list(experts_of(model))
        assert list(model.state_dict()) == before[2]
        assert list(model.named_parameters()) == before[1]
        with expert_layers(model):
            assert list(experts_of(model)) == names
        assert list(experts_of(model)) == names
        model.lm_head(torch.ones(1))

    with pytest.raises(RuntimeError), expert_layers(model):
        use()
    assert state(model) == before
    assert not experts_of(model)
    assert not store_of(model).names


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_a_matrix_is_a_view_of_its_stack(name):
    model = family(name)
    with expert_layers(model):
        for layer in experts_of(model).values():
            assert size_of(layer) == weight_of(layer).shape == (layer.out_features, layer.in_features)
            stack = layer.experts.get_parameter(layer.stack)
            assert torch.equal(weight_of(layer), stack[layer.number].mT if layer.experts.is_transposed else stack[layer.number])
            weight_of(layer).zero_()
            assert not stack[layer.number].any()
        assert not any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("down_proj"))


def test_experts_with_another_forward_are_no_linear_layers():
    for name in ("llama4_text", "jetmoe"):
        with expert_layers(model := family(name)):
            assert not experts_of(model)


def test_a_parametrized_stack_is_refused():
    model = family("mixtral")
    experts = model.model.layers[0].mlp.experts
    torch.nn.utils.parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"the weight of model.layers.0.mlp.experts.0.down_proj is computed"):
        bh.prune(model, bh.Magnitude(), sparsity=0.5)
