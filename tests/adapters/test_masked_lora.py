"""LoRA on pruned weights: zeros stay through a merge, and masked adapters merge without error, in copies too."""

import copy

import peft
import pytest
import torch
from torch.nn.functional import linear

import billhook as bh
from billhook.adapters.masked import mask_adapters, unmask_adapters
from billhook.adapters.masked_layer import MaskedLora
from billhook.adapters.merge import merge
from billhook.model.layers import prunable
from kit.adapters import BUILD, IDS, logits, lora, pruned, q_proj
from kit.families import build as build_family
from kit.families import llama, tokens
from kit.operations import Operations
from kit.sparsity import weight_named


@pytest.mark.parametrize("build", BUILD)
def test_zeros_stay_and_the_rest_is_merged(build):
    model, masks = pruned(build)
    plain = copy.deepcopy(model).merge_and_unload()
    result = merge(model)
    assert not any("lora" in name for name, _ in result.model.named_parameters())
    assert not hasattr(result.model, "peft_config")
    expected = prunable(plain)
    for name, one in prunable(result.model).items():
        torch.testing.assert_close(one.weight, expected[name].weight * masks[name])
        assert (one.weight == 0).sum() == (~masks[name]).sum()
    assert all(0.5 < share < 0.9 for share in result.error.values())  # about sqrt(1/2): half of the entries
    assert {name.removeprefix("base_model.model.") for name in result.pruned} == set(masks)
    assert "zeros kept; " in str(result)


def with_lora_on_experts(model, *parameters):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{name}" for name in parameters])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["gate_up_proj", "down_proj"]], ids=["one", "both"])
def test_zeros_of_experts_stay_when_adapters_of_their_parameters_are_merged(parameters):
    model, batches = build_family("mixtral"), [{"input_ids": tokens(8, 24)}]
    masks = bh.prune(model, bh.Wanda(), batches, 0.5).masks(model)
    model = with_lora_on_experts(model, *parameters)
    held = bh.hold_masks(model, torch.optim.AdamW(model.parameters()), {f"base_model.model.{n}": m for n, m in masks.items()})
    held.detach()
    expected = copy.deepcopy(model).merge_and_unload()
    result = merge(model).model
    for name, mask in masks.items():
        weight = weight_named(result, name)
        assert torch.equal(weight != 0, mask)
        torch.testing.assert_close(weight, weight_named(expected, name) * mask)


def test_experts_with_an_adapter_on_their_parameter_are_refused_by_other_changes():
    model, batches = with_lora_on_experts(build_family("mixtral"), "gate_up_proj", "down_proj"), [{"input_ids": tokens(8, 24)}]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"parameter of base_model.*experts.0.gate_up_proj has an adapter. Prune the model before"
    ):
        bh.prune(model, bh.Magnitude(), sparsity=0.5)
    with pytest.raises(ValueError, match=r"parameters of model.*experts have an adapter \(target_parameters\)"):
        bh.plan(model, bh.importance.REAP(), batches, experts=0.25)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bh.prune(model, bh.Magnitude(), sparsity=0.5, options=bh.PruneOptions(skip=["*.experts.*"]))


@pytest.mark.parametrize("build", BUILD)
def test_masked_adapters_merge_without_error(build):
    model, masks = pruned(build)
    before = logits(model)
    mask_adapters(model)
    masked = logits(model)
    assert (masked - before).abs().max() > 1e-3
    result = merge(model)
    torch.testing.assert_close(logits(result.model), masked, atol=1e-5, rtol=1e-4)
    assert set(result.error.values()) == {0.0}
    assert "no update was lost" in str(result)
    assert all((one.weight == 0).sum() == (~masks[name]).sum() for name, one in prunable(result.model).items())


def test_masked_adapters_are_trained_through_the_mask():
    model, masks = pruned("llama", lora_dropout=0.1)
    mask_adapters(model)
    layer = q_proj(model)
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


def test_dropout_is_the_adapters_own():
    model, masks = pruned("llama", lora_dropout=0.5)
    mask_adapters(model)
    layer, x = q_proj(model).train(), torch.ones(4, 32)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    given = layer.lora_dropout["default"](x)
    assert set(given.flatten().tolist()) == {0.0, 2.0}
    product = layer.get_delta_weight("default")
    torch.testing.assert_close(out, layer.base_layer(x) + given @ product.t())


def products(operations):
    """How many products of matrices were computed."""
    return sum(operations.counts[kind] for kind in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm))


def of_two_products(layer, x):
    """What a masked layer computes with a product by the weight and one by each adapter's; and the gradients."""
    out = layer.base_layer(x)
    for adapter in layer.active_adapters:
        product = layer.get_delta_weight(adapter)
        out = out + linear(layer.lora_dropout[adapter](x).to(product.dtype), product.t() if layer.fan_in_fan_out else product)
    return out.to(layer.base_layer(x).dtype)


# what a layer's forward and backward multiply: B A, and with it the inputs, once for all or once for each
@pytest.mark.parametrize(
    ("build", "adapters", "options", "forward", "backward"),
    [
        ("llama", 1, {}, 2, 4),
        ("llama", 2, {}, 3, 6),
        ("gpt2", 1, {}, 2, 4),
        ("llama", 1, {"lora_dropout": 0.5}, 3, 5),
        ("llama", 1, {"hook": True}, 3, 5),
        ("llama", 1, {"dtype": torch.bfloat16}, 3, 5),
        ("llama", 1, {"base": torch.bfloat16}, 3, 5),
        ("llama", 1, {"autocast": True}, 3, 5),
    ],
)
def test_a_layer_multiplies_its_inputs_once_where_that_is_the_same(build, adapters, options, forward, backward):
    dropout = {name: value for name, value in options.items() if name == "lora_dropout"}
    model, _ = pruned(build, **dropout)
    if adapters == 2:
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model.base_model.set_adapter(["default", "two"])
    mask_adapters(model)
    layer = q_proj(model.to(options.get("dtype"))) if build == "llama" else model.base_model.model.transformer.h[0].attn.c_attn
    layer.train().base_layer.to(options.get("base"))
    if options.get("hook"):
        layer.base_layer.register_forward_pre_hook(lambda *_: None)
    trained = [one.weight for parts in (layer.lora_A, layer.lora_B) for one in parts.values()]
    x = torch.randn(2, 5, layer.in_features, dtype=layer.base_layer.weight.dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(options.get("autocast"))):
        torch.manual_seed(1)
        with Operations() as operations:
            out = layer(x)
        torch.manual_seed(1)
        expected = of_two_products(layer, x)
    assert products(operations) == forward
    torch.testing.assert_close(out, expected)
    with Operations() as operations:
        found = torch.autograd.grad(out.square().sum(), [x, *trained])
    assert products(operations) == backward
    assert all(one.abs().max() > 0 for one in found)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [x, *trained]))


def test_masks_leave_no_trace():
    model, _ = pruned("llama")
    before, keys = logits(model), list(model.state_dict())
    mask_adapters(model)
    assert list(model.state_dict()) == keys
    unmask_adapters(model)
    assert torch.equal(logits(model), before)
    assert type(q_proj(model)) is peft.tuners.lora.Linear
    with model.disable_adapter():
        off = logits(model)
        mask_adapters(model)
        assert torch.equal(logits(model), off)
    assert not torch.equal(logits(model), off)


class TestCopies:
    """They compute the same, and with layers of their own."""

    def check(self, model, copied):
        masked = logits(model)
        assert torch.equal(logits(copied), masked)
        layer = q_proj(copied)
        assert isinstance(layer, MaskedLora)
        layer.lora_B["default"].weight.data.mul_(3)
        changed = logits(copied)
        assert (changed - masked).abs().max() > 1e-3
        assert torch.equal(logits(model), masked)
        mask_adapters(copied, {name: torch.zeros_like(one.weight) > 0 for name, one in prunable(copied).items()})
        assert (logits(copied) - changed).abs().max() > 1e-3
        unmask_adapters(copied)
        assert torch.equal(logits(model), masked)
        assert set(merge(model).error.values()) == {0.0}

    def test_deepcopy(self):
        model, _ = pruned("llama")
        mask_adapters(model)
        copied = copy.deepcopy(model)
        assert q_proj(copied).keep is q_proj(model).keep  # a byte a weight that copies need not have twice
        assert q_proj(copy.deepcopy(model).to("meta")).keep.is_meta
        assert not q_proj(model).keep.is_meta
        self.check(model, copied)

    def test_pickled_as_a_whole(self, tmp_path):
        model, _ = pruned("llama")
        mask_adapters(model)
        torch.save(model, tmp_path / "model.pt")
        self.check(model, torch.load(tmp_path / "model.pt", weights_only=False))

    def test_to_another_dtype(self):
        model, masks = pruned("llama")
        mask_adapters(model)
        expected = logits(model)
        torch.testing.assert_close(logits(model.bfloat16()).float(), expected, atol=0.05, rtol=0.05)
        assert q_proj(model).keep.dtype == torch.bool
        result = merge(model)
        assert set(result.error.values()) == {0.0}
        assert all((one.weight == 0).sum() >= (~masks[name]).sum() for name, one in prunable(result.model).items())


class TestWithPeft:
    """What PEFT does to a model it also does to one with masked adapters."""

    def masked(self, build="llama"):
        model, masks = pruned(build)
        mask_adapters(model)
        return model, masks, logits(model)

    @pytest.mark.daily("llama")
    @pytest.mark.parametrize("build", ["llama", "gpt2"])
    def test_merge_and_unmerge(self, build):
        model, masks, expected = self.masked(build)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        weights = {name.removeprefix("base_model.model."): one.weight for name, one in prunable(model).items()}
        assert all(not weights[name][~mask].any() for name, mask in masks.items())
        with pytest.raises(ValueError, match="are merged"):
            mask_adapters(model)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        assert all(not weights[name][~mask].any() for name, mask in masks.items())
        model.merge_adapter()
        with model.disable_adapter():  # takes them out again, as PEFT does
            unmasked, _ = pruned(build)
            with unmasked.disable_adapter():
                torch.testing.assert_close(logits(model), logits(unmasked), atol=1e-5, rtol=1e-4)

    def test_merge_and_unload(self):
        model, masks, expected = self.masked()
        plain = model.merge_and_unload()
        torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-4)
        assert all((one.weight == 0).sum() == (~masks[name]).sum() for name, one in prunable(plain).items())

    def test_save_pretrained(self, tmp_path):
        model, _, expected = self.masked()
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        base = llama()
        bh.prune(base, bh.Magnitude(), sparsity=0.5)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        mask_adapters(loaded)
        assert torch.equal(logits(loaded), expected)

    def test_two_adapters(self):
        model, _ = pruned("llama")
        model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        mask_adapters(model)
        one = logits(model)
        model.set_adapter("two")
        two = logits(model)
        assert (one - two).abs().max() > 1e-3
        result = merge(model)
        torch.testing.assert_close(logits(result.model), two, atol=1e-5, rtol=1e-4)

    def test_an_adapter_for_each_example_is_refused(self):
        model, _, _ = self.masked()
        with pytest.raises(ValueError, match=r"adapter_names=\['default', 'default'\] must be None"):
            model(input_ids=IDS, adapter_names=["default", "default"])


def test_adapters_without_a_wrapper_of_peft():
    model, masks = pruned("llama")
    merged = merge(model.get_base_model())
    assert merged.model is model.get_base_model()
    assert all((one.weight == 0).sum() == (~masks[name]).sum() for name, one in prunable(merged.model).items())
    assert type(merged.model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_masks_of_ones_own():
    model, masks = pruned("llama")
    name, other, third = list(masks)[:3]
    result = merge(model, {name: torch.ones_like(masks[name]), "base_model.model." + other: masks[other]})
    weights = prunable(result.model)
    assert (weights[name].weight != 0).all()
    assert (weights[other].weight == 0).sum() == (~masks[other]).sum()
    assert (weights[third].weight != 0).all()


def test_layers_without_a_mask_stay_as_they_are():
    model, masks = pruned("llama")
    names = list(masks)
    mask_adapters(model, {names[0]: masks[names[0]]})
    mask_adapters(model, {names[1]: masks[names[1]]})
    layers = model.get_base_model().model.layers
    assert [type(layers[0].self_attn.get_submodule(p)) is MaskedLora for p in ("q_proj", "k_proj", "v_proj")] == [
        True,
        True,
        False,
    ]


def test_a_few_zeros_are_not_pruning():
    """They are merged over, unless a mask says otherwise; from 1 % on they stay."""
    torch.manual_seed(0)
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight  # 1024 entries
    other = model.model.layers[0].self_attn.k_proj.weight  # 512
    with torch.no_grad():
        weight.view(-1)[:10] = 0
        other.view(-1)[:6] = 0
    model = lora(model, target_modules=["q_proj", "k_proj"])
    result = merge(copy.deepcopy(model))
    assert result.pruned == ("base_model.model.model.layers.0.self_attn.k_proj",)
    assert "zeros kept in 1;" in str(result)
    weights = prunable(result.model)
    assert weights["model.layers.0.self_attn.q_proj"].weight.all()
    assert (weights["model.layers.0.self_attn.k_proj"].weight == 0).sum() == 6
    mask_adapters(model, {"model.layers.0.self_attn.q_proj": torch.ones_like(weight, dtype=torch.bool)})
    mask_adapters(model)
    layer = model.get_base_model().model.layers[0].self_attn
    assert type(layer.q_proj) is not MaskedLora
    assert type(layer.k_proj) is MaskedLora


def test_what_is_zero_stays_zero_whatever_the_mask():
    model, masks = pruned("llama")
    mask_adapters(model, {name: torch.ones_like(mask) for name, mask in masks.items()})
    masked = logits(model)
    result = merge(model)
    assert set(result.error.values()) == {0.0}
    torch.testing.assert_close(logits(result.model), masked, atol=1e-5, rtol=1e-4)


def test_what_is_pruned_after_masking_stays_zero_too():
    model, _ = pruned("llama")
    mask_adapters(model)
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.75).masks(model)
    result = merge(model)
    assert all(0.1 < share < 0.9 for share in result.error.values())
    for name, one in prunable(result.model).items():
        assert (one.weight == 0).sum() == (~masks["base_model.model." + name]).sum()


class TestRefused:
    def test_none_merged_or_no_masks_that_fit(self):
        model, masks = pruned("llama")
        with pytest.raises(ValueError, match="has no adapters on linear layers"):
            merge(llama())
        name = "base_model.model." + next(iter(masks))
        with pytest.raises(
            ValueError, match=rf"masks: the mask of {name} must be bool of shape \[32, 32\], got torch.bool \[3, 3\]"
        ):
            merge(model, {name: torch.ones(3, 3, dtype=torch.bool)})
        with pytest.raises(ValueError, match="masks: no name matches an adapted layer"):
            merge(model, {"elsewhere": masks[next(iter(masks))]})
        with pytest.raises(ValueError, match=r"masks=None: no adapted layer, such as .*, has 1% zeros\. Prune the model first"):
            mask_adapters(lora(llama()))
        model.merge_adapter()
        with pytest.raises(ValueError, match="are merged"):
            merge(model)

    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
    @pytest.mark.parametrize(
        ("options", "got"),
        [({"use_dora": True}, "LoRA with DoraLinearVariant"), ({"lora_bias": True}, "LoRA with a bias")],
    )
    def test_what_is_not_plain(self, options, got):
        model, _ = pruned("llama", **options)
        before = logits(model)
        with pytest.raises(ValueError, match=f"q_proj must be plain LoRA without bias, got {got}"):
            mask_adapters(model)
        assert torch.equal(logits(model), before)

    def test_another_forward_in_its_place(self):
        model, _ = pruned("llama")
        layer = q_proj(model)
        layer.forward = layer.forward
        with pytest.raises(ValueError, match="got LoRA with a replaced forward"):
            mask_adapters(model)
        with pytest.raises(ValueError, match="has a replaced forward"):
            merge(model)

    def test_other_kinds_of_adapters(self):
        model = peft.get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
        with torch.no_grad():
            for one in prunable(model).values():
                one.weight.view(-1)[::2] = 0
        with pytest.raises(ValueError, match="must be plain LoRA without bias, got Linear"):
            mask_adapters(model)

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings=True`")
    def test_a_weight_that_others_have_too(self):
        model = lora(llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
        before = model.get_base_model().model.embed_tokens.weight.clone()
        with pytest.raises(ValueError, match="lm_head shares its weight with another module"):
            merge(model)
        assert torch.equal(model.get_base_model().model.embed_tokens.weight, before)


def test_a_report_that_is_taken_for_the_model_says_so(tmp_path):
    model = llama()
    net = merge(lora(model))
    assert str(net).startswith("merged adapters of ")
    assert " in place, " in str(net)
    for call in (lambda: bh.save(net, tmp_path / "out"), lambda: bh.convert_kv_heads(net, 1), lambda: bh.summary(net)):
        with pytest.raises(
            ValueError, match="bh.training.merge works in place and returns a report. Use the model that you passed"
        ):
            call()
    assert bh.save(net.model, tmp_path / "out").folder
