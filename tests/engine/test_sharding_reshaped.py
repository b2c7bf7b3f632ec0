"""A sharded model whose shapes change, in one process: it is sharded as it was afterwards, whatever was told and set."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import billhook as bh
from billhook.engine import fsdp as internals
from billhook.engine.sharded_files import DeferredTensor
from billhook.engine.sharding import full_tensor, is_sharded
from billhook.engine.shards import gathered
from kit.families import llama, tokens


def sharded(mesh, **told):
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, **told)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer):
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model, optimizer):
    """Copies all values by name: of parameters, and of what the optimizer keeps of each."""
    found = {name: full_tensor(own).clone() for name, own in model.named_parameters()}
    kept = {name: optimizer.state[own] for name, own in model.named_parameters()}
    return found | {f"{name} {key}": full_tensor(one).clone() for name, own in kept.items() for key, one in own.items()}


def hooks(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    return [len(vars(part)[kind]) for part in model.modules() for kind in (*kinds, "_load_state_dict_post_hooks")]


def test_what_is_cut_is_sharded_and_trains_on_with_its_state(mesh):
    model, optimizer = sharded(mesh)
    step(model, optimizer)
    before = values(model, optimizer)
    plan = bh.pruning.plan_units(llama(tie_word_embeddings=True), {0: [1, 3]}, "channel")
    with gathered(model, [optimizer], gradients=False):
        assert not is_sharded(model)
        bh.apply(model, plan, optimizer)
    kept = [one for one in range(48) if one not in (1, 3)]
    after, name = values(model, optimizer), "model.layers.0.mlp.up_proj.weight"
    assert isinstance(model.get_parameter(name), DTensor)
    for own in (name, f"{name} exp_avg", f"{name} exp_avg_sq"):
        assert torch.equal(after[own], before[own][kept])
    assert all(isinstance(model, FSDPModule) for model in (model, *model.model.layers))
    assert all(isinstance(one, DTensor) for own in optimizer.state.values() for one in own.values() if one.ndim)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    step(model, optimizer)
    assert not torch.equal(full_tensor(model.get_parameter(name)), after[name])


def test_an_error_leaves_all_as_it_was(mesh):
    model, optimizer = sharded(mesh)
    step(model, optimizer)
    before, there = values(model, optimizer), hooks(model)
    with pytest.raises(ValueError, match="in the middle"), gathered(model, [optimizer], gradients=False):
        raise ValueError("in the middle")
    after = values(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    step(model, optimizer)
    assert hooks(model) == there


@pytest.mark.parametrize("number", [1, 5])  # before FSDP is taken off, and after
def test_a_gather_that_fails_leaves_all_as_it_was(mesh, monkeypatch, number):
    model, optimizer = sharded(mesh)
    step(model, optimizer)
    before, there, seen = values(model, optimizer), hooks(model), []

    def fails(tensor):
        seen.append(tensor)
        if len(seen) == number:
            raise MemoryError
        return full_tensor(tensor)

    monkeypatch.setattr("billhook.engine.shards.full_tensor", fails)
    with pytest.raises(MemoryError), gathered(model, [optimizer], gradients=False):
        pass
    after = values(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(isinstance(part, FSDPModule) for part in (model, *model.model.layers))
    step(model, optimizer)
    assert hooks(model) == there


def test_what_was_told_and_set_is_kept(mesh):
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    model, optimizer = sharded(mesh, reshard_after_forward=False, mp_policy=policy)
    first, second = model.model.layers
    first.set_modules_to_forward_prefetch([second])
    second.set_modules_to_backward_prefetch([first])
    second.set_gradient_divide_factor(4.0)
    second.set_reshard_after_backward(False)
    with gathered(model, [optimizer], gradients=False):
        pass
    (of_first, of_second) = (part._get_fsdp_state() for part in (first, second))
    assert of_first._states_to_forward_prefetch == [of_second]
    assert of_second._states_to_backward_prefetch == [of_first]
    (group,) = internals.groups_of(of_second)
    assert (group.gradient_divide_factor, group.reshard_after_backward, group.post_forward_mesh_info) == (4.0, False, None)
    assert of_first._mp_policy == policy
    model(input_ids=tokens())
    assert not isinstance(first.mlp.up_proj.weight, DTensor)  # as it is not sharded after a forward


def test_dimensions_and_ignored_parameters_are_kept(mesh):
    torch.manual_seed(0)
    model = llama()
    norm = model.model.norm.weight
    fully_shard(model, mesh=mesh, ignored_params={norm}, shard_placement_fn=lambda own: Shard(own.ndim - 1))
    with gathered(model, [], gradients=False):
        bh.convert_kv_heads(model, 2)
    assert model.model.norm.weight is norm
    assert model.model.layers[0].self_attn.k_proj.weight.placements == (Shard(1),)


@pytest.mark.parametrize("gradients", [True, False])
def test_gradients_follow_where_they_are_asked_for(mesh, gradients):
    model, optimizer = sharded(mesh)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    before = {name: full_tensor(own.grad).clone() for name, own in model.named_parameters()}
    with gathered(model, [optimizer], gradients=gradients):
        pass
    for name, own in model.named_parameters():
        assert (own.grad is not None) == gradients
        assert not gradients or torch.equal(full_tensor(own.grad), before[name])


@pytest.mark.parametrize(("where", "name"), [("groups", "fsdp_params"), ("", "_mp_policy")])
def test_another_fsdp_is_refused_before_anything_changes(mesh, where, name):
    model, optimizer = sharded(mesh)
    state = model.model.layers[1]._get_fsdp_state()
    del vars(internals.groups_of(state)[0] if where else state)[name]
    told = rf"torch {torch.__version__.partition('+')[0]}.*: its FSDP2 lacks {name}, which"
    with pytest.raises(RuntimeError, match=told), gathered(model, [optimizer], gradients=False):
        pass
    assert isinstance(model, FSDPModule)


def test_a_torch_with_one_group_at_most(mesh):
    """Torch 2.10 keeps that under another name, and some settings not at all."""
    model, optimizer = sharded(mesh)
    assert internals.groups_of(SimpleNamespace(_fsdp_param_group=model)) == [model]
    assert internals.groups_of(SimpleNamespace(_fsdp_param_group=None)) == []
    for part in (model, *model.model.layers):
        (group,) = internals.groups_of(part._get_fsdp_state())
        for name in internals.NEWER_SETTINGS:
            vars(group).pop(name, None)
    before = {name: full_tensor(own) for name, own in model.named_parameters()}
    with gathered(model, [optimizer], gradients=False):
        assert not isinstance(model, FSDPModule)
    assert isinstance(model, FSDPModule)
    assert all(torch.equal(full_tensor(own), before[name]) for name, own in model.named_parameters())


def test_all_private_names_are_there(mesh):
    model, _ = sharded(mesh)
    for part in (model, *model.model.layers):
        internals.check_known(part)
    internals.metadata_classes()
    assert internals.WRAPPED in checkpoint_wrapper(torch.nn.Linear(1, 1))._modules
    assert torch.equal(DeferredTensor.of((2,), torch.bfloat16, lambda: torch.ones(2)), torch.ones(2))
