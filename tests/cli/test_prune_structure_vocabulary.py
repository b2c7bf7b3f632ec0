"""`billhook prune-vocabulary`: from the shell to a checkpoint and a tokenizer with fewer tokens."""

import json
import math
import re

import pytest
import transformers

import billhook as bh
from billhook.cli.main import main
from kit.cli import option, small_llama
from kit.printed import assert_printed
from kit.published import record_of

SHORT = ["--length", "32", "--evaluate", "6"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_llama(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["in memory", "streamed"])
def test_a_third_of_the_tokens_goes(small, files, tmp_path, capsys, stream):
    out = tmp_path / "out"
    main(["prune-vocabulary", str(small), str(out), "--tokens", "0.3", *SHORT, *stream, *option(files)])
    said, record = capsys.readouterr().out, record_of(out)
    assert "  2,048 -> 1,408 tokens" in said
    assert_printed("prune-vocabulary-streamed" if stream else "prune-vocabulary", said)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == model.config.vocab_size == 1408
    with pytest.raises(SystemExit, match=r"tokenizer: it has 2,048 tokens, but the model only 1,408.*--tokenizer FOLDER"):
        main(["prune", str(out), str(tmp_path / "other"), "--sparsity", "0.5", "--tokenizer", str(small), *SHORT, *option(files)])
    text = record["degradation"][0]
    assert text["bits_per_byte"] == pytest.approx([math.log2(text[when]) / text["token_bytes"] for when in ("before", "after")])
    assert text["token_ratio"] >= 1
    assert record["importance"]["tokens"] == 0.3
    shown = "naïve 日本語 🙂"
    assert tokenizer.decode(tokenizer(shown)["input_ids"], skip_special_tokens=True) == shown
    before, after = text["bits_per_byte"]
    assert record["bits_per_byte"] == {"before": before, "after": after, "examples": 6}
    assert "perplexity" not in record
    counted, card = record["text"]["counted_tokens"], (out / "README.md").read_text()
    assert list(counted) == ["train", "mixed"]
    assert all(f"{name} {count}" in card for name, count in counted.items())
    assert "bits per byte" in card
    assert "perplexity" not in card
    assert re.search(r"- without 640 tokens \(\d\.\d\d% of the counted text\)", card)


def test_before_other_units_whose_text_is_in_the_tokens_that_are_left(small, files, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["--tokens", "0.3", "--params", "0.7", "--examples", "8", "--repair", "null"]
    main(["prune-structure", str(small), str(out), *asked, *SHORT, *option(files)])
    before = bh.load(small).num_parameters()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 1408
    assert model.config.intermediate_size < bh.load(small).config.intermediate_size
    assert model.num_parameters() <= 0.7 * before
    assert "without 640 tokens (" in json.dumps(record_of(out)["events"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ([], "tokens=None: pass the fraction of the vocabulary to remove, in (0, 1), with --tokens."),
        (["--tokens", "0.95"], "At most"),
        (["--tokens", "1.5"], "fraction"),
    ],
    ids=["none", "more than can go", "no fraction"],
)
def test_what_cannot_be_done_is_refused(small, files, tmp_path, capsys, asked, why):
    with pytest.raises(SystemExit) as ended:
        main(["prune-vocabulary", str(small), str(tmp_path / "out"), *asked, *SHORT, *option(files)])
    assert why in f"{ended.value}{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_and_a_dry_run(small, files, tmp_path, capsys):
    main(["prune-vocabulary", str(small), str(tmp_path / "out"), "--tokens", "0.3", "--dry_run", *SHORT, *option(files)])
    assert "2,048 -> 1,408 tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    bare = small_llama(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="has no tokenizer"):
        main(["prune-vocabulary", str(bare), str(tmp_path / "out"), "--tokens", "0.3", *SHORT, *option(files)])


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_speed_and_losses_of_models_with_different_tokenizers(small, files, tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "out.json"
    main(["prune-vocabulary", str(small), str(out), "--tokens", "0.3", *SHORT, *option(files)])
    capsys.readouterr()
    text = ["--text", files["validation"], "--length", "16", "--examples", "3"]
    with pytest.raises(SystemExit, match="different tokenizers are not comparable. `billhook verdict` compares bits per byte"):
        main(["evaluate", str(small), str(out), *text, "--json", str(record)])
    main(["evaluate", str(small), str(small), *text, "--json", str(record)])
    assert [figure["measure"] for figure in json.loads(record.read_text())["models"][1]["figures"]] == ["perplexity"]
    speed = ["--batch_sizes", "1", "--contexts", "16", "--new_tokens", "3", "--rounds", "2", "--json", str(record)]
    main(["bench", str(small), str(out), *speed])
    said = capsys.readouterr().out
    first, second = (model["bytes_per_token"] for model in json.loads(record.read_text())["models"])
    assert first > second > 1
    assert f"out: {second:.2f} bytes per token of packaged text, {first / second:.3f}x the tokens of {small.name}" in said
    assert "bytes/s" in said
