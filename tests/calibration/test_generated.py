"""What the model writes itself: drawn from its own distribution, packed, reproducible, and shown where nothing else is given."""

import pytest
import torch

import billhook as bh
from billhook.assets import model_path
from billhook.model.preprocessors import tokenizer_of
from kit.families import llama
from kit.losses import BUILD

PROMPTS = ["Once upon a time", "Enter", "Exit"]


@pytest.fixture(scope="module")
def model():
    return bh.load("tiny")


def rows(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


def test_rows_are_full_and_the_same_again(model):
    before, mode = torch.get_rng_state(), model.training
    found = rows(bh.generated(model, examples=3, length=24, batch_size=2))
    assert found.shape == (3, 24)
    assert torch.equal(found, rows(bh.generated(model, examples=3, length=24)))
    assert not torch.equal(found, rows(bh.generated(model, examples=3, length=24, seed=1)))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training == mode


def test_rows_begin_within_an_eighth_of_their_length():
    """A model that counts: each token is one more than the last."""
    model = llama(vocab_size=128, hidden_size=128, num_hidden_layers=1, bos_token_id=0, max_position_embeddings=256).eval()
    with torch.no_grad():
        for weight in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(128))
        model.lm_head.weight.copy_(100 * torch.eye(128).roll(1, 0))
    found = rows(bh.generated(model, examples=100, length=80))
    assert torch.equal(found[:, 1:], found[:, :-1] + 1)
    assert set(found[:, 0].tolist()) == set(range(1, 11))


def test_tokens_are_drawn_from_the_models_own_distribution():
    """Of a vocabulary of 8, what follows the first token of 2,000 texts; the temperature sharpens it."""
    model = llama(vocab_size=8, num_hidden_layers=1, bos_token_id=1, eos_token_id=2, max_position_embeddings=2).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        logits = model(input_ids=torch.tensor([[1]])).logits[0, -1]
    for temperature in (1.0, 0.5):
        first = rows(bh.generated(model, examples=2000, length=2, temperature=temperature, batch_size=50))[:, 0]
        shares = torch.bincount(first, minlength=8) / len(first)
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.04, rtol=0)


def test_a_row_goes_on_past_the_end_of_a_text():
    model = llama(vocab_size=4, bos_token_id=0, eos_token_id=3, pad_token_id=None)
    found = rows(bh.generated(model, examples=20, length=30))
    assert (found == 3).sum() > 20
    assert (found[:, -1] != 3).any()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_may_be_as_long_as_the_model_reads(kind):
    model = BUILD[kind]()
    most = model.config.max_position_embeddings
    model.generation_config.bos_token_id = model.config.bos_token_id = 1
    assert rows(bh.generated(model, examples=2, length=most)).shape == (2, most)


def test_prompts_begin_the_rows_in_turn(model):
    batches = bh.generated(model, PROMPTS, examples=4, length=16)
    tokenizer = tokenizer_of(model)
    for batch, prompt in zip(batches, [*PROMPTS, PROMPTS[0]], strict=True):
        (ids,) = batch["input_ids"].tolist()
        assert batch["input_ids"].shape == (1, 16)
        assert tokenizer.decode(ids, skip_special_tokens=True).startswith(prompt)
    assert not torch.equal(batches[0]["input_ids"], batches[3]["input_ids"])


def test_chats_go_through_the_template(model):
    tokenizer = tokenizer_of(model)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    (batch,) = bh.generated(model, [[{"role": "user", "content": "Who is there?"}]], examples=1, length=40, tokenizer=tokenizer)
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True).startswith("[user] Who is there?")


def test_it_is_what_methods_are_shown_where_nothing_is_given(monkeypatch):
    model, seen = llama(bos_token_id=1), []
    written = bh.generated(model, examples=4, length=32)
    monkeypatch.setattr(bh.Calibration, "read", lambda self, model: seen.append(self) or written)
    bh.plan(model, channels=0.5)
    bh.convert_kv_heads(model, 1, "svd")
    bh.prune(model, sparsity=0.5)
    assert seen == [bh.Calibration()] * 3, "it has no tokenizer"
    bh.plan(bh.load("tiny"), channels=0.5)
    assert seen[3] == bh.Calibration(["mixed", "generated"], tokens=80 * 512)


@pytest.mark.parametrize(("of", "arguments", "said"), [
    (llama, {"examples": 0}, "examples=0"), (llama, {"length": 1}, "length=1"), (llama, {"temperature": 0.0}, "temperature=0.0"),
    (llama, {"length": 65}, "length=65 exceeds the context length of the model, 64 tokens"),
    (BUILD["bert"], {}, "Bert.* does not generate text"), (BUILD["t5"], {}, "does not generate text"),
    (llama, {"prompts": ["a"]}, "tokenizer=None: LlamaForCausalLM does not say where it came from"),
    (lambda: llama(vocab_size=2048), {"prompts": [], "tokenizer": model_path("tiny")}, "prompts is empty. Pass at least"),
    (lambda: llama(vocab_size=2048), {"prompts": [3], "tokenizer": model_path("tiny")}, "prompts: 3 must be text or a chat"),
    (lambda: llama(bos_token_id=None, eos_token_id=None), {}, "has no token to start a text with. Pass prompts"),
])  # fmt: skip
def test_refused(of, arguments, said):
    with pytest.raises(ValueError, match=said):
        bh.generated(of(), **arguments)
