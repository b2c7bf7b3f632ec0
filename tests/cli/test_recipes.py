"""`billhook recipes`, and `--config recipe:NAME`."""

import pytest

from billhook.cli.main import main
from billhook.cli.recipes import resolve_recipes
from kit.cli import ROOT
from kit.cli import pytestmark as quiet

pytestmark = quiet


def test_they_are_listed_each_with_its_first_sentence(capsys):
    main(["recipes"])
    said = capsys.readouterr().out
    names = [line.split()[0] for line in said.splitlines() if not line.startswith(" ")]
    assert names == sorted([path.stem for path in ROOT.glob("callbacks/*.yaml")] + ["base", "quickstart"])
    assert "\nmagnitude        Magnitude pruning: sets the smallest half of each layer's weights to zero.\n" in said
    assert "yaml-language-server" not in said


@pytest.mark.parametrize("name", ["wanda", "recipe:wanda"])
def test_one_is_printed(name, capsys):
    main(["recipes", name])
    assert capsys.readouterr().out == (ROOT / "callbacks" / "wanda.yaml").read_text()


def test_one_that_there_is_not_is_refused_with_those_there_are():
    for line in (["recipes", "wander"], ["fit", "--config", "recipe:wander"], ["fit", "--config=recipe:wander"]):
        with pytest.raises(
            SystemExit, match=f"billhook {line[0]}: unknown recipe 'wander'. Did you mean 'wanda'.* Recipes: base, .*, wanda_lora"
        ):
            main(line)


def test_only_what_follows_the_option_is_a_recipe():
    base = str(ROOT / "examples" / "base.yaml")
    words = ["fit", "--config", "recipe:base", "--config=recipe:base", "--model.model", "recipe:base"]
    assert resolve_recipes(words) == ["fit", "--config", base, f"--config={base}", "--model.model", "recipe:base"]


def test_fit_takes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "recipe:base", "--config=recipe:gqa", "--print_config"])
    assert stopped.value.code == 0
    assert "class_path: billhook.KVHeadConversion" in capsys.readouterr().out
