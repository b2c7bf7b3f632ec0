"""Blocks are matched after a repair: all their weights are tuned, zeros and ties hold, and the model stays as it is."""

import copy

import pytest
import torch

import billhook as bh
from billhook.engine.batches import Run
from billhook.engine.lazy import LazyTensors
from billhook.kv_heads.convert import find_attentions
from billhook.kv_heads.plan import plan_kv_heads
from billhook.repairs.matching import BlockMatching, BlockTuning, match_blocks
from kit.families import build, tokens
from kit.losses import BUILD
from kit.ranks import Ranks

FEW = BlockMatching(steps=40, lr=0.02)
KINDS = {
    "llama": lambda: bh.load("tiny", dtype="float32"),
    "mixtral": lambda: build("mixtral", num_key_value_heads=8),
    "gpt2": lambda: BUILD["gpt2"]().eval(),
    "t5": lambda: BUILD["t5"]().eval(),
    "bert": lambda: BUILD["bert"]().eval(),
}


def batches_for(model, number=6):
    found = [{"input_ids": tokens(16, 16)} for _ in range(number)]
    return [one | {"labels": tokens(16, 8)} for one in found] if model.config.is_encoder_decoder else found


def far(model, dense, batches):
    with torch.no_grad():
        return sum(float((model(**batch).logits - dense(**batch).logits).norm()) for batch in batches)


def cut(model):
    kinds = {"heads": 0.5} if "Mixtral" in type(model).__name__ else {"heads": 0.5, "channels": 0.5}
    return bh.plan(model, bh.importance.WeightNorm(), **kinds)


@pytest.mark.daily("gpt2")
@pytest.mark.parametrize("family", KINDS)
def test_units_go_and_the_model_is_nearer_to_the_dense_one(family):
    torch.manual_seed(0)
    dense = KINDS[family]()
    before, batches, plan = copy.deepcopy(dense.state_dict()), batches_for(dense), cut(dense)
    repaired, matched = (bh.repair(dense, plan, batches, bh.RepairConfig(match=match)) for match in (None, FEW))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items()), "the model does not change"
    assert set(matched) > set(repaired)
    assert any("norm" in name.lower() or "ln_" in name for name in matched), "norms are tuned, too"
    for name, value in repaired.items():
        assert not matched[name][value == 0].any(), "zeros stay"
    distances = []
    for weights in (repaired, matched):
        assert all(value.isfinite().all() for value in weights.values())
        model = copy.deepcopy(dense)
        bh.apply(model, plan, weights=weights)
        distances.append(far(model, dense, batches))
    assert distances[1] < 0.97 * distances[0]


@pytest.mark.nightly
def test_blocks_go_and_those_behind_them_make_up_for_it(tmp_path):
    dense = bh.load("tiny", dtype="float32")
    batches, plan, distances = batches_for(dense), bh.pruning.plan_units(dense, {"model.layers": [1]}, "block"), []
    for how in (None, bh.RepairConfig(), bh.RepairConfig(match=FEW)):
        model = bh.stream("tiny", tmp_path / str(len(distances)), dtype="float32") if how and how.match else copy.deepcopy(dense)
        weights = None if how is None else bh.repair(model, plan, batches, how)
        assert not [name for name in weights or () if name.startswith(("model.layers.0.", "model.layers.1."))]
        bh.apply(model, plan, weights=weights)
        assert model.config.num_hidden_layers == 3
        distances.append(far(model, dense, batches))
    assert distances[2] < 0.97 * distances[1] < 0.97 * distances[0]


def test_the_last_block_has_none_behind_it():
    dense = build("llama")
    plan = bh.pruning.plan_units(dense, {"model.layers": [1]}, "block")
    with pytest.raises(ValueError, match="no linear layer runs after the removed blocks, so none can compensate"):
        bh.repair(dense, plan, batches_for(dense))


def test_a_plan_of_other_changes_is_refused():
    dense = build("llama")
    with pytest.raises(ValueError, match=r"plan: repair supports plans of units and of blocks, got a plan of kv_heads"):
        bh.repair(dense, plan_kv_heads(dense, 2), batches_for(dense))


@pytest.mark.daily("svd-2", "*similar*-1")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["mean", "svd", bh.kv_methods.SVD("similar")], ids=str)
def test_heads_of_a_group_stay_equal(groups, method):
    dense = build("llama", num_key_value_heads=8, attention_bias=True)
    batches = batches_for(dense)
    plan = plan_kv_heads(dense, groups, bh.kv_heads.methods.method_of(method) if isinstance(method, str) else method)
    attentions = find_attentions(dense, plan)
    runs = [attentions.run(batch) for batch in batches]
    ((_, new),) = attentions.reconstructed([plan.method], runs)
    tuned = attentions.repaired(new, runs, bh.RepairConfig(match=FEW)).values
    changed = 0
    for name in attentions.projections:
        for kind in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
            heads = tuned[f"{name}.{kind}"].unflatten(0, (groups, 8 // groups, -1))
            assert torch.equal(heads, heads[:, :1].expand_as(heads)), kind
            changed += not torch.equal(tuned[f"{name}.{kind}"], new.values[f"{name}.{kind}"])
    assert changed


def test_a_converted_model_computes_what_was_matched(tmp_path):
    dense = build("llama", num_key_value_heads=8)
    batches, models = batches_for(dense), {}
    for match in (None, FEW):
        models[match] = copy.deepcopy(dense)
        bh.convert_kv_heads(models[match], 2, "svd", batches, repair=bh.RepairConfig(match=match))
    assert far(models[FEW], dense, batches) < 0.97 * far(models[None], dense, batches)
    bh.save(models[FEW], tmp_path)
    with torch.no_grad():
        assert torch.equal(models[FEW](**batches[0]).logits, bh.load(tmp_path)(**batches[0]).logits)


def test_inputs_come_from_matched_blocks_and_goals_from_the_dense_model(monkeypatch):
    dense, seen = build("llama"), []
    batches, plan, original = batches_for(dense), cut(dense), BlockTuning.__call__

    def noted(self, tune, held_out):
        seen.append((self.block, [*tune, *held_out]))
        return original(self, tune, held_out)

    monkeypatch.setattr(BlockTuning, "__call__", noted)
    weights = bh.repair(dense, plan, batches, bh.RepairConfig(match=FEW))
    monkeypatch.undo()
    model = copy.deepcopy(dense)
    bh.apply(model, plan, weights=weights)
    with torch.no_grad():
        small, whole = ([one(**batch, output_hidden_states=True).hidden_states for batch in batches] for one in (model, dense))
    held_out = FEW.is_held_out([""] * len(batches))
    order = sorted(range(len(batches)), key=held_out.__getitem__)
    assert [block for block, _ in seen] == list(dense.model.layers)
    for sample, batch in zip(seen[1][1], order, strict=True):
        torch.testing.assert_close(sample.inputs[0][0], small[batch][1], atol=1e-5, rtol=1e-4)
    for sample, batch in zip(seen[0][1], order, strict=True):
        torch.testing.assert_close(sample.goal, whole[batch][1])


def test_blocks_that_compute_the_same_stay_as_they_are():
    dense = build("llama")
    batches, plan = batches_for(dense), bh.pruning.plan_units(dense, {1: [0, 3]}, "channel")
    weights = bh.repair(dense, plan, batches, bh.RepairConfig(match=FEW))
    assert all(torch.equal(value, dense.get_parameter(name)) for name, value in weights.items() if ".layers.0." in name)
    assert any(not torch.equal(value, dense.get_parameter(name)) for name, value in weights.items() if ".layers.1.input" in name)


def test_padding_does_not_count():
    dense, plan = build("llama"), None
    plan = cut(dense)
    mask = torch.ones(16, 16, dtype=torch.long)
    mask[::2, 11:] = 0

    def tuned(other):
        torch.manual_seed(0)
        batches = []
        for batch in batches_for(dense):
            ids = torch.where(mask.bool(), batch["input_ids"], other)
            batches.append({"input_ids": ids, "attention_mask": mask})
        return bh.repair(dense, plan, batches, bh.RepairConfig(match=FEW))

    one, two = tuned(3), tuned(5)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-4)


def test_ranks_come_to_the_same():
    dense = build("llama")
    batches, plan = batches_for(dense, 8), cut(dense)
    copies = [copy.deepcopy(dense) for _ in range(2)]

    def one(rank, reduce):
        return bh.repair(copies[rank], plan, batches[rank::2], bh.RepairConfig(match=FEW), reduce=reduce)

    first, *others = Ranks(2).run(one)
    assert any("norm" in name for name in first)
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


def test_a_rank_with_one_batch_is_refused_on_all_ranks():
    dense = build("llama")
    batches, plan = batches_for(dense, 4), cut(dense)
    copies = [copy.deepcopy(dense) for _ in range(2)]

    def one(rank, reduce):
        return bh.repair(copies[rank], plan, [batches[:3], batches[3:]][rank], bh.RepairConfig(match=FEW), reduce=reduce)

    with pytest.raises(ValueError, match="match needs at least two batches on each rank .*, got (3|1) on this rank"):
        Ranks(2).run(one)


def test_adapters_and_what_is_beneath_them_stay():
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    with_lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    batches, plan = batches_for(model), bh.pruning.plan_units(with_lora, {0: [0, 3]}, "channel")
    weights = bh.repair(with_lora, plan, batches, bh.RepairConfig(match=FEW))
    assert any(".k_proj." in name for name in weights)
    assert not [name for name in weights if "q_proj" in name or "v_proj" in name]


def test_blocks_that_are_called_again_are_refused():
    dense = build("llama")
    name, batches = "model.layers.0.mlp.down_proj.weight", batches_for(dense)
    twice = [Run(lambda batch=batch: (dense(**batch), dense(**batch))) for batch in batches]
    with pytest.raises(ValueError, match=r"match: model.layers.0 is called again after its block"):
        match_blocks(dense, LazyTensors.of({name: dense.get_parameter(name).detach() / 2}), twice, FEW)


def test_one_batch_is_too_few():
    dense = build("llama")
    with pytest.raises(ValueError, match="batches: repair needs at least two batches"):
        bh.repair(dense, cut(dense), batches_for(dense, 1), bh.RepairConfig(match=FEW))
    assert bh.repair(dense, cut(dense), batches_for(dense, 2), bh.RepairConfig(match=BlockMatching(steps=1)))


def test_some_of_each_source_is_held_out():
    matching = bh.criteria.BlockMatching()
    assert matching.is_held_out(["a"] * 4 + ["b"] * 4) == [False, False, True, False, True, False, False, False]
    assert matching.is_held_out(["a"] * 16 + ["b"] * 16) == [number in (4, 12, 20, 28) for number in range(32)]
    assert matching.is_held_out(["a", "b", "c"]) == [False, True, False], "what is alone in its source is tuned on"
    assert matching.is_held_out(["a", "a"]) == [False, True]
