import atexit
import os
import shutil
import tempfile

# before datasets is imported: no hub, and a cache of the tests' own
cache = tempfile.mkdtemp(prefix="billhook-tests-")
atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = cache
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _alone():
    """The same random numbers for each test, and nothing that a trainer leaves in the environment."""
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    from fits import write_text

    return write_text(tmp_path_factory.mktemp("text"))
