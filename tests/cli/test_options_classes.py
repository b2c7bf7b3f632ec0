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


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            "class_path: WeightPruning, init_args: {sparsity: half}",
            "sparsity=half must be a number, null or a class: Constant, Cosine,",
        ),
        (
            "class_path: WeightPruning, init_args: {sparsity: 0.5, at: middle}",
            "at=middle must be an integer, a number, 'start' or a class: Constant, Cosine,",
        ),
        (
            "class_path: WeightPruning, init_arg: {sparsity: 0.5}",
            "unknown key 'init_arg'. Did you mean 'init_args'? Keys of a class: class_path, init_args, dict_kwargs",
        ),
        (
            "class_path: WeightPruning, init_args: {sparsity: 0.5, criterion: billhook.Wonda}",
            "criterion: unknown class 'billhook.Wonda'. Did you mean 'Wanda'? Classes: ",
        ),
        (
            "class_path: billhook.WeightPrunning",
            "trainer.callbacks: unknown class 'billhook.WeightPrunning'. Did you mean 'WeightPruning'? Classes: ",
        ),
        (
            "class_path: WeightPruning, init_args: {at: 1.5, sparsity: 0.5}",
            "at=1.5 as a float is a fraction of training and must be",
        ),
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["billhook fit", "own CLI"])
def test_a_wrong_value_or_key_gets_one_line_with_the_legal_ones(tmp_path, capfd, settings, told, own):
    (tmp_path / "own.yaml").write_text(f"trainer:\n  callbacks+: [{{{settings}}}]\n")
    words, program = ["fit", "--config", "recipe:base", "--config", "own.yaml"], "mine.py" if own else "billhook"
    options = {"parser_class": ArgumentParser, "parser_kwargs": {"prog": program}, "args": words}
    with pytest.raises(SystemExit) as ended:
        LightningCLI(bh.TransformerModule, bh.TextDataModule, **options) if own else main(words)
    message = capfd.readouterr().err.splitlines()[-1] if ended.value.code == 2 else str(ended.value.code)
    assert message.startswith(f"{program} fit: {told}")


def test_an_override_after_another_callback_names_the_rule(capsys):
    words = [
        "--config",
        "recipe:base",
        "--config",
        "recipe:wanda",
        "--config",
        "recipe:export",
        "--trainer.callbacks.sparsity",
        "0.6",
    ]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *words])
    rule = "--trainer.callbacks.sparsity applies to the last callback before it on the command line. Put it directly after the "
    assert f"\n{rule}--config that adds its callback.\n" in capsys.readouterr().err


def test_a_users_own_cli_finds_recipes(capsys):
    def cli(recipe):
        words = ["fit", "--config", f"recipe:{recipe}", "--print_config"]
        with pytest.raises(SystemExit) as ended, pytest.warns(UserWarning, match="args parameter"):
            LightningCLI(bh.TransformerModule, bh.TextDataModule, parser_class=ArgumentParser, args=words)
        return ended.value.code, capsys.readouterr()

    code, said = cli("export")
    assert code == 0
    assert "class_path: billhook.Export" in said.out
    code, said = cli("exprt")
    assert code == 2
    assert "unknown recipe 'exprt'. Did you mean 'export'?" in said.err
