"""How the words of a command line become the values of a command."""

from dataclasses import dataclass

import pytest

from billhook.cli.main import main
from billhook.cli.options import run


@dataclass
class Group:
    """Options of a command, one of which has the group's name."""

    examples: int = 3


@pytest.fixture
def given(monkeypatch):
    """What a command is called with."""
    seen = {}

    def prunes(
        model: str,
        out: str,
        examples: Group,
        sizes: list[int] | None = None,
        files: list[str] | None = None,
        skip: str | list[str] | None = None,
        data: str | dict[str, str] | list[str | dict[str, str]] | None = None,
        layers: list[int | str] | None = None,
        dry_run: bool = False,
    ) -> None:
        """Stands for a command."""
        seen.update(locals())
        del seen["seen"], seen["examples"]

    def called(*words):
        run(prunes, words)
        return {name: value for name, value in seen.items() if value not in (None, False)}

    return called


@pytest.mark.parametrize(("word", "value"), [("--dry_run", True), ("--dry_run=True", True), ("--dry_run=false", False)])
def test_a_switch_may_have_its_value_behind_an_equals_sign(given, word, value):
    assert given(word, "tiny", "out") == {"model": "tiny", "out": "out"} | ({"dry_run": True} if value else {})


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--sizes", "1", "8"], "sizes", [1, 8]),
        (["--sizes", "8"], "sizes", [8]),
        (["--sizes=1", "8"], "sizes", [1, 8]),
        (["--sizes", "[1, 8]"], "sizes", [1, 8]),
        (["--sizes=[1, 8]"], "sizes", [1, 8]),
        (["--files", "a, b.txt", "12"], "files", ["a, b.txt", "12"]),
        (["--files", "a", "--files", "b", "c"], "files", ["a", "b", "c"]),
        (["--data", "a.txt", "--data=b.txt"], "data", ["a.txt", "b.txt"]),
        (["--skip", "*.down_proj"], "skip", "*.down_proj"),
        (["--skip", "*.down_proj", "lm_head"], "skip", ["*.down_proj", "lm_head"]),
        (["--data", "{train: a.txt}"], "data", {"train": "a.txt"}),
        (["--data", "{train: a.txt}", "b.txt"], "data", [{"train": "a.txt"}, "b.txt"]),
        (["--layers", "0", "model.layers.1.self_attn"], "layers", [0, "model.layers.1.self_attn"]),
    ],
)
def test_values_in_a_row_are_a_list_and_so_is_one_in_brackets(given, words, name, value):
    assert given("tiny", "out", *words, "--dry_run") == {"model": "tiny", "out": "out", name: value, "dry_run": True}


def test_an_option_of_one_value_may_stand_before_what_a_command_begins_with(given):
    assert given("--data", "a.txt", "tiny", "out") == {"model": "tiny", "out": "out", "data": "a.txt"}


def test_a_number_that_is_none_is_refused(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        given("tiny", "out", "--sizes", "1", "eight")
    assert "eight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "wrong", "near"),
    [
        ("prune tiny out --sparsty 0.5", "sparsty", "sparsity"),
        ("prune tiny out --sparsity 0.5 --exmples=4", "exmples", "examples"),
        ("prune-structure tiny out --chanels 0.5", "chanels", "channels"),
        ("convert tiny out --dry-run", "dry-run", "dry_run"),
        ("bench tiny --batchsizes 1 8", "batchsizes", "batch_sizes"),
        ("prune tiny out --quite_another", "quite_another", None),
    ],
)
def test_a_misspelt_option_is_answered_with_the_nearest_in_two_lines(line, wrong, near, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    command, meant = line.split()[0], "" if near is None else f" Did you mean '--{near}'?"
    said = f"billhook {command}: unknown option '--{wrong}'.{meant}\n`billhook {command} --help` lists all options.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prune tiny", "the following arguments are required: out"),
        ("prune tiny out more", "unrecognized arguments: more"),
        ("prune tiny out --sparsity half", "sparsity=half must be a number or null."),
    ],
)
def test_other_errors_are_told_without_the_usage_too(line, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    told = capsys.readouterr().err
    assert told.startswith(f"billhook prune: {said}\n")
    assert told.endswith("\n`billhook prune --help` lists all options.\n")
    assert "usage:" not in told
