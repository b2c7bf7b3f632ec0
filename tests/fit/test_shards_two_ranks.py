"""FSDP2 on the CPU: two processes under ModelParallelStrategy, started as in test_lightning_ddp; one fit after another."""

import pytest
import torch
import transformers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import billhook as bh
from billhook.adapters.masked import find_adapters
from billhook.checkpoints.export import export
from billhook.engine.sharding import is_sharded
from billhook.model.layers import prunable
from kit.beside import LAYERS, ON_TWO, ZEROS
from kit.families import llama, tokens
from kit.fits import same
from kit.four import FOUR
from kit.ranks import asked_for, run_script
from kit.settings import MASKED, SETTINGS
from kit.sharding import ADAPTED, CHANGED, MASKS, RESUMED, SHAPES, STEPS, weight_in

SCRIPT = """
import os
os.environ["PYTHONHASHSEED"] = "4"
from kit import beside, settings, sharding
sharding.fit_all()
settings.fit_all()
beside.measure_all()
"""


pytestmark = pytest.mark.slow
OF_FOUR = SCRIPT.partition("from")[0] + "from kit.four import fork_four\nfork_four()\n"


@pytest.fixture(scope="module")
def fitted(request, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(folder, SCRIPT, [files, str(folder), asked_for(request)])
    return folder


@pytest.fixture
def of_two(fitted):
    def read(name):
        alike, result = torch.load(fitted / f"{name}.pt", weights_only=True)
        assert alike, "the ranks differ"
        return result

    return read


@pytest.mark.daily("wanda, experts", "magnitude, global")
@pytest.mark.parametrize("name", MASKS | MASKED)
def test_two_processes_prune_as_one_does(of_two, files, tmp_path, name):
    state, (always, (masks, events)) = of_two(name)
    _, single, (_, (masks_of_one, events_of_one)) = (MASKS | MASKED)[name].run(tmp_path, files)
    assert always
    assert [e["after"]["sparsity"] for e in events] == [e["after"]["sparsity"] for e in events_of_one]
    assert masks.keys() == masks_of_one.keys()
    least = 0.97 if "bf" in name else 0.99
    for own, mask in masks_of_one.items():
        assert (mask == masks[own]).float().mean() >= least, own
        if "wanda" in name and "global" not in name and "Conv1D" not in name:
            assert (mask.sum(-1) == masks[own].sum(-1)).all()
        both = mask & masks[own]
        values = [weight_in(found, own) for found in (state, single)]
        assert not values[0][~masks[own]].any()
        torch.testing.assert_close(values[0][both], values[1][both], atol=0.05 if "bf" in name else 2e-3, rtol=1e-2)


@pytest.mark.daily("channels", "a rank without batches, repaired", "KV heads, matched")
@pytest.mark.parametrize("name", SHAPES)
def test_two_processes_change_shapes_as_one_does(of_two, files, tmp_path, name):
    state, (_, events) = of_two(name)
    _, single, (_, events_of_one) = SHAPES[name].run(tmp_path, files)
    assert [event["what"] for event in events] == [event["what"] for event in events_of_one]
    assert [event["after"]["params"] for event in events] == [event["after"]["params"] for event in events_of_one]
    assert events[-1]["before"]["params"] > events[-1]["after"]["params"]
    assert state.keys() == single.keys()
    for own, value in single.items():
        # AdamW makes much of rounding where gradients are small, and two ranks match blocks in steps of two batches
        if "bfloat16" in name or "matched" in name:
            assert (state[own] - value).abs().mean() < (2e-2 if "matched" in name else 5e-3), own
        else:
            torch.testing.assert_close(state[own], value, atol=5e-4 if "the best" in name else 1e-4, rtol=1e-3)


@pytest.mark.daily("bf16-mixed, channels by gradients")
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_change_shapes_as_one_does_whatever_is_set(of_two, files, tmp_path, name):
    state, (_, events) = of_two(name)
    run, single, (_, events_of_one) = SETTINGS[name].run(tmp_path, files)
    assert [event["what"] for event in events] == [event["what"] for event in events_of_one]
    assert [event["after"]["params"] for event in events] == [event["after"]["params"] for event in events_of_one]
    assert events[-1]["before"]["params"] > events[-1]["after"]["params"]
    assert state.keys() == single.keys()
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(run.precision, torch.float32)
    for own, value in single.items():
        assert state[own].dtype == value.dtype == dtype
        if "bf16" in name:
            assert (state[own] - value).abs().mean() < 2e-4, own
        else:
            torch.testing.assert_close(state[own], value, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def of_four(request, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    run_script(folder, OF_FOUR, [files, str(folder), asked_for(request)])
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_change_shapes_as_one_does(of_four, files, tmp_path, name):
    alike, (state, (_, told)) = torch.load(of_four / f"{name}.pt", weights_only=True)
    _, single, (_, told_of_one) = FOUR[name].run(tmp_path, files)
    assert alike
    assert [event["what"] for event in told] == [event["what"] for event in told_of_one]
    for own, value in single.items():
        torch.testing.assert_close(state[own], value, atol=1e-4, rtol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["adapted"])
def test_two_processes_mask_the_adapters_that_one_does(of_two, fitted, files, tmp_path, name):
    state, (_, (masks, events)) = of_two(name)
    _, single, (_, (masks_of_one, events_of_one)) = ADAPTED.run(tmp_path, files)
    assert [event["after"]["sparsity"] for event in events] == [event["after"]["sparsity"] for event in events_of_one]
    for linear, mask in masks_of_one.items():
        assert (mask == masks[linear]).float().mean() >= 0.99, linear
    for own, value in single.items():
        assert (state[own] - value).abs().mean() < 1e-4, own
    lit = bh.training.load_from_checkpoint(
        bh.TransformerModule, fitted / name / "step=5.ckpt", model=llama(vocab_size=2048), lora=bh.training.LoRA(r=2, dropout=0.0)
    )
    layers = find_adapters(lit.model)
    assert all(bool(layer.lora_B["default"].weight.any()) for layer in layers.values())
    assert masks.keys() <= layers.keys()
    merged = export(fitted / name / "step=5.ckpt", tmp_path / "merged")
    weights = prunable(bh.load(merged.folder))
    assert not any(weights[linear].weight[~mask].any() for linear, mask in masks.items())


@pytest.mark.daily("masks-3", "heads changed-*")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["adapted", *RESUMED, *CHANGED])
def test_resumed_equals_straight_through(of_two, name, step):
    straight, resumed = of_two(name), of_two(f"{name}, {step}")
    assert same(straight[0], resumed[0])
    assert str(straight[1]) == str(resumed[1])


@pytest.mark.filterwarnings("ignore:.*as many processes", "ignore:You're resuming", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.daily("heads changed-*")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CHANGED)
def test_one_process_goes_on_where_two_have_changed_shapes(of_two, fitted, alone, files, tmp_path, name, step):
    straight, (_, events) = of_two(name)
    (_, one), path = CHANGED[name], fitted / name / f"step={step}.ckpt"
    run, state, (_, events_of_one) = one.run(tmp_path, files, path=path, options={"strategy": alone})
    assert is_sharded(run.lightning_module)
    assert [event["what"] for event in events] == [event["what"] for event in events_of_one]
    for own, value in straight.items():
        torch.testing.assert_close(state[own], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["masks"])
def test_zeros_are_in_the_checkpoint(of_two, fitted, name):
    _, (_, masks) = of_two(name)
    path = fitted / name / "step=4.ckpt"
    assert not path.is_file()
    dcp_to_torch_save(path, path / "whole.pt")
    state = torch.load(path / "whole.pt", weights_only=True)["state_dict"]
    assert len(masks) == 15
    for linear, mask in masks.items():
        weight = state[f"model.{linear}.weight"]
        assert not weight[~mask].any()
        assert weight[mask].all()


@pytest.mark.daily("heads changed")
@pytest.mark.parametrize("name", CHANGED)
def test_a_checkpoint_whose_shapes_have_changed_is_exported_and_loaded(of_two, fitted, tmp_path, name):
    state, _ = of_two(name)
    path = fitted / name / "step=4.ckpt"
    assert path.is_file() == CHANGED[name][0]
    lit = bh.training.load_from_checkpoint(bh.TransformerModule, path, model=llama(vocab_size=2048))
    assert same(lit.state_dict(), state)
    export(path, tmp_path / "exported")
    ids = tokens()
    torch.testing.assert_close(bh.load(tmp_path / "exported")(ids).logits, lit.model.eval()(ids).logits)


def test_what_is_exported_loads(fitted):
    model = bh.load(fitted / "exported")
    assert type(model) is transformers.LlamaForCausalLM
    assert all((linear.weight == 0).float().mean() == 0.5 for linear in prunable(model).values())


@pytest.mark.nightly
@pytest.mark.parametrize("name", ON_TWO)
def test_two_blocks_at_most_are_there_on_each_of_two_ranks(of_two, name):
    for most, allowed, _ in of_two(f"{name}, beside {LAYERS}"):
        assert most <= allowed


@pytest.mark.nightly
@pytest.mark.parametrize("name", ZEROS)
def test_each_rank_has_its_share_and_no_more(of_two, name):
    few, many = (of_two(f"{name}, beside {layers}") for layers in (LAYERS, 2 * LAYERS))
    for (most, _, shards), (of_more, allowed, more) in zip(few, many, strict=True):
        assert of_more <= allowed
        assert of_more - most <= more - shards


def test_tensor_parallel_is_refused(of_two):
    for message, name in zip(of_two("refused"), ("WeightPruning", "KVHeadConversion"), strict=True):
        assert message.startswith(f"{name} does not support ModelParallelStrategy with these settings")
        assert "FSDP2 (ModelParallelStrategy with tensor_parallel_size=1)" in message
