"""Damage under FSDP2: two processes, which gather block by block as in training, tell what one does."""

import pytest
import torch

from kit.damaged import MODULES, told
from kit.ranks import run_script

pytestmark = pytest.mark.slow
SCRIPT = "from kit.damaged import fit_all\nfit_all()\n"


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_script(folder, SCRIPT, [str(folder)])
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_tell_the_sharded_damage_that_one_does(of_two, tmp_path, name):
    alike, found = torch.load(of_two / f"{name}.pt", weights_only=True)
    _, of_one = told(tmp_path, name)
    assert alike
    for here, there in zip(found, of_one, strict=True):
        assert [own.pop("source") for own in here] == [own.pop("source") for own in there] == ["generated"]
        assert here == [pytest.approx(own, rel=2e-3, abs=1e-5) for own in there]
        assert here[0]["rows"] == 3
        assert here[0]["kl"] > 1e-4
