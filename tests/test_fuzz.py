"""Configs, plans and YAML with random mistakes: they run, or are refused in a sentence, never by an error from the depths."""

import contextlib
import copy
import json
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import billhook as bh
from billhook.atomic_folder import check_target
from billhook.cli.main import main
from billhook.model.meta import from_name
from kit.families import llama

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
ANY = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within Python"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**18, 10**30, -0.5, 0.5, 1.5, 1e300]),
    st.sampled_from(["", "start", "mean", "nan", "inf", "ñ", "*", "a.b", "__class__", "../..", "{", "1e400"]),
    st.sampled_from([[], {}, [1], [[]], [None], {"a": 1}, {"class_path": "os.system"}, {"class_path": "Linear"}, ["start", 2]]),
)


def places(plain, path=()):
    """Where something stands in nested plain data."""
    found = [path] if path else []
    for key, value in plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ():
        found += places(value, (*path, key))
    return found


def changed(plain, place, how, value):
    new = copy.deepcopy(plain)
    own = new
    for key in place[:-1]:
        own = own[key]
    if how == "gone":
        del own[place[-1]]
    elif how == "renamed" and isinstance(own, dict):
        own[str(value)[:20]] = own.pop(place[-1])
    else:
        own[place[-1]] = value
    return new


def wrong(plain):
    """A strategy: one thing or two in plain data are others, gone, or have another name."""
    one = st.tuples(st.sampled_from(places(plain)), st.sampled_from(["other", "other", "gone", "renamed"]), VALUES)
    return one.map(lambda change: changed(plain, *change))


@pytest.fixture(scope="module")
def model():
    return llama(**SMALL)


PLAN = {
    "kind": "units",
    "model": "LlamaForCausalLM",
    "kinds": {f"model.layers.{n}.mlp": "channel" for n in (0, 1)},
    "units": {f"model.layers.{n}.mlp": [1, 2, 3] for n in (0, 1)},
    "before": {f"model.layers.{n}.mlp": [16] for n in (0, 1)},
}


@settings(ANY, max_examples=60)
@given(plain=wrong(PLAN))
def test_plans(model, plain):
    with contextlib.suppress(ValueError):
        assert bh.ModelPlan.from_json(json.loads(json.dumps(plain)), model).model == "LlamaForCausalLM"


@pytest.fixture(scope="module")
def block_plan(model):
    return json.loads(json.dumps(bh.pruning.plan_units(model, [1], "block").to_json()))


@settings(ANY, max_examples=60)
@given(data=st.data())
def test_plans_of_blocks(model, block_plan, data):
    plain = data.draw(wrong(block_plan))
    with contextlib.suppress(ValueError):
        own = copy.deepcopy(model)
        bh.apply(own, bh.ModelPlan.from_json(plain, own))


def test_the_kind_of_a_plan_is_a_word(model, block_plan):
    with pytest.raises(ValueError, match=r"plan: its kind is \[\], and must be one of blocks, "):
        bh.ModelPlan.from_json(block_plan | {"kind": []}, model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    bh.save(llama(**SMALL), folder / "plain")
    uneven = llama(**SMALL)
    bh.apply(uneven, bh.plan(uneven, bh.importance.WeightNorm(), amount=bh.Amount(channels=0.5, first=1)))
    assert bh.save(uneven, folder / "shaped").way == "shaped"
    return folder


@settings(ANY, max_examples=60)
@given(kind=st.sampled_from(["plain", "shaped"]), data=st.data())
def test_configs(folders, kind, data):
    held = json.loads((folders / kind / "config.json").read_text())
    said = held["billhook"] if kind == "shaped" else held
    plain = data.draw(wrong(said))
    shutil.copytree(folders / kind, folders / "bad", dirs_exist_ok=True)
    (folders / "bad" / "config.json").write_text(json.dumps(held | {"billhook": plain} if kind == "shaped" else plain))
    for use in (bh.load, from_name):
        with contextlib.suppress(ValueError, OSError, ImportError):
            use(folders / "bad")


@settings(ANY, max_examples=40)
@given(record=wrong({"files": ["config.json", "model.safetensors"], "saved": {"way": "plain"}}))
def test_records(folders, record):
    target = folders / "target"
    shutil.copytree(folders / "plain", target, dirs_exist_ok=True)
    names = sorted(path.name for path in target.iterdir())
    (target / "billhook.json").write_text(json.dumps(record))
    with contextlib.suppress(ValueError):
        check_target(target)
    assert sorted(path.name for path in target.iterdir()) == names


CALLBACKS = [
    ("WeightPruning", {"criterion": {"class_path": "SparseGPT", "init_args": {"damp": 0.1}}, "sparsity": 0.5, "at": 2}),
    ("WeightPruning", {"sparsity": {"class_path": "Cubic", "init_args": {"final": 0.5, "start": 0, "end": 4, "every": 2}}}),
    ("WeightPruning", {"pattern": "2:4", "options": {"skip": ["*.down_proj"], "allocation": {"class_path": "OWL"}}, "at": 4}),
    ("KVHeadConversion", {"num_key_value_heads": [4, 1], "at": [0.1, 0.3], "method": "svd", "calibration": 4}),
    ("KVHeadConversion", {"num_key_value_heads": 1, "at": {"class_path": "Linear", "init_args": {"final": 1.0, "every": 2}}}),
    (
        "HeadPruning",
        {"ratio": 0.5, "at": 3, "importance": {"class_path": "Taylor", "init_args": {"how": "unit"}}, "remove": "never"},
    ),
    (
        "StructuredPruning",
        {"amount": {"channels": 0.2, "params": 0.8, "first": 1}, "at": "start", "rounds": 2, "repair": {"validation": 0.1}},
    ),
    ("Shrinking", {"budget": {"params": 0.8}, "layers": "free", "at": 0.5, "search": {"generations": 2, "round_to": 8}}),
    ("DepthPruning", {"blocks": 1, "importance": {"class_path": "Ablation"}, "greedy": True, "first": 1}),
    ("Export", {"folder": "out"}),
    ("Report", {"plot_file": "report.png", "metric": "val_loss", "measure_batches": 2}),
]


@pytest.mark.nightly
@settings(ANY, max_examples=25)
@given(own=st.sampled_from(CALLBACKS), data=st.data())
def test_callbacks_in_yaml(tmp_path_factory, own, data):
    """Parsed and constructed by the command; `--print_config` stops it before anything is built."""
    name, arguments = own
    plain = data.draw(wrong({"class_path": name, "init_args": arguments}))
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": [plain]}}, allow_unicode=True))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(file), "--print_config"])


@settings(ANY, max_examples=300)
@given(own=st.sampled_from(CALLBACKS), data=st.data())
def test_callbacks_in_python(own, data):
    """Where nothing has checked types before."""
    name, arguments = own
    plain = data.draw(wrong(arguments))
    given = {key: value for key, value in plain.items() if key in arguments and not isinstance(value, dict)}
    kind = getattr(bh, name)
    needed = {"KVHeadConversion": {"num_key_value_heads": 1}, "HeadPruning": {"ratio": 1}, "DepthPruning": {"blocks": 1}}
    needed["StructuredPruning"] = {"amount": bh.Amount(channels=0.2)}
    needed["Shrinking"] = {"budget": bh.Budget(params=0.8)}
    with contextlib.suppress(ValueError):
        kind(**needed.get(name, {}) | given)
