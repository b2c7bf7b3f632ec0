"""What goes with heads: tables, numbers, and every plan that is refused before anything changes."""

import pytest
import transformers
from packaging.version import Version
from small_configs import OVERRIDES, small_config
from small_configs import build as small

import billhook as bh
from billhook.model.inputs import make_inputs
from billhook.model.shape import shape_of
from billhook.units.find import find_units
from kit.families import build, llama, t5
from kit.shaped import bert, gpt2

LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]  # of families.llama: 8 query heads of 4, 4 KV heads


def refused(model, heads, match, **options):
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    shape = shape_of(model)
    with pytest.raises(ValueError, match=match):
        bh.pruning.prune_units(model, heads, **options)
    with pytest.raises(ValueError, match=match):
        bh.pruning.plan_units(model, heads, **options)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert shape_of(model) == shape


def test_a_plan_says_what_stays():
    plan = bh.pruning.plan_units(llama(), {0: [1, 2, 5, 7], LAYERS[1]: [6, 7]})
    assert plan.units == {LAYERS[0]: [1, 2, 5, 7], LAYERS[1]: [6, 7]}
    assert plan.before == dict.fromkeys(LAYERS, (8, 4))
    assert plan.after == {LAYERS[0]: (4, 4), LAYERS[1]: (6, 3)}
    query = [head * 4 + i for head in (0, 3, 4, 6) for i in range(4)]
    found = {key: stays.tolist() for key, stays in plan.cuts.items()}
    assert found[f"{LAYERS[0]}.q_proj.weight", 0] == found[f"{LAYERS[0]}.o_proj.weight", 1] == query
    assert found[f"{LAYERS[0]}.k_proj.weight", 0] == found[f"{LAYERS[0]}.v_proj.weight", 0] == list(range(16))
    assert found[f"{LAYERS[1]}.q_proj.weight", 0] == found[f"{LAYERS[1]}.o_proj.weight", 1] == list(range(24))
    assert found[f"{LAYERS[1]}.k_proj.weight", 0] == found[f"{LAYERS[1]}.v_proj.weight", 0] == list(range(12))
    assert len(found) == 8
    before = llama().num_parameters()
    assert plan.parameters == (before, before - 2 * 32 * 16 - 2 * 32 * (8 + 4))


def test_the_table():
    plan = bh.pruning.plan_units(llama(), {0: [1, 2, 5, 7]})
    before, after = plan.parameters
    assert str(plan).splitlines() == [
        f"LlamaForCausalLM: {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)",
        "  model.layers.0.self_attn  8 -> 4 query, 4 KV heads; without 1, 2, 5, 7",
        "  model.layers.1.self_attn  8 query, 4 KV heads",
    ]
    assert (
        str(bh.pruning.plan_units(bert(), {1: [3]})).splitlines()[2]
        == "  bert.encoder.layer.1.attention  4 -> 3 heads; without 3"
    )


def test_kv_heads_are_their_query_heads():
    model = llama()
    one, other = (
        bh.pruning.plan_units(model, {0: [1, 3], 1: [0]}, per="kv_head"),
        bh.pruning.plan_units(model, {0: [2, 3, 6, 7], 1: [0, 1]}),
    )
    assert one.units == other.units
    assert one.cuts.keys() == other.cuts.keys()
    assert all((one.cuts[key] == other.cuts[key]).all() for key in one.cuts)
    mixed = bh.pruning.plan_units(model, {0: [0, 1, 2, 4, 7]})  # a whole KV head, and one of two from each of the others
    assert mixed.after[LAYERS[0]] == (3, 3)


class TestRefused:
    def test_layers_and_heads_that_are_not_there(self):
        model = llama()
        order = "in this order: model.layers.0.self_attn, model.layers.1.self_attn"
        refused(model, {2: [0]}, f"heads: there is no module 2; there are 0 to 1, {order}")
        refused(model, {-1: [0]}, "heads: there is no module -1; there are 0 to 1")
        refused(model, {"layers.0": [0]}, "heads: there is no module 'layers.0'")
        refused(model, {True: [0]}, "heads: there is no module True")
        refused(model, {0: [0], 1: [8]}, f"heads: {LAYERS[1]} has no head 8; it has 0 to 7")
        refused(model, {0: [-1]}, f"heads: {LAYERS[0]} has no head -1")
        refused(model, {0: [4]}, f"heads: {LAYERS[0]} has no KV head 4; it has 0 to 3", per="kv_head")
        refused(model, {0: [0]}, "per='query' must be one of head, kv_head", per="query")

    def test_a_layer_without_heads(self):
        refused(bert(), {1: range(4)}, "bert.encoder.layer.1.attention would be left without heads; at least one of its 4 must")
        refused(llama(), {0: range(4)}, "would be left without heads; at least one of its 8 must stay", per="kv_head")
        refused(llama(num_key_value_heads=1), {0: [0]}, "at least one of its 8 must stay", per="kv_head")

    def test_a_single_head(self):
        refused(
            bert(num_attention_heads=1),
            {0: [0]},
            "heads: bert.encoder.layer.0.attention has only one head, which cannot be",
        )
        refused(gpt2(n_head=1), {1: [0]}, "heads: transformer.h.1.attn has only one head, which cannot be removed")
        refused(llama(num_attention_heads=1, num_key_value_heads=1), {0: [0]}, "self_attn has only one head", per="kv_head")

    def test_kv_heads_that_would_serve_different_numbers(self):
        match = (
            r"the KV heads of model.layers.0.self_attn would have \[1, 2\] query heads each, but need the same number. Remove "
            r"whole KV heads \(per='kv_head'\), or the same number, 1 to 1, from each of its 4"
        )
        refused(llama(), {0: [0]}, match)
        refused(llama(), {0: [0, 2, 4]}, match)
        wide = llama(num_key_value_heads=2)
        refused(
            wide, {1: [0, 1, 2, 4]}, r"layers.1.self_attn would have \[1, 3\] query heads each, .* 1 to 3, from each of its 2"
        )
        assert bh.pruning.plan_units(wide, {1: [0, 2, 6, 7]}).after[LAYERS[1]] == (4, 2)
        assert bh.pruning.plan_units(llama(num_key_value_heads=1), {0: [3]}).after[LAYERS[0]] == (7, 1)

    def test_other_heads_of_layers_that_share_a_bias(self):
        model = t5()
        names = list(find_units(model, "head"))
        share = r"share a position bias with one column per head. Remove the same heads from all of them, or use bh.mask"
        refused(model, {names[0]: [1], names[1]: [2]}, f"heads: {names[0]}, {names[1]} {share}")
        refused(model, {names[1]: [1]}, f"heads: {names[0]}, {names[1]} {share}")
        refused(model, {"decoder.block.0.layer.0.SelfAttention": [1]}, f"decoder.block.1.layer.0.SelfAttention {share}")
        deep = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=5, vocab_size=64)
        refused(transformers.T5EncoderModel(deep).eval(), {0: [1]}, f"encoder.block.2.layer.0.SelfAttention and more {share}")

    def test_slopes_that_are_constants_of_the_code(self):
        masked = r"its values are a constant of the code \(arange\). Use bh.mask to mask them instead"
        bloom = small(small_config(transformers.BloomConfig), transformers.BloomForCausalLM)
        refused(bloom, {0: [1]}, f"heads: cannot be removed from transformer.h.0.self_attention: {masked}")
        mpt = small(small_config(transformers.MptConfig, n_heads=8), transformers.MptForCausalLM)
        refused(mpt, {1: [1]}, f"heads: cannot be removed from transformer.blocks.1.attn: {masked}")

    def test_a_norm_over_all_heads(self):
        normed = "a norm spans all of them, so its output would change"
        refused(build("olmo2"), {0: [0, 1]}, f"heads: cannot be removed from model.layers.0.self_attn: {normed}")
        if Version(transformers.__version__) >= Version("5.20"):  # Mamba2's code before has no heads that are found
            config = small_config(transformers.Mamba2Config)
            refused(
                small(config, transformers.Mamba2ForCausalLM),
                {1: [0]},
                f"heads: cannot be removed from backbone.layers.1.mixer: {normed}",
            )
        with bh.mask(build("olmo2"), {0: [0, 1]}):
            pass

    def test_models_without_attention(self):
        mamba = small(small_config(transformers.MambaConfig), transformers.MambaForCausalLM)
        refused(mamba, {0: [0]}, "model: MambaForCausalLM has no heads")

    def test_a_model_whose_code_has_put_other_modules_in_place(self):
        """A BigBird that has seen few tokens attends to all of them, and what is loaded builds that anew of its config."""
        kind = transformers.BigBirdForMaskedLM
        model = small(small_config(kind.config_class), kind)
        model(**make_inputs(model))
        refused(model, {0: [0, 1]}, "heads: BigBirdForMaskedLM runs without them, but not after it is saved and loaded")

    def test_heads_that_are_masked(self):
        model = llama()
        match = r"units: model.layers.1.self_attn.o_proj has a mask or gates. Remove them first with mask.remove\(\)"
        mask = bh.mask(model, {1: [1]})
        with pytest.raises(ValueError, match=match):
            bh.pruning.prune_units(model, {0: [0, 1]})
        mask.remove()
        with bh.gates(model, bh.find_units(model, "head")), pytest.raises(ValueError, match="has a mask or gates"):
            bh.pruning.prune_units(model, {0: [0, 1]})
        assert bh.pruning.prune_units(model, {0: [0, 1]}).after[LAYERS[0]] == (6, 3)


def test_codegen_deals_its_heads_to_four_cores():
    assert OVERRIDES["codegen"]["n_head"] == 8
    config = small_config(transformers.CodeGenConfig)
    model = small(config, transformers.CodeGenForCausalLM)
    shape = shape_of(model)
    with pytest.raises(ValueError, match="heads cannot be removed from CodeGenForCausalLM"):
        bh.pruning.prune_units(model, {0: [0, 1, 2, 5]})  # the cores would have one, none, one and two
    assert shape_of(model) == shape
    assert bh.pruning.prune_units(model, {0: [0, 2, 4, 7]}).after["transformer.h.0.attn"] == (4, 4)
