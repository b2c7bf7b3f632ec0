"""`billhook schema`: what it says of configs, and the file that fragments name."""

import copy
import importlib
import json
import pkgutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import jsonschema
import pytest
import yaml

import billhook
from billhook.cli.main import main
from kit.cli import ROOT

FILE = ROOT / "callbacks" / "billhook.schema.json"
CONFIGS = sorted([*ROOT.glob("callbacks/*.yaml"), *ROOT.glob("examples/*.yaml")])
WANDA = yaml.safe_load((ROOT / "callbacks" / "wanda.yaml").read_text())


@pytest.fixture(scope="module")
def validator():
    with redirect_stdout(StringIO()) as said:
        main(["schema"])
    schema = json.loads(said.getvalue())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def wanda(**changes):
    config = copy.deepcopy(WANDA)
    config["trainer"]["callbacks+"][0] |= changes
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid_and_name_it(path, validator):
    first = path.read_text().splitlines()[0]
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == FILE
    validator.validate(yaml.safe_load(path.read_text()))


@pytest.mark.nightly
def test_what_has_been_imported_makes_no_difference(capsys):
    for module in pkgutil.walk_packages(billhook.__path__, "billhook."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    main(["schema"])
    fresh = subprocess.run([sys.executable, "-m", "billhook", "schema"], capture_output=True, text=True, check=True)
    assert json.loads(capsys.readouterr().out) == json.loads(fresh.stdout)


@pytest.mark.parametrize(
    "config",
    [
        wanda(class_path="WeightPruning"),
        wanda(class_path="my.own.Callback", init_args={"any": 1}),
        wanda(class_path="ModelCheckpoint", init_args={"monitor": "val_loss"}),
        {"model": {"class_path": "my.own.Module", "init_args": {"any": 1}}, "data": {"data": "tiny"}},
        {"trainer": {"callbacks": ["billhook.Report"], "max_steps": 3}},
        wanda(init_args={"criterion": {"class_path": "Refit", "init_args": {"criterion": "my.own.Criterion"}}, "sparsity": 0.5}),
    ],
)
def test_legal(config, validator):
    validator.validate(config)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (wanda(class_path="billhook.WeightPrunning"), "WeightPrunning"),
        (wanda(class_path="WeightPrunning"), "WeightPrunning"),
        (wanda(init_args={"sparsitty": 0.5}), "sparsitty"),
        (wanda(init_args={"sparsity": "half"}), "half"),
        (wanda(init_args={"criterion": "billhook.Wander"}), "Wander"),
        (wanda(init_args={"criterion": {"class_path": "billhook.criteria.Refit", "init_args": {"stepz": 3}}}), "stepz"),
        (wanda(arguments={}), "arguments"),
        ({"trainer": {"max_stepz": 3}}, "max_stepz"),
        ({"model": {"lrr": 1}}, "lrr"),
        ({"data": {"class_path": "TextDataModule", "init_args": {"dataa": "tiny"}}}, "dataa"),
        ({"data": {"data": 5}}, "5"),
        ({"trainers": {}}, "trainers"),
    ],
)
def test_illegal(config, word, validator):
    with pytest.raises(jsonschema.ValidationError) as refused:
        validator.validate(config)
    assert word in str(refused.value)


def test_arguments_are_described(validator):
    own = validator.schema["$defs"]["billhook.KVHeadConversion"]["properties"]["num_key_value_heads"]
    assert own["anyOf"] == [{"type": "array", "items": {"type": "integer"}}, {"type": "integer"}]
    assert own["description"].startswith("Number of KV heads after the conversion, 1 for multi-query attention,")
    assert "max_steps" in validator.schema["$defs"]["lightning.pytorch.Trainer"]["properties"]
