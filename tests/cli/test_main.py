import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

import billhook as bh
from billhook.cli.main import main
from billhook.cli.options import COMMANDS, command_of, description
from kit.cli import QUICK, ROOT, callbacks_in, small_llama
from kit.cli import pytestmark as quiet
from kit.fits import write_text

pytestmark = quiet
FRAGMENTS = sorted(ROOT.glob("callbacks/*.yaml"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def billhook(line: str) -> None:
    main(shlex.split(line))


@pytest.fixture
def quick(tmp_path):
    files = write_text(tmp_path)
    given = "{" + ", ".join(f"{split}: {path}" for split, path in files.items()) + "}"
    return f"{QUICK} --data.data '{given}'"


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """As many heads and blocks as the embedded model has, all of them smaller."""
    return small_llama(tmp_path_factory.mktemp("smaller"), hidden_size=64, num_hidden_layers=4, num_key_value_heads=8)


@pytest.fixture(scope="module")
def mixture(smaller, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 32, "num_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **heads)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(smaller).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["TextDataModule", "ClassificationDataModule", "billhook.training.data.Seq2SeqDataModule"])
@pytest.mark.parametrize("given", ["text.txt", "[text.txt, other.txt]"])
def test_a_file_of_text_is_named_not_read(name, given, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a: line\n" * 9)
    with pytest.raises(SystemExit, match="0"):
        billhook(f"fit --data {name} --data.data '{given}' --model.model tiny --print_config")
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["data"] == yaml.safe_load(given)


@pytest.mark.daily("shrink", "wanda_lora", "experts")
@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.stem)
def test_every_fragment_runs(fragment, quick, smaller, mixture, capsys):
    model = mixture if fragment.stem == "experts" else smaller
    line = f"fit --config {ROOT}/examples/base.yaml --config {fragment} --trainer.max_steps 2 --trainer.val_check_interval 1"
    billhook(f"{line} --trainer.logger false --trainer.enable_checkpointing false {quick} --model.model {model}")
    used = {c["class_path"].rpartition(".")[2] for c in yaml.safe_load(fragment.read_text())["trainer"]["callbacks+"]}
    assert used <= set(callbacks_in("config.yaml"))


def test_the_saved_config_runs_again(quick, capsys):
    options = "--trainer.max_steps 2 --trainer.logger false --trainer.enable_checkpointing false --trainer.val_check_interval 1"
    billhook(f"fit --config {ROOT}/examples/base.yaml --config {ROOT}/callbacks/mqa.yaml {options} {quick}")
    Path("config.yaml").rename("again.yaml")
    billhook("fit --config again.yaml")
    assert Path("config.yaml").read_text() == Path("again.yaml").read_text()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_validate_test_predict_and_export(quick, capsys):
    options = "--trainer.max_steps 2 --trainer.val_check_interval 1 --trainer.logger false"
    billhook(f"fit --config {ROOT}/examples/base.yaml --config {ROOT}/callbacks/gqa.yaml {options} {quick}")
    (ckpt,) = Path("checkpoints").glob("*.ckpt")
    for command in ("validate", "test"):
        billhook(f"{command} --model.model tiny --ckpt_path '{ckpt}' {quick} --trainer.logger false")
        assert "perplexity" in capsys.readouterr().out
    billhook(f"predict --model.model tiny --ckpt_path '{ckpt}' {quick} --trainer.logger false --trainer.limit_predict_batches 1")
    billhook(f"export '{ckpt}' out")
    assert "Format: standard checkpoint: from_pretrained loads it" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained("out").config.num_key_value_heads == 4
    assert transformers.AutoTokenizer.from_pretrained("out")("to be").input_ids
    billhook(f"export '{ckpt}' out")
    assert capsys.readouterr().out.startswith("Saving to out (replaces the billhook checkpoint of ")


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.stem)
def test_examples_are_legal(example, capsys):
    with pytest.raises(SystemExit) as stopped:
        billhook(f"fit --config {example} --print_config")
    assert stopped.value.code == 0
    assert "class_path: billhook" in capsys.readouterr().out


def test_the_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["billhook", "--version"])
    runpy.run_module("billhook", run_name="__main__")
    assert capsys.readouterr().out == f"{bh.__version__}\n"


WORDS = ("prune MODEL OUT", "shrink MODEL OUT", "recipes [NAME]", "export PATH [PATH ...]", "push FOLDER NAME")


class TestHelp:
    def told(self, line, capsys):
        with pytest.raises(SystemExit) as stopped:
            billhook(line)
        assert stopped.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    def test_the_front_page_names_and_describes_every_command(self, capsys):
        billhook("--help")
        assert capsys.readouterr().out == description()
        told = " ".join(description().split())
        for name in COMMANDS:
            first = " ".join(command_of(name).__doc__.partition("\n\n")[0].split())
            assert f"billhook {name} " in told
            assert first in told
        assert all(word in told for word in ("billhook fit", "validate", "predict"))
        assert [words for words in WORDS if f"billhook {words}" not in told] == []

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            (
                "fit --trainer.callbacks.help KVHeadConversion",
                [
                    "Converts attention to fewer KV heads",
                    "1 for multi- query attention",
                    "'mean', 'first', 'random', 'aligned', 'svd', 'auto'",
                    "billhook.kv_heads.methods.Aligned",
                ],
            ),
            (
                "fit --model.help TransformerModule",
                [
                    "with optional LoRA and distillation",
                    "determines its class and metric",
                    "Peak learning rate",
                    "GGUF",
                ],
            ),
            ("fit --data.help TextDataModule", ["packed or padded", "Tokens per example"]),
            ("export --help", ["Lightning checkpoint", "writes the folder and verifies it"]),
            ("summary --help", ["KV-cache bytes per token", '"tiny"']),
        ],
    )
    def test_it_reads_like_a_manual(self, line, words, capsys):
        told = self.told(line, capsys)
        assert [word for word in words if word not in told] == []


class TestRefused:
    def told(self, line, capsys):
        with pytest.raises(SystemExit) as stopped:
            billhook(line)
        assert stopped.value.code not in (0, None)
        return capsys.readouterr().err + str(stopped.value.code)

    @pytest.mark.parametrize(
        ("callback", "words"),
        [
            (
                "{class_path: KVHeadConversion, init_args: {num_kv_heads: 4}}",
                ["num_kv_heads", "Did you mean 'num_key_value_heads'?", "measure_batches"],
            ),
            (
                "{class_path: KVHeadConversion, init_args: {num_key_value_heads: 4, method: median}}",
                ["'mean', 'first', 'random'", "median"],
            ),
            ("{class_path: KVHeadConversion, init_args: {num_key_value_heads: four}}", ["num_key_value_heads", "four"]),
            (
                "{class_path: KVHeadConversion, init_args: {num_key_value_heads: 3}}",
                ["billhook fit: num_key_value_heads=3 must", "Use 1, 2, 4."],
            ),
            ("{class_path: KVHeadConversion}", ["num_key_value_heads"]),
        ],
    )
    def test_a_wrong_callback(self, callback, words, tmp_path, capsys):
        path = tmp_path / "wrong.yaml"
        path.write_text(f"trainer:\n  callbacks:\n    - {callback}\n")
        told = self.told(f"fit --config {path}", capsys)
        assert [word for word in words if word not in told] == []

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("fit --config nowhere.yaml", ["nowhere.yaml"]),
            ("fit --config wrong.yaml", ["max_stepz", "Did you mean 'max_steps'?"]),
            ("fit --model.lrr 1", ["lrr"]),
            ("fit --trainer.max_stepz 3", ["lightning.pytorch.Trainer has no argument 'max_stepz'. Did you mean 'max_steps'?"]),
            ("fit --model.task poetry", ["poetry"]),
            ("prunes", ["billhook: unknown command 'prunes'. Did you mean 'prune'?", "Commands: fit, ", " prune-heads, "]),
            ("prune", ["required", "model"]),
            ("summary", ["required", "model"]),
            ("", ["billhook: missing command.", "Commands: fit, validate, test, predict, convert, prune, "]),
            ("fit --trainer.max_epochs 1 --model.model ./nowhere", ["'./nowhere' is not a folder with"]),
            ("export nowhere.ckpt out", ["'nowhere.ckpt' is neither a Lightning checkpoint (.ckpt) nor a folder of its shards"]),
            ("summary ./nowhere", ["'./nowhere' is not a folder with"]),
            ("summary .", ["has no config.json, so it is not a Hugging Face checkpoint"]),
        ],
    )
    def test_a_wrong_line(self, line, words, capsys):
        Path("wrong.yaml").write_text("trainer:\n  max_stepz: 3\n")
        told = self.told(line, capsys)
        assert [word for word in words if word not in told] == []


def test_the_stored_help_is_that_of_the_parser(tmp_path):
    """In a process of its own, as classes are listed in the order of their imports."""
    subprocess.run([sys.executable, str(ROOT / ".ci/help_texts.py"), str(tmp_path)], check=True)
    stored = Path(bh.__file__).with_name("cli") / "help"
    for command in COMMANDS:
        made = (tmp_path / f"{command}.txt").read_text()
        assert made == (stored / f"{command}.txt").read_text(), "python .ci/help_texts.py stores it"


@pytest.mark.parametrize(
    "words", [["shrink", "--help"], ["prune", "tiny", "out", "--sparsty", "0.5"]], ids=["help", "an unknown option"]
)
def test_what_needs_no_model_imports_no_torch(words):
    code = f"""
import sys
from billhook.cli.main import main
try:
    main({words!r})
except SystemExit as ended:
    assert ended.code in (0, 2)
assert not {{"torch", "transformers", "lightning"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: billhook shrink" in done.stdout or "Did you mean '--sparsity'?" in done.stderr
