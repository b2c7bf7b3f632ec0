"""Wheel and sdist hold what they should and pass twine's checks; the wheel works without the clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import billhook as bh
from kit.fits import write_text

ROOT = Path(__file__).parents[1]
LETTERS = ("ARCHITECTURE.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
LITTER = re.compile(r"/(__pycache__|outputs|lightning_logs|dist|site|\..*)/|\.(pyc|log)$")
pytestmark = [pytest.mark.nightly, pytest.mark.slow]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What is in the repository."""
    folder = tmp_path_factory.mktemp("clone") / "billhook"
    litter = shutil.ignore_patterns(".git", ".*_cache", "outputs", "lightning_logs", "dist", "site", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=litter)
    return folder


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    """Both in one folder, as `python -m build` makes them: the wheel of what is in the sdist."""
    folder, beside = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("unpacked")
    (sdist,) = SdistBuilder(str(clone)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(sdist) as tar:
        tar.extractall(beside, filter="data")
    list(WheelBuilder(str(beside / f"billhook-{bh.__version__}")).build(directory=str(folder), versions=["standard"]))
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_twine_finds_nothing_to_mend(built):
    paths = sorted(map(str, built.iterdir()))
    line = [sys.executable, "-m", "twine", "check", "--strict", *paths]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == len(paths) == 2


def test_what_is_in_the_sdist(built, clone):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        files = [one.name.split("/", 1) for one in tar.getmembers() if one.isfile()]
    assert {top for top, _ in files} == {f"billhook-{bh.__version__}"}
    names = {name for _, name in files}
    made = {"PKG-INFO", ".gitignore"}  # which hatchling adds
    single = {*("README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "pyproject.toml", "mkdocs.yml"), *LETTERS}
    folders = ("src", "callbacks", "examples", ".ci", "benchmarks", "tests", "docs")
    own = {str(one.relative_to(clone)) for name in folders for one in (clone / name).rglob("*") if one.is_file()}
    assert names == {one for one in own if not LITTER.search(one)} | single | made


def test_what_is_in_it(wheel, clone):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    recipes = {path.name for path in (clone / "callbacks").iterdir()} | {"base.yaml", "quickstart.yaml"}
    source = clone / "src"
    own = {str(path.relative_to(source)) for path in (source / "billhook").rglob("*") if path.is_file()}
    assert names == {one for one in own if "__pycache__" not in one} | {f"billhook/recipes/{name}" for name in recipes}
    assert {"billhook/py.typed", "billhook/assets/train.parquet", "billhook/assets/model/model.safetensors"} <= names


def test_what_it_says_of_itself(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    said = Parser().parsestr(wheel.read(name).decode())
    assert (said["Name"], said["Version"], said["License-Expression"]) == ("billhook", bh.__version__, "Apache-2.0")
    assert "Typing :: Typed" in said.get_all("Classifier")
    cited = re.findall(r"^    url: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert [address.rpartition(", ")[2] for address in said.get_all("Project-URL")] == cited != []
    assert wheel.read(name.replace("METADATA", "entry_points.txt")).decode().split() == [
        "[console_scripts]",
        "billhook",
        "=",
        "billhook.cli.main:main",
    ]


def test_installed_alone_it_runs_the_quickstart(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    short = "--trainer.max_steps 12 --trainer.limit_val_batches 1 --trainer.val_check_interval 6 --trainer.accelerator cpu"
    files = ", ".join(f"{split}: {path}" for split, path in write_text(tmp_path).items())
    data = ["--data.data", f"{{{files}}}", "--data.length", "16", "--data.batch_size", "2"]
    line = [sys.executable, "-m", "billhook", "fit", "--config", "recipe:quickstart", *short.split(), *data]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(line, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "after 8 -> 1 KV heads (mean)" in done.stdout
    assert (tmp_path / "empty" / "outputs" / "quickstart" / "model" / "model.safetensors").is_file()
