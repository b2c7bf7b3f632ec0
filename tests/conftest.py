import atexit
import os
import shutil
import sys
import tempfile

# before datasets is imported: no hub, and a cache of the tests' own
cache = tempfile.mkdtemp(prefix="billhook-tests-")
atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = cache
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # models are so small that threads, of children too, only wait for one another

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _alone():
    """The same random numbers for each test, and nothing that a trainer leaves in the environment."""
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "torch._dynamo.eval_frame" in sys.modules:
        assert sys.modules["torch._dynamo.eval_frame"]._stance.stance == "default", "compiled code has been switched off"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    from kit.fits import write_text

    return write_text(tmp_path_factory.mktemp("text"))
