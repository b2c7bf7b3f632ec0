"""Commands with `--stream`: the same checkpoint and figures as in memory."""

import json
import shutil

import pytest
import torch

import billhook as bh
from billhook.cli.main import main
from kit.cli import option, small_llama

SHORT = ["--polish", "null", "--length", "16", "--examples", "6", "--evaluate", "5", "--supplement", "0"]
GENERATES = "is not supported with stream=True: to generate text, a streamed model would be read once per token"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


def ran(command, model, out, *arguments):
    main([command, str(model), str(out), *arguments])
    return json.loads((out / "billhook.json").read_text())


@pytest.mark.daily("prune", "prune-structure")
@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--sparsity", "0.5"],
        ["convert", "--num_key_value_heads", "1", "--method", "svd"],
        [
            "convert",
            "--num_key_value_heads",
            "1",
            "--method",
            "auto",
            "--repair",
            "RepairConfig",
            "--batch_size",
            "1",
        ],
        ["prune-blocks", "--blocks", "1"],
        ["prune-heads", "--ratio", "0.5", "--importance", "OutputNorm"],
        ["prune-structure", "--channels", "0.25", "--blocks", "1", "--importance", "OBS"],
    ],
    ids=lambda a: a[0],
)
def test_the_same_as_in_memory(small, files, tmp_path, capsys, arguments):
    command, *asked = arguments
    text = [*SHORT, *option(files), *asked]
    memory, streamed = (ran(command, small, tmp_path / name, *text, *how) for name, how in (("a", []), ("b", ["--stream"])))
    found = [bh.load(tmp_path / name).state_dict() for name in "ab"]
    assert all(torch.equal(found[1][name], one) for name, one in found[0].items())
    assert memory["perplexity"] == pytest.approx(streamed["perplexity"], rel=1e-6)
    assert [one["source"] for one in streamed["degradation"]] == ["train", "unseen"]  # what the model writes is not measured on
    assert memory["events"] == streamed["events"]
    assert not (tmp_path / ".b.parts").exists()


def test_without_data_it_reads_packaged_text_and_the_model_writes_none(small, tmp_path):
    asked = ["--sparsity", "0.5", "--criterion", "Magnitude", "--evaluate", "0"]
    for name, how in (("a", []), ("b", ["--stream"])):
        ran("prune", small, tmp_path / name, *asked, *how)
    found = [bh.load(tmp_path / name).state_dict() for name in "ab"]
    assert all(torch.equal(found[1][name], one) for name, one in found[0].items())
    ran("prune", small, tmp_path / "c", "--sparsity", "0.5", "--examples", "6", "--length", "16", "--evaluate", "2", "--stream")
    record = json.loads((tmp_path / "c" / "billhook.json").read_text())
    assert record["calibration"]["sources"] == "mixed"
    measured = [(one["source"], one["inside"], one["rows"]) for one in record["degradation"]]
    assert measured == [("mixed", True, 2), ("unseen", False, 2)]
    shutil.copytree(small, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(SystemExit, match="data=None: '.*bare' has no tokenizer to read text with. Pass --tokenizer and --data."):
        ran("prune", tmp_path / "bare", tmp_path / "d", "--sparsity", "0.5", "--stream")
    ran("prune", tmp_path / "bare", tmp_path / "d", "--sparsity", "0.5", "--examples", "2", "--length", "8", "--evaluate", "1")
    assert json.loads((tmp_path / "d" / "billhook.json").read_text())["calibration"]["sources"] == "generated"


def test_memory_that_is_too_little(small, files, tmp_path):
    with pytest.raises(
        SystemExit, match=r"memory=0\.00 GiB is too small: streaming one block at a time needs at least \d\.\d\d GiB"
    ):
        main(["prune", str(small), str(tmp_path / "out"), *option(files), "--sparsity", "0.5", "--stream", "--memory", "1MB"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["prune", "--sparsity", "0.5", "--data", "generated"], f"data='generated' {GENERATES}"),
        (["prune", "--sparsity", "0.5", "--data", "tiny", "--offload", "true"], "offload=True keeps the model in memory"),
    ],
)
def test_refused(small, tmp_path, arguments, refusal):
    command, *asked = arguments
    with pytest.raises(SystemExit) as refused:
        main([command, str(small), str(tmp_path / "out"), *asked, "--stream"])
    assert refusal in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_memory_without_stream(small, tmp_path):
    with pytest.raises(SystemExit):
        main(["prune", str(small), str(tmp_path / "out"), "--sparsity", "0.5", "--memory", "1GiB"])


def test_perplexity_of_streamed_models(small, files, tmp_path, capsys):
    figures = []
    for how in ([], ["--stream"]):
        main(["evaluate", str(small), "--text", files["validation"], "--length", "16", "--examples", "4", *how])
        figures.append(capsys.readouterr().out)
    assert figures[0] == figures[1]
    with pytest.raises(SystemExit, match="stream=True only supports --text"):
        main(["evaluate", str(small), "--data", files["validation"], "--stream"])


def printed(capsys, *arguments):
    main([*map(str, arguments)])
    return capsys.readouterr().out


def test_summary_is_the_same_and_no_block_comes(small, tmp_path, capsys, monkeypatch):
    model = bh.load(small)
    bh.prune(model, bh.Magnitude(), sparsity=0.5)
    bh.save(model, tmp_path / "sparse")
    expected, streamed = bh.summary(model), bh.stream(tmp_path / "sparse")
    assert expected.zeros > 5_000
    monkeypatch.setattr("billhook.engine.files.load_tensors", None)  # what reads blocks
    assert bh.summary(streamed) == expected
    assert printed(capsys, "summary", tmp_path / "sparse", "--stream") == expected.text() + "\n"


@pytest.mark.nightly
def test_inspect_is_the_same_and_says_how_the_model_streams(small, capsys, monkeypatch):
    monkeypatch.setattr("billhook.engine.files.load_tensors", None)
    said = printed(capsys, "inspect", small, "--stream")
    plain = printed(capsys, "inspect", small)
    blocks = [sum(one.nbytes for one in block.parameters()) for block in bh.load(small).model.layers]
    stays = sum(one.nbytes for one in bh.load(small).parameters()) - sum(blocks)
    assert said.startswith(plain)
    assert (
        said[len(plain) :].split()
        == (
            f"streaming 2 blocks of up to {blocks[0] / 1e6:,.1f} MB, loaded one at a time "
            f"({sum(blocks) / 1e6:,.1f} MB in total); {stays / 1e6:,.1f} MB stay in memory"
        ).split()
    )
    found = json.loads(printed(capsys, "inspect", small, "--stream", "--json", "true"))
    assert found["streamed"] == {"blocks": 2, "bytes": sum(blocks), "largest": max(blocks), "stays": stays}
