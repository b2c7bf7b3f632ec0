"""A rank that suffices is exact; what is lost on data is in the order that is claimed."""

import functools

import pytest
import torch

from billhook.engine.batches import Run
from billhook.kv_heads.basis import find_bases, pooled
from billhook.kv_heads.layout import find_projections, read
from billhook.kv_heads.methods import method_of
from billhook.kv_heads.moments import weight_moments
from billhook.kv_heads.symmetry import Mixing, Symmetries, find_symmetries
from billhook.tracing.trace import trace
from kit.families import tokens
from kit.kv_zoo import mixed, model_of, moments_of, with_stacks

CHANGES = {
    "cohere": {"use_qk_norm": False},
    "smollm3": {"num_hidden_layers": 4},
    "llama": {"attention_bias": True},
    "gpt_neox": {"hidden_size": 64},
}


class Case:
    """A model, how it is run, and what is known of it."""

    def __init__(self, family, heads=4, queries=1):
        self.model = model_of(family, heads, queries, **CHANGES.get(family, {}))
        self.places = find_projections(self.model, trace(self.model))
        self.symmetries = find_symmetries(self.model, self.places)
        ids = tokens(4, 24)
        self.inputs = {"input_ids": ids}
        if self.model.config.is_encoder_decoder:
            self.inputs["decoder_input_ids"] = tokens(4, 11)
        if family == "whisper":
            self.inputs = {"input_features": torch.randn(4, 8, 32).double(), "decoder_input_ids": tokens(4, 11)}
        if family == "vit":
            self.inputs = {"pixel_values": torch.randn(4, 3, 16, 16).double()}

    @torch.no_grad()
    def logits(self):
        return self.model(**self.inputs).logits

    def groups(self, number=2):
        return {name: place.kv_heads // 2 if number is None else number for name, place in self.places.items()}

    def moments(self, how, groups=2):
        if how == "weights":
            return {name: weight_moments(read(self.model, place), groups) for name, place in self.places.items()}
        return moments_of(self.model, self.places, dict.fromkeys(self.places, groups), [Run(self.logits)])

    def plant(self, groups=2, turn=False):
        for name, place in self.places.items():
            with_stacks(self.model, place, mixed(read(self.model, place), self.symmetries[name], groups, turn))

    def change(self, become, start, how="data", groups=2):
        """Returns what the renderings of each attention lose."""
        moments, lost = self.moments(how, groups), {}
        for name, place in self.places.items():
            stacks = read(self.model, place)
            bases = find_bases(stacks, moments[name], self.symmetries[name], method_of(start))
            with_stacks(self.model, place, become(stacks, *bases))
            lost[name] = tuple(one.lost for one in bases)
        return lost


@functools.cache
def case(family):
    """Whose weights are not written to."""
    return Case(family)


@pytest.mark.parametrize("start", ["svd", "aligned"])
@pytest.mark.parametrize("family", ["llama", "phi", "gptj", "phi3", "gpt2", "bart", "qwen3"])
def test_a_rank_that_suffices_is_exact(family, start):
    """Heads of a group that are mixes (for turns: rotations) of one head are rendered by one without loss."""
    one = Case(family)
    one.plant(turn=start == "aligned")
    before = one.logits()
    if family == "qwen3":  # of which keys cannot be mixed, so they were left the same
        assert all(torch.equal(*read(one.model, place).k[:2]) for place in one.places.values())
    lost = one.change(pooled, start)
    torch.testing.assert_close(one.logits(), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert max(max(pair) for pair in lost.values()) < 1e-8
    for place in one.places.values():
        stacks = read(one.model, place)
        for heads in (stacks.k, stacks.v):
            torch.testing.assert_close(heads[0], heads[1])
    plain = Case(family)
    plain.plant(turn=start == "aligned")
    plain.change(pooled, "mean")
    assert (plain.logits() - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5"])
def test_the_mean_is_that_of_pooling_repeated(family):
    one = case(family)
    for name, place in one.places.items():
        stacks, groups = read(one.model, place), place.kv_heads // 2
        bases = find_bases(stacks, weight_moments(stacks, groups), one.symmetries[name], method_of("mean"))
        found = pooled(stacks, *bases)
        for new, old in ((found.k, stacks.k), (found.v, stacks.v)):
            expected = old.unflatten(0, (groups, -1)).mean(1).repeat_interleave(2, 0)
            torch.testing.assert_close(new, expected)
        assert torch.equal(found.q, stacks.q)
        assert torch.equal(found.o, stacks.o)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "bart"])
def test_what_is_lost_is_counted_on_data_and_least_with_svd(family, groups):
    one = Case(family, queries=2 if family == "llama" else 1)
    moments = one.moments("data", groups)
    for name, place in one.places.items():
        stacks = read(one.model, place)
        lost = {
            start: find_bases(stacks, moments[name], one.symmetries[name], method_of(start))
            for start in ("mean", "aligned", "svd")
        }
        for number in (0, 1):
            svd, aligned, mean = (lost[start][number].lost for start in ("svd", "aligned", "mean"))
            assert 0 < svd <= aligned + 1e-12
            assert svd <= mean + 1e-12
        values = lost["svd"][1]  # of values, in the model's own terms: what the outputs of the heads miss
        heads, each = len(stacks.k), len(stacks.q) // len(stacks.k)
        seen = moments[name].values
        missing = there = 0.0
        for head in range(heads):
            group, own = divmod(head, heads // groups)
            members = range(group * (heads // groups), (group + 1) * (heads // groups))
            for query in range(each):
                output = stacks.o[head * each + query]
                left = [-output @ values.basis[head] @ values.shared[member] for member in members]
                left[own] = left[own] + output
                total = torch.cat(left, 1)
                square = seen[group].flatten(2).flatten(0, 1)
                missing += float(torch.trace(total @ square @ total.T))
                there += float(torch.trace(output @ seen[group, own, :, own] @ output.T))
        assert values.lost == pytest.approx(missing / there, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "phi", "gptj"])
def test_bases_mix_no_more_than_may_be_mixed(name):
    one = case(name)
    for start in ("mean", "aligned", "svd"):
        moments = one.moments("weights")
        for attention, place in one.places.items():
            keys, _ = find_bases(read(one.model, place), moments[attention], one.symmetries[attention], method_of(start))
            allowed = torch.zeros(keys.basis.shape[1:], dtype=torch.bool)
            for block in one.symmetries[attention].keys:
                own = torch.tensor([*block.real, *block.imaginary])
                allowed[own[:, None], own] = True
                if block.imaginary:
                    for matrices in (keys.basis, keys.shared):
                        a, b = matrices[:, own[0], own[0]], matrices[:, own[1], own[0]]
                        torch.testing.assert_close(matrices[:, own[1], own[1]], a)
                        torch.testing.assert_close(matrices[:, own[0], own[1]], -b)
            assert not keys.basis[:, ~allowed].any()
            assert not keys.shared[:, ~allowed].any()


def test_complex_keys_by_hand():
    """Two heads: for each frequency the principal direction of diag(sqrt e) Z Z^H diag(sqrt e), e being the queries' energies."""
    stacks = read(case("llama").model, case("llama").places["model.layers.0.self_attn"])
    stacks = type(stacks)(stacks.q[:2], stacks.k[:2], stacks.v[:2], stacks.o[:2])
    symmetries = case("llama").symmetries["model.layers.0.self_attn"]
    keys, _ = find_bases(stacks, weight_moments(stacks, 1), symmetries, method_of("svd"))
    half = stacks.k.shape[1] // 2
    for f in range(half):
        z = torch.complex(stacks.k[:, f], stacks.k[:, f + half])
        energy = (stacks.q[:, f].square() + stacks.q[:, f + half].square()).sum(1)
        root = energy.sqrt().to(z.dtype)
        values, vectors = torch.linalg.eigh(root[:, None] * (z @ z.mH) * root)
        first = vectors[:, -1]
        shared = (first.conj() * root) @ z  # kbar, but for a factor
        expected = (first / root)[:, None] * shared  # what each head is taken for
        taken = torch.einsum("jab,ibc,icn->jan", keys.basis, keys.shared, stacks.k)
        torch.testing.assert_close(torch.complex(taken[:, f], taken[:, f + half]), expected)


def test_numbers_in_no_block_are_averaged_and_a_group_of_nothing_loses_nothing():
    stacks = read(case("llama").model, case("llama").places["model.layers.0.self_attn"])
    some = Symmetries((Mixing((0,), (4,)),), (), True)
    keys, values = find_bases(stacks, weight_moments(stacks, 2), some, method_of("svd"))
    eye = torch.eye(8, dtype=torch.float64).expand(4, -1, -1)
    rest = [1, 2, 3, 5, 6, 7]
    torch.testing.assert_close(keys.basis[:, rest][:, :, rest], eye[:, rest][:, :, rest])
    torch.testing.assert_close(keys.shared[:, rest][:, :, rest], eye[:, rest][:, :, rest] / 2)
    assert not torch.allclose(keys.basis[:, [0, 4]][:, :, [0, 4]], eye[:, :2, :2])
    torch.testing.assert_close(values.basis, eye)
    torch.testing.assert_close(values.shared, eye / 2)
    silent = type(stacks)(stacks.q, 0 * stacks.k, 0 * stacks.v, stacks.o)
    for start in ("mean", "aligned", "svd"):
        for one in find_bases(silent, weight_moments(silent, 2), some, method_of(start)):
            assert one.lost == 0
            assert one.basis.isfinite().all()
            assert one.shared.isfinite().all()
