"""Verdicts: what models write against plain loops, limits, and stored figures."""

import json
import math

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import billhook as bh
from billhook.assets import model_path
from billhook.cli.main import main
from billhook.engine.batches import Batch
from billhook.report import writing
from billhook.report.verdict import Check
from billhook.report.writing import ENDED, Writing, Written, distinct_share, repeats, write
from kit.families import BERT, llama, tokens


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return llama()


@pytest.fixture
def changed():
    torch.manual_seed(1)
    return llama()


def rows():
    torch.manual_seed(2)
    return [Batch({"input_ids": tokens(3, 12)}, "seen"), Batch({"input_ids": tokens(2, 12)}, "other")]


@torch.no_grad()
def greedy(model, prompt, count, ends=()):
    """Greedy tokens without a cache, without padding, one text at a time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_greedy_texts_are_those_of_single_steps_whatever_the_lengths_of_prompts(dense, monkeypatch):
    monkeypatch.setattr(writing, "NEW_TOKENS", 10)
    dense.generation_config.eos_token_id = None
    dense.config.eos_token_id = None
    prompts = [[5, 6, 7, 8], [9, 3], [4]]
    assert write(dense, prompts, [0.0])[0].tolist() == [greedy(dense, prompt, 10) for prompt in prompts]


def test_one_batch_writes_at_all_temperatures(dense, monkeypatch):
    monkeypatch.setattr(writing, "NEW_TOKENS", 6)
    dense.generation_config.eos_token_id = dense.config.eos_token_id = None
    prompts, steps = [[5, 6, 7, 8], [9, 3]], []
    cold, sampled, frozen = write(dense, prompts, [0.0, 0.7, 1e-6], step=steps.append)
    assert cold.tolist() == frozen.tolist() == [greedy(dense, prompt, 6) for prompt in prompts]
    assert sampled.tolist() != cold.tolist()
    assert steps == [1, 2, 3, 4, 5, 6]


def test_samples_are_of_the_tempered_distribution(dense, monkeypatch):
    monkeypatch.setattr(writing, "NEW_TOKENS", 1)
    dense.lm_head.weight.data *= 40
    dense.generation_config.eos_token_id = dense.config.eos_token_id = None
    found = write(dense, [[5, 6, 7, 8]] * 4000, [0.7]).flatten()
    with torch.no_grad():
        expected = (dense(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1] / 0.7).softmax(-1)
    shares = torch.bincount(found, minlength=len(expected)) / len(found)
    assert expected.max() > 0.05
    assert (shares - expected).abs().max() < 0.04


def test_a_text_ends_at_the_end_token(dense, monkeypatch):
    monkeypatch.setattr(writing, "NEW_TOKENS", 10)
    free = greedy(dense, [5, 6, 7, 8], 10)
    end = free[4]
    dense.generation_config.eos_token_id = [end, 10_000]
    first = free.index(end)
    assert write(dense, [[5, 6, 7, 8]], [0.0])[0].tolist() == [free[:first] + [ENDED] * (10 - first)]


def test_sampling_follows_the_seed_and_leaves_random_numbers_alone(dense, monkeypatch):
    monkeypatch.setattr(writing, "NEW_TOKENS", 8)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, again, other = (write(dense, [[1, 2], [3, 4]], [0.7], seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("row", "loops"),
    [
        (list(range(60)), False),
        ([*range(40), 7, 8, 7, 8, 7, 8], True),  # a phrase of two tokens, three times at the end
        ([*range(40), 7, 8, 7, 8, 7, 8, ENDED], False),  # the model has ended the text
        ([*range(40), 7, 7, 7], False),  # a single token is no phrase
        ([1, 2, 3] * 10 + list(range(4, 12)), True),  # few distinct 4-grams, although it ends otherwise
        ([1, 2, 3] * 10 + list(range(4, 40)), False),
    ],
)
def test_loops(row, loops):
    padded = row + [ENDED] * (70 - len(row)) if ENDED in row else row
    found = Writing.of(torch.tensor([padded]))
    assert found.loops == (loops,)
    own = [token for token in row if token != ENDED]
    grams = [tuple(own[start : start + 4]) for start in range(len(own) - 3)]
    assert found.distinct == len(set(grams)) / len(grams) == distinct_share(own)
    assert (found.tokens, found.ended) == (len(own), float(ENDED in row))
    phrases = any(own[-3 * n :] == own[-n:] * 3 for n in range(2, len(own) // 3 + 1))
    assert repeats(own) == phrases


def test_loops_of_the_dense_model_are_not_held_against_the_changed_one():
    then, now = (Writing(loops, 1.0, 8.0, 0.0) for loops in ((True, False, False), (True, True, False)))
    share, error = Written(0.0, then, now).new_loops()
    assert share == 1 / 3
    assert error == pytest.approx(math.sqrt(3 / 7 * 4 / 7 / 7))


def test_the_same_model_passes_all_limits_and_another_breaks_them(dense, changed):
    limits = bh.Limits(max_ratio=1.0001, max_unseen_ratio=1.0001, min_agreement=0.999)
    same = bh.verdict(dense, dense, rows(), ["seen"], limits, prompts=0)
    assert same.broken == []
    assert [text.acceptance for text in same.texts] == pytest.approx([1, 1])
    other = bh.verdict(dense, changed, rows(), ["seen"], limits, prompts=0)
    told = {(check.limit, check.of) for check in other.broken}
    expected = {("min_agreement", "seen"), ("min_agreement", "other")}
    expected |= {("max_ratio" if text.inside else "max_unseen_ratio", text.source) for text in other.texts if text.ratio > 1.0001}
    assert told == expected
    assert other.text().count("FAIL") == len(told) == other.markdown().count("**FAIL**")
    assert [check["passes"] for check in other.to_json()["checks"]].count(False) == len(told)


def test_how_many_examples_would_decide():
    sure = Check("max_ratio", "a", 1.2, 0.04, 1.3, 16)
    unsure = Check("max_ratio", "a", 1.25, 0.05, 1.3, 16)
    assert sure.text() == "max_ratio=1.3: a 1.200 ± 0.040"
    assert unsure.text().endswith("(undecided: 16 examples, and about 64 would decide)")  # an error of 0.025 is half of 0.05
    assert unsure.passes
    assert not Check("min_agreement", "a", math.nan, math.nan, 0.8, 1).passes


@pytest.mark.parametrize(
    ("limit", "inside", "problem"),
    [
        ({"max_ratio": 1.2}, [], "max_ratio=1.2 has no figure, because no text was calibrated on"),
        ({"max_unseen_ratio": 1.2}, ["seen", "other"], "every text was calibrated on"),
        ({"max_loops": 0.1}, [], "prompts=0 writes no text"),
    ],
)
def test_a_limit_without_a_figure_is_refused(dense, changed, limit, inside, problem):
    with pytest.raises(ValueError, match=problem):
        bh.verdict(dense, changed, rows(), inside, bh.Limits(**limit), prompts=0)


def encoder(kind, **config):
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**BERT | config)).eval()


def test_encoders_write_nothing_and_are_judged_by_cosine_or_labels(tmp_path):
    dense, changed = encoder("BertModel"), encoder("BertModel")
    limits = bh.Limits(min_cosine=0.999)
    same = bh.verdict(dense, changed, rows(), limits=limits, folder=tmp_path)
    assert not same.broken
    assert not same.written
    with torch.no_grad():
        changed.encoder.layer[0].output.dense.weight.mul_(-50)
    found = bh.verdict(dense, changed, rows(), limits=limits, folder=tmp_path)  # with the stored states
    assert [check.of for check in found.broken] == ["seen", "other"]
    assert all(-1 < text.cosine < 0.999 for text in found.texts)
    assert f"FAIL  min_cosine=0.999: seen {found.texts[0].cosine:.3f} ±" in found.text()
    classifier = encoder("BertForTokenClassification")
    assert bh.verdict(classifier, classifier, rows(), limits=bh.Limits(min_agreement=1.0)).checks[0].value == 1


@pytest.mark.parametrize(
    ("dense", "changed", "options", "problem"),
    [
        (
            "BertModel",
            "BertModel",
            {"limits": bh.Limits(max_ratio=1.1)},
            "max_ratio=1.1 .*, because the models predict no next token",
        ),
        (
            "BertModel",
            "BertModel",
            {"limits": bh.Limits(max_loops=0.1)},
            "max_loops=0.1 .*, because the models predict no next token",
        ),
        (
            "BertModel",
            "BertModel",
            {"limits": bh.Limits(min_agreement=0.1)},
            "min_agreement=0.1 .*, because the models have no logits",
        ),
        ("BertForMaskedLM", "BertForMaskedLM", {"limits": bh.Limits(min_cosine=0.1)}, "because the models have logits"),
        (
            "BertModel",
            "BertForMaskedLM",
            {},
            "model: BertForMaskedLM does not return token states of size 32 for each token, as BertModel",
        ),
        ("BertModel", "narrow", {}, "model: BertModel does not return token states of size 32"),
        ("llama", "BertModel", {}, "model: BertModel does not return next-token predictions, as LlamaForCausalLM does"),
        ("T5Model", "BertModel", {}, "dense: T5Model is neither a causal language model nor an encoder of text"),
        ("ViTModel", "BertModel", {}, "dense: ViTModel is neither"),
        ("BertModel", "BertModel", {"tokenizers": ("tiny", "small")}, "Pass models with the same tokenizer"),
        ("BertModel", "fewer tokens", {}, r"a model does not say where it came from. Pass both tokenizers\."),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(dense, changed, options, problem):
    makers = {
        "llama": llama,
        "fewer tokens": lambda: encoder("BertModel", vocab_size=60),
        "narrow": lambda: encoder("BertModel", hidden_size=16),
        "T5Model": lambda: transformers.T5Model(
            transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "ViTModel": lambda: transformers.ViTModel(
            transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        ),
    }
    before, after = (makers.get(name, lambda name=name: encoder(name))() for name in (dense, changed))
    if "tokenizers" in options:
        tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
        other = AutoTokenizer.from_pretrained(model_path("tiny"))
        other.add_tokens(["billhook"])
        options = {"tokenizers": (tokenizer, other)}
    with pytest.raises(ValueError, match=problem):
        bh.verdict(before, after, rows(), ["seen"], **{"prompts": 0} | options)


def test_empty_texts_are_refused(dense):
    with pytest.raises(ValueError, match="batches is empty"):
        bh.verdict(dense, dense, [], prompts=0)
    with pytest.raises(ValueError, match=r"max_loops=1.5 must be in \[0, 1\]"):
        bh.Limits(max_loops=1.5)


def test_stored_figures_give_the_same_verdict_and_another_dense_model_does_not_use_them(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "NEW_TOKENS", 8)
    dense, changed = bh.load("tiny", "float32"), bh.load("tiny", "float32")
    with torch.no_grad():
        changed.model.layers[3].mlp.down_proj.weight.mul_(0.5)
    batches = bh.Calibration("tiny", tokens=3 * 64, length=64).read(dense)
    first = bh.verdict(dense, changed, batches, prompts=2, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    again = bh.verdict(dense, changed, batches, prompts=2, folder=tmp_path)
    assert not calls
    assert again.written == first.written
    for one, then in zip(again.texts, first.texts, strict=True):
        assert one.ratio == then.ratio
        assert one.kl == pytest.approx(then.kl, rel=1e-2)  # log-probabilities are stored in half precision
        assert one.acceptance == pytest.approx(then.acceptance, rel=1e-3)
    bh.verdict(changed, dense, batches, prompts=2, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    apart = [Batch(batch, f"text {number}") for number, batch in enumerate(batches)]  # three prompts in place of two
    assert len(bh.verdict(dense, changed, apart, prompts=2, folder=tmp_path).written[0].before.loops) == 3


def run(*words):
    """Runs the command, and returns its exit code."""
    try:
        main(["verdict", *map(str, words)])
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_command_measures_what_the_pruning_command_measured_and_ends_with_a_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "own.txt"
    text.write_text("\n".join(f"The {number} old houses stood on the hill, and rain fell." for number in range(900)))
    pruned = tmp_path / "out"
    short = ["--length", 64, "--examples", 8]
    words = ["prune-structure", "tiny", pruned, "--channels", 0.25, "--data", text, *short, "--evaluate", 3, "--polish", "null"]
    main([*map(str, words)])
    record = {one["source"]: one for one in json.loads((pruned / "billhook.json").read_text())["degradation"]}
    common = ["tiny", pruned, "--data", text, "--length", 64, "--examples", 3, "--prompts", 0, "--cache", tmp_path / "cache"]
    assert run(*common, "--json", tmp_path / "found.json", "--markdown", tmp_path / "found.md", "--max_unseen_ratio", 9) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert {one["source"]: one["inside"] for one in found["degradation"]} == {"own": True, "mixed": True, "unseen": False}
    for one in found["degradation"]:
        assert one["ratio"] == pytest.approx(record[one["source"]]["ratio"], rel=1e-5)
    assert "| own | calibrated on |" in (tmp_path / "found.md").read_text()
    capsys.readouterr()
    assert run(*common, "--min_agreement", 1) == 2
    assert capsys.readouterr().out.count("FAIL  min_agreement=1: ") == 3
    assert "max_loops=0.1 has no figure" in run(*common, "--max_loops", 0.1)


def test_a_changed_vocabulary_is_compared_by_bytes_and_its_texts_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writing, "NEW_TOKENS", 8)
    pruned = tmp_path / "out"
    main([*map(str, ["prune-vocabulary", "tiny", pruned, "--tokens", 0.5, "--length", 64, "--evaluate", 0])])
    common = ["tiny", pruned, "--length", 64, "--examples", 2, "--prompts", 1, "--cache", tmp_path / "cache"]
    assert run(*common, "--max_loops", 1) == 0
    out = capsys.readouterr().out
    assert "bits per byte of" in out
    assert "T=0.7" in out
    assert "min_agreement=0.5 has no figure, because the models have different tokenizers" in run(*common, "--min_agreement", 0.5)


def test_a_chat_template_asks_to_continue(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    assert tokenizer.decode(writing.prompt_ids("To be", tokenizer)) == "To be"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert tokenizer.decode(writing.prompt_ids("To be", tokenizer)) == "<user>Continue this text:\n\nTo be"
