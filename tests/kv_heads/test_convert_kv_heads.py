import copy

import pytest
import torch
import transformers
from torch import nn

from billhook.kv_heads.config import kv_heads_of
from billhook.kv_heads.convert import convert_kv_heads
from billhook.kv_heads.methods import RandomHeads
from billhook.kv_heads.plan import plan_kv_heads
from billhook.kv_heads.pooling import Pooled
from billhook.model.shape import shape_of
from kit.families import EXTRA, build, llama, tokens
from kit.shaped import uneven_llama


def reference_pool(weight, heads, groups, how=lambda group: sum(group) / len(group)):
    """Head by head, with nothing but slices."""
    width, size = len(weight) // heads, heads // groups
    split = [weight[h * width : (h + 1) * width] for h in range(heads)]
    return torch.cat([how(split[g * size : (g + 1) * size]) for g in range(groups)])


def pooled_and_repeated(dense, groups, how=None):
    """The original class with as many KV heads as before: each head replaced by the pooled head of its group."""
    model = copy.deepcopy(dense)
    heads = kv_heads_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = name.split(".")[-2]
            if owner in ("k_proj", "v_proj") or (
                owner == "k_norm" and len(parameter) % heads == 0 and "cohere" in str(type(model)).lower()
            ):
                pooled = reference_pool(parameter, heads, groups, *([how] if how else []))
            elif owner == "k_norm" and len(parameter) == heads * (model.config.hidden_size // model.config.num_attention_heads):
                pooled = reference_pool(parameter, heads, groups)
            else:
                continue
            width = len(parameter) // heads
            blocks = [pooled[g * width : (g + 1) * width] for g in range(groups) for _ in range(heads // groups)]
            parameter.copy_(torch.cat(blocks))
    return model


@pytest.mark.daily("llama-*", "gemma2-1", "qwen3-2", "mixtral-1", "olmo2-2", "cohere-1", "stablelm-2", "phi-1")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("family", sorted(EXTRA))
def test_converted_equals_the_original_class_with_pooled_heads_repeated(family, groups):
    dense = build(family)
    expected, ids = pooled_and_repeated(dense, groups), tokens()
    convert_kv_heads(dense, groups)
    torch.testing.assert_close(dense(ids).logits, expected(ids).logits, atol=2e-5, rtol=1e-4)
    assert kv_heads_of(dense) == groups


def test_layers_that_are_unlike_in_something_else():
    dense, ids = uneven_llama(), tokens()
    expected = pooled_and_repeated(dense, 2)(ids).logits
    convert_kv_heads(dense, 2)
    torch.testing.assert_close(dense(ids).logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "cohere"])
def test_equal_heads_convert_with_no_change_of_logits(family):
    equal, ids = pooled_and_repeated(build(family), 2), tokens()
    before = equal(ids).logits
    convert_kv_heads(equal, 2)
    torch.testing.assert_close(equal(ids).logits, before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_generation_equals_the_reference(attention):
    dense = llama(attn_implementation=attention)
    reference = pooled_and_repeated(dense, 2)
    convert_kv_heads(dense, 2)
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    for extra in ({"do_sample": False}, {"num_beams": 3}):
        options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, **extra}
        assert torch.equal(dense.generate(ids, **options), reference.generate(ids, **options))
    cache = dense(ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[1] == 2


def test_first_takes_the_first_head_of_each_group():
    dense = llama(attention_bias=True)
    expected = {
        n: reference_pool(p, 4, 2, lambda group: group[0])
        for n, p in dense.named_parameters()
        if ".k_proj" in n or ".v_proj" in n
    }
    convert_kv_heads(dense, 2, "first")
    assert len(expected) == 8
    for name, value in expected.items():
        assert torch.equal(dense.get_parameter(name), value)


def test_random_is_drawn_anew_as_the_model_initialises_and_depends_on_the_seed_alone():
    models = [llama(hidden_size=128, num_hidden_layers=4) for _ in range(3)]
    for model, seed in zip(models, [1, 1, 2], strict=True):
        torch.manual_seed(model.num_parameters() + seed)
        convert_kv_heads(model, 2, RandomHeads(seed))
    a, b, c = (m.model.layers[1].self_attn.k_proj.weight for m in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.std().item() == pytest.approx(models[0].config.initializer_range, rel=0.05)
    assert not torch.equal(a, models[0].model.layers[1].self_attn.v_proj.weight)


def test_what_the_class_itself_would_build_is_what_comes_out():
    model = build("qwen3")
    convert_kv_heads(model, 2)
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    assert shape_of(fresh) == shape_of(model)
    attention = model.model.layers[0].self_attn
    assert (attention.num_key_value_groups, attention.k_proj.out_features) == (4, 2 * 8)


def test_what_a_user_set_by_hand_stays():
    model = build("mistral")
    model.model.layers[0].self_attn.sliding_window = 5
    model.config.use_cache, model.config.num_beams_of_mine = False, 7
    convert_kv_heads(model, 2)
    assert model.model.layers[0].self_attn.sliding_window == 5
    assert (model.config.use_cache, model.config.num_beams_of_mine) == (False, 7)


def test_only_the_decoder_of_an_encoder_decoder_is_converted():
    """As in the paper (section 3.1): encoder self-attention is never converted."""
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    part |= {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 64, "query_pre_attn_scalar": 8}
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=64)
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    shapes = shape_of(model).tensors
    plan = convert_kv_heads(model, 2)
    assert len(plan.parameters) == 4  # keys and values of self- and cross-attention
    assert all(".decoder." in name for name in plan.parameters)
    assert (config.encoder.num_key_value_heads, config.decoder.num_key_value_heads) == (4, 2)
    ids = tokens()
    assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()
    assert [n for n, size in shape_of(model).tensors.items() if size != shapes[n]] == list(plan.parameters)


def test_pooling_is_done_in_float32():
    halves = torch.tensor([2048.0, 1.0, 1.0, 1.0], dtype=torch.float16)  # in float16, 2048 + 1 is 2048
    pooled = Pooled(0, (0, 0, 0, 0)).pool(halves)
    assert pooled.item() == torch.tensor(2051 / 4).half().item()
    assert pooled.dtype == torch.float16


def test_pooling_along_another_dimension():
    weight = torch.randn(3, 8, 2)
    pooled = Pooled(1, (0, 1, 0, 1, 2, 3, 2, 3)).pool(weight)
    torch.testing.assert_close(pooled[:, :2], (weight[:, 0:2] + weight[:, 2:4]) / 2)
    assert pooled.shape == (3, 4, 2)


class TestOptimizer:
    def trained(self, optimizer_class, steps=3, **options):
        model = llama().train()
        optimizer = optimizer_class(model.parameters(), lr=1e-2, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            model(tokens(), labels=tokens()).loss.backward()
            optimizer.step()
        return model, optimizer

    def test_adam_moments_follow(self):
        model, optimizer = self.trained(torch.optim.AdamW, amsgrad=True)
        k, q = (getattr(model.model.layers[0].self_attn, name).weight for name in ("k_proj", "q_proj"))
        old, untouched = dict(optimizer.state[k]), copy.deepcopy(optimizer.state[q])
        order = [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
        convert_kv_heads(model, 2, optimizers=[optimizer])
        new = optimizer.state[model.model.layers[0].self_attn.k_proj.weight]
        torch.testing.assert_close(new["exp_avg"], reference_pool(old["exp_avg"], 4, 2))
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            torch.testing.assert_close(new[name], 4 * reference_pool(old[name], 4, 2))
        assert torch.equal(new["step"], old["step"])
        assert all(torch.equal(untouched[name], value) for name, value in optimizer.state[q].items())
        assert k not in optimizer.state
        parameters = optimizer.param_groups[0]["params"]
        assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
        assert [len(shape) for shape in order] == [p.ndim for p in parameters]

    def test_the_second_moment_bounds_the_pooled_gradient(self):
        gradients = torch.randn(100, 4, 1)
        pooled_second_moment = 4**2 * gradients.square().mean(0).mean()
        assert gradients.sum(1).square().mean() <= pooled_second_moment

    @pytest.mark.parametrize(
        ("kind", "options"),
        [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"fused": True}), (torch.optim.RMSprop, {})],
    )
    def test_training_goes_on_and_moves_the_new_parameters(self, kind, options):
        model, optimizer = self.trained(kind, **options)
        convert_kv_heads(model, 1, optimizers=[optimizer])
        before = model.model.layers[1].self_attn.v_proj.weight.detach().clone()
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        assert not torch.equal(before, model.model.layers[1].self_attn.v_proj.weight)

    @pytest.mark.parametrize(("kind", "key", "scale"), [
        (torch.optim.RMSprop, "square_avg", 4),
        (torch.optim.Adadelta, "square_avg", 4),
        (torch.optim.Adagrad, "sum", 4),
        (torch.optim.Adamax, "exp_inf", 2),
    ])  # fmt: skip
    def test_what_other_optimizers_keep_of_squares_follows(self, kind, key, scale):
        model, optimizer = self.trained(kind)
        old = optimizer.state[model.model.layers[0].self_attn.k_proj.weight][key].clone()
        convert_kv_heads(model, 2, optimizers=optimizer)
        new = optimizer.state[model.model.layers[0].self_attn.k_proj.weight][key]
        torch.testing.assert_close(new, scale * reference_pool(old, 4, 2))

    def test_optimizers_may_come_from_a_generator(self):
        model, optimizer = self.trained(torch.optim.AdamW)
        convert_kv_heads(model, 2, optimizers=(o for o in [optimizer]))
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}

    def test_state_that_cannot_follow_is_dropped_with_a_warning(self):
        model, optimizer = self.trained(torch.optim.Adafactor)
        with pytest.warns(UserWarning, match="keeps '.*' of size .* restarts"):
            convert_kv_heads(model, 2, optimizers=[optimizer])
        assert not optimizer.state.get(model.model.layers[0].self_attn.k_proj.weight)
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()

    def test_frozen_parameters_stay_frozen(self):
        model = llama()
        model.requires_grad_(False)
        convert_kv_heads(model, 2)
        assert not any(p.requires_grad for p in model.parameters())

    def test_an_error_leaves_model_and_optimizer_as_they_were(self, monkeypatch):
        model, optimizer = self.trained(torch.optim.AdamW)
        before, state, shape = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), shape_of(model)
        pool, calls = Pooled.pool, iter([True] * 3 + [False] * 100)
        monkeypatch.setattr(Pooled, "pool", lambda *a, **k: pool(*a, **k) if next(calls) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_kv_heads(model, 2, optimizers=[optimizer])
        assert shape_of(model) == shape
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


class TestRefused:
    @pytest.mark.parametrize(
        ("heads", "legal"),
        [(3, "Use 1, 2"), (4, "Use 1, 2"), (8, "Use 1, 2"), (6, "Use 1, 2")],
    )
    def test_numbers_of_heads(self, heads, legal):
        model = llama()
        shape = shape_of(model)
        with pytest.raises(ValueError, match=f"num_key_value_heads={heads} must .*{legal}"):
            convert_kv_heads(model, heads)
        assert shape_of(model) == shape

    def test_groups_that_do_not_divide_the_query_heads(self):
        with pytest.raises(ValueError, match="Use 1, 3"):
            convert_kv_heads(llama(num_attention_heads=9, num_key_value_heads=9, hidden_size=36), 2)

    def test_one_head_is_all_there_is(self):
        with pytest.raises(ValueError, match="One KV head is the minimum"):
            convert_kv_heads(llama(num_key_value_heads=1), 1)

    @pytest.mark.parametrize("heads", [0, -1, True, "2", 2.0])
    def test_what_is_no_number_of_heads(self, heads):
        with pytest.raises(ValueError, match=f"num_key_value_heads={heads!r} must be a whole number of at least 1"):
            convert_kv_heads(llama(), heads)

    def test_a_model_that_was_changed_by_hand(self):
        model = llama()
        model.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
        with pytest.raises(ValueError, match="LlamaForCausalLM does not run on meta tensors"):
            convert_kv_heads(model, 2)

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="method='median' must be one of mean, first, random"):
            plan_kv_heads(llama(), 2, "median")

    def test_a_model_without_attention(self):
        model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
        with pytest.raises(ValueError, match="MambaForCausalLM does not support fewer KV heads"):
            convert_kv_heads(model, 2)

    def test_not_a_hugging_face_model(self):
        with pytest.raises(ValueError, match="Linear contains no Hugging Face model"):
            convert_kv_heads(nn.Linear(2, 2), 1)

    def test_quantised(self):
        model = llama()
        attention = model.model.layers[0].self_attn
        attention.k_proj.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match="k_proj.weight is quantized"):
            convert_kv_heads(model, 2)
