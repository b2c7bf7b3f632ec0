import atexit
import copy
import importlib
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


@pytest.fixture(scope="session")
def structures():
    return {}


@pytest.fixture(autouse=True)
def _figured_once(structures):
    """What models of one shape cost is found once: half of a short fit's time is otherwise spent on it."""
    figures = importlib.import_module("billhook.model.figures")
    run = figures._run_on_meta

    def remembered(model, context):
        if (sight := _sight(model)) is None:
            return run(model, context)
        key = (sight, context)
        if key not in structures:
            structures[key] = run(model, context)
        return structures[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "_run_on_meta", remembered)
        yield


@pytest.fixture
def traced_once(structures):
    """Models alike in all that a trace looks at are traced once for all tests that use this: short fits do little else."""
    module = importlib.import_module("billhook.tracing.trace")
    trace = module._run

    def remembered(shadow, beside, example_inputs, everything):
        sight = None if example_inputs is not None else _sight(shadow)
        if sight is None:
            return trace(shadow, beside, example_inputs, everything)
        key = (sight, tuple(beside.items()), everything)
        if key not in structures:
            structures[key] = trace(shadow, beside, example_inputs, everything)
        return copy.deepcopy(structures[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_run", remembered)
        yield


def _sight(shadow):
    """Configs, tensors and which of them are one, class and plain attributes of each module; None of what has hooks."""
    modules = dict(shadow.named_modules(remove_duplicate=False))
    if not hasattr(shadow, "config") or any(m._forward_pre_hooks or m._forward_hooks for m in modules.values()):
        return None
    plain = (int, float, str, tuple, type(None))
    if any("forward" in vars(m) for m in modules.values()):
        return None
    said = [
        (name, type(m), vars(m).get("handing"), *((k, v) for k, v in vars(m).items() if isinstance(v, plain)))
        for name, m in modules.items()
    ]
    tensors = [*shadow.named_parameters(remove_duplicate=False), *shadow.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(tensors)}
    shapes = [(name, first[id(tensor)], tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    configs = {id(m.config): m.config for m in modules.values() if hasattr(m, "config")}
    return tuple(repr(vars(one)) for one in configs.values()), tuple(said), tuple(shapes)
