"""`permute_for`, and `prune(permute=True)`: the model computes the same, keeps more of its scores, and is exactly N:M."""

import copy
import signal
from functools import partial

import peft
import pytest
import torch
import transformers
from torch import nn

import billhook as bh
from billhook.engine.statistics import InputNorms
from billhook.model.layers import is_convolution, patches, prunable, weight_of
from billhook.sparsity import permute
from billhook.sparsity.masks import keep_n_of_m
from kit import prunes
from kit.families import build, llama, tokens
from kit.losses import BUILD
from kit.sparsity import batches_of, family, masks_of

MODELS = {
    **{name: BUILD[name] for name in ("llama", "gpt2", "bert", "t5")},
    **{name: (lambda name=name: build(name)) for name in ("mixtral", "qwen3_moe", "olmo2")},
    "whisper": lambda: family("whisper"),
    "vit": lambda: family("vit"),
    "resnet": lambda: family("resnet"),
}


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def logits(model, batches):
    return [model(**batch).logits for batch in batches]


def scores_of(model, batches):
    """Wanda's scores on the inputs of the dense model, from plain hooks."""
    linears, norms = prunable(model), {}
    hooks = []
    for name, linear in linears.items():
        norms[name] = InputNorms(weight_of(linear).shape[1])
        reads = partial(patches, linear) if is_convolution(linear) else nn.Identity()
        hooks.append(linear.register_forward_pre_hook(lambda _, args, own=norms[name], reads=reads: own.add(reads(args[0]))))
    logits(model, batches)
    for hook in hooks:
        hook.remove()
    return {name: weight_of(linear).abs() * norms[name].squares.sqrt() for name, linear in linears.items()}


def kept_in(scores, n=2, m=4):
    return sum(float((one * keep_n_of_m(one, n, m)).sum()) for one in scores.values())


def exactly(n, m, model):
    return all((mask.reshape(-1, m).sum(1) == n).all() for mask in masks_of(model).values())


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same_and_keeps_more(name):
    model = MODELS[name]().eval()
    batches = batches_of(model)
    expected, before, first = logits(model, batches), values(model), scores_of(model, batches)
    done = bh.criteria.permute_for(model, "2:4", batches)
    for found, own in zip(logits(model, batches), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    assert not same(model, before)
    assert kept_in(scores_of(model, batches)) > kept_in(first)
    assert {one.kind for one in done.axes} >= ({"residual", "channel"} if name == "resnet" else {"residual", "value"})
    assert all(then >= share - 1e-6 for share, then in (one.kept for one in done.axes))


def test_what_it_tells_is_what_is_kept():
    model, batches = llama().eval(), batches_of(llama())
    first = scores_of(model, batches)
    done = bh.criteria.permute_for(model, "2:4", batches)
    second = scores_of(model, batches)
    for one in done.axes:
        for scores, share in zip((first, second), one.kept, strict=True):
            own = {name: scores[name] for name in one.readers}
            assert kept_in(own) / sum(float(part.sum()) for part in own.values()) == pytest.approx(share, rel=1e-4)
    assert {one.where for one in done.axes if one.kind == "channel"} == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert "channel in model.layers.*.mlp" in str(done)
    assert "2 x     48" in str(done)


@pytest.mark.daily("*-2:4", "criterion0-*")
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
@pytest.mark.parametrize(
    "criterion",
    [bh.Wanda(), bh.criteria.Refit(), bh.criteria.ALPS(), bh.SparseGPT(block_size=16), bh.Magnitude(), bh.criteria.RIA()],
)
def test_pruning_then_is_exactly_n_of_m_by_every_criterion(criterion, pattern):
    model, (n, m) = llama(head_dim=8), map(int, pattern.split(":"))
    plan = bh.prune(model, criterion, batches_of(model), pattern=pattern, permute=True)
    assert exactly(n, m, model)
    assert all(torch.equal(mask, model.get_submodule(name).weight != 0) for name, mask in plan.masks(model).items())
    assert plan.sparsity == pytest.approx(1 - n / m)


@pytest.mark.parametrize("match", [None, bh.criteria.BlockMatching(steps=4)])
def test_it_is_permute_for_and_then_prune(match):
    one, batches = llama(), batches_of(llama())
    other = copy.deepcopy(one)
    prunes.prune(one, bh.Wanda(), batches, pattern="2:4", permute=True, skip="*.o_proj", match=match)
    bh.criteria.permute_for(other, "2:4", batches, skip="*.o_proj")
    prunes.prune(other, bh.Wanda(), batches, pattern="2:4", skip="*.o_proj", match=match)
    assert same(one, values(other))


def test_a_checkpoint_of_it_is_plain_and_computes_the_same(tmp_path):
    model, batches = build("llama", tie_word_embeddings=True), batches_of(llama())
    dense = logits(model, batches)
    bh.criteria.permute_for(model, "2:4", batches)
    bh.save(model, tmp_path / "dense")
    for found, expected in zip(logits(bh.load(tmp_path / "dense"), batches), dense, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    bh.prune(model, bh.Wanda(), batches, pattern="2:4", permute=True)
    bh.save(model, tmp_path / "sparse")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert all(torch.equal(a, b) for a, b in zip(logits(plain, batches), logits(model.eval(), batches), strict=True))
    assert exactly(2, 4, plain)


def test_adapters_go_along():
    model, config = llama(), peft.LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    batches, lora = batches_of(model), peft.get_peft_model(model, config).eval()
    expected = logits(lora, batches)
    bh.criteria.permute_for(lora, "2:4", batches)
    for found, own in zip(logits(lora, batches), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    bh.prune(lora, bh.Wanda(), batches, pattern="2:4", permute=True, count_adapters=True)
    assert exactly(2, 4, lora)


def test_gradients_go_along():
    model, ids = llama(), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    bh.criteria.permute_for(model, "2:4", [{"input_ids": ids}])
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


class TestNothingIsHalfDone:
    def test_a_model_that_computes_something_else(self, monkeypatch):
        model = llama()
        before = values(model)
        monkeypatch.setattr(permute, "outputs_match", lambda *_: False)
        with pytest.raises(ValueError, match="model: the logits of LlamaForCausalLM change with the channel order"):
            bh.criteria.permute_for(model, "2:4", batches_of(model))
        assert same(model, before)

    def test_a_criterion_that_fails_afterwards(self):
        class Fails(bh.Wanda):
            def prune(self, *_):
                raise ValueError("it fails")

        model = llama()
        before = values(model)
        with pytest.raises(ValueError, match="it fails"):
            bh.prune(model, Fails(), batches_of(model), pattern="2:4", permute=True)
        assert same(model, before)

    @pytest.mark.parametrize("at", [1, 3, 20])
    def test_an_interrupt_while_tensors_are_put_in_order(self, at, monkeypatch):
        model, calls = llama(), []
        before, plain = values(model), torch.Tensor.copy_

        def interrupted(tensor, *args):
            calls.append(tensor)
            if len(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return plain(tensor, *args)

        real = permute._move

        def move(*args):
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "copy_", interrupted)
                return real(*args)

        monkeypatch.setattr(permute, "_move", move)
        with pytest.raises(KeyboardInterrupt):
            bh.criteria.permute_for(model, "2:4", batches_of(model))
        assert len(calls) > 2 * at, "all were put in order, and then back"
        assert same(model, before)


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"sparsity": 0.5}, r"pattern='unstructured': channel order matters only for N:M patterns"),
            ({"pattern": "2:4", "dry_run": True}, "permute=True cannot be combined with dry_run=True"),
            ({"pattern": "2:4", "reduce": lambda tensor: tensor}, "permute=True does not support reduce"),
            ({"pattern": "2:4", "permute": 1}, "permute=1 must be True or False"),
        ],
    )
    def test_by_prune(self, settings, said):
        model = llama()
        before = values(model)
        with pytest.raises(ValueError, match=said):
            prunes.prune(model, bh.Wanda(), batches_of(model), **{"permute": True} | settings)
        assert same(model, before)

    def test_by_permute_for(self):
        model = llama()
        with pytest.raises(ValueError, match="pattern='unstructured': channel order matters only"):
            bh.criteria.permute_for(model, "unstructured", batches_of(model))
        with pytest.raises(ValueError, match="has 48 inputs, not a multiple of 5|has 32 inputs, not a multiple of 5"):
            bh.criteria.permute_for(model, "2:5", batches_of(model))
        with pytest.raises(ValueError, match="contains no Hugging Face model"):
            bh.criteria.permute_for(nn.Sequential(nn.Linear(8, 8)), "2:4", [torch.ones(1, 8)])

    def test_while_a_mask_stands_before_units(self):
        model = llama()
        before = values(model)
        said = r"model: model\.layers\.0\.mlp\.\w+ has a mask or gates\. Remove them first"
        with bh.mask(model, {0: [1]}, "channel"), pytest.raises(ValueError, match=said):
            bh.criteria.permute_for(model, "2:4", batches_of(model))
        assert same(model, before)
