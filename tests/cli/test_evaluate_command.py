"""`billhook evaluate`: each choice alone, in float64 and without padding, is the reference."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, processors

import billhook as bh
from billhook.assets import model_path
from billhook.cli.evaluate import difference, metric_table
from billhook.cli.main import main
from billhook.report.choices import Question, batches, encode, log_likelihoods, read_questions
from billhook.training.evaluation import Figure, accuracies, blocks, mean
from kit.chats import chat, talking
from kit.printed import assert_printed
from kit.shaped import gpt2

LINES = [
    {
        "context": "Question: who spoke to the king?\nAnswer:",
        "choices": ["the queen", "no man of all that were there"],
        "label": 1,
    },
    {"context": "To be, or ", "choices": ["not to be", "to be  ", "never\nmore"], "label": 0},  # ends in a space
    {"context": "Ô", "choices": ["é", "é", "a"], "label": 1},
    {"context": "It was the best of times, it was the worst of times, it was", "choices": ["the", "an age"], "label": 0},
]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(model_path("tiny"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(json.dumps(line | {"id": i}, ensure_ascii=bool(i % 2)) for i, line in enumerate(LINES)) + "\n\n")
    return str(path)


@torch.no_grad()
def reference(model, tokenizer, line, choice, length):
    """Of a choice alone: tokens that end behind the context (found by their offsets), one row, float64."""
    encoded = tokenizer(f"{line['context']} {choice}", return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    scored = sum(end > len(line["context"].rstrip()) for end in ends)
    ids = torch.tensor(encoded["input_ids"][-(length + 1) :])
    logits = model(input_ids=ids[None, :-1]).logits[0].double()
    chances = logits - logits.exp().sum(-1, keepdim=True).log()
    return sum(float(chances[len(ids) - 1 - i, ids[len(ids) - i]]) for i in range(scored, 0, -1))


def small(kind):
    """Models whose positions are absolute: wrong ones would change every logit."""
    if kind == "tiny":
        return bh.load("tiny", "float32")
    if kind == "gpt2":
        return gpt2(vocab_size=2048, initializer_range=0.5)
    config = transformers.OPTConfig(
        vocab_size=2048, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32, init_std=0.5,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["tiny", "gpt2", "opt"])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 64), (3, 64), (8, 64), (4, 12)])
def test_a_batch_gives_what_each_choice_alone_does(kind, batch_size, length, tokenizer, file):
    model = small(kind)
    rows = encode(read_questions(file), tokenizer, length)
    every = [row for own in rows for row in own]
    assert any(row.cut for row in every) == (length == 12)
    found = {}
    for batch in batches(every, batch_size):
        assert len(batch) <= batch_size
        found |= zip(batch, log_likelihoods(model, batch), strict=True)
    for line, own in zip(LINES, rows, strict=True):
        expected = [reference(model, tokenizer, line, choice, length) for choice in line["choices"]]
        assert [found[row] for row in own] == pytest.approx(expected, rel=2e-5, abs=2e-5)


def test_equal_choices_are_equally_likely_and_the_first_counts(tokenizer, file):
    model, question = small("gpt2"), read_questions(file)[2]
    for label in (0, 1):
        asked = Question(question.file, question.line, question.context, ("é", "é"), label)
        rows = encode([asked], tokenizer, 64)[0]
        assert sum(map(len, batches(rows, 1))) == 1
        sums = [log_likelihoods(model, [row])[0] for row in rows]
        assert sums[0] == sums[1]
        assert [figure.each for figure in accuracies("x", [(asked, sums)])] == [(1 - label,)] * 2


def test_the_normalised_accuracy_is_per_character_not_per_byte():
    asked = Question("f", 1, "c", ("éééé", "abcd", "ab"), 1)  # per byte the first would be the answer, in all the last
    plain, norm = accuracies("x", [(asked, [-4.0, -3.0, -2.5])])
    assert (plain.measure, plain.value, norm.measure, norm.value) == ("acc", 0.0, "acc_norm", 1.0)


def test_standard_errors_by_hand():
    first, other = (Figure("x", "acc", *mean(each), each) for each in ((1, 1, 0, 0), (1, 0, 0, 1)))
    assert first.error == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert difference(other, first) == (0.0, pytest.approx(math.sqrt(1 / 6)))  # differences 0, -1, 0, 1
    assert difference(Figure("x", "acc", 0.75, 0.25, (1, 1, 0, 1)), first) == (0.25, pytest.approx(0.25))
    assert mean([1]) == (1.0, None)
    shown = metric_table(["a", "b"], [[first, Figure("t", "perplexity", 20.0)], [other, Figure("t", "perplexity", 30.5)]])
    assert "0.500 ± 0.289  0.500 ± 0.289  (+0.000 ± 0.408)" in shown
    assert shown.splitlines()[3].split() == ["t", "perplexity", "20.000", "30.500", "(+10.500)"]


def test_a_beginning_stands_in_front_once_where_the_tokenizer_puts_one(file):
    started = transformers.AutoTokenizer.from_pretrained(model_path("tiny"))
    beginning = (started.bos_token, started.bos_token_id)
    started.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{beginning[0]} $A", pair=f"{beginning[0]} $A $B", special_tokens=[beginning]
    )
    questions = read_questions(file)
    plain = encode(questions, transformers.AutoTokenizer.from_pretrained(model_path("tiny")), 64)
    for given in (questions, [Question(q.file, q.line, beginning[0] + q.context, q.choices, q.label) for q in questions]):
        for with_it, without in zip(encode(given, started, 64), plain, strict=True):
            assert [row.ids for row in with_it] == [(beginning[1], *row.ids) for row in without]
            assert [row.scored for row in with_it] == [row.scored for row in without]


def test_a_token_that_joins_context_and_choice_is_the_choices():
    vocabulary = {"a": 0, "b": 1, " ": 2, "c": 3, "b ": 4, "a ": 5}
    joined = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", " "), ("a", " ")]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=joined)
    assert encode([Question("f", 1, "ab", ("c",), 0)], tokenizer, 9)[0][0].ids == (0, 4, 3)
    assert encode([Question("f", 1, "ab", ("c",), 0)], tokenizer, 9)[0][0].scored == 2
    with pytest.raises(ValueError, match="f, line 7: choice 0 has 2 tokens after 0 context tokens. It must have 1 to length=9"):
        encode([Question("f", 7, "a", ("c",), 0)], tokenizer, 9)
    with pytest.raises(ValueError, match="f, line 7: choice 1 has 4 tokens after 1 context tokens. It must have 1 to length=3"):
        encode([Question("f", 7, "ab", ("c", "ccc"), 0)], tokenizer, 3)


@pytest.mark.parametrize(
    "line",
    [
        '{"context": "a", "choices": ["b", "c"], "label": 0',
        '{"context": "a", "choices": ["b", "c"]}',
        '{"context": " \\n", "choices": ["b", "c"], "label": 0}',
        '{"context": "a", "choices": ["b", ""], "label": 0}',
        '{"context": "a", "choices": ["b"], "label": 0}',
        '{"context": "a", "choices": "bc", "label": 0}',
        '{"context": "a", "choices": ["b", "c"], "label": 2}',
        '{"context": "a", "choices": ["b", "c"], "label": true}',
        b'{"context": "\xff", "choices": ["b", "c"], "label": 0}',
    ],
)
def test_a_line_that_is_no_question_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(LINES[0]).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match=r'q.jsonl, line 3 is .*a line is {"context": text, "choices": \[text, text'):
        read_questions(str(path))
    assert len(read_questions(str(path), 1)) == 1


def test_files_without_questions_are_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"q.jsonl has no questions"):
        read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(ValueError, match="does not exist"):
        read_questions(str(tmp_path))


@pytest.fixture
def cut(tmp_path, tokenizer):
    """A checkpoint that only `bh.load` loads: one layer has fewer heads."""
    model = bh.load("tiny", "float32")
    bh.pruning.prune_units(model, {"model.layers.0.self_attn": [0, 1, 2, 3]})
    assert bh.save(model, tmp_path / "cut", tokenizer).way == "shaped"
    return str(tmp_path / "cut")


def test_before_and_after_from_the_command_line(tmp_path, file, files, cut, tokenizer, capsys):
    out, text = tmp_path / "out.json", files["validation"]
    options = f"--text {text} --examples 3 --length 32 --dtype float32 --device cpu --batch_size 3 --json {out}"
    main(["evaluate", "tiny", cut, "--data", file, *options.split()])
    said, record = capsys.readouterr().out, json.loads(out.read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"]["data"] == [file]
    right = {}
    for name, about in zip(("tiny", cut), record["models"], strict=True):
        model = bh.load(name, "float32")
        for line, answer in zip(LINES, about["answers"][file], strict=True):
            expected = [reference(model, tokenizer, line, choice, 32) for choice in line["choices"]]
            assert answer["log_likelihoods"] == pytest.approx(expected, rel=2e-5, abs=2e-5)
            assert answer["acc"] == int(expected.index(max(expected)) == line["label"])
        right[name] = [answer["acc"] for answer in about["answers"][file]]
        plain, _, perplexity = about["figures"]
        assert (plain["of"], plain["measure"], plain["value"]) == ("q (4)", "acc", sum(right[name]) / 4)
        ids = tokenizer(Path(text).read_text(), add_special_tokens=False)["input_ids"]
        losses = [float(model(input_ids=i, labels=i).loss.detach()) for i in torch.tensor(ids[:96]).view(3, 1, 32)]
        assert perplexity["value"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert plain["difference"] == pytest.approx((sum(right[cut]) - sum(right["tiny"])) / 4)
    assert f"{perplexity['value']:,.3f}  ({perplexity['difference']:+,.3f})" in said
    assert_printed("evaluate", said)


def test_all_that_a_chat_says_is_measured(tmp_path):
    talking().save_pretrained(tmp_path)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat("Who " * 40, "The gardener.")}))
    rows = blocks(str(tmp_path / "chats.jsonl"), str(tmp_path), 16, "text")
    assert len(rows) > 3, "with loss on responses alone it would be one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--data", "FILE", "--limit", "0"], "limit=0 must be a whole number of at least 1"),
        (["--data", "FILE", "--length", "513"], r"length=513 must be from 2 to 512"),
        (["--data", "FILE", "--length", "3"], r"evaluate: data: .*q.jsonl, line 1: choice 1 has 7 tokens"),
        (["--data=FILE", "--json", "out.txt"], "json='out.txt' must be a .json file in an existing folder"),
        (["--data", "FILE", "none.jsonl"], "data: the file 'none.jsonl' does not exist"),
        (["--tasks", "hellaswag,arc_easy"], r"tasks=hellaswag,arc_easy requires lm-eval. .*'billhook\[eval\]'"),
    ],
)
def test_refusals_come_before_any_model_is_loaded(file, arguments, message, monkeypatch):
    monkeypatch.setattr("billhook.cli.evaluate.load", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=message):
        main(["evaluate", "tiny", *(argument.replace("FILE", file) for argument in arguments)])


def test_models_that_predict_no_next_token_or_diverged(tmp_path, file, tokenizer):
    fields = {"vocab_size": 2048, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertForMaskedLM(transformers.BertConfig(**fields)).save_pretrained(tmp_path / "bert")
    with pytest.raises(SystemExit, match="bert' is a BertForMaskedLM, which predicts no next token"):
        main(["evaluate", "tiny", str(tmp_path / "bert"), "--data", file])
    diverged = gpt2(vocab_size=2048)
    torch.nn.init.constant_(diverged.transformer.ln_f.weight, torch.nan)
    diverged.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    with pytest.raises(SystemExit, match="nan' has logits that are not finite"):
        main(["evaluate", str(tmp_path / "nan"), "--data", file])


HARNESS = """
from lm_eval.models.huggingface import HFLM


def simple_evaluate(model, tasks, limit, log_samples):
    assert isinstance(model, HFLM) and type(model.pretrained).__name__ == "LlamaForCausalLM" and not log_samples
    assert model.tokenizer("a") and (model.batch_size, model.max_length) == (2, 512)
    if "local" in tasks:
        raise KeyError("local")
    heads = model.pretrained.model.layers[0].self_attn.q_proj.out_features / 100
    found = {"alias": "x", "sample_len": 7, "acc,none": heads, "acc_stderr,none": 0.125}
    return {"results": {task: found | {"exact_match,strict": limit, "exact_match_stderr,strict": "N/A"} for task in tasks}}
"""


def test_tasks_go_to_lm_eval(tmp_path, cut, capsys, monkeypatch):
    """A stand-in of lm-eval that has the two names and the form of results that are used of it."""
    (tmp_path / "lm_eval" / "models").mkdir(parents=True)
    (tmp_path / "lm_eval" / "__init__.py").write_text(HARNESS)
    (tmp_path / "lm_eval" / "models" / "huggingface.py").write_text(
        "class HFLM:\n    def __init__(self, **given):\n        vars(self).update(given)\n"
    )
    (tmp_path / "lm_eval-0.4.9.dist-info").mkdir()
    (tmp_path / "lm_eval-0.4.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.4.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    out = tmp_path / "out.json"
    main(["evaluate", "tiny", cut, "--tasks", "one,two", "three", "--limit", "5", "--batch_size", "2", "--json", str(out)])
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    assert record["versions"]["lm_eval"] == "0.4.9"
    sizes = [bh.load(name).model.layers[0].self_attn.q_proj.out_features / 100 for name in ("tiny", cut)]
    assert f"{sizes[0]:.3f} ± 0.125  {sizes[1]:.3f} ± 0.125  ({sizes[1] - sizes[0]:+.3f})" in said
    assert [(one["of"], one["measure"]) for one in record["models"][1]["figures"]] == [
        (task, measure) for task in ("one", "two", "three") for measure in ("acc", "exact_match (strict)")
    ]
    assert record["models"][0]["figures"][1] == {
        "of": "one", "measure": "exact_match (strict)", "value": 5.0, "error": None, "difference": 0.0, "difference_error": None
    }  # fmt: skip
    with pytest.raises(SystemExit, match=r"^billhook evaluate: tasks=local: lm-eval has no task of this name. Pass the path of"):
        main(["evaluate", "tiny", "--tasks", "one,local", "--batch_size", "2"])
