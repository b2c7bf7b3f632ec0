"""The folders of one-shot commands: one without a tokenizer, and one that is read and would be written."""

import json

import pytest
import torch
import transformers

import billhook as bh
from billhook.assets import model_path
from billhook.cli.main import main
from kit.cli import pytestmark, small_llama  # noqa: F401 - of short fits
from kit.fits import llama, write_text

SHORT = ["--polish", "null", "--length", "16", "--examples", "4", "--device", "cpu"]
HALF = ["--criterion", "Magnitude", "--sparsity", "0.5", "--evaluate", "0"]
COMMANDS = {
    "prune": ["--sparsity", "0.5"],
    "prune-structure": ["--channels", "0.5"],
    "shrink": ["--params", "0.9"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    files = write_text(tmp_path_factory.mktemp("text"))
    return ["--data", "{" + ", ".join(f"{split}: {path}" for split, path in files.items()) + "}"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model alone."""
    folder = tmp_path_factory.mktemp("bare")
    torch.manual_seed(0)
    llama(vocab_size=2048).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that billhook has written."""
    folder = tmp_path_factory.mktemp("written") / "model"
    torch.manual_seed(0)
    bh.save(llama(vocab_size=2048), folder, transformers.AutoTokenizer.from_pretrained(model_path("tiny")))
    return folder


class TestWithoutATokenizer:
    def test_text_asks_for_one(self, bare, text, tmp_path):
        with pytest.raises(SystemExit, match=rf"'{bare}' has no tokenizer: name another .* \(--tokenizer NAME\)$"):
            main(["prune", bare, str(tmp_path / "out"), *COMMANDS["prune"], *text, *SHORT])
        assert list(tmp_path.iterdir()) == []

    def test_one_is_named_read_by_and_saved_along(self, bare, text, tmp_path):
        main(["prune", bare, str(tmp_path / "out"), *COMMANDS["prune"], *text, *SHORT, "--evaluate", "2", "--tokenizer", "tiny"])
        saved, given = (transformers.AutoTokenizer.from_pretrained(name) for name in (tmp_path / "out", model_path("tiny")))
        assert saved.get_vocab() == given.get_vocab()

    def test_where_nothing_is_read_none_is_needed(self, bare, tmp_path, capsys):
        main(["prune", bare, str(tmp_path / "out"), *HALF, *SHORT])
        assert f"No tokenizer saved: '{bare}' has none. Add one with --tokenizer NAME.\n" in capsys.readouterr().out
        assert float((bh.load(tmp_path / "out").model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5

    def test_nor_where_it_reads_what_it_writes(self, bare, tmp_path):
        main(["prune", bare, str(tmp_path / "out"), *COMMANDS["prune"], *SHORT, "--evaluate", "2"])
        assert not (tmp_path / "out" / "tokenizer.json").exists()

    def test_one_that_is_code(self, bare, text, tmp_path):
        own = tmp_path / "own"
        own.mkdir()
        said = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
        (own / "tokenizer_config.json").write_text(json.dumps(said))
        with pytest.raises(SystemExit, match="tokenizer or processor is code that comes with it.*name another as tokenizer"):
            main(["prune", bare, str(tmp_path / "out"), *HALF, *SHORT, "--tokenizer", str(own)])


class TestWhatIsReadIsNotWritten:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_by_any_command(self, command, written):
        before = {path.name: path.read_bytes() for path in written.iterdir()}
        with pytest.raises(SystemExit, match=f"'{written}' is or contains the folder of the model, which would"):
            main([command, str(written), str(written), *COMMANDS[command], *SHORT])
        assert {path.name: path.read_bytes() for path in written.iterdir()} == before

    def test_by_other_names(self, written, tmp_path, monkeypatch):
        (tmp_path / "link").symlink_to(written)
        monkeypatch.chdir(written)
        for source, out in ((written, tmp_path / "link"), (tmp_path / "link", written), (written, f"../{written.name}")):
            for stream in ([], ["--stream"]):
                with pytest.raises(SystemExit, match="is or contains the folder of the model"):
                    main(["prune", str(source), str(out), *HALF, "--data", "tiny", *SHORT, *stream])

    def test_nor_what_holds_it(self, written, tmp_path):
        bh.save(bh.load(written), tmp_path / "outer")
        (tmp_path / "outer" / "inner").symlink_to(written)
        with pytest.raises(SystemExit, match="holds"):
            main(["prune", str(tmp_path / "outer" / "inner"), str(tmp_path / "outer"), *HALF, *SHORT])

    def test_a_folder_within_is_another(self, written, tmp_path):
        bh.save(bh.load(written), tmp_path / "model")
        main(["prune", str(tmp_path / "model"), str(tmp_path / "model" / "half"), *HALF, *SHORT])
        assert bh.load(tmp_path / "model").dtype == bh.load(tmp_path / "model" / "half").dtype
