"""What one-shot commands say while they work: what they will do, bars for each long step, and what may follow."""

import re
import shlex
from contextlib import contextmanager

import pytest
import transformers

from billhook.cli.main import main
from kit.cli import QUICK, option, pytestmark, small_llama  # noqa: F401 - of short fits

SHORT = ["--polish", "null", "--length", "16", "--examples", "6", "--evaluate", "5", "--batch_size", "1"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


@pytest.fixture
def bars(monkeypatch):
    """The bars that are shown, in order, and how far each has come: `{what: (done, total, of)}`."""
    shown = {}

    @contextmanager
    def bar(what, of="", *_):
        shown[what] = None

        def told(done, total):
            shown[what] = done, total, of

        yield told

    for module in ("one_shot", "prune_structure", "prune_heads"):
        monkeypatch.setattr(f"billhook.cli.{module}.progress_bar", bar)
    for module in ("calibration.calibration", "calibration.generated", "cli.machine"):
        monkeypatch.setattr(f"billhook.{module}.progress_bar", bar)
    return shown


def test_structure_shows_a_bar_for_each_step(small, tmp_path, bars, capsys):
    out = tmp_path / "out"
    main(["prune-structure", str(small), str(out), "--channels", "0.5", *SHORT])
    assert bars == {
        f"loading {small}": None,
        "reading packaged text": None,
        "generating text": (5 * 17, 5 * 17, "tokens"),  # what it is measured on, the last
        "measuring": (15, 15, "examples"),
        "scoring": (6, 6, "batches"),
        "refitting": (2, 2, "layers"),
        "measuring again": (15, 15, "examples"),
        "saving and verifying": None,
    }
    said = capsys.readouterr().out
    sources = r"\(sources: 3 from packaged text, 3 from self-generated text\)"
    calibration = re.search(rf"calibrate on 6 examples of \d+ tokens {sources}", said)
    assert calibration
    plan = [
        f"Model: {small} (",
        "remove units: channels=0.5 (importance: OutputNorm())",
        "refit consumer layers",
        calibration[0],
    ]
    places = [said.index(words) for words in [*plan, f"save to {out}", "LlamaForCausalLM: ", "perplexity on", "Next steps:"]]
    assert places == sorted(places), "the plan comes first, and what may follow last"


@pytest.mark.parametrize(
    ("words", "step", "of"),
    [
        (["prune-heads", "--ratio", "0.5", "--repair", "null"], "scoring", "batches"),
        (["prune", "--sparsity", "0.5"], "pruning", "linear layers"),
    ],
)
def test_others_show_bars_too(small, files, tmp_path, bars, capsys, words, step, of):
    command, *more = words
    main([command, str(small), str(tmp_path / "out"), *more, *SHORT, *option(files)])
    done, total, counted = bars[step]
    assert (done, counted) == (total, of)
    assert bars["measuring again"] == (15, 15, "examples")  # of three texts
    said = capsys.readouterr().out
    assert said.index("save to ") < said.index("perplexity on")
    assert ("billhook fit" in said) == (command != "prune"), "training would undo zeros"


def test_what_may_follow_can_be_run(small, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["prune-heads", str(small), "out", "--ratio", "0.5", *SHORT, *option(files)])
    _, _, after = capsys.readouterr().out.partition("Next steps:\n")
    commands = [shlex.split(line, comments=True)[1:] for line in after.splitlines()]
    assert [words[0] for words in commands] == ["verdict", "fit", "serve-check"]
    file = str(files["train"])
    verdict, fit, _ = ([word.replace("FILE", file).replace("1000", "1") for word in words] for words in commands)
    main([*verdict, "--length", "16", "--examples", "2", "--prompts", "0", "--cache", str(tmp_path / "cache")])
    assert "same token" in capsys.readouterr().out
    main([*fit, *QUICK.split()])
    assert transformers.AutoModelForCausalLM.from_pretrained("out-trained").num_parameters() > 0


@pytest.mark.parametrize(
    ("words", "plan", "tokens"),
    [
        (["prune", "--sparsity", "0.5"], False, "128"),  # 3 of 6 rows of 16 to be shown, and 5 to be measured on
        (["prune", "--sparsity", "0.5", "--criterion", "Magnitude"], True, "80"),
        (["prune-structure", "--channels", "0.5", "--importance", "WeightNorm"], True, "128"),
        (["convert", "--num_key_value_heads", "1"], True, "80"),
        (["shrink", "--params", "0.92"], True, "128"),
    ],
)
def test_a_dry_run_has_the_model_write_nothing_and_says_how_much_it(small, tmp_path, monkeypatch, capsys, words, plan, tokens):
    def writes(*_, **__):
        raise AssertionError("the model writes")

    monkeypatch.setattr("billhook.calibration.calibration.generated", writes)
    command, *more = words
    main([command, str(small), str(tmp_path / "out"), *more, *SHORT, "--dry_run"])
    said = capsys.readouterr().out
    assert said.index(f"save to {tmp_path / 'out'}") < said.index(f"Dry run: {tmp_path / 'out'} was not written.")
    uses = "calibration and evaluation" if tokens == "128" else "evaluation"
    assert f"the model first generates {tokens} tokens for {uses}." in said
    assert ("With --data FILE, a dry run prints the whole plan." in said) == (not plan)
    assert (said.count("\n\n") == 2) == plan
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--data", "none.txt"], ["--data", "generated", "none.txt"], ["--also", "none.txt"]])
def test_text_that_is_not_there_is_refused_before_the_model_is_loaded(small, tmp_path, bars, capsys, words):
    with pytest.raises(SystemExit, match=f"billhook prune: {words[0][2:]}: the file 'none.txt' of the split 'train' does not"):
        main(["prune", str(small), str(tmp_path / "out"), "--sparsity", "0.5", *words])
    assert bars == {}
    assert capsys.readouterr().out == ""


def test_an_earlier_checkpoint_is_named_before_the_work_and_other_folders_are_never_replaced(small, files, tmp_path, capsys):
    words = ["prune-heads", str(small), str(tmp_path / "out"), "--ratio", "0.5", *SHORT, *option(files)]
    main(words)
    assert f"  save to {tmp_path / 'out'}\n" in capsys.readouterr().out
    main(words)
    said = capsys.readouterr().out
    line = f"  save to {tmp_path / 'out'} (replaces the billhook checkpoint of "
    assert 0 < said.index(line) < said.index("LlamaForCausalLM: ")
    (tmp_path / "out" / "notes.txt").write_text("mine\n")
    with pytest.raises(
        SystemExit, match=r"is not a billhook checkpoint \(notes.txt\) and will not be overwritten. Choose another folder"
    ):
        main(words)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine\n"


def test_how_long_the_examples_take_is_said_before(small, tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr("billhook.cli.command_plan.time_forward", lambda model, length: told.append(length) or 20.0)
    line = ["prune-structure", str(small), str(tmp_path / "out"), "--channels", "0.5", "--dry_run", *SHORT]
    main(line)
    assert told == [8, 16]
    plan = capsys.readouterr().out.partition("\n\n")[0]
    forwards = 2 * 6 + 2 * 15  # scores, and three texts measured twice
    fast, repaired = 20 * forwards / 60, 20 * (forwards + 3 * 6) / 60
    assert plan.endswith(f"\n  about {repaired:.0f} min in all (--effort fast: {fast:.0f} min)")
