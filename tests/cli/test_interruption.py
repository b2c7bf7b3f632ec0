"""Commands that are stopped say in one line what stays and how they go on, and then do."""

import os
import signal

import pytest
import torch

import billhook as bh
import billhook.calibration.generated as text
from billhook.cli.main import main
from billhook.engine.parts import Parts
from billhook.shrinking.variants import VariantCache
from kit.cli import QUICK, option, small_llama
from kit.cli import pytestmark as quiet

pytestmark = quiet

SHORT = ["--polish", "null", "--length", "16", "--examples", "24", "--evaluate", "0", "--batch_size", "4"]
SHRINK = ["--params", "0.95", "--generations", "0", "--candidates", "1", *SHORT]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


def stopped(words, capsys, status=130):
    """Runs a command that is stopped, and returns its last line on stderr; there is no traceback."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


COMMANDS = {
    "prune": ["--sparsity", "0.5"],
    "prune-structure": ["--channels", "0.25", "--importance", "WeightNorm"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("by", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_one_line_and_no_traceback(small, tmp_path, monkeypatch, capsys, command, by, status):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("billhook.cli.one_shot.load", lambda *_: os.kill(os.getpid(), by))
    line = stopped([command, small, out, *COMMANDS[command]], capsys, status)
    assert line == f"billhook {command}: interrupted. {out} was not written. The same command starts from the beginning."
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["evaluate", "tiny", "--data", "tiny"], "billhook.cli.evaluate.device_of"),
        (["bench", "tiny"], "billhook.cli.bench.device_of"),
    ],
    ids=["evaluate", "bench"],
)
def test_commands_that_write_no_folder(words, where, monkeypatch, capsys):
    monkeypatch.setattr(where, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert stopped(words, capsys) == f"billhook {words[0]}: interrupted."


def test_a_fit(tmp_path, monkeypatch, capsys, files):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bh.TransformerModule, "training_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    words = ["fit", "--model.model", "tiny", *(f"--data.data={option(files)[1]}",), "--trainer.max_steps", "1", *QUICK.split()]
    try:
        line = stopped(words, capsys)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on
    assert line == "billhook fit: interrupted. Checkpoints are kept. Resume with --ckpt_path FILE."


def test_a_fit_that_has_ended_leaves_no_process_group_to_the_interpreter_which_could_abort_in_it(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    training_step, during = bh.TransformerModule.training_step, []

    def step(*given):
        during.append(torch.distributed.is_initialized())
        return training_step(*given)

    monkeypatch.setattr(bh.TransformerModule, "training_step", step)
    words = ["fit", "--model.model", "tiny", *(f"--data.data={option(files)[1]}",), "--trainer.max_steps", "1", *QUICK.split()]
    main([*words, "--trainer.strategy", "ddp"])
    assert during == [True]
    assert not torch.distributed.is_initialized()


def test_streamed_work_goes_on(small, files, tmp_path, monkeypatch, capsys):
    words = ["prune", small, tmp_path / "out", "--sparsity", "0.5", "--stream", *SHORT, *option(files)]
    with monkeypatch.context() as patch:
        write, written = Parts.write, []

        def last(*given):
            if written:
                os.kill(os.getpid(), signal.SIGINT)
            written.append(given)
            write(*given)

        patch.setattr(Parts, "write", last)
        line = stopped(words, capsys)
    parts = tmp_path / ".out.parts"
    again = "Run the same command again to continue after the finished blocks in"
    assert line.endswith(f"interrupted. {tmp_path / 'out'} was not written. {again} {parts}.")
    main([str(word) for word in words])
    assert "Reused 1 block from an interrupted run." in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_search_goes_on_with_what_it_has_made(small, files, tmp_path, monkeypatch, capsys):
    words = ["shrink", small, tmp_path / "out", *SHRINK, *option(files)]
    cache, add, made = tmp_path / ".out.variants", VariantCache.add, []

    def counted(*given):
        made.append(given[1:3])
        if len(made) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        add(*given)

    monkeypatch.setattr(VariantCache, "add", counted)
    line = stopped(words, capsys)
    assert line.endswith(f"Run the same command again to continue after the finished variants in {cache}.")
    before = made[:3]
    main([str(word) for word in words])
    assert f"Reusing 3 variants of an earlier run in {cache}." in capsys.readouterr().out
    assert not set(before) & set(made[4:])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "--num_key_value_heads", "1", "--method", "svd"],
        ["prune-structure", "--channels", "0.25"],
        ["shrink", *SHRINK],
    ],
    ids=lambda command: command[0],
)
def test_generated_text_is_kept_until_the_output_is_saved(small, tmp_path, monkeypatch, capsys, command):
    name, *options = command
    words = [name, small, tmp_path / "out", *options, *SHORT, "--evaluate", "2", "--data", "generated"]
    sampled, made = text._continued, []

    def counted(*given):
        made.append(given)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sampled(*given)

    monkeypatch.setattr(text, "_continued", counted)
    line, kept = stopped(words, capsys), tmp_path / ".out.generated"
    assert line.endswith(f"Run the same command again to continue after the finished self-generated text in {kept}.")
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    main([str(word) for word in words])
    assert len(made) == 3  # the first is not generated again
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_says_what_there_is_to_go_on_with(small, files, tmp_path, monkeypatch):
    words = ["shrink", str(small), str(tmp_path / "out"), *SHRINK, *option(files)]
    monkeypatch.setattr("billhook.shrinking.measurement.config_losses", fails)
    with pytest.raises(SystemExit, match=r"(?s)no room.*Run the same command again to continue after the finished variants in"):
        main(words)


def fails(*_):
    raise ValueError("no room")


def test_a_cache_that_billhook_did_not_write_is_left_alone(small, tmp_path):
    (tmp_path / ".out.variants").mkdir()
    (tmp_path / ".out.variants" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="billhook shrink: '.*out.variants' is needed for the variant cache"):
        main(["shrink", str(small), str(tmp_path / "out"), "--params", "0.95"])
    assert (tmp_path / ".out.variants" / "notes.txt").read_text() == "mine"
