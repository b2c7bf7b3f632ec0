"""A sample of the sweep over all architectures and operations (`benchmarks/roundtrip.py`), a step of its own in CI."""

import logging
import re
from pathlib import Path

import pytest
import transformers
from roundtrip import BUGS, OPERATIONS, examine_one, jobs

PAGE = Path(__file__).parents[1] / "docs" / "evidence" / "roundtrip.md"
KNOWN = set(re.findall(rf"^\| (\w+) \| ([\w.-]+) \| ({'|'.join(OPERATIONS)}) \| (?:{'|'.join(BUGS)}) \|", PAGE.read_text(), re.M))
PAIRS = [(auto, kind, operation) for auto, kind, own in jobs([], OPERATIONS, sample=60, seed=0) for operation in own]


pytestmark = pytest.mark.sweep


@pytest.fixture(autouse=True)
def _loud_again():
    """The sweep silences others; tests that come later may listen to them."""
    said, level = transformers.logging.get_verbosity(), logging.getLogger("lightning.pytorch").level
    yield
    transformers.logging.set_verbosity(said)
    transformers.logging.enable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(level)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("auto", "model_type", "operation"), PAIRS)
def test_a_pair_is_right_or_refused(auto, model_type, operation, request):
    """Except for the bugs that docs/evidence/roundtrip.md lists."""
    if (auto, model_type, operation) in KNOWN:
        request.applymarker(pytest.mark.xfail(strict=True, reason="a bug that docs/evidence/roundtrip.md lists"))
    (result,) = examine_one((auto, model_type, (operation,)))
    assert result.state not in BUGS, f"{result.state}: {result.detail}"
