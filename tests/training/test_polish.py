"""A polish: training toward what the dense model predicts, beside plain computations of the divergence and of what may change."""

import copy

import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity, kl_div

import billhook as bh
from billhook.repairs.polish import LR
from billhook.training.targets import LEAST_REST, TOP, Targets, divergence
from kit.families import llama
from kit.shaped import bert

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 200}


def batches(count=6, rows=2, length=12, sources=("one", "other")):
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        ids = torch.randint(SMALL["vocab_size"], (rows, length), generator=generator)
        made.append(bh.engine.batches.Batch({"input_ids": ids}, sources[number % len(sources)]))
    return made


@pytest.fixture
def dense():
    torch.manual_seed(0)
    model = llama(**SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that predictions are not alike
    return model


def cut(model):
    smaller = copy.deepcopy(model)
    bh.apply(smaller, bh.plan(smaller, bh.importance.WeightNorm(), channels=0.5))
    return smaller


def state(model):
    hooks = [(type(m), m.training, len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    parameters = [(name, value.dtype, value.requires_grad, value.grad is None) for name, value in model.named_parameters()]
    return hooks, parameters


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def all_logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=batch["input_ids"]).logits for batch in rows])


class TestDivergence:
    def test_the_rest_counts_as_one_class(self, dense):
        smaller, rows = cut(dense), batches(1, rows=1)
        (target,) = Targets.of(dense, rows).examples
        p, q = (all_logits(model, rows)[0].softmax(-1).double() for model in (dense, smaller))
        likely = p.topk(TOP).indices
        assert torch.equal(likely.sort().values, target.classes.long().sort().values)
        inside = [one.gather(1, likely) for one in (p, q)]
        joined = [torch.cat([one, 1 - one.sum(1, keepdim=True)], 1) for one in inside]
        expected = (joined[0] * (joined[0] / joined[1]).log()).sum(1).mean()
        with torch.no_grad():
            computed = divergence(smaller, target)
        assert float(computed) == pytest.approx(float(expected), rel=2e-3), "logarithms are float16"
        whole = kl_div(q.log(), p, reduction="none").sum(1).mean()
        assert float(expected) < float(whole)
        assert 1 - float(inside[0].sum(1).min()) > LEAST_REST

    def test_few_classes_are_all_there_and_padding_does_not_count(self):
        model = transformers.BertForSequenceClassification(bert(num_labels=3).config).eval()
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.classifier.weight.mul_(20)
        rows = [{"input_ids": torch.arange(1, 9).view(2, 4), "labels": torch.tensor([0, 2])}]
        targets = Targets.of(model, rows).examples
        logits = [all_logits(one, rows).log_softmax(-1) for one in (model, other)]
        expected = kl_div(logits[1], logits[0], log_target=True, reduction="none").sum(1)
        with torch.no_grad():
            computed = torch.stack([divergence(other, target) for target in targets])
        torch.testing.assert_close(computed, expected, rtol=2e-3, atol=1e-5)

        causal = llama(**SMALL).eval()
        ids, mask = torch.randint(200, (1, 8)), torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
        padded, plain = (Targets.of(causal, [one]).examples[0] for one in (
            {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, :5]}
        ))  # fmt: skip
        assert padded.values.shape == plain.values.shape == (5, TOP + 1)

    def test_without_logits_it_is_the_cosine_of_token_states(self):
        model = transformers.BertModel(bert().config).eval()
        other = transformers.BertModel(bert().config).eval()
        rows = [{"input_ids": torch.arange(1, 9)[None], "attention_mask": torch.tensor([[1] * 6 + [0] * 2])}]
        (target,) = Targets.of(model, rows).examples
        states = [one(**rows[0]).last_hidden_state[0, :6].detach() for one in (model, other)]
        with torch.no_grad():
            computed = float(divergence(other, target))
        assert computed == pytest.approx(1 - float(cosine_similarity(*states, dim=-1).mean()), abs=1e-3)


class TestPolish:
    @pytest.mark.parametrize("trains", LR)
    def test_it_comes_nearer_and_only_values_change(self, dense, trains):
        smaller, rows = cut(dense), batches()
        smaller.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        smaller.model.layers[1].train()
        before, logits, random = state(smaller), all_logits(dense, rows), torch.get_rng_state()
        distance = (all_logits(smaller, rows) - logits).square().mean()
        result = bh.polish(smaller, Targets.of(dense, rows), how=bh.PolishConfig(steps=30, trains=trains))
        assert state(smaller) == before
        assert torch.equal(torch.get_rng_state(), random)
        assert max(result.after.values()) < max(result.before.values())
        assert set(result.after) == {"one", "other"}
        assert (all_logits(smaller, rows) - logits).square().mean() < distance

    def test_what_is_reported_is_what_the_model_has_afterward(self, dense):
        smaller, targets = cut(dense), Targets.of(dense, batches())
        _, held_out = targets.split(8)
        result = bh.polish(smaller, targets, how=bh.PolishConfig(steps=9))
        for source, after in result.after.items():
            with torch.no_grad():
                measured = [float(divergence(smaller, one)) for one in held_out if one.source == source]
            assert after == pytest.approx(sum(measured) / len(measured), rel=1e-4), "scales are in the weights"

    def test_the_same_twice_and_a_second_time(self, dense):
        targets = Targets.of(dense, batches())
        twins = cut(dense), cut(dense)
        results = [bh.polish(one, targets, how=bh.PolishConfig(steps=6)) for one in twins]
        assert results[0] == results[1]
        assert all(torch.equal(*pair) for pair in zip(*(values(one).values() for one in twins), strict=True))
        again = bh.polish(twins[0], targets, how=bh.PolishConfig(steps=6))
        assert again.before == pytest.approx(results[0].after, rel=1e-4)

    def test_what_makes_it_worse_is_not_kept(self, dense):
        smaller, targets = cut(dense), Targets.of(dense, batches())
        before = values(smaller)
        result = bh.polish(smaller, targets, how=bh.PolishConfig(steps=6, trains="all", lr=30.0))
        assert (result.share, result.after) == (0.0, result.before)
        assert all(torch.equal(before[name], value) for name, value in smaller.state_dict().items())

    @pytest.mark.parametrize("trains", LR)
    def test_zeros_stay(self, dense, trains):
        bh.prune(dense, bh.Magnitude(), sparsity=0.5)
        target = Targets.of(llama(**SMALL).eval(), batches())
        zeros = {name: value == 0 for name, value in dense.named_parameters()}
        bh.polish(dense, target, how=bh.PolishConfig(steps=4, trains=trains))
        assert all((value[zeros[name]] == 0).all() for name, value in dense.named_parameters())

    def test_half_precision_stays_and_ties_too(self, dense):
        model = llama(**SMALL, tie_word_embeddings=True).to(torch.bfloat16).eval()
        bh.polish(model, Targets.of(dense, batches()), how=bh.PolishConfig(steps=4, trains="all"))
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("trains", LR)
    def test_an_error_in_the_middle_leaves_the_model_as_it_was(self, dense, trains):
        smaller, before = cut(dense), None
        targets = Targets.of(dense, batches())
        before, kept = state(smaller), values(smaller)

        def stop(done, total):
            if done == 3:
                raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            bh.polish(smaller, targets, how=bh.PolishConfig(steps=6, trains=trains), progress=stop)
        assert state(smaller) == before
        assert all(torch.equal(kept[name], value) for name, value in smaller.state_dict().items())

    def test_other_architectures(self):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=200)).eval()
        t5 = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=200, decoder_start_token_id=0
            )
        ).eval()
        for model in (gpt2, t5, transformers.BertModel(bert().config).eval()):
            smaller = cut(model)
            ids = [torch.randint(1, 50, (2, 8)) for _ in range(4)]
            rows = [{"input_ids": one} | ({"labels": one} if model is t5 else {}) for one in ids]
            result = bh.polish(smaller, model, rows, bh.PolishConfig(steps=6))
            assert result.after[""] <= result.before[""]

    def test_what_cannot_be_polished_is_refused(self, dense, tmp_path):
        targets = Targets.of(dense, batches())
        wider = llama(**(SMALL | {"vocab_size": 300}))
        before = values(wider)
        with pytest.raises(ValueError, match="the model has 300 outputs for each position, and the dense model had 200"):
            bh.polish(wider, targets)
        assert all(torch.equal(before[name], value) for name, value in wider.state_dict().items())
        with pytest.raises(ValueError, match="1 examples are too few"):
            bh.polish(dense, Targets(targets.examples[:1]))
        adapted = copy.deepcopy(dense)
        bh.adapters.lora.attach(adapted, bh.training.LoRA())
        with pytest.raises(ValueError, match="polish: the model has adapters"):
            bh.polish(adapted, targets)
        dense.save_pretrained(tmp_path / "dense")
        streamed = bh.stream(str(tmp_path / "dense"), str(tmp_path / "out"))
        with pytest.raises(ValueError, match="streamed or sharded model cannot be polished"):
            bh.polish(streamed, targets)


def test_sources_are_drawn_in_turn(dense):
    """Whatever their size; and no example that is held out."""
    from billhook.training.polish import _in_turn

    rows = [*batches(2, rows=8, sources=("long",)), *batches(1, rows=2, sources=("short",))]
    train, held_out = Targets.of(dense, rows).split(8)
    drawn = list(_in_turn(train, bh.PolishConfig(steps=10)))
    assert [one.source for one in drawn] == ["long", "short"] * 10
    kept = {id(one.values) for one in held_out}
    assert not any(id(one.values) in kept for one in drawn)
