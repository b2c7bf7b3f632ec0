"""Fewer KV heads on every family, against the dense class with heads pooled and repeated by slices."""

import copy
import functools
import json

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from billhook.checkpoints.export import build_model, read_checkpoint
from billhook.checkpoints.save import load, save
from billhook.kv_heads.config import heads_of, kv_heads_by_layer, kv_heads_of
from billhook.kv_heads.convert import convert_kv_heads
from billhook.kv_heads.layout import find_kv
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.model.checkpoint_shape import load_shape, save_shape
from billhook.model.costs import costs_of
from billhook.model.inputs import make_inputs
from billhook.model.plan import apply
from billhook.model.shape import GROUPS, Shape, set_shape, shape_of
from billhook.report.summary import summary
from kit.kv_zoo import ZOO, build, pooled_and_repeated

WAYS = {
    "config": ["llama", "phi3", "falcon"],
    "groups": ["t5", "bart", "pegasus", "bert", "roberta", "distilbert", "albert", "vit", "clip", "gptj"],
    "refused": [
        *("old falcon", "alibi falcon", "gpt_bigcode", "whisper", "deberta", "deberta_v2", "modernbert", "opt", "gpt_neox"),
        *("bloom", "gpt2", "mpt", "codegen", "xglm"),
    ],
}
CASES = [(family, way, 2) for way, families in WAYS.items() if way != "refused" for family in families]
CASES += [("old falcon", "config", 1), ("alibi falcon", "config", 1), ("gpt_bigcode", "config", 1)]
CASES += [("t5", "groups", 1), ("bert", "groups", 1)]
named = pytest.mark.parametrize(("family", "way", "heads"), CASES, ids=[f"{family}-{heads}" for family, _, heads in CASES])


@functools.cache
def three(family: str, heads: int) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, KVHeadPlan]:
    """Dense, reference, converted, and the plan; none of them is changed."""
    dense = build(family)
    converted = copy.deepcopy(dense)
    plan = convert_kv_heads(converted, heads)
    return dense, pooled_and_repeated(dense, family, heads), converted, plan


def inputs_of(model: PreTrainedModel, batch: int, length: int, padded: str = "") -> dict[str, torch.Tensor]:
    inputs = make_inputs(model, batch, length)
    ids = inputs.get("input_ids")
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))
        if ids is not None:
            ids = inputs["input_ids"] = make_inputs(model, batch, 9 - length)["input_ids"]
    if padded and ids is not None:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, slice(0, 2) if padded == "left" else slice(-2, None)] = 0
    return inputs


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    found = output.logits if hasattr(output, "logits") else output[0]
    mask = inputs.get("attention_mask")
    return found[mask.bool()] if mask is not None and found.shape[:2] == mask.shape else found


def check_same(a: PreTrainedModel, b: PreTrainedModel, sizes=((1, 1), (3, 3), (2, 4), (1, 8))) -> None:
    for batch, length in sizes:
        inputs = inputs_of(a, batch, length)
        torch.testing.assert_close(logits(a, inputs), logits(b, inputs), atol=5e-5, rtol=1e-4)
    for side in ("left", "right") if a.main_input_name == "input_ids" else ():
        inputs = inputs_of(a, 3, 6, side)
        torch.testing.assert_close(logits(a, inputs), logits(b, inputs), atol=5e-5, rtol=1e-4)


def probe_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs_of(model, 1, 5).items() if isinstance(value, torch.Tensor)}


def implementations(model: PreTrainedModel) -> list[str]:
    return ["eager", *(["sdpa"] if type(model)._supports_sdpa else [])]


def test_the_zoo_has_a_case_for_every_family():
    assert {family for families in WAYS.values() for family in families} == ZOO.keys()


@pytest.mark.daily("opt", "gpt_neox", "old falcon")
@pytest.mark.parametrize("family", WAYS["refused"])
def test_code_that_cannot_have_fewer_is_refused_before_anything_changes(family):
    model = build(family)
    shape = shape_of(model)
    with pytest.raises(ValueError, match=f"the code of {type(model).__name__} cannot have fewer KV heads than query heads"):
        convert_kv_heads(model, 2)
    assert shape_of(model) == shape


@pytest.mark.daily("llama-2", "phi3-2", "bert-2", "t5-2", "alibi falcon-1", "gpt_bigcode-1")
@named
def test_it_equals_the_dense_class_with_heads_pooled_and_repeated(family, way, heads):
    dense, reference, converted, plan = three(family, heads)
    assert plan.saves_cache == (family != "falcon")
    assert set(kv_heads_by_layer(converted).values()) <= {heads, 8}
    assert {kv_heads_by_layer(converted)[name] for name in plan.layers} == {heads}
    assert kv_heads_of(converted) == heads
    assert not torch.allclose(logits(reference, inputs_of(dense, 1, 5)), logits(dense, inputs_of(dense, 1, 5)), atol=1e-3)
    pair = copy.deepcopy(reference), copy.deepcopy(converted)
    for implementation in implementations(dense):
        for model in pair:
            if model.config._attn_implementation != implementation:
                model.set_attn_implementation(implementation)
        if way == "groups" and implementation == "eager" and heads > 1:
            with pytest.raises(RuntimeError, match="must match the size|but got|shape"):
                logits(pair[1], inputs_of(dense, 2, 4))
        else:
            check_same(*pair)


@pytest.mark.daily("llama-2", "phi3-2", "bert-2", "t5-2", "alibi falcon-1", "gpt_bigcode-1")
@named
def test_generation_with_a_cache_equals_the_reference(family, way, heads):
    _, reference, converted, _ = three(family, heads)
    if not converted.can_generate() or converted.main_input_name != "input_ids":
        pytest.skip("it generates nothing, or in its own way")
    ids = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for more in ({}, {"num_beams": 3}):
        options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **more}
        assert torch.equal(converted.generate(ids, **options), reference.generate(ids, **options))


@pytest.mark.daily("llama-2", "phi3-2", "bert-2", "t5-2", "gpt_bigcode-1")
@named
def test_it_is_saved_and_reloaded(family, way, heads, tmp_path):
    _, _, converted, _ = three(family, heads)
    saved = save(converted, tmp_path / "a", probe=probe_of(converted))
    again = load(tmp_path / "a")
    expected = "plain" if way == "config" else "shaped"
    assert saved.way == expected
    assert summary(again).numbers() == summary(converted).numbers()
    assert list(kv_heads_by_layer(again).values()) == list(kv_heads_by_layer(converted).values())
    inputs = inputs_of(converted, 2, 5)
    torch.testing.assert_close(logits(again, inputs), logits(converted, inputs), atol=1e-5, rtol=1e-5)
    if expected == "shaped":
        with pytest.raises(RuntimeError, match="mismatch"):
            type(converted).from_pretrained(tmp_path / "a")


@pytest.mark.daily("llama-2", "phi3-2", "bert-2", "t5-2", "alibi falcon-1", "gpt_bigcode-1")
@named
def test_a_shape_brings_any_model_there_and_back(family, way, heads):
    dense, _, converted, _ = three(family, heads)
    other = copy.deepcopy(dense)
    for target in (converted, dense, converted):
        set_shape(other, Shape.from_dict(json.loads(json.dumps(shape_of(target).to_dict()))))
        other.load_state_dict(target.state_dict())
        inputs = inputs_of(dense, 2, 5)
        assert torch.equal(logits(other, inputs), logits(target, inputs))
        assert shape_of(other) == shape_of(target)
        assert [type(module) for module in other.modules()] == [type(module) for module in target.modules()]


@pytest.mark.daily("llama-2", "phi3-2", "bert-2", "t5-2", "alibi falcon-1", "gpt_bigcode-1")
@named
def test_summaries_tell_the_truth(family, way, heads):
    dense, _, converted, plan = three(family, heads)
    before, after = costs_of(dense), costs_of(converted)
    shrunk = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in converted.parameters())
    assert before.params - after.params == shrunk > 0
    assert heads_of(converted) == (8, heads)
    assert heads_of(dense) == (8, plan.before)
    if before.kv_cache_bytes is not None:
        fewer = before.kv_cache_bytes * heads // plan.before
        assert after.kv_cache_bytes == (fewer if plan.saves_cache else before.kv_cache_bytes)
        assert summary(converted).kv_cache_bytes == (fewer if plan.saves_cache else before.kv_cache_bytes)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_encoder_is_converted_on_request(family):
    dense = build(family)
    converted = copy.deepcopy(dense)
    plan = convert_kv_heads(converted, 2, encoder=True)
    assert set(plan.layers) == set(find_kv(dense))
    assert set(kv_heads_by_layer(converted).values()) == {2}
    check_same(pooled_and_repeated(dense, family, 2, encoder=True), converted)


@pytest.mark.daily("llama", "bert")
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_bigcode", "bert"])
def test_layers_one_after_the_other_end_where_all_at_once_ends(family, tmp_path):
    heads = 1 if family == "gpt_bigcode" else 2
    dense, reference, at_once, plan = three(family, heads)
    model = copy.deepcopy(dense)
    config = dict(vars(model.config))
    first = convert_kv_heads(model, heads, layers=[1])
    names = list(kv_heads_by_layer(dense))
    assert first.layers == (names[1],)
    assert kv_heads_by_layer(model) == {names[0]: plan.before, names[1]: heads}
    assert {key: value for key, value in vars(model.config).items() if key != "billhook"} == config
    assert (kv_heads_of(model), heads_of(model)) == (plan.before, (None, None))
    half = [
        a if "1." in name else b for (name, a), (_, b) in zip(reference.named_parameters(), dense.named_parameters(), strict=True)
    ]
    mixed = copy.deepcopy(dense)
    for parameter, values in zip(mixed.parameters(), half, strict=True):
        parameter.data.copy_(values)
    check_same(mixed, model)
    assert save(model, tmp_path / "a").way == "shaped"
    again = load(tmp_path / "a")
    assert kv_heads_by_layer(again) == kv_heads_by_layer(model)
    check_same(again, model, sizes=[(2, 3)])
    convert_kv_heads(model, heads)
    assert shape_of(model) == shape_of(at_once)
    torch.testing.assert_close(model.state_dict(), at_once.state_dict(), rtol=0, atol=0)
    if family != "bert":
        assert save(model, tmp_path / "b").way == "plain"


@pytest.mark.daily("phi3")
@pytest.mark.parametrize("family", ["bert", "phi3"])
def test_stages_end_where_one_step_ends(family):
    model = build(family)
    _, _, at_once, plan = three(family, 2)
    if plan.before == 8:
        convert_kv_heads(model, 4)
    convert_kv_heads(model, 2)
    torch.testing.assert_close(model.state_dict(), at_once.state_dict(), rtol=1e-5, atol=1e-6)
    assert shape_of(model) == shape_of(at_once)
    convert_kv_heads(model, 1)
    assert set(kv_heads_by_layer(model).values()) == {1}
    check_same(model, pooled_and_repeated(build(family), family, 1))


def test_optimizers_follow_in_a_fused_matrix():
    model = build("phi3").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(3, 64, (2, 6))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    dense, (name, *_) = copy.deepcopy(model.state_dict()), plan_kv_heads(model, 2).parameters
    old = {key: value.clone() for key, value in optimizer.state[model.get_parameter(name)].items()}
    pooled = convert_kv_heads(model, 2, optimizers=optimizer).parameters[name]
    new = optimizer.state[model.get_parameter(name)]
    index, groups = torch.tensor(pooled.index), torch.bincount(torch.tensor(pooled.index))
    for place in range(len(groups)):
        members = (index == place).nonzero().flatten()
        rows = {key: value.index_select(pooled.dim, members).mean(pooled.dim) for key, value in old.items() if value.ndim}
        assert len(members) in (1, 2)
        torch.testing.assert_close(new["exp_avg"].select(pooled.dim, place), rows["exp_avg"])
        torch.testing.assert_close(new["exp_avg_sq"].select(pooled.dim, place), rows["exp_avg_sq"] * len(members) ** 2)
        mean = dense[name].index_select(pooled.dim, members).mean(pooled.dim)
        torch.testing.assert_close(model.get_parameter(name).select(pooled.dim, place), mean)
    before = model.get_parameter(name).detach().clone()
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert (model.get_parameter(name) != before).any(1 - pooled.dim).all()


@pytest.mark.nightly
def test_eager_code_that_repeats_no_heads_is_refused_with_what_to_do():
    model = build("bert", attn_implementation="eager")
    shape = shape_of(model)
    with pytest.raises(
        ValueError, match=r"BertForMaskedLM with attn_implementation=\"eager\" .* 2 KV heads.*set_attn_implementation"
    ):
        convert_kv_heads(model, 2)
    assert shape_of(model) == shape
    convert_kv_heads(model, 1)
    assert shape_of(model).attributes[f"bert.encoder.layer.0.attention.self.{GROUPS}"] == 8
    check_same(model, pooled_and_repeated(build("bert"), "bert", 1))


@pytest.mark.parametrize(("layers", "message"), [
    ([2], "layers: there is no 2; there are 0 to 1, in this order: bert"),
    (["nothing"], "layers: there is no 'nothing'"),
    ([True], "layers: there is no True"),
    ([], "layers is empty"),
])  # fmt: skip
def test_layers_that_are_not_there_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        plan_kv_heads(build("bert"), 2, layers=layers)


def test_what_no_way_makes_right_is_refused():
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48))
    with pytest.raises(ValueError, match="XLNetLMHeadModel does not support fewer KV heads"):
        plan_kv_heads(model, 2)


def test_of_a_model_that_sees_only_the_language_model_follows():
    text = transformers.LlamaConfig(**ZOO["llama"][1] | {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 6})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**ZOO["clip"][1]), text_config=text, image_token_index=5
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    plan = convert_kv_heads(model, 3)  # which the vision model could not have
    assert all("language_model" in name for name in plan.layers)
    assert sorted(kv_heads_by_layer(model).values()) == [3, 3]
    assert model.config.text_config.num_key_value_heads == 3


def test_random_numbers_go_on_as_if_nothing_had_been_proved():
    model, state = build("bert"), torch.random.get_rng_state()
    plan_kv_heads(model, 2)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("heads", [3, 8, 16])
def test_numbers_that_are_not_legal_without_a_field(heads):
    with pytest.raises(ValueError, match=f"num_key_value_heads={heads} must be .*8 KV heads and 8 query heads. Use 1, 2, 4."):
        plan_kv_heads(build("bert"), heads)


class TestWeights:
    """The conversion of what another method has put in the place of the weights."""

    @pytest.mark.parametrize("family", ["llama", "bert"])
    def test_it_starts_from_these(self, family):
        dense, other = build(family), build(family)
        for parameter in other.parameters():
            parameter.data.mul_(1.5)
        plan = plan_kv_heads(dense, 2)
        name = next(iter(plan.parameters))
        beside = next(n for n, p in dense.named_parameters() if "o_proj" in n or "dense.weight" in n)
        optimizer = torch.optim.AdamW(dense.parameters())
        dense(torch.arange(8).view(2, 4), labels=torch.arange(8).view(2, 4)).loss.backward()
        optimizer.step()
        kept = optimizer.state[dense.get_parameter(beside)]["exp_avg"].clone()
        expected, untouched = (
            copy.deepcopy(other),
            dense.get_input_embeddings().weight,
        )
        convert_kv_heads(expected, 2)
        given = {one: other.get_parameter(one).detach() for one in (name, beside)}
        apply(dense, plan, optimizer, given)
        for one in (name, beside):
            assert torch.equal(dense.get_parameter(one), expected.get_parameter(one))
        assert torch.equal(optimizer.state[dense.get_parameter(beside)]["exp_avg"], kept)
        assert untouched is dense.get_input_embeddings().weight

    def test_values_of_other_sizes_or_names_are_refused(self):
        model = build("llama")
        plan, shape = plan_kv_heads(model, 2), shape_of(model)
        name = "model.layers.0.self_attn.o_proj.weight"
        for wrong, message in (
            (name, "has size \\[3\\], but must have"),
            ("nothing", "'nothing' is not a parameter of LlamaForCausalLM"),
        ):
            with pytest.raises(ValueError, match=f"weights: .*{message}"):
                apply(model, plan, weights={wrong: torch.zeros(3)})
        with pytest.raises(ValueError, match="the new values are not finite"):
            apply(model, plan, weights={name: torch.full((32, 32), torch.nan)})
        assert shape_of(model) == shape

    def test_a_plan_of_another_model_is_refused(self):
        model = build("llama")
        plan = plan_kv_heads(model, 2)
        convert_kv_heads(model, 4)
        with pytest.raises(ValueError, match="plan: it was made for a different model"):
            apply(model, plan)


class TestFromALightningCheckpoint:
    @pytest.mark.parametrize("family", ["phi3", "t5"])
    def test_it_is_exported(self, family, tmp_path):
        _, _, converted, _ = three(family, 2)
        holder = torch.nn.ModuleDict({"model": converted})
        checkpoint = {"state_dict": holder.state_dict()}
        save_shape(holder, checkpoint)
        torch.save(checkpoint, tmp_path / "a.ckpt")
        again = build_model(read_checkpoint(tmp_path / "a.ckpt"), "a.ckpt")
        assert shape_of(again) == shape_of(converted)
        check_same(again, converted, sizes=[(2, 4)])
        fresh = torch.nn.ModuleDict({"model": build(family)})
        load_shape(fresh, read_checkpoint(tmp_path / "a.ckpt"))
        fresh.load_state_dict(holder.state_dict())
        check_same(fresh["model"], converted, sizes=[(2, 4)])
