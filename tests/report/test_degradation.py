"""Degradation against plain computations, and what is warned of."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import billhook as bh
from billhook.calibration.reading import load_splits
from billhook.engine.batches import Batch
from billhook.model.preprocessors import load_tokenizer
from billhook.report.degradation import DenseReference, TextDegradation, degradation_table, degradation_warning
from billhook.vocabulary.scores import token_shares
from billhook.vocabulary.tokenizer import Vocabulary
from kit.families import BERT, llama, tokens
from kit.ranks import Ranks


def texts():
    torch.manual_seed(0)
    return [
        Batch({"input_ids": tokens(2, 12)}, "one"),
        Batch({"input_ids": tokens(3, 9)}, "two"),
        Batch({"input_ids": tokens(1, 12)}, "one"),
    ]


def plain(degradation):
    return [text.to_json() for text in degradation]  # where NaN equals NaN


def chances(model, ids):
    return model.double()(input_ids=ids[None]).logits[0, :-1].softmax(-1)


def of_source(model, batches, source):
    """Losses and predictions, row by row, in float64."""
    rows = [row for batch in batches if batch.source == source for row in batch["input_ids"]]
    each = [chances(copy.deepcopy(model), row) for row in rows]
    return torch.stack([-p.gather(1, row[1:, None]).log().mean() for p, row in zip(each, rows, strict=True)]), each


@torch.no_grad()
def test_perplexity_and_divergence_of_each_text_with_paired_errors():
    dense, batches = llama(), texts()
    torch.manual_seed(1)
    changed = llama()
    found = DenseReference(dense, batches, inside=["two"]).degradation(changed)
    assert [(one.source, one.inside, one.rows) for one in found] == [("one", False, 3), ("two", True, 3)]
    for one in found:
        before, dense_chances = of_source(dense, batches, one.source)
        after, now = of_source(changed, batches, one.source)
        assert one.before == pytest.approx(float(before.mean().exp()), rel=1e-6)
        assert one.after == pytest.approx(float(after.mean().exp()), rel=1e-6)
        assert one.ratio == pytest.approx(float((after - before).mean().exp()), rel=1e-6)
        error = float((after - before).std() / len(before) ** 0.5)
        assert one.ratio_error == pytest.approx(one.ratio * error, rel=1e-5)
        pairs = zip(dense_chances, now, strict=True)
        each = torch.stack([(p * (p.log() - q.log())).sum(-1).mean() for p, q in pairs])
        assert one.kl == pytest.approx(float(each.mean()), rel=1e-5)
        assert one.kl_error == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-4)
        pairs = list(zip(dense_chances, now, strict=True))
        each = torch.stack([(p.argmax(-1) == q.argmax(-1)).double().mean() for p, q in pairs])
        assert one.agreement == pytest.approx(float(each.mean()))
        assert one.agreement_error == pytest.approx(float(each.std() / len(each) ** 0.5))
        each = torch.stack([torch.minimum(p, q).sum(-1).mean() for p, q in pairs])
        assert one.acceptance == pytest.approx(float(each.mean()), rel=1e-5)
        assert one.acceptance_error == pytest.approx(float(each.std() / len(each) ** 0.5), rel=1e-3)


def test_ranks_read_a_share_each_and_all_know_all():
    dense, batches, group = llama(), texts(), Ranks(2)
    torch.manual_seed(1)
    changed = llama()
    alone = DenseReference(dense, batches).degradation(changed)

    def of(rank, reduce):
        return DenseReference(copy.deepcopy(dense), batches, (), reduce).degradation(copy.deepcopy(changed))

    for one in group.run(of):
        assert repr(one) == repr(alone)


def test_what_is_kept_goes_on_with_the_same_model_and_tells_no_divergence_with_another():
    dense, batches = llama(), texts()
    torch.manual_seed(1)
    changed = llama()
    first = DenseReference(dense, batches, inside=["two"])
    expected, kept = first.degradation(changed), first.state_dict()
    again = DenseReference(dense, batches, inside=["one"])
    assert again.load_state_dict(kept)
    assert plain(again.degradation(changed)) == plain(expected)
    for other in (DenseReference(changed, batches), DenseReference(dense, batches[:2]), DenseReference(dense, texts()[::-1])):
        assert not other.load_state_dict(kept)
        for one, then in zip(other.degradation(changed), expected, strict=True):
            assert math.isnan(one.kl)
            compared = [f"{name}{end}" for name in ("kl", "agreement", "acceptance") for end in ("", "_error")]
            assert all(math.isnan(getattr(one, name)) for name in compared)
            assert plain([replace(one, **{name: getattr(then, name) for name in compared})]) == plain([then])


def test_a_model_without_outputs_for_tokens_is_refused():
    model = llama().model
    model.register_forward_hook(lambda *_: {"pooled": torch.ones(1)})
    with pytest.raises(ValueError, match="LlamaModel has neither logits nor token states"):
        DenseReference(model, texts())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForTokenClassification"])
def test_outputs_of_encoders_against_plain_computations(kind):
    def bert(seed):
        torch.manual_seed(seed)
        return getattr(transformers, kind)(transformers.BertConfig(**BERT)).eval()

    dense, changed, batches = bert(0), bert(1), texts()
    reference = DenseReference(dense, batches, inside=["two"])
    stored = DenseReference(dense, batches, stored=reference.tensors())
    for text, again in zip(reference.degradation(changed), stored.degradation(changed), strict=True):
        kls, same, cosines = [], [], []
        for row in (row for batch in batches if batch.source == text.source for row in batch["input_ids"]):
            then, now = (copy.deepcopy(model).double()(input_ids=row[None])[0][0] for model in (dense, changed))
            p, q = then.softmax(-1), now.softmax(-1)
            kls.append((p * (p.log() - q.log())).sum(-1).mean())
            same.append((p.argmax(-1) == q.argmax(-1)).double().mean())
            cosines.append(((then * now).sum(-1) / then.norm(dim=-1) / now.norm(dim=-1)).mean())
        measured = {"cosine": cosines} if kind == "BertModel" else {"kl": kls, "agreement": same}
        for name, values in measured.items():
            assert getattr(text, name) == pytest.approx(float(torch.stack(values).mean()), rel=1e-4, abs=1e-6)
            error = float(torch.stack(values).std() / len(values) ** 0.5)
            assert getattr(text, f"{name}_error") == pytest.approx(error, rel=1e-3, abs=1e-6)
            assert getattr(again, name) == pytest.approx(getattr(text, name), rel=1e-2)
        absent = {"before", "after", "ratio", "kl", "agreement", "acceptance", "cosine"} - {*measured}
        assert all(math.isnan(getattr(text, name)) for name in absent)
    heads = degradation_table(plain([text])).splitlines()[0].split("  ")
    assert [head.strip() for head in heads if head.strip()] == [
        "outputs on",
        *(["cosine"] if kind == "BertModel" else ["KL", "same label"]),
    ]


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_another_encoder_is_not_taken_for_the_dense_one(kind):
    """Although a norm makes the states of both equally long."""
    torch.manual_seed(0)
    dense, other = (getattr(transformers, kind)(transformers.BertConfig(**BERT)).eval() for _ in range(2))
    kept = DenseReference(dense, texts()).state_dict()
    assert DenseReference(dense, texts()).load_state_dict(kept)
    assert not DenseReference(other, texts()).load_state_dict(kept)


def one(source, ratio, inside, error=0.0):
    return TextDegradation(source, inside, 10.0, 10.0 * ratio, error, 0.1, 0.01, 8, 0.9, 0.02, 0.8, 0.03)


def test_a_text_outside_that_loses_twice_as_much_is_warned_of():
    assert degradation_warning([one("in", 1.2, True), one("out", 1.4, False)]) is None
    assert degradation_warning([one("in", 1.2, True), one("out", 1.6, False, 0.3)]) is None  # by chance
    assert "out (1.60x perplexity)" in degradation_warning([one("in", 1.2, True), one("out", 1.6, False, 0.05)])
    assert (
        degradation_warning([one("in", 1.2, True, 0.2), one("out", 1.6, False, 0.05)]) is None
    )  # what is inside may have lost as much
    assert degradation_warning([one("in", 0.9, True), one("out", 1.0, False)]) is None
    assert degradation_warning([one("in", 0.972, True, 0.018), one("out", 1.085, False, 0.038)]) is None
    assert "degraded and the calibration texts did not: out (1.09x" in degradation_warning(
        [one("in", 0.97, True, 0.01), one("out", 1.09, False, 0.01)]
    )
    assert degradation_warning([one("in", 0.97, True, math.nan), one("out", 1.09, False)]) is None  # of one row nothing is known
    assert degradation_warning([one("out", 3.0, False)]) is None


def test_with_another_tokenizer_bits_per_byte_are_warned_of():
    texts = [replace(one(name, ratio, name == "in", 0.01), token_bytes=2.0) for name, ratio in (("in", 1.1), ("out", 4.0))]
    bits = [math.log2(perplexity) / 2 for perplexity in (10.0, 40.0)]
    assert texts[1].shown_ratio[0] == pytest.approx(bits[1] / bits[0])
    warning = degradation_warning(texts)
    assert f"out ({bits[1] / bits[0]:.2f}x bits per byte)" in warning
    assert "perplexity" not in warning
    assert f"{bits[1] / bits[0]:.3f}" in degradation_table([text.to_json() for text in texts])


def test_the_table_and_the_record():
    texts = [one("in", 1.2, True, 0.05), one("out", 1.5, False, math.nan)]
    shown = degradation_table([text.to_json() for text in texts])
    others = ["0.900", "±", "0.020", "0.800", "±", "0.030"]
    assert [row.split() for row in shown.splitlines()[2:]] == [
        ["in", "calibrated", "on", "10", "12", "1.200", "±", "0.050", "0.100", "±", "0.010", *others],
        ["out", "not", "calibrated", "on", "10", "15", "1.500", "0.100", "±", "0.010", *others],
    ]
    assert texts[1].to_json()["ratio_error"] == "nan"
    missing = replace(texts[1], acceptance=math.nan).to_json()
    assert degradation_table([texts[0].to_json(), missing]).split()[-1] == "unknown"
    assert "accepted" not in degradation_table([missing])  # a column without a figure


def test_with_another_tokenizer_the_same_text_is_compared_in_bits_per_byte():
    dense, tokenizer = bh.load("tiny", "float32"), load_tokenizer("tiny")
    batches = [Batch({"input_ids": ids[None]}, source) for source, ids in zip("aabb", texts_of_tiny(tokenizer), strict=True)]
    counts = token_shares(batches[:1], 2048)[0].numpy()
    _, others = Vocabulary(tokenizer).order(counts, np.flatnonzero(counts))
    plan = bh.pruning.plan_units(dense, sorted(others[-1024:]), "token")  # what the first example does not use
    changed, fewer = bh.load("tiny", "float32"), plan.trim_tokenizer(tokenizer)
    bh.apply(changed, plan)
    reference = DenseReference(dense, batches, ["a"], tokenizer=tokenizer)
    for text in reference.degradation(dense, tokenizer=tokenizer):
        assert (text.ratio, text.token_ratio) == (1, 1)
    found = reference.degradation(changed, tokenizer=fewer)
    for text, rows in zip(found, (batches[:2], batches[2:]), strict=True):
        numbers = {"before": nats(dense, tokenizer, tokenizer, rows), "after": nats(changed, fewer, tokenizer, rows)}
        (lost_before, tokens_before, size), (lost_after, tokens_after, _) = numbers.values()
        # all rows have as many tokens, so that the mean over rows is that over tokens
        assert text.bits_per_byte == pytest.approx([lost / math.log(2) / size for lost in (lost_before, lost_after)], rel=1e-4)
        assert text.token_ratio == tokens_after / tokens_before
        assert math.isnan(text.kl)
    assert found[1].ratio > found[0].ratio > 1
    shown = degradation_table([text.to_json() for text in found])
    assert shown.startswith("bits per byte of")
    assert f"{found[0].token_ratio:.3f}" in shown
    assert found[0].to_json()["bits_ratio_error"] == found[0].shown_ratio[1]


def texts_of_tiny(tokenizer):
    text = "\n".join(load_splits("tiny")["validation"][:200]["text"])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: 4 * 64].view(4, 64)


@torch.no_grad()
def nats(model, tokenizer, before, rows):
    """Nats, tokens and bytes of what follows each row's first token, one row at a time."""
    lost = tokens = size = 0
    for row in rows:
        ids = row["input_ids"][0].tolist()
        first, rest = (tokenizer(before.decode(part), add_special_tokens=False)["input_ids"] for part in (ids[:1], ids[1:]))
        logs = model(torch.tensor([first + rest])).logits[0].log_softmax(-1)
        lost -= sum(float(logs[len(first) - 1 + place, token]) for place, token in enumerate(rest))
        tokens, size = tokens + len(rest), size + len(before.decode(ids[1:]).encode())
    return lost, tokens, size
