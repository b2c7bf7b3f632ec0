"""Widths that quantisers and kernels like: which multiple is taken, that budgets stay upper bounds, and what is told."""

from fractions import Fraction

import jsonargparse
import pytest
import torch
import transformers

import billhook as bh
from billhook.model.costs import costs_of
from billhook.pruning.amount import Amount, kernel_multiple, round_units, unit_length
from billhook.pruning.planning import plan_from_search
from billhook.pruning.target import RatioSearch
from billhook.units.find import find_units
from kit.families import ATTENTIONS, MLPS, build, llama


def by_trial(asked, first, each=1, more=True):
    """Every multiple of 256 below, then of 128, 64 and 32: the nearest one, if it is near enough."""
    for multiple in (256, 128, 64, 32):
        fits = [n for n in range(1, first) if n * each % multiple == 0 and (more or n <= asked)]
        near = [n for n in fits if Fraction(abs(n - asked), first) <= Fraction(3, 100)]
        if near and first * each >= 256:
            return min(near, key=lambda n: (abs(n - asked), -n))
    return None


def wide(**changes):
    return llama(intermediate_size=1536, **changes)


def smollm2(layers=2):
    """SmolLM2-135M as its config says, with fewer blocks and tokens."""
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=layers,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def planned(model, amount, first=None):
    search = RatioSearch(model, amount) if first is None else RatioSearch(model, amount).part(amount, first)
    scores = {name: torch.arange(one.count(amount.per), dtype=torch.float32) for name, one in search.removable().items()}
    return plan_from_search(search, scores=scores)


class TestRule:
    @pytest.mark.parametrize(("first", "each"), [(255, 1), (256, 1), (384, 1), (640, 1), (40, 128), (71, 64), (9, 64)])
    def test_is_the_largest_multiple_that_is_near_enough(self, first, each):
        for asked in range(1, first):
            for more in (True, False):
                assert round_units(asked, first, first, unit_size=each, allow_more=more) == by_trial(asked, first, each, more)

    @pytest.mark.parametrize("width", [64, 96, 255])
    def test_small_models_are_cut_as_asked(self, width):
        plan = bh.plan(llama(intermediate_size=width), bh.importance.WeightNorm(), channels=0.25)
        assert all(plan.after[name] == (width - width // 4,) for name in MLPS)
        assert plan.widths == ()

    @pytest.mark.parametrize(("implementation", "width", "dtype", "multiple"), [
        ("grouped_mm", 48, torch.float32, 4), ("grouped_mm", 48, torch.bfloat16, 8), ("grouped_mm", 50, torch.float32, 1),
        ("eager", 48, torch.float32, 1),
    ])  # fmt: skip
    def test_the_kernel_of_experts_reads_whole_pieces(self, monkeypatch, implementation, width, dtype, multiple):
        model = build("mixtral", intermediate_size=width).to(dtype)
        monkeypatch.setattr(model, "get_correct_experts_implementation", lambda _: implementation)
        found = find_units(model, ["head", "channel", "expert"])
        assert [kernel_multiple(model, found[name]) for name in (f"{MLPS[0]}.experts", ATTENTIONS[0])] == [multiple, 1]
        assert [unit_length(found[ATTENTIONS[0]], per) for per in ("head", "kv_head")] == [4, 8]
        assert unit_length(found[f"{MLPS[0]}.experts"]) == 1


class TestSmolLM2:
    @pytest.mark.parametrize(("ratio", "kept", "multiple"), [
        (0.2, 1216, 64), (0.25, 1152, 128), (0.17, 1280, 256), (0.02, 1472, 64), (0.5, 768, 256), (0.01, 1504, 32),
    ])  # fmt: skip
    def test_channels(self, ratio, kept, multiple):
        plan = planned(smollm2(), Amount(channels=ratio))
        assert all(plan.after[name] == (kept,) for name in MLPS)
        requested = 1536 - int(ratio * 1536)
        rounded = "" if requested == kept else f"rounded from {requested:,} to "
        assert plan.widths == (f"channels: {kept:,} ({rounded}a multiple of {multiple})",)
        assert planned(smollm2(), Amount(channels=ratio, round_to=1)).after[MLPS[0]] == (requested,)

    def test_hidden_size_and_heads(self):
        plan = planned(smollm2(), Amount(residual=0.1, kv_heads=1 / 3))
        assert plan.widths[1] == "hidden dimensions: 512 (rounded from 519 to a multiple of 256)"
        assert "  heads: 6 (head dimension 64, rows of 384, a multiple of 128)" in str(plan).splitlines()


class TestTargets:
    @pytest.mark.parametrize(("target", "ranking"), [("params", "layer"), ("params", "global"), ("bytes", "global")])
    def test_are_upper_bounds(self, target, ranking):
        model = wide()
        now = getattr(costs_of(model), target)
        for part in (0.93, 0.66):
            amount = {target: part, "ranking": ranking, "kv_heads": 0.0}
            plan, exact = planned(model, Amount(**amount)), planned(model, Amount(**amount, round_to=1))
            assert getattr(plan.costs[1], target) <= int(part * now)
            for name in MLPS:
                left, asked = plan.after[name][0], exact.after[name][0]
                assert left == (asked if asked == 1536 else by_trial(asked, 1536, more=False))


class TestArguments:
    @pytest.mark.parametrize("given", ["auto", "64", "1"])
    def test_a_command_line_and_yaml_take_both(self, given):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--amount", type=Amount)
        parsed = parser.instantiate(parser.parse_args(["--amount.channels=0.2", f"--amount.round_to={given}"]))
        assert parsed.amount.round_to == (given if given == "auto" else int(given))
        assert Amount(channels=0.2).round_to == "auto"

    def test_others_are_refused(self):
        legal_by_wrong = {"best": "one of auto or a whole number", 0: "a whole number of at least 1", 2.5: "one of auto"}
        for wrong, legal in legal_by_wrong.items():
            with pytest.raises(ValueError, match=f"round_to={wrong!r} must be {legal}"):
                Amount(channels=0.2, round_to=wrong)
