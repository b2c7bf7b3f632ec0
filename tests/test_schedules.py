"""Values against formulas worked out by hand, and what every schedule promises."""

import math

import jsonargparse
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.schedules import (
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    MultiStep,
    Ramp,
    Schedule,
    resolve_step,
)


def all_schedules(parent=Schedule):
    for kind in parent.__subclasses__():
        yield from [kind, *all_schedules(kind)]


EVERY = [kind for kind in all_schedules() if kind.__module__ == "billhook.schedules" and kind is not Ramp]
RAMPS = [kind for kind in EVERY if issubclass(kind, Ramp)]
fractions = st.floats(0.0, 0.99)


def test_cubic_is_zhu_and_gupta():
    # s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3
    ramp = Cubic(final=0.9, initial=0.1, start=20, end=120, every=10)
    for step in range(20, 121):
        rounds = (step - 20) // 10
        assert ramp(step) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - rounds / 10) ** 3)


def test_linear():
    ramp = Linear(final=1.0, initial=0.5, start=10, end=20)
    assert [ramp(step) for step in (0, 10, 11, 15, 19, 20, 21)] == pytest.approx([0.5, 0.5, 0.55, 0.75, 0.95, 1.0, 1.0])


def test_cosine():
    ramp = Cosine(final=0.8, initial=0.2, end=6)
    expected = [0.2, 0.2 + 0.3 * (1 - math.sqrt(3) / 2), 0.2 + 0.15, 0.5, 0.8 - 0.15, 0.2 + 0.3 * (1 + math.sqrt(3) / 2), 0.8]
    assert [ramp(step) for step in range(7)] == pytest.approx(expected)


def test_exponential_removes_the_same_share_of_what_is_left():
    ramp = Exponential(final=1 - 0.9 * 0.5**4, initial=0.1, end=4)
    assert [1 - ramp(step) for step in range(5)] == pytest.approx([0.9, 0.45, 0.225, 0.1125, 0.05625])


def test_constant():
    assert [Constant(0.5)(step) for step in (0, 7)] == [0.5, 0.5]
    assert [Constant(0.5, start=3, initial=0.1)(step) for step in (2, 3, 4)] == [0.1, 0.5, 0.5]


def test_multi_step():
    stairs = MultiStep(values=[0.5, 0.2, 0.9], steps=[0, 4, 9], initial=0.7)
    assert [stairs(step) for step in (0, 3, 4, 8, 9, 99)] == [0.5, 0.5, 0.2, 0.2, 0.9, 0.9]
    assert MultiStep(values=[0.5], steps=[2], initial=0.7)(1) == 0.7


def test_every_holds_between_and_end_is_reached_off_beat():
    ramp = Linear(final=1.0, start=5, end=12, every=3)
    assert [ramp(step) for step in range(5, 14)] == pytest.approx([0, 0, 0, 3 / 7, 3 / 7, 3 / 7, 6 / 7, 1, 1])


@pytest.mark.parametrize("kind", RAMPS)
def test_a_ramp_first_changes_after_its_first_interval(kind):
    # 0.7 + (0.1 - 0.7) is not 0.1 in floating point: that must not count as a change
    ramp = kind(final=0.7, initial=0.1, start=10, end=30, every=5)
    assert list(ramp.changes(100)) == [0, 15, 20, 25, 30]
    assert ramp(14) == 0.1


def test_changes():
    assert list(Constant(0.5).changes(10)) == [0]
    assert list(Constant(0.5, start=0.5).changes(10)) == [5]
    assert list(Constant(0.0).changes(10)) == []
    assert list(MultiStep(values=[0.1, 0.1, 0.2], steps=[2, 4, 6]).changes(10)) == [2, 6]


def test_binding_turns_fractions_into_steps():
    ramp = Cubic(final=0.5, start=0.1, end=0.9, every=2).bind(200)
    assert (ramp.start, ramp.end, ramp.every) == (20, 180, 2)
    assert ramp == Cubic(final=0.5, start=20, end=180, every=2)
    assert Constant(0.5, start=0.25).bind(200).start == 50
    assert MultiStep(values=[0.1, 0.2], steps=[5, 0.5]).bind(100).steps == [5, 50]
    assert Linear(final=1.0).bind(40)(40) == 1.0
    assert Linear(final=1.0).bind(40)(39) < 1.0


def test_stairs_given_as_fractions_bind_to_any_length():
    stairs = MultiStep(values=[0.1, 0.2, 0.3], steps=[0.3, 0.6, 0.9])
    assert [stairs.bind(1)(step) for step in (0, 1)] == [0.1, 0.3]
    assert stairs.bind(0)(0) == 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(final=1.0, every=0), "every=0 must be a whole number of at least 1"),
        (lambda: Linear(final=1.0, start=5, end=4), "end=4 must not be before start=5"),
        (lambda: Linear(final=1.0, start=50, end=0.4).bind(100), "end=40 must not be before start=50"),
        (lambda: Linear(final=math.nan), "final=nan must be a number"),
        (lambda: Constant(0.5, start=-1), "start=-1 is negative"),
        (lambda: Linear(final=0.5, end=1.5), "end=1.5 as a float is a fraction"),
        (lambda: Linear(final=0.5, end="10"), "end='10' must be an int"),
        (lambda: Linear(final=0.5, end=101).bind(100), "end=101 is past the end of training, which has 100"),
        (lambda: Exponential(final=1.0), "final=1.0 must be below 1"),
        (lambda: MultiStep(values=[], steps=[]), "same length, at least 1"),
        (lambda: MultiStep(values=[0.1, 0.2], steps=[2, 1]), r"steps=\[2, 1\] must ascend"),
        (lambda: MultiStep(values=[0.1], steps=[-1]), "steps=-1 is negative"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(
    kind=st.sampled_from(RAMPS),
    initial=fractions,
    final=fractions,
    start=st.integers(0, 30),
    length=st.integers(0, 60),
    every=st.integers(1, 70),
)
def test_ramps_are_monotone_and_within_their_ends(kind, initial, final, start, length, every):
    ramp = kind(final=final, initial=initial, start=start, end=start + length, every=every)
    values = [ramp(step) for step in range(start + length + 3)]
    low, high = sorted((initial, final))
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    sign = 1 if final >= initial else -1
    assert all(sign * (b - a) >= -1e-12 for a, b in zip(values, values[1:], strict=False))
    assert values[start] == (initial if length else final)
    assert values[start + length :] == [final] * 3
    moved = {step for step in range(1, len(values)) if values[step] != values[step - 1]}
    assert all((step - start) % every == 0 or step == start + length for step in moved)


@given(
    fraction=st.floats(0.0, 1.0),
    total=st.integers(0, 10**6),
)
def test_a_fraction_is_a_step_of_the_training(fraction, total):
    step = resolve_step(fraction, total)
    assert 0 <= step <= total
    assert abs(step - fraction * total) <= 0.5
    assert Constant(0.5, start=fraction).bind(total) == Constant(0.5, start=step)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True))
def test_stairs_hold_until_the_next_step(steps):
    steps = sorted(steps)
    stairs = MultiStep(values=[step / 100 + 0.1 for step in steps], steps=steps)
    for step in range(45):
        passed = [s for s in steps if s <= step]
        assert stairs(step) == (passed[-1] / 100 + 0.1 if passed else 0.0)


def test_a_users_own_ramp_needs_only_its_shape():
    class Square(Ramp):
        def at(self, progress):
            return self.final * progress**2

    assert Square(final=1.0, end=0.5).bind(20)(5) == 0.25


def settings_of(kind, final, start):
    """Each kind rises from 0 to a value, from a time on."""
    if kind is MultiStep:
        return {"values": [final / 2, final], "steps": [start, 1.0 if isinstance(start, float) else start + 5]}
    return {"value": final, "start": start} if kind is Constant else {"final": final, "start": start, "every": 2}


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
class TestEverySchedule:
    def test_it_rises_to_its_last_value_as_amount_or_progress(self, kind):
        for final in (0.5, 0.99):
            bound = kind(**settings_of(kind, final, 0.25)).bind(20)
            values = [bound(step) for step in range(21)]
            assert values[:5] == [0] * 5
            assert values == sorted(values)
            assert values[-1] == bound(10**6) == final
            assert list(bound.changes(20)) == [step for step in range(1, 21) if values[step] != values[step - 1]]

    def test_binding_again_changes_nothing(self, kind):
        bound = kind(**settings_of(kind, 0.5, 3)).bind(20)
        assert bound.bind(20) == bound
        assert bound.bind(50) == bound

    def test_fractions_must_be_bound(self, kind):
        with pytest.raises(ValueError, match="is a fraction of training: call bind"):
            kind(**settings_of(kind, 0.5, 0.25))(7)

    def test_configured_by_its_place_or_its_short_name(self, kind):
        settings, parser = settings_of(kind, 0.5, 3), jsonargparse.ArgumentParser()
        parser.add_argument("--sparsity", type=float | Schedule)
        for name in (f"billhook.schedules.{kind.__name__}", kind.__name__):
            plain = {"class_path": name, "init_args": settings}
            assert parser.instantiate(parser.parse_object({"sparsity": plain})).sparsity == kind(**settings)
