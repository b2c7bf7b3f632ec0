"""What every method must be, found by its class; and one from a file that is not billhook's."""

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass

import peft
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

import billhook as bh
from billhook.kv_heads.config import kv_heads_of
from billhook.kv_heads.methods import METHODS, KVMethod, Reconstructing, Reconstruction, method_of
from billhook.kv_heads.plan import plan_kv_heads
from billhook.model.plan import ModelPlan, apply, subclasses
from kit.families import build, tokens
from kit.kv_zoo import build as zoo

K = "model.layers.0.self_attn.k_proj.weight"


OWN = [kind for kind in subclasses(KVMethod) if not inspect.isabstract(kind) and kind.__module__.startswith("billhook.")]
EVERY = sorted(OWN, key=lambda kind: kind.__name__)


@dataclass(frozen=True)
class Last(KVMethod):
    """The last head of the group."""

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        return heads[-1]


@dataclass(frozen=True)
class Weighted(Reconstructing):
    """A mean in which heads with larger numbers count for more, to some power."""

    power: float = 1.0

    def reconstruct(self, metric: Tensor, moments: Tensor) -> Reconstruction:
        eye = torch.eye(moments.shape[1], dtype=moments.dtype).expand(len(moments), -1, -1)
        size = torch.einsum("jaja->j", moments).real ** (self.power / 2)
        return Reconstruction(eye, eye * (size / size.sum())[:, None, None])


def batches(count=3):
    return [{"input_ids": ids, "labels": ids} for ids in tokens(8 * count, 24).split(8)]


def with_equal_heads():
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = linear.weight.view(2, 2, 4, 32)
                heads[:, 1] = heads[:, 0]
    return model


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
class TestContract:
    def test_it_has_a_short_name_and_is_a_value(self, kind):
        method = kind()
        assert METHODS[method.name] is kind
        assert method_of(method.name) == method == method_of(method) == copy.deepcopy(method)
        assert str(method) == method.name
        assert hash(method) == hash(kind())
        with pytest.raises(FrozenInstanceError):
            method.seed = 1

    def test_equal_heads_convert_with_no_change_of_logits(self, kind):
        model, ids = with_equal_heads(), tokens()
        before = model(ids).logits
        plan = bh.convert_kv_heads(model, 2, kind(), batches())
        assert (plan.method, kv_heads_of(model)) == (kind(), 2)
        if kind().pools_adapters:
            torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)

    def test_what_is_equal_is_pooled_to_itself(self, kind):
        head = torch.randn(4, 32)
        assert torch.equal(kind().pool([head, head]), head)

    def test_a_plan_is_the_same_after_json(self, kind):
        model = zoo("bart")
        plan = plan_kv_heads(model, 2, kind(), encoder=True)
        assert ModelPlan.from_json(json.loads(json.dumps(plan.to_json())), model) == plan

    def test_too_few_batches_are_refused_and_nothing_changes(self, kind):
        model = build("llama")
        before = copy.deepcopy(model.state_dict())
        if kind().least_batches:
            with pytest.raises(ValueError, match=f"batches: method='{kind().name}' needs at least {kind().least_batches}, "):
                bh.convert_kv_heads(model, 2, kind(), batches()[: kind().least_batches - 1])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_repair_is_made_or_refused(self, kind):
        model = build("llama")
        if kind().candidates:
            bh.convert_kv_heads(model, 2, kind(), batches(), repair=bh.RepairConfig())
            assert kv_heads_of(model) == 2
        else:
            with pytest.raises(ValueError, match=f"repair goes with .*, not with '{kind().name}'"):
                bh.convert_kv_heads(model, 2, kind(), batches(), repair=bh.RepairConfig())


def test_every_short_name_has_its_class():
    assert sorted(METHODS.values(), key=lambda kind: kind.__name__) == EVERY


def norms(model, heads):
    """Frobenius norms of the heads of each projection, `[projections, heads]`."""
    linears = [linear for layer in model.model.layers for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    return torch.stack([linear.weight.detach().view(heads, -1).norm(dim=1) for linear in linears])


class TestNorms:
    def test_a_mean_has_the_root_mean_square_of_its_members_and_nothing_else_changes(self):
        model = build("llama")
        plain = copy.deepcopy(model)
        expected = norms(model, 4).view(-1, 2, 2).square().mean(-1).sqrt()
        bh.convert_kv_heads(plain, 2, "mean")
        bh.convert_kv_heads(model, 2, bh.kv_methods.Mean(renorm=True))
        torch.testing.assert_close(norms(model, 2), expected)
        factors = expected / norms(plain, 2)
        assert factors.min() > 1.2
        for name, value in plain.state_dict().items():
            if "k_proj" in name or "v_proj" in name:
                factor = factors[2 * int(name.split(".")[2]) + ("v_proj" in name)]
                value = (value.view(2, -1) * factor[:, None]).view_as(value)
            torch.testing.assert_close(model.state_dict()[name], value)

    def test_aligned_heads_have_it_too_as_turns_keep_norms(self):
        model = build("llama")
        expected = norms(model, 4).view(-1, 2, 2).square().mean(-1).sqrt()
        bh.convert_kv_heads(model, 2, bh.kv_methods.Aligned(renorm=True))
        torch.testing.assert_close(norms(model, 2), expected)

    def test_heads_that_cancel_out_stay_zero(self):
        model = build("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                heads = layer.self_attn.k_proj.weight.view(2, 2, -1)
                heads[:, 1] = -heads[:, 0]
        bh.convert_kv_heads(model, 2, bh.kv_methods.Mean(renorm=True))
        assert not any(layer.self_attn.k_proj.weight.any() for layer in model.model.layers)
        assert all(value.isfinite().all() for value in model.state_dict().values())

    def test_lora_is_refused(self):
        model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["k_proj"]))
        with pytest.raises(ValueError, match="with LoRA attached to .*k_proj"):
            bh.convert_kv_heads(model, 2, bh.kv_methods.Mean(renorm=True))


class TestFromAFileOfTheUsersOwn:
    def test_it_pools(self):
        model = build("llama")
        dense = model.get_parameter(K).detach().view(2, 2, 4, 32).clone()
        plan = bh.convert_kv_heads(model, 2, Last())
        assert torch.equal(model.get_parameter(K).view(2, 4, 32), dense[:, 1])
        assert "4 -> 2 KV heads in 2 attention modules (last)" in str(plan)

    def test_optimizer_state_follows(self):
        model = build("llama").train()
        optimizer = torch.optim.AdamW(model.parameters())
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        old = {key: value.clone() for key, value in optimizer.state[model.get_parameter(K)].items()}
        bh.convert_kv_heads(model, 2, Last(), optimizers=optimizer)
        new = optimizer.state[model.get_parameter(K)]
        assert torch.equal(new["exp_avg"].view(2, 4, 32), old["exp_avg"].view(2, 2, 4, 32)[:, 1])
        assert torch.equal(new["exp_avg_sq"].view(2, 4, 32), 4 * old["exp_avg_sq"].view(2, 2, 4, 32)[:, 1])

    def test_it_renders_in_groups_of_its_choice(self):
        model, ids = build("llama"), tokens()
        plain = copy.deepcopy(model)
        bh.convert_kv_heads(plain, 2, "mean")
        bh.convert_kv_heads(model, 2, Weighted(power=0.0))
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        bh.convert_kv_heads(model, 1, Weighted("similar", 2.0), batches(), repair=bh.RepairConfig())
        assert kv_heads_of(model) == 1

    @pytest.mark.parametrize(("given", "method"), [
        ("{class_path: %s.Last}", Last()),
        ("%s.Last", Last()),
        ("{class_path: %s.Weighted, init_args: {power: 2, grouping: similar}}", Weighted("similar", 2.0)),
        ("{class_path: billhook.kv_methods.SVD, init_args: {grouping: similar}}", bh.kv_methods.SVD("similar")),
        ("{class_path: SVD}", bh.kv_methods.SVD()),
        ("svd", bh.kv_methods.SVD()),
    ])  # fmt: skip
    def test_yaml_names_it(self, given, method):
        parser = ArgumentParser()
        parser.add_subclass_arguments(bh.KVHeadConversion, "callback")
        given = given % __name__ if "%" in given else given
        line = f"{{class_path: billhook.KVHeadConversion, init_args: {{num_key_value_heads: 2, method: {given}}}}}"
        callback = parser.instantiate(parser.parse_args([f"--callback={line}"])).callback
        assert callback.method == method

    def test_json_names_it_by_its_class(self):
        model = build("llama")
        plan = plan_kv_heads(model, 2, Weighted("similar", 2.0))
        plain = json.loads(json.dumps(plan.to_json()))
        assert plain["method"] == {"Weighted": {"grouping": "similar", "power": 2.0}}
        assert ModelPlan.from_json(plain, model) == plan
        with pytest.raises(ValueError, match="there is no method 'Median' among .*: import what defines it first"):
            ModelPlan.from_json(plain | {"method": {"Median": {}}}, model)


class TestPlan:
    def test_json_keeps_where_the_optimizer_starts_again(self):
        model = build("llama")
        plan = plan_kv_heads(model, 2)
        plan = plan.starting_from(plan.parameters, None)
        assert ModelPlan.from_json(json.loads(json.dumps(plan.to_json())), model).restart == tuple(plan.parameters)

    def test_it_is_applied_from_json_as_it_was(self):
        model = build("llama")
        other = copy.deepcopy(model)
        plain = json.dumps(plan_kv_heads(model, 2, bh.kv_methods.Mean()).to_json())
        apply(other, ModelPlan.from_json(json.loads(plain), other))
        bh.convert_kv_heads(model, 2)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())

    def test_what_restarts_is_a_part_of_it(self):
        model = build("llama")
        plan = bh.convert_kv_heads(model, 2, "aligned")
        assert plan.to_json()["restart"] == [
            f"model.layers.{layer}.self_attn.{linear}_proj.weight" for layer in range(2) for linear in "qkvo"
        ]

    def test_it_prints_a_table(self):
        assert str(plan_kv_heads(build("llama"), 2)).splitlines() == [
            "LlamaForCausalLM: 4 -> 2 KV heads in 2 attention modules (mean); the KV cache shrinks",
            "  model.layers.*.self_attn.k_proj.weight  16 -> 8 along dimension 0, in each of 2",
            "  model.layers.*.self_attn.v_proj.weight  16 -> 8 along dimension 0, in each of 2",
        ]

    @pytest.mark.parametrize(("change", "match"), [
        ({"model": "GPT2LMHeadModel"}, "made for a different model than this LlamaForCausalLM with 4 KV heads"),
        ({"before": 8}, "made for a different model than this LlamaForCausalLM with 4 KV heads"),
        ({"layers": ["nowhere"]}, "layers: there is no 'nowhere'"),
        ({"layers": None}, "layers and restart must be lists of names"),
        ({"restart": [1]}, "layers and restart must be lists of names"),
        ({"restart": ["model.layers.0.self_attn", 1]}, "layers and restart must be lists of names"),
        ({"after": "2"}, "num_key_value_heads='2' must be a whole number"),
        ({"method": "mean"}, "method is 'mean', and must be a class's name with its arguments"),
        ({"method": {"Mean": {"grouping": "alike"}}}, "grouping='alike' must be one of consecutive, similar"),
    ])  # fmt: skip
    def test_what_is_no_plan_of_the_model_is_refused(self, change, match):
        model = build("llama")
        with pytest.raises(ValueError, match=match):
            ModelPlan.from_json(plan_kv_heads(model, 2).to_json() | change, model)
