"""What is said where a class is named that there is not."""

import pytest
from lightning.pytorch.cli import LightningCLI

import billhook as bh
from billhook.cli.fit import ArgumentParser
from billhook.cli.main import main
from kit.cli import pytestmark as quiet

pytestmark = quiet


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "near", "others"),
    [
        (["prune", "tiny", "out", "--criterion", "Wandaa"], "Wanda", ("Magnitude", "Refit", "SparseGPT")),
        (["prune", "tiny", "out", "--allocation", "Uniforn"], "Uniform", ("ByPattern", "OWL")),
        (["prune-structure", "tiny", "out", "--importance", "Tayler"], "Taylor", ("OBS", "OutputNorm")),
        (["fit", "--config", "recipe:base", "--trainer.callbacks+=WeightPrunning"], "WeightPruning", ("Export", "HeadPruning")),
    ],
)
def test_those_there_are_are_listed(words, near, others, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    told = capsys.readouterr().err
    assert f"unknown class '{words[-1].rpartition('=')[2]}'. Did you mean '{near}'? Classes: " in told
    assert all(f"{name}," in told or f"{name}, or" in told for name in (near, *others))
    assert "Criterion," not in told
    assert "Importance," not in told


def test_a_class_within_a_config(tmp_path, capsys):
    settings = "{class_path: WeightPruning, init_args: {criterion: Wandaa, sparsity: 0.5}}"
    (tmp_path / "own.yaml").write_text(f"trainer:\n  callbacks+: [{settings}]\n")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "recipe:base", "--config", "own.yaml"])
    assert "unknown class 'Wandaa'. Did you mean 'Wanda'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["fit", "--trainer.callbacks+=HeadPrunning"],
            "unknown class 'HeadPrunning'. Did you mean 'HeadPruning'? Classes: ",
        ),
        (["fit", "--trainer.max_stepps=1"], "lightning.pytorch.Trainer has no argument 'max_stepps'. Did you mean 'max_steps'?"),
        (["fti"], "unknown command 'fti'. Did you mean 'fit'? See `mine.py --help`.\nCommands: fit, "),
    ],
)
def test_a_users_own_cli_suggests_names_too(words, told, capsys):
    with pytest.raises(SystemExit, match="2"), pytest.warns(UserWarning, match="args parameter"):
        LightningCLI(
            bh.TransformerModule, bh.TextDataModule, parser_class=ArgumentParser, parser_kwargs={"prog": "mine.py"}, args=words
        )
    said = capsys.readouterr().err
    assert told in said
    assert "serve-check" not in said
