import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from fnmatch import fnmatchcase

gc.disable()  # nothing of what is imported becomes garbage
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it

# before datasets is imported: no hub, and a cache of the tests' own, which the workers of a run share
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = tempfile.mkdtemp(prefix="billhook-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["HF_DATASETS_CACHE"] = cache
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # models are so small that threads, of children too, only wait for one another

import pytest
import torch

torch.set_num_threads(1)
UNUSED = pytest.StashKey[dict]()
FOLDERS = {"tmp_path", "tmp_path_factory", "files"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Puts `slow` tests first, so that none is left to the end, and marks as `fast` one case of each test of the others.

    Of tests that need a folder, which are fits, checkpoints and commands, that is the first of each file.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    leave_to_the_night(items)
    seen = set()
    for item in items:
        slow = any(item.get_closest_marker(name) for name in ("slow", "real", "sweep", "nightly"))
        if slow or getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            continue
        once = item.path if FOLDERS & set(getattr(item, "fixturenames", ())) else item.nodeid.partition("[")[0]
        if once not in seen:
            seen.add(once)
            item.add_marker("fast")


def leave_to_the_night(items):
    """Marks as `nightly` what the marker `daily` of a test does not name; notes patterns that fit none of its cases."""
    unused = {}
    for item in items:
        if marker := item.get_closest_marker("daily"):
            patterns = [pattern for pattern in marker.args if fnmatchcase(item.callspec.id, pattern)]
            unused.setdefault(item.nodeid.partition("[")[0], set(marker.args)).difference_update(patterns)
            if not patterns:
                item.add_marker("nightly")
    if items and not any("[" in argument for argument in items[0].config.args):
        items[0].config.stash[UNUSED] = {test: patterns for test, patterns in unused.items() if patterns}


def pytest_collection_finish():
    """Leaves what has been imported out of each later search for garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _alone():
    """The same random numbers for each test, and nothing that a trainer leaves in the environment or torch."""
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.use_deterministic_algorithms(False)
    if "torch._dynamo.eval_frame" in sys.modules:
        assert sys.modules["torch._dynamo.eval_frame"]._stance.stance == "default", "compiled code has been switched off"


@pytest.fixture
def unused_patterns(pytestconfig):
    """What the marker `daily` names that is not among the cases of its test, of all tests that were collected."""
    return pytestconfig.stash.get(UNUSED, {})


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    from kit.fits import write_text

    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def converter():
    """llama.cpp's converter, which takes seconds to start."""
    from billhook.serving.converter import Converter

    with Converter() as running:
        yield running


@pytest.fixture(scope="session")
def llama_cpp():
    """llama.cpp, running."""
    from billhook.serving.engine import LlamaCpp

    with LlamaCpp() as running:
        yield running


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process, over which models can be sharded."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
