"""When a choice is settled: against a choice whose noise is known."""

import pytest
import torch

import billhook as bh
from billhook.calibration.enough import Settled, interleaved, settle, steps
from billhook.engine.batches import Batch, Run


def settled(noise, given, enough, seen):
    """Chooses the 50 lowest of 200 scores, seen through the mean of so many batches."""

    def see(batches):
        seen.append(len(batches))
        return len(batches), sum(batch["noise"] for batch in batches)

    def join(one, other):
        return one[0] + other[0], one[1] + other[1]

    def choose(found):
        number, total = found
        return {"place": (torch.arange(200.0) + noise * total / number).argsort()[:50].tolist()}

    return settle(see, join, choose, given, steps(len(given), 6), enough)


def batches(number):
    torch.manual_seed(0)
    return [Batch({"noise": torch.randn(200)}, "one") for _ in range(number)]


def test_it_ends_when_halves_and_doublings_agree():
    seen = []
    (number, _), found = settled(10.0, batches(512), 0.95, seen)
    assert found.batches == number == sum(seen) < 512
    assert found.is_enough
    assert min(found.halves, found.doubling) >= 0.95
    assert seen == [4, 4, 8]
    assert settled(0.1, batches(512), 0.95, [])[1].batches == 8


def test_what_it_compares():
    given, seen = batches(512), []
    _, found = settled(10.0, given, 0.95, seen)

    def chosen(some):
        mean = torch.stack([one["noise"] for one in some]).mean(0)
        return set((torch.arange(200.0) + 10.0 * mean).argsort()[:50].tolist())

    half, number = found.batches // 2, found.batches
    first, second, whole = chosen(given[:half]), chosen(given[half:number]), chosen(given[:number])
    assert (found.halves, found.doubling) == (len(first & second) / 50, len(first & whole) / 50)


def test_there_may_not_be_enough():
    (number, _), found = settled(1000.0, batches(320), 0.99, [])
    assert number == found.batches == found.of == 320
    assert found.halves < 0.99
    assert not found.is_enough


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            Settled(8, 16, 0.995, 1.0, 0.99),
            "chosen on 8 of 16 batches: two halves agree on 99.5% of what is removed, all with the first half on 100%",
        ),
        (
            Settled(128, 128, 0.93, 0.9996, 0.99),
            "chosen on 128 of 128 batches, which do not settle it (asked for was 99%): two halves agree on 93% of what is "
            "removed, all with the first half on 99.9%",
        ),
        (Settled(1, 1, None, None, 0.99), "chosen on 1 of 1 batches, too few to compare two halves of them"),
    ],
)
def test_it_says_what_it_took(found, says):
    assert found.to_json() == {**vars(found), "says": says}


def test_the_first_batches_are_of_all_sources():
    given = [Batch({"number": number}, "one") for number in range(6)] + [Batch({"number": number}, "two") for number in range(3)]
    assert [one.source for one in interleaved(given)] == ["one", "two", "one"] * 3
    assert [one["number"] for one in interleaved(given) if one.source == "one"] == list(range(6))
    runs = [Run(lambda: None, source=source) for source in "aabb"]
    assert [one.source for one in interleaved(runs)] == ["a", "b", "a", "b"]


def test_refused():
    with pytest.raises(ValueError, match=r"enough=0.0 must be in \(0, 1\]"):
        bh.Calibration(enough=0.0)
