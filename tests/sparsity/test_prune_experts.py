"""Experts of a mixture are pruned by the tokens that are routed to each, wherever the model is."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import billhook as bh
from billhook.model.layers import prunable
from billhook.sparsity.masks import FEWEST
from billhook.sparsity.weight_plan import WeightPlan
from kit import prunes, stopped
from kit.families import build
from kit.fits import same
from kit.ranks import Ranks
from kit.sparsity import family, stable_sort_rows, weight_named
from kit.streams import same as saved_as

pytestmark = pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation")
WANDA = {"criterion": bh.Wanda(), "sparsity": 0.5}


def batches_of(padded=False, number=3, length=32):
    torch.manual_seed(7)
    batches = [{"input_ids": torch.randint(3, 60, (4, length))} for _ in range(number)]
    for batch in batches if padded else ():
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, length // 2 :] = 0
        batch["attention_mask"][2, : length // 3] = 0
    return batches


def matrices_of(experts, number):
    """The matrices and biases of an expert, `[out, in]`."""
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        matrix = getattr(experts, name)[number].detach()
        bias = getattr(experts, f"{name}_bias")[number].detach() if experts.has_bias else None
        yield name, matrix.T if experts.is_transposed else matrix, bias


def routed_tokens(model, batches):
    """The inputs of each expert's matrices in the dense model, by a loop over experts and non-padding tokens, of each batch."""
    seen = {}

    def hook(name, keep, experts, args):
        hidden, chosen = args[0].detach(), args[1]
        for number in range(len(experts.down_proj)):
            rows = hidden[(chosen == number).any(-1) & keep.flatten()]
            for stack, matrix, bias in matrices_of(experts, number):
                seen.setdefault((name, stack, number), []).append(rows)
                rows = nn.functional.linear(rows, matrix, bias)
                rows = (experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)) if stack != "down_proj" else rows

    for batch in batches:
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        modules = [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]
        hooks = [module.register_forward_pre_hook(partial(hook, name, keep)) for name, module in modules]
        with torch.no_grad():
            model(**batch)
        for handle in hooks:
            handle.remove()
    return seen


@pytest.mark.daily("unstructured-*mixtral", "2:4-True-qwen3_moe", "unstructured-True-*")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "nemotron_h"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_scores_each_expert_by_its_tokens(name, padded, pattern):
    model, batches = family(name), batches_of(padded)
    seen = routed_tokens(model, batches)
    how = {"sparsity": 0.5} if pattern == "unstructured" else {"pattern": pattern}
    plan = prunes.prune(model, bh.Wanda(), batches, **how, sequential="none", dry_run=True)
    masks = plan.masks(model)
    assert not plan.uncalled
    assert not plan.unsupported
    for (owner, stack, number), parts in seen.items():
        tokens, experts = torch.cat(parts), model.get_submodule(owner)
        weight = next(matrix for found, matrix, _ in matrices_of(experts, number) if found == stack)
        few = len(tokens) < FEWEST
        assert few == (f"{owner}.{number}.{stack}" in plan.by_magnitude)
        scores = weight.abs() if few else weight.abs() * tokens.norm(dim=0)
        groups = scores.reshape(-1, 4) if pattern == "2:4" else scores
        expected = stable_sort_rows(groups, groups.shape[1] // 2).view(scores.shape)
        mask = masks[f"{owner}.{stack}"][number]
        mask = mask.T if experts.is_transposed else mask
        if few and pattern == "unstructured":
            assert (~mask).sum() == mask.numel() // 2
        else:
            assert (mask == expected).float().mean() > 0.999
    assert len(seen) == sum(".experts." in found for found in plan.pruned)


def test_sparsegpt_solves_for_an_expert_as_for_a_linear_layer():
    model, batches = build("mixtral"), batches_of()
    seen, alone = routed_tokens(model, batches), {}
    for (owner, stack, number), parts in seen.items():
        linear = nn.Linear(1, 1, bias=False)
        weight = next(matrix for found, matrix, _ in matrices_of(model.get_submodule(owner), number) if found == stack)
        linear.weight = nn.Parameter(weight.clone())
        bh.prune(nn.Sequential(linear), bh.SparseGPT(), parts, 0.5)
        alone[owner, stack, number] = linear.weight.detach()
    prunes.prune(model, bh.SparseGPT(), batches, 0.5, sequential="none")
    for (owner, stack, number), weight in alone.items():
        found = model.get_submodule(owner).get_parameter(stack)[number]
        assert ((found == 0) == (weight == 0)).float().mean() > 0.999
        torch.testing.assert_close(found, weight, atol=1e-4, rtol=1e-3)


def test_the_plan_names_and_counts_experts(tmp_path):
    model, batches = build("mixtral"), batches_of()
    dense = copy.deepcopy(model)
    plan = prunes.prune(model, bh.Wanda(), batches, 0.5, skip=["*.experts.3.*"])
    assert not any(".experts.3." in name for name in plan.pruned)
    again = WeightPlan.from_json(plan.to_json(), dense)
    assert again.text() == plan.text()
    assert again.sparsity == plan.sparsity
    again.apply(dense)
    assert same(dense.state_dict(), model.state_dict())
    zeros = sum(int((value == 0).sum()) for name, value in model.model.layers.named_parameters() if value.dim() > 1)
    sizes = sum(linear.weight.numel() for linear in prunable(model).values())
    sizes += sum(value[:3].numel() for value in model.parameters() if value.dim() == 3)
    assert plan.sparsity == pytest.approx(zeros / sizes)
    masks = plan.masks(model)
    for name, value in model.named_parameters():
        if value.dim() == 3:
            assert torch.equal(masks[name], value != 0)
            assert masks[name][3].all()
    model.save_pretrained(tmp_path)
    assert same(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.SparseGPT()])
@pytest.mark.parametrize("sequential", ["block", "layer"])
def test_streamed_experts_are_pruned_as_in_memory(tmp_path, criterion, sequential):
    build("mixtral").save_pretrained(tmp_path / "dense")
    batches = batches_of(padded=True)
    dense, streamed = bh.load(tmp_path / "dense"), bh.stream(tmp_path / "dense", tmp_path / "out")
    how = {"sparsity": 0.5, "sequential": sequential}
    plans = [prunes.prune(dense, criterion, batches, **how)]
    plans += [prunes.prune(streamed, criterion, batches, **how, activations=str(tmp_path))]
    assert plans[0].text() == plans[1].text()
    assert plans[0].by_magnitude == plans[1].by_magnitude
    bh.save(streamed, tmp_path / "out")
    assert saved_as(tmp_path / "out", dense)


@pytest.mark.parametrize(
    "how", [{"sequential": "layer"}, {"allocation": bh.criteria.OWL()}, {"match": bh.criteria.BlockMatching(steps=20)}], ids=str
)
def test_options(how):
    model, batches = build("mixtral"), batches_of()
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    plan = prunes.prune(model, bh.Wanda(compares="layer"), batches, 0.5, **how)
    assert plan.sparsity == pytest.approx(0.5, abs=1e-3)
    for name, mask in plan.masks(model).items():
        weight = weight_named(model, name)
        assert not weight[~mask].any()
    if "match" in how:
        bh.prune(plain, bh.Wanda(compares="layer"), batches, 0.5)
        with torch.no_grad():
            far = [sum(float((found(**x)[0] - dense(**x)[0]).norm()) for x in batches) for found in (model, plain)]
        assert far[0] < far[1]


def test_a_streamed_model_that_was_stopped_goes_on_to_the_same_plan(tmp_path, monkeypatch):
    build("mixtral", num_local_experts=8).save_pretrained(tmp_path / "dense")
    batches, model = batches_of(number=1, length=8), bh.load(tmp_path / "dense")
    expected = bh.prune(model, batches=batches, **WANDA)
    _, go_on = stopped.stop_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        bh.prune(bh.stream(tmp_path / "dense", tmp_path / "out"), batches=batches, **WANDA)
    go_on()
    streamed = bh.stream(tmp_path / "dense", tmp_path / "out")
    plan = bh.prune(streamed, batches=batches, **WANDA)
    assert len(plan.by_magnitude) > 8
    assert plan.by_magnitude == expected.by_magnitude
    assert plan.decided() == expected.decided()
    bh.save(streamed, tmp_path / "out")
    assert saved_as(tmp_path / "out", model)


@pytest.mark.parametrize("sequential", ["block", "layer"])
@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.SparseGPT()])
def test_two_ranks_come_to_the_masks_of_one(sequential, criterion):
    """Also if an expert receives tokens on one rank only, and few in all."""
    model, batches = build("mixtral", num_local_experts=8), batches_of(number=2, length=8)
    batches.append({"input_ids": batches[1]["input_ids"][:1, :1]})
    how = {"criterion": criterion, "sparsity": 0.5, "sequential": sequential, "dry_run": True}
    one = prunes.prune(model, batches=batches, **how)

    def plan(rank, reduce):
        return prunes.prune(copy.deepcopy(model), batches=batches[rank * 2 : rank * 2 + 2], reduce=reduce, **how)

    first, second = Ranks(2).run(plan)
    assert first.decided() == second.decided()
    assert one.by_magnitude.keys() == first.by_magnitude.keys() == second.by_magnitude.keys()
    assert 0 < len(one.by_magnitude) < len(one.pruned)
    expected, found = one.masks(model), first.masks(model)
    assert min(float((found[name] == mask).float().mean()) for name, mask in expected.items()) > 0.98


def test_batches_of_padding_alone_are_refused():
    model, batches = build("mixtral"), batches_of(padded=True, number=1)
    batches[0]["attention_mask"].zero_()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no linear layer was called with a non-padding token"):
        bh.prune(model, batches=batches, **WANDA)
    assert same(model.state_dict(), before)


def test_a_global_criterion_compares_experts_with_all_layers():
    model, batches = build("mixtral"), batches_of()
    plan = prunes.prune(model, bh.Wanda(compares="global"), batches, 0.5, sequential="none")
    assert plan.sparsity == pytest.approx(0.5, abs=1e-4)
    assert not plan.by_magnitude


def test_masks_of_experts_are_held_in_training(tmp_path):
    """Also in a training that is resumed from the middle, which ends as the other."""
    first, batches = build("mixtral").train(), batches_of(number=6)
    masks, ended = bh.prune(first, batches=batches, **WANDA).masks(first), []

    def resume(model, masks, state=None):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
        if state is not None:
            optimizer.load_state_dict(state)
        return model, optimizer, bh.hold_masks(model, optimizer, masks)

    for stopped_at in (None, 3):
        model, optimizer, held = resume(copy.deepcopy(first), masks)
        for number, batch in enumerate(batches):
            if number == stopped_at:
                torch.save([optimizer.state_dict(), held.state_dict()], tmp_path / "state")
                state, saved = torch.load(tmp_path / "state", weights_only=True)
                model, optimizer, held = resume(copy.deepcopy(model), saved, state)
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert not any(weight_named(model, name)[~mask].any() for name, mask in masks.items())
        assert same(held.masks, masks)
        ended.append(model.state_dict())
    assert same(*ended)
