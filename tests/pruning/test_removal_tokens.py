"""Tokens as units: every table of the vocabulary, the ids of the configs, and the logits of what is left."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import billhook as bh
from billhook.engine.batches import Batch
from billhook.engine.comm import Comm
from billhook.model.inputs import make_inputs
from billhook.model.plan import ModelPlan
from billhook.model.token_ids import named_token_ids
from billhook.pruning.planning import plan_units
from billhook.vocabulary import scores
from billhook.vocabulary.scores import predicted_shares, token_shares
from kit.families import build, t5
from kit.small_tokenizers import LINES, TEXTS, byte_level

SIZE = 64
SMALL = {"vocab_size": SIZE, "max_position_embeddings": 64}
BERT = SMALL | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bart():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        **SMALL, **sizes, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=60, eos_token_id=61, bos_token_id=62
    )
    return transformers.BartForConditionalGeneration(config)


MODELS = {
    "Llama, untied": lambda: build("llama"),
    "Llama, tied": lambda: build("llama", tie_word_embeddings=True),
    "special ids last": lambda: build("qwen2", bos_token_id=61, eos_token_id=[62, 63], pad_token_id=60),
    "Gemma": lambda: build("gemma"),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, bos_token_id=63, eos_token_id=63)
    ),
    "T5": t5,
    "BART, with a bias of logits": bart,
    "BERT, with a bias": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "RoBERTa, whose positions know the padding": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT)),
    "a classifier": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
}


def some(model, every=3):
    """A third of the tokens, none of which a config names, and the rest."""
    size = next(iter(bh.find_units(model, "token").values())).count()
    named = named_token_ids(model, size)
    gone = [token for token in range(size) if token % every == 1 and token not in named]
    return gone, np.delete(np.arange(size), gone), size


def inputs_of(kept, model):
    """The same tokens before and after, in all inputs that are ids."""
    inputs = make_inputs(model)
    inputs.pop("use_cache", None)
    numbers = {name: torch.randint(4, len(kept) - 5, value.shape) for name, value in inputs.items() if "input_ids" in name}
    return {name: torch.from_numpy(kept)[ids] for name, ids in numbers.items()}, numbers


@torch.no_grad()
def answers(model, inputs):
    model.eval()
    return model(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_what_is_left_are_equal_and_plain_transformers_loads_it(name, tmp_path):
    model = MODELS[name]()
    (gone, kept, size), old = some(model), dict(model.config.to_dict())
    before, after = inputs_of(kept, model)
    expected, parameters = answers(model, before), model.num_parameters()
    where = next(iter(bh.find_units(model, "token")))
    plan = bh.pruning.prune_units(model, {where: gone}, kind="token")
    assert plan.parameters == (parameters, model.num_parameters())
    assert plan.after == {where: (len(kept),)}
    got = answers(model, after)
    assert torch.equal(got, expected[..., kept] if expected.shape[-1] == size else expected)
    assert bh.save(model, tmp_path / "out").way == "plain"
    again = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(answers(again, after), got)
    assert again.config.vocab_size == len(kept)
    for config in (again.config, getattr(again, "generation_config", None)):
        for field, value in (config.to_dict() if config else {}).items():
            if field.endswith("token_id") and old.get(field) is not None:
                ids, then = ([item] if isinstance(item, int) else item for item in (value, old[field]))
                assert kept[ids].tolist() == then, field
    padding = [module.padding_idx for module in model.modules() if getattr(module, "padding_idx", None) is not None]
    assert {int(kept[number]) for number in padding} <= {old["pad_token_id"]}


def test_ids_of_a_config_around_that_of_the_text(tmp_path):
    text = transformers.LlamaConfig(**{**BERT, "pad_token_id": 5, "eos_token_id": 61})
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**vision), text_config=text, image_token_id=60)
    model = transformers.LlavaForConditionalGeneration(config)
    gone, kept, _ = some(model)
    assert {5, 60, 61} <= set(kept.tolist())
    bh.pruning.prune_units(model, gone, kind="token")
    bh.save(model, tmp_path / "out")
    again = transformers.LlavaConfig.from_pretrained(tmp_path / "out")
    assert kept[[again.image_token_id, again.text_config.pad_token_id, again.text_config.eos_token_id]].tolist() == [60, 5, 61]
    assert again.text_config.vocab_size == len(kept)


def test_optimizer_state_and_gradients_follow():
    model = build("llama")
    gone, kept, _ = some(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.from_numpy(kept)[torch.randint(len(kept), (2, 8))]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    table = model.model.embed_tokens.weight
    state, gradient = optimizer.state[table]["exp_avg"].clone(), table.grad.clone()
    bh.pruning.prune_units(model, gone, optimizer, kind="token")
    table = model.model.embed_tokens.weight
    assert torch.equal(optimizer.state[table]["exp_avg"], state[kept])
    assert torch.equal(table.grad, gradient[kept])


def test_adapters_of_the_vocabulary_follow(tmp_path):
    model = build("llama")
    gone, kept, _ = some(model)
    settings = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings).eval()
    before, after = inputs_of(kept, model)
    expected = answers(adapted, before)
    bh.pruning.prune_units(adapted, gone, kind="token")
    assert torch.allclose(answers(adapted, after), expected[..., kept], atol=1e-6)
    bh.save(adapted, tmp_path / "out")
    assert torch.allclose(answers(bh.load(tmp_path / "out"), after), expected[..., kept], atol=1e-5)


def test_what_the_configs_name_stays_and_nothing_changes_by_a_refusal():
    model = build("llama")
    model.generation_config.forced_eos_token_id = 40
    model.generation_config.suppress_tokens = [50, 51]
    model.generation_config.bad_words_ids = [[10], [11, 12]]
    before = copy.deepcopy(model.state_dict())
    for token, field in ((2, "config.eos_token_id"), (40, "generation_config.forced_eos_token_id")):
        with pytest.raises(ValueError, match=f"tokens: {token} cannot be removed, because it is {field}"):
            bh.pruning.prune_units(model, [token], kind="token")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bh.pruning.prune_units(model, [11, 50], kind="token")
    generation = model.generation_config
    assert (generation.forced_eos_token_id, generation.suppress_tokens, generation.bad_words_ids) == (39, [49], [[10]])
    model.generation_config.sequence_bias = {(1, 2): 0.5}
    with pytest.raises(ValueError, match="sequence_bias=.* mixes token ids with other numbers"):
        bh.pruning.prune_units(model, [11], kind="token")


def test_the_share_of_a_token_is_the_sum_over_sources():
    long, short = torch.tensor([[5, 5, 6, 7, 0, 0]] * 4), torch.tensor([[6, 6, 6, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 4)
    batches = [Batch({"input_ids": long, "attention_mask": mask}, "long"), Batch({"input_ids": short}, "short")]
    # each source's counts, less the discount, by its number of tokens
    expected = Counter({5: 7.25 / 16, 6: 3.25 / 16 + 2.25 / 4, 7: 3.25 / 16, 9: 0.25 / 4})
    shares, sources = token_shares(batches, 10)
    assert (shares.tolist(), sources) == ([expected[token] for token in range(10)], 2)
    both, _ = token_shares(batches[:1], 10, Comm(lambda tensor: tensor.mul_(2) if tensor.is_floating_point() else tensor))
    assert both.tolist() == token_shares(batches[:1] * 2, 10)[0].tolist()  # two ranks of equal text


def test_what_the_model_expects_counts_beside_what_the_text_has():
    model = build("llama").eval()
    size = model.config.vocab_size
    ids, mask = torch.randint(4, size, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:] = 0
    with torch.no_grad():
        probabilities = model(input_ids=ids, attention_mask=mask).logits.double().softmax(-1)[mask.bool()]
    expected = predicted_shares(model, size, [{"input_ids": ids, "attention_mask": mask}])
    assert torch.allclose(expected, probabilities.mean(0), atol=1e-6)
    assert not predicted_shares(model, size + 1, [{"input_ids": ids}]).any()  # as of a classifier
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "PREDICTED", 8)
        predicted_shares(model, size, [Batch({"input_ids": torch.full((1, 4), 5)}, name) for name in "ab" * 6])
    assert len(seen) == 4  # two of each source


@pytest.fixture(scope="module")
def trained():
    tokenizer = byte_level(420)
    model = build("llama", vocab_size=424, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    ids = [tokenizer(text)["input_ids"] for text in LINES[:2]]
    return model, tokenizer, [Batch({"input_ids": torch.tensor([row])}, f"line {number}") for number, row in enumerate(ids)]


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_a_plan_keeps_what_text_uses(trained, ratio, tmp_path):
    model, tokenizer, batches = trained
    model = copy.deepcopy(model)
    plan = bh.plan(model, batches=batches, amount=bh.Amount(tokens=ratio, round_to=1), tokenizer=tokenizer)
    (gone,) = plan.units.values()
    assert len(gone) == int(424 * ratio)
    assert ratio > 0.1 or set(gone).isdisjoint({token for batch in batches for token in batch["input_ids"].flatten().tolist()})
    assert {420, 421, 422, 423} <= set(gone)  # rows without a token
    fewer = plan.trim_tokenizer(tokenizer)
    bh.apply(model, plan)
    bh.save(model, tmp_path / "out", fewer)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = torch.tensor(again(text)["input_ids"])
        assert int(ids.max()) < loaded.config.vocab_size
        assert again.decode(ids, skip_special_tokens=True) == text
    assert ModelPlan.from_json(plan.to_json(), trained[0]).units == plan.units
    assert plan_units(trained[0], gone, "token").trim_tokenizer(tokenizer).get_vocab() == fewer.get_vocab()


def test_with_other_units_in_one_plan(trained):
    model, tokenizer, batches = copy.deepcopy(trained[0]), *trained[1:]
    plan = bh.plan(model, batches=batches, tokens=0.25, channels=0.25, tokenizer=tokenizer)
    assert {plan.kinds[name] for name in plan.units} == {"token", "channel"}
    bh.apply(model, plan)
    assert (model.config.vocab_size, model.config.intermediate_size) == (320, 36)  # of 318, a multiple of 32


def test_more_than_can_go_or_without_its_tokenizer(trained):
    model, tokenizer, batches = trained
    with pytest.raises(
        ValueError, match=r"tokens=0.9 would remove 381 of 424 tokens of the model. At most \d+ can be removed: tokens=0\."
    ):
        bh.plan(model, batches=batches, tokens=0.9, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="it has ids up to 419, but the model only 64 tokens"):
        bh.plan(build("llama"), batches=batches, tokens=0.5, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="does not say where it came from: name a tokenizer"):
        bh.plan(model, batches=batches, tokens=0.5)


@pytest.mark.parametrize(
    ("token", "why"),
    [("~", "it spells text"), ("<unk>", "it is a special token"), ("qu", "'.*' is made of it")],
    ids=["byte", "special", "part"],
)
def test_a_tokenizer_is_not_trimmed_of_what_text_needs(trained, token, why):
    model, tokenizer, _ = trained
    number = tokenizer.convert_tokens_to_ids(token)
    with pytest.raises(ValueError, match=rf"tokens: {number} \('{token}'\) must stay, because {why}"):
        plan_units(model, [number], "token").trim_tokenizer(tokenizer)


def test_the_tokenizer_of_before_is_refused_wherever_text_is_read(trained, tmp_path):
    tokenizer = trained[1]
    bh.save(trained[0], tmp_path / "dense", tokenizer)
    (tmp_path / "text.txt").write_text("a cat\n" * 200)  # ids that the smaller model has, too
    model = bh.load(tmp_path / "dense")
    plan = bh.plan(model, batches=trained[2], amount=bh.Amount(tokens=0.1, round_to=1))
    fewer = plan.trim_tokenizer(tokenizer)
    fewer.save_pretrained(tmp_path / "fewer")
    tokenizer.save_pretrained(tmp_path / "copy")
    bh.apply(model, plan)
    text = {"sources": str(tmp_path / "text.txt"), "tokens": 64, "length": 16}
    for name in (None, str(tmp_path / "copy")):
        with pytest.raises(ValueError, match=r"tokens.* After a removal of tokens, pass plan.trim_tokenizer\(tokenizer\)"):
            bh.prune(model, bh.Wanda(), bh.Calibration(**text, tokenizer=name), sparsity=0.5)
        with pytest.raises(ValueError, match="After a removal of tokens, pass"):
            bh.evaluate(model, text["sources"], length=16, tokenizer=name)
    with pytest.raises(ValueError, match="After a removal of tokens, pass"):
        bh.Calibration(**text).read(model, tokenizer)
    with pytest.raises(ValueError, match="After a removal of tokens, pass"):
        bh.plan(model, channels=0.3)  # on the default text
    read = bh.Calibration(**text, tokenizer=str(tmp_path / "fewer")).read(model)
    assert read[0]["input_ids"].tolist() == bh.Calibration(**text).read(model, fewer)[0]["input_ids"].tolist()
    bh.save(model, tmp_path / "out", fewer)
    again = bh.load(tmp_path / "out")
    bh.Calibration(**text).read(again)
    for name in ("dense", "copy"):
        with pytest.raises(ValueError, match=r"it has 4.. tokens, but the model only 382"):
            bh.Calibration(**text, tokenizer=str(tmp_path / name)).read(again)


def test_a_tokenizer_whose_ids_are_not_those_of_the_model_is_refused(trained, tmp_path):
    tokenizer = trained[1]
    model = build("llama", vocab_size=440)  # with 20 rows that have no token
    spare = plan_units(model, [438, 439], "token")  # no token gets another id
    bh.apply(model, spare)
    bh.save(model, tmp_path / "spare", tokenizer)
    first = plan_units(model, [410, 415, 418], "token")  # fewer than rows without a token
    bh.apply(model, first)
    trimmed = first.trim_tokenizer(spare.trim_tokenizer(tokenizer))
    trimmed.save_pretrained(tmp_path / "first")
    second = plan_units(model, [411], "token")
    bh.apply(copy.deepcopy(model), second)  # of another model
    bh.save(model, tmp_path / "once", transformers.AutoTokenizer.from_pretrained(tmp_path / "first"))
    bh.apply(model, second)
    for other in (tokenizer, trimmed):
        with pytest.raises(ValueError, match="has lost tokens, so its ids are not the tokenizer's. After a removal"):
            bh.save(model, tmp_path / "out", other)
    bh.save(model, tmp_path / "out", second.trim_tokenizer(trimmed))
    bh.save(bh.load(tmp_path / "out"), tmp_path / "again", transformers.AutoTokenizer.from_pretrained(tmp_path / "out"))


def test_added_tokens_without_an_embedding_are_refused_once_a_text_has_one(tmp_path):
    tokenizer = byte_level(420)
    model = build("llama", vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for text in ("plain", "an <image> here"):
        (tmp_path / f"{text[:2]}.txt").write_text(f"{text}\n" * 99)
    sizes = {"tokens": 64, "length": 16, "tokenizer": str(tmp_path / "tokenizer")}
    assert bh.Calibration(str(tmp_path / "pl.txt"), **sizes).read(model)
    with pytest.raises(ValueError, match="the text has the token 420, but the model only 420 tokens"):
        bh.Calibration(str(tmp_path / "an.txt"), **sizes).read(model)
    bh.save(model, tmp_path / "out", tokenizer)


def test_images_that_are_tokens_do_not_follow():
    codes = {f"<|visual token {number:06d}|>": 40 + number for number in range(16)} | {"<image>": 4, "<|extra_200|>": 59}
    vision = {"codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "double_latent": False, "base_channels": 32}
    vision |= {"channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [4], "hidden_size": 32}
    text = transformers.Emu3TextConfig(**BERT, num_key_value_heads=2, bos_token_id=0, eos_token_id=2, pad_token_id=3)
    config = transformers.Emu3Config(vq_config=vision, text_config=text.to_dict(), vocabulary_map=codes)
    model = transformers.Emu3ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="config.vocabulary_map names the tokens of images"):
        bh.pruning.plan_units(model, [6, 7], "token")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: adapted_with(modules_to_save=["embed_tokens"]), "modules_to_save of PEFT keeps tokens beside"),
        (lambda: adapted_with(modules_to_save=["lm_head"]), "modules_to_save of PEFT keeps tokens beside lm_head"),
        (lambda: adapted_with(trainable_token_indices=[20, 21]), "trainable_token_indices of PEFT keeps tokens beside"),
        (
            lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT, pad_token_id=20)),
            r"position_embeddings counts from config.pad_token_id=20, which would be 18\. Keep all tokens below it",
        ),
    ],
    ids=["trained embeddings", "a trained head", "trained tokens", "positions after the padding"],
)
def test_tables_that_do_not_follow(make, why):
    model = make()
    before = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"tokens: .*{why}"):
        bh.pruning.prune_units(model, [11, 12], kind="token")
    assert {name: value.shape for name, value in model.state_dict().items()} == before


def adapted_with(**options):
    return get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], **options))


IDS = torch.tensor([[4, 5, 6]])


@pytest.mark.parametrize(
    ("batches", "why"),
    [
        ([], "batches is empty. Pass text to count tokens in"),
        ([{"pixel_values": torch.zeros(1, 3)}], r"one has no input_ids to count tokens in \(pixel_values\)"),
        ([{"input_ids": IDS + 420}], r"token ids are in 424\.\.426, but must be in 0\.\.423"),
        ([{"input_ids": IDS.numpy()}], "input_ids must be a tensor of token ids, not a ndarray"),
        (
            [{"input_ids": IDS, "attention_mask": torch.ones(1, 1, 3, 3)}],
            r"attention_mask must have the shape of input_ids, \[1, 3\]",
        ),
    ],
    ids=["none", "images", "too large", "numpy", "mask of pairs"],
)
def test_batches_without_tokens_to_count(trained, batches, why):
    with pytest.raises(ValueError, match=f"batches.*{why.removeprefix('batches')}"):
        bh.plan(trained[0], batches=batches, tokens=0.1, tokenizer=trained[1])
