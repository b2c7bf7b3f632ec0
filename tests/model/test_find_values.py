"""Models whose tensors hold no values, or may not be changed, are refused before anything is."""

import pytest
import torch
import torch.nn.utils.prune
import transformers

import billhook as bh
from billhook.kv_heads.plan import plan_kv_heads
from kit import shrinks
from kit.families import VIT, llama, tokens

BATCHES = [{"input_ids": tokens(4, 24)} for _ in range(2)]
CHANGES = {
    "heads": lambda model: bh.pruning.prune_units(model, {0: [0, 1]}),
    "blocks": lambda model: bh.pruning.prune_units(model, [1], kind="block"),
    "residual": lambda model: bh.apply(model, bh.plan(model, scores=scores(model, "residual"), residual=0.25)),
    "weights": lambda model: bh.prune(model, bh.Wanda(), BATCHES, 0.5),
    "kv_heads": lambda model: bh.convert_kv_heads(model, 1),
    "kv_heads by svd": lambda model: bh.convert_kv_heads(model, 1, "svd", BATCHES),
    "scores": lambda model: bh.score(model, bh.find_units(model, "head"), bh.Taylor(), BATCHES),
}


def scores(model, kind):
    return {name: torch.arange(float(one.count())) for name, one in bh.find_units(model, kind).items()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_made_in_inference_mode_is_refused_as_it_is(change, inside):
    with torch.inference_mode():
        model = llama()
        before = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        torch.inference_mode(inside),
        pytest.raises(ValueError, match=r"model: .* was created under torch\.inference_mode.*outside"),
    ):
        CHANGES[change](model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "scores"])
def test_a_model_that_is_changed_in_inference_mode_can_be_trained_later(change):
    model = llama()
    with torch.inference_mode():
        CHANGES[change](model)
    model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()


def test_a_model_without_values_has_no_scores():
    model = llama().to("meta")
    with pytest.raises(ValueError, match=r"model: model.embed_tokens.weight has no values .it is on the meta device.. Load"):
        bh.score(model, bh.find_units(model, "head"), bh.importance.WeightNorm())


# a block is removed whatever its weights hold
ODD = [(change, kind) for change in CHANGES for kind in ("float8", "sparse") if change not in ("blocks", "scores")]


@pytest.mark.parametrize(("change", "kind"), ODD)
def test_weights_that_are_no_plain_numbers_are_refused_as_they_are(change, kind):
    model = llama()
    linear = model.model.layers[0].mlp.up_proj
    weight = linear.weight.detach()
    linear.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn) if kind == "float8" else weight.to_sparse(), False)
    before = linear.weight
    said = "up_proj.* is quantized" if kind == "float8" else r"up_proj.* has the sparse layout torch.sparse_coo"
    with pytest.raises(ValueError, match=said):
        CHANGES[change](model)
    assert linear.weight is before


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("change", ["heads", "blocks", "weights", "kv_heads", "save"])
def test_what_torch_ao_has_quantised_is_refused(change, tmp_path):
    model = torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"q_proj.* is quantized|q_proj.* is a dtype and no tensor|op quantized::linear"):
        bh.save(model, tmp_path / "a") if change == "save" else CHANGES[change](model)


PLANS = {
    "units": lambda model: bh.pruning.plan_units(model, {0: [0, 1]}),
    "blocks": lambda model: bh.pruning.plan_units(model, [1], kind="block"),
    "weights": lambda model: bh.prune(model, bh.Magnitude(), sparsity=0.5, dry_run=True),
    "kv_heads": lambda model: plan_kv_heads(model, 1),
}


@pytest.mark.parametrize("kind", PLANS)
def test_new_values_are_of_parameters_and_of_their_sizes(kind):
    model, name = llama(), "model.layers.0.mlp.down_proj.weight"
    plan, before = PLANS[kind](model), {name: value.clone() for name, value in model.state_dict().items()}
    for weights, said in (
        ({name: torch.tensor(1.0)}, r"down_proj.weight has size \[\], but must have \[32, 48\]"),
        ({name: torch.ones(1, 48)}, r"down_proj.weight has size \[1, 48\], but must have \[32, 48\]"),
        ({"model.layers.0.mlp": torch.ones(1)}, "'model.layers.0.mlp' is not a parameter of LlamaForCausalLM"),
        ({"model.nothing": torch.ones(1)}, "'model.nothing' is not a parameter of LlamaForCausalLM"),
    ):
        with pytest.raises(ValueError, match=f"weights: .*{said}"):
            bh.apply(model, plan, weights=weights)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_the_config_of_a_classifier_stays_as_it_is():
    """Its forward writes the kind of problem into it, once there are labels."""
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    batches = [{"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])} for _ in range(2)]
    for change in (
        lambda: bh.plan(model, bh.Taylor(), batches, channels=0.5),
        lambda: bh.score(model, bh.find_units(model, "channel"), bh.Taylor(), batches),
        lambda: bh.prune(model, bh.Wanda(), batches, 0.5),
    ):
        change()
        assert model.config.problem_type is None


@pytest.mark.parametrize("how", ["masked", "parametrised", "buffer"])
def test_weights_that_are_no_parameters_are_not_refitted(how):
    model = llama()
    linear = model.model.layers[0].mlp.down_proj
    if how == "masked":
        torch.nn.utils.prune.l1_unstructured(linear, "weight", 0.3)
    elif how == "parametrised":
        torch.nn.utils.parametrizations.orthogonal(linear)
    else:
        weight = linear.weight.detach()
        del linear.weight
        linear.register_buffer("weight", weight)
    plan = bh.pruning.plan_units(model, {0: [0, 1]})
    for refits in (lambda: shrinks.shrink(model, BATCHES, params=0.9), lambda: bh.repair(model, plan, BATCHES)):
        with pytest.raises(
            ValueError,
            match=r"the weight of .*down_proj is not a parameter \(it is a buffer, or computed.*Make it a parameter first",
        ):
            refits()
