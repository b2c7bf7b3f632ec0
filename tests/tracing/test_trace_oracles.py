"""What trace says of every family is asked of the model itself, in float64 with every parameter random."""

import copy
import itertools
import math
import warnings

import oracle
import pytest
import torch
import transformers
from small_configs import architectures, build, has_experts, small_config

import billhook as bh
from billhook.model.inputs import make_inputs
from billhook.tracing.groups import Group
from billhook.tracing.show import fold_groups
from kit.units import FAMILIES

NOT_ASKED = ("vocab", "position", "label", "fixed")  # indices that mean something to the tokenizer, to the task or to the code
# what may not be permuted, and trace flags by itself
FLAGGED = {
    "bloom": ("head", "const"),  # the slopes of ALiBi are a constant of the code, one number a head
    "mpt": ("head", "const"),
    "dbrx": ("expert", "const"),  # a loop over those experts that were chosen
}
# members that change nothing in these small models, though they are coupled
IDLE = {
    "falcon_h1": {"mup_vector"},  # a buffer with one number for all units of a segment
    "resnet": {"normalization.running_mean", "normalization.bias"},  # channels that ReLU silences for these inputs
}
SUBSETS = ["llama", "phi3", "gpt2", "bert", "mixtral", "t5", "mamba"]


class Case:
    """A small real model, what it is run with, and its structure."""

    def __init__(self, family: str) -> None:
        _, _, config_class, model_class = next(architectures(family))
        config = small_config(config_class)
        self.model = build(config, model_class, "batched_mm" if has_experts(config) else "eager")
        inputs = make_inputs(self.model)
        self.structure = bh.trace(self.model)
        self.model.double()
        oracle.randomise(self.model)
        self.inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}

    def run(self, model: torch.nn.Module | None = None) -> torch.Tensor:
        return oracle.answer((model or self.model)(**self.inputs))

    def one_of_each(self) -> list[Group]:
        return [own[0] for own in fold_groups(self.structure.groups)]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """Is made once for all tests of a family, which run one after the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        return Case(request.param)


def of(families: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", families, ids=families, indirect=True)


@pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "falcon", "deepseek_v3")
@of(FAMILIES)
def test_permuting_a_unit_order_everywhere_changes_nothing(case: Case, request: pytest.FixtureRequest) -> None:
    groups = [group for group in case.structure.groups if group.kind not in NOT_ASKED]
    findings = list(oracle.check(case.model, case.structure, case.run, groups))
    wrong = [
        f"{f.group.kind} {f.group.size} {f.group.members[0].name}: {f.error:.1e}"
        for f in findings
        if not f.holds and not f.group.reason
    ]
    assert not wrong
    assert not case.structure.opaque
    missed = {
        (f.group.kind, next(flag for flag in ("opaque", "const") if flag in f.group.flags)) for f in findings if not f.holds
    }
    assert missed == {FLAGGED[family] for family in [request.node.callspec.id] if family in FLAGGED}


@pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5")
@of(FAMILIES)
def test_leaving_any_member_out_changes_the_answer(case: Case, request: pytest.FixtureRequest) -> None:
    groups = [
        group for group in case.one_of_each() if group.kind not in NOT_ASKED and not group.reason and len(group.members) > 1
    ]
    for finding in oracle.check(case.model, case.structure, case.run, groups, necessity=math.inf):
        idle = tuple(IDLE.get(request.node.callspec.id, ()))
        needless = {member.name for member in finding.needless if not member.name.endswith(idle or "?")}
        assert needless <= set(finding.group.idle), f"{finding.group.kind} {finding.group.size}: {needless} need not be members"


@pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "falcon", "deepseek_v3")
@of(FAMILIES)
def test_without_a_unit_as_if_nobody_read_it(case: Case) -> None:
    asked = [g for g in case.one_of_each() if g.kind in ("kv_head", "query_head", "head", "channel") and not g.reason]
    for group in asked:
        if "normed" in group.flags:  # a norm over the units takes part of its scale from each, so a mask is not a cut
            continue
        error, attributes = oracle.slice_error(case.model, group, case.run)
        assert error < oracle.TOLERANCE, f"{group.kind} {group.size} of {group.where}: {error:.1e} with {attributes}"


@of(SUBSETS)
def test_no_part_of_a_group_is_a_group(case: Case) -> None:
    groups = [group for group in case.one_of_each() if not group.reason and 1 < len(group.members) <= 7]
    assert groups
    for group in groups:
        members = [member for member in group.members if member.name not in group.idle]
        for count in range(1, len(members)):
            for some in itertools.combinations(members, count):
                part = copy.copy(group)
                part.members = some
                finding = next(iter(oracle.check(case.model, case.structure, case.run, [part])))
                assert not finding.holds, f"{group.kind}: {[m.name for m in some]} would do"
