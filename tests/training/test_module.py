import json
import math

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from billhook import KVHeadConversion, TextDataModule, TransformerModule
from billhook.checkpoints.save import save
from billhook.model.shape import shape_of
from billhook.training import ClassificationDataModule, LoRA
from billhook.training.data import Seq2SeqDataModule
from billhook.training.metrics import TokenPerplexity
from kit.families import BERT, SMALL, T5, VIT, build, llama, tokens
from kit.fits import data, module, same, trainer, weights
from kit.shaped import SHAPED, uneven_llama


def test_validation_perplexity_is_torchmetrics_own(files, tmp_path):
    lit = module().eval()
    said = trainer(tmp_path, []).validate(lit, data(files), verbose=False)[0]
    metric, source = Perplexity(ignore_index=-100), data(files)
    source.setup("validate")
    for batch in source.val_dataloader()[0]:
        metric.update(lit.model(batch["input_ids"]).logits[:, :-1].detach(), batch["labels"][:, 1:])
    assert said["val_perplexity"] == pytest.approx(metric.compute().item(), rel=1e-4)
    assert said["val_loss"] == pytest.approx(math.log(said["val_perplexity"]), rel=1e-4)


def test_perplexity_weighs_tokens_not_batches():
    metric = TokenPerplexity()
    metric.update(torch.tensor(1.0), torch.tensor(30))
    metric.update(torch.tensor(4.0), torch.tensor(10))
    assert metric.compute().item() == pytest.approx(math.exp(1.75))


def test_padding_does_not_count(tmp_path):
    lit = TransformerModule(llama())
    ids, labels = tokens(4), tokens(4)
    labels[:2, 5:] = -100
    whole = DataLoader([{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)], batch_size=4)
    parts = DataLoader(whole.dataset, batch_size=2)
    a, b = (trainer(tmp_path, []).validate(lit, loader, verbose=False)[0]["val_perplexity"] for loader in (whole, parts))
    assert a == pytest.approx(b, rel=1e-5)


def write_rows(folder, rows):
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}


class TestTasks:
    """Each task learns a little by heart."""

    def learns(self, folder, lit, source, metric, better):
        before = trainer(folder, []).validate(lit, source, verbose=False)[0][metric]
        trainer(folder, [], max_steps=30).fit(lit, source)
        after = trainer(folder, []).validate(lit, source, verbose=False)[0][metric]
        assert better(before, after), (before, after)

    def test_causal_lm(self, files, tmp_path):
        self.learns(tmp_path, module(), data(files), "val_perplexity", lambda before, after: after < 0.7 * before)

    def test_masked_lm(self, files, tmp_path):
        lit = TransformerModule(transformers.BertConfig(**BERT), task="masked-lm", lr=1e-2)
        source = TextDataModule(files, "tiny", length=16, batch_size=4, mlm_probability=0.3)
        source.tokenizer.mask_token = source.tokenizer.eos_token
        self.learns(tmp_path, lit, source, "val_perplexity", lambda before, after: after < 0.7 * before)

    @pytest.mark.daily("config0")
    @pytest.mark.parametrize(
        "config", [transformers.BertConfig(**BERT, pad_token_id=0), llama(vocab_size=2048, pad_token_id=None).config]
    )
    def test_sequence_classification(self, tmp_path, config):
        rows = [{"text": f"{word} {i}", "label": label} for i in range(8) for label, word in enumerate(("love", "sword", "king"))]
        lit = TransformerModule(config, task="sequence-classification", num_labels=3, lr=1e-2)
        source = ClassificationDataModule(write_rows(tmp_path, rows), "tiny", batch_size=8)
        self.learns(tmp_path, lit, source, "val_accuracy", lambda before, after: after > 0.95)

    def test_seq2seq_lm(self, tmp_path):
        rows = [{"source": f"to be {i}", "target": f"or not {i}"} for i in range(16)]
        lit = TransformerModule(transformers.T5Config(**T5), task="seq2seq-lm", lr=1e-2)
        source = Seq2SeqDataModule(write_rows(tmp_path, rows), "tiny", batch_size=8)
        self.learns(tmp_path, lit, source, "val_perplexity", lambda before, after: after < 0.5 * before)
        predicted = trainer(tmp_path, []).predict(lit, source)
        assert predicted[0].shape[0] == 8

    def test_image_classification(self, tmp_path):
        lit = TransformerModule(transformers.ViTConfig(**VIT), task="image-classification", num_labels=2, lr=1e-2)
        images = [{"pixel_values": torch.randn(3, 8, 8) + label, "labels": torch.tensor(label)} for label in (0, 1) * 8]
        loader = DataLoader(images, batch_size=8)
        trainer(tmp_path, [], max_steps=20).fit(lit, loader, loader)
        assert trainer(tmp_path, []).validate(lit, loader, verbose=False)[0]["val_accuracy"] > 0.9


class TestModel:
    def test_folder_config_file_config_and_ready_model(self, tmp_path):
        model = llama()
        model.save_pretrained(tmp_path)
        assert same(TransformerModule(str(tmp_path)).model.state_dict(), model.state_dict())
        assert TransformerModule(model).model is model
        for config in (str(tmp_path / "config.json"), model.config):
            fresh = TransformerModule(config).model
            assert fresh.num_parameters() == model.num_parameters()
            assert not same(fresh.state_dict(), model.state_dict())

    @pytest.mark.parametrize("family", SHAPED)
    def test_a_folder_of_a_shape_that_its_class_does_not_build(self, family, tmp_path):
        model = SHAPED[family]()
        assert save(model, tmp_path / "a").way == "shaped"
        task = "masked-lm" if family == "bert" else "causal-lm"
        lit = TransformerModule(str(tmp_path / "a"), task, dtype="bfloat16", attn_implementation="eager")
        assert (type(lit.model), lit.model.dtype) == (type(model), torch.bfloat16)
        assert lit.model.config._attn_implementation == "eager"
        lit = TransformerModule(str(tmp_path / "a"), task)
        assert lit.model.training
        assert same(lit.model.state_dict(), model.state_dict())
        assert shape_of(lit.model) == shape_of(model)
        ids = tokens()
        with torch.no_grad():
            assert torch.equal(lit.eval()(input_ids=ids).logits, model(ids).logits)

    @pytest.mark.parametrize("family", SHAPED)
    def test_a_classifier_on_such_a_folder(self, family, tmp_path):
        model = SHAPED[family]()
        save(model, tmp_path / "a")
        lit = TransformerModule(str(tmp_path / "a"), "sequence-classification", num_labels=3)
        assert type(lit.model).__name__.endswith("ForSequenceClassification")
        found, expected = (one.base_model.state_dict() for one in (lit.model, model))
        assert same({name: found[name] for name in expected}, expected)
        ids = tokens()
        output = lit(input_ids=ids, labels=torch.tensor([0, 2]))
        assert output.logits.shape == (2, 3)
        output.loss.backward()
        assert TransformerModule(str(tmp_path / "a"), "sequence-classification").model.num_labels == 2

    def test_such_a_folder_is_checked(self, tmp_path):
        save(uneven_llama(), tmp_path / "a")
        with pytest.raises(ValueError, match="task='masked-lm' is not supported: .* no such class for model type 'llama'"):
            TransformerModule(str(tmp_path / "a"), "masked-lm")
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        config["billhook"]["shape"]["tensors"]["lm_head.weight"] = [64, 8]
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="lm_head.weight is said to be"):
            TransformerModule(str(tmp_path / "a"))
        with pytest.raises(ValueError, match="lm_head.weight is named, and LlamaForSequenceClassification has nothing"):
            TransformerModule(str(tmp_path / "a"), "sequence-classification")

    def test_a_config_that_was_given_stays_as_it_is(self, files, tmp_path):
        config, before = llama(vocab_size=2048).config, llama(vocab_size=2048).config.to_dict()
        lit = TransformerModule(config, num_labels=7)
        trainer(tmp_path, [KVHeadConversion(1, measure_batches=0)], max_steps=1).fit(lit, data(files))
        assert lit.model.config.num_key_value_heads == 1
        assert config.to_dict() == before

    def test_dtype_attention_and_checkpointing(self):
        lit = TransformerModule("tiny", dtype="bfloat16", attn_implementation="eager", gradient_checkpointing=True)
        assert lit.model.dtype == torch.bfloat16
        assert lit.model.config._attn_implementation == "eager"
        assert TransformerModule("tiny", dtype="auto").model.dtype == torch.float16
        plain = TransformerModule("tiny")
        lit = TransformerModule("tiny", gradient_checkpointing=True)
        ids = tokens()
        for one in (plain, lit):
            one(input_ids=ids, labels=ids).loss.backward()
        for (name, p), q in zip(plain.named_parameters(), lit.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)

    def test_gguf_becomes_really_plain(self, tmp_path):
        gguf = pytest.importorskip("gguf")
        source = llama(vocab_size=8)
        write_gguf(gguf, tmp_path / "small.gguf", source)
        lit = TransformerModule(str(tmp_path), gguf_file="small.gguf")
        for name in ("mlp.down_proj", "self_attn.v_proj", "input_layernorm"):
            layers = (model.model.layers[1].get_submodule(name).weight for model in (lit.model, source))
            torch.testing.assert_close(*layers)
        lit.model.save_pretrained(tmp_path / "saved")
        assert not hasattr(lit.model.config, "quantization_config")
        assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict(), lit.model.state_dict())

    def test_load_from_checkpoint_and_hyperparameters(self, files, tmp_path):
        lit, run = module(), trainer(tmp_path, [], max_steps=2)
        run.fit(lit, data(files))
        run.save_checkpoint(tmp_path / "last.ckpt")
        loaded = TransformerModule.load_from_checkpoint(tmp_path / "last.ckpt", model=llama(vocab_size=2048))
        assert same(weights(loaded), weights(lit))
        assert loaded.lr == 1e-2


class TestOptimizer:
    def made(self, files, folder, **options):
        lit = TransformerModule(llama(vocab_size=2048, attention_bias=True), **{"lr": 1e-2, **options})
        run = trainer(folder, [], max_steps=10)
        run.fit(lit, data(files))
        return lit, run

    def test_no_decay_on_biases_and_norms(self, files, tmp_path):
        lit, run = self.made(files, tmp_path, weight_decay=0.1)
        groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in run.optimizers[0].param_groups}
        flat = {id(p) for name, p in lit.named_parameters() if "norm" in name or name.endswith("bias")}
        assert groups[0.0] == flat
        assert groups[0.1] == {id(p) for p in lit.parameters()} - flat
        assert run.optimizers[0].defaults["fused"]

    @pytest.mark.parametrize(
        ("decay", "expected"),
        [
            ("constant", lambda s: 1.0),
            ("linear", lambda s: 1 - (s - 2) / 8),
            ("cosine", lambda s: (1 + math.cos(math.pi * (s - 2) / 8)) / 2),
        ],
    )
    def test_learning_rate(self, files, tmp_path, decay, expected):
        rates = []

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        lit = TransformerModule(llama(vocab_size=2048), lr=0.01, decay=decay, warmup=0.2 if decay == "linear" else 2)
        trainer(tmp_path, [Watch()], max_steps=10).fit(lit, data(files))
        wanted = [0.01 * (s / 2 if s < 2 else expected(s)) for s in range(10)]
        assert rates == pytest.approx(wanted)

    def test_endless_training_needs_a_length(self, files, tmp_path):
        with pytest.raises(ValueError, match="decay='cosine' .* Set Trainer.max_steps="):
            trainer(tmp_path, [], max_steps=-1, max_epochs=-1).fit(module(), data(files))


def trained(lit):
    return {name for name, parameter in lit.model.named_parameters() if parameter.requires_grad}


def fitted(folder, files, lit, callbacks=(), ckpt_path=None, max_steps=6):
    keep = ModelCheckpoint(folder / ("resumed" if ckpt_path else "run"), filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(folder, [*callbacks, keep], max_steps=max_steps, limit_val_batches=0)
    run.fit(lit, data(files), ckpt_path=ckpt_path)
    return run


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
class TestTrainable:
    """Attention alone, or some names alone, in training."""

    def made(self, seed=0, trainable="attention", **changes):
        torch.manual_seed(seed)
        return TransformerModule(llama(vocab_size=2048, **changes), lr=1e-2, warmup=2, trainable=trainable)

    @pytest.mark.parametrize(
        ("config", "task", "parts"),
        [
            (transformers.BertConfig(**BERT, pad_token_id=0), "sequence-classification", (".attention.", "classifier.")),
            (transformers.ViTConfig(**VIT), "image-classification", (".attention.", "classifier.")),
        ],
        ids=["text", "images"],
    )
    def test_attention_and_the_head_of_a_classifier(self, config, task, parts):
        lit = TransformerModule(config, task, trainable="attention")
        assert trained(lit) == {name for name, _ in lit.model.named_parameters() if any(part in name for part in parts)}

    def test_names(self):
        lit = self.made(trainable=["*.k_proj.*", "*layers.0*v_proj*"])
        wanted = {f"model.layers.{i}.self_attn.{part}_proj.weight" for i, part in ((0, "k"), (0, "v"), (1, "k"))}
        assert trained(lit) == wanted
        lit = self.made(trainable=["lm_head.*"], tie_word_embeddings=True)
        assert trained(lit) == {"model.embed_tokens.weight"}

    @pytest.mark.parametrize(("kind", "router"), [("qwen3_moe", "mlp.gate.weight"), ("mixtral", "mlp.gate.weight")])
    def test_routers_of_experts(self, kind, router):
        assert trained(TransformerModule(build(kind), trainable="router")) == {f"model.layers.{i}.{router}" for i in range(2)}
        with pytest.raises(ValueError, match="trainable='router': no router of experts was found in LlamaForCausalLM"):
            self.made(trainable="router")

    def test_what_a_ready_model_has_frozen_stays_so(self):
        model = llama()
        model.model.layers[0].requires_grad_(False)
        lit = TransformerModule(model, trainable="attention")
        assert all(name.startswith("model.layers.1.self_attn.") for name in trained(lit))
        assert len(trained(lit)) == 4

    @pytest.mark.parametrize("at", ["start", 3])
    def test_the_optimizer_knows_nothing_else_through_a_conversion(self, files, tmp_path, at):
        lit = self.made()
        names, before = trained(lit), weights(lit)
        run = fitted(tmp_path, files, lit, [KVHeadConversion(1, at=at, measure_batches=0)])
        assert trained(lit) == names
        held = {name: parameter for name, parameter in lit.model.named_parameters() if name in names}
        optimizer = run.optimizers[0]
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in held.values()}
        assert {id(p) for p in optimizer.state} == {id(p) for p in held.values()}
        for name, value in weights(lit).items():
            own = name.removeprefix("model.")
            assert (own in names) != (value.shape == before[name].shape and torch.equal(value, before[name])), name
        assert lit.model.model.layers[0].self_attn.k_proj.weight.shape[0] == 4  # one head of 4

    @pytest.mark.daily("attention-2", "names-4")
    @pytest.mark.parametrize("step", [2, 4])
    @pytest.mark.parametrize("trainable", ["attention", ["*.mlp.*", "*.v_proj.*"]], ids=["attention", "names"])
    def test_resumed_ends_as_the_straight_run(self, files, tmp_path, step, trainable):
        conversion = lambda: [KVHeadConversion(1, at=3, measure_batches=0)]  # noqa: E731
        straight, lit = self.made(trainable=trainable), self.made(seed=1, trainable=trainable)
        fitted(tmp_path, files, straight, conversion())
        kept = {name: value for name, value in weights(lit).items() if name.removeprefix("model.") not in trained(lit)}
        fitted(tmp_path, files, lit, conversion(), ckpt_path=str(tmp_path / "run" / f"step={step}.ckpt"))
        assert same(weights(lit), weights(straight))
        assert not same(kept, {name: weights(lit)[name] for name in kept})  # those came from the checkpoint, too

    def test_checkpoints_say_so(self, files, tmp_path):
        lit = self.made()
        fitted(tmp_path, files, lit, max_steps=2)
        loaded = TransformerModule.load_from_checkpoint(tmp_path / "run" / "step=2.ckpt", model=llama(vocab_size=2048))
        assert trained(loaded) == trained(lit)
        assert torch.load(tmp_path / "run" / "step=2.ckpt")["hyper_parameters"]["trainable"] == "attention"

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"trainable": "heads"}, "trainable='heads' must be 'all', 'attention', 'router', or name patterns"),
            ({"trainable": []}, r"trainable=\[\] must be"),
            (
                {"trainable": ["*.k_proj.*", "*.key.*"]},
                r"trainable='\*.key.\*' matches none of the .*'model.embed_tokens.weight'",
            ),
            ({"trainable": "attention", "lora": LoRA()}, "trainable='attention' cannot be combined with lora"),
            ({"model": transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64)}, "no attention module"),
        ],
        ids=["word", "nothing", "no match", "lora", "no attention"],
    )
    def test_refused(self, options, match):
        model = llama()
        with pytest.raises(ValueError, match=match):
            TransformerModule(**{"model": model, "trainable": "attention"} | options)
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "poetry"}, "task='poetry' must be one of causal-lm, seq2seq-lm"),
        ({"lr": 0}, "lr=0 must be a number above 0"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"model": "no/such/folder/config.json"}, "the config file .* does not exist"),
    ],
)
def test_refused(options, match):
    with pytest.raises(ValueError, match=match):
        TransformerModule(**options)


def test_a_folder_that_is_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, so it is not a Hugging Face checkpoint"):
        TransformerModule(str(tmp_path))


def write_gguf(gguf, path, model):
    """The smallest llama in GGUF, with a tokenizer as the format wants it."""
    c = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(SMALL["max_position_embeddings"])
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_dimension_count(c.head_dim)
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("llama")
    out.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    out.add_token_scores([0.0] * c.vocab_size)
    out.add_token_types([1] * c.vocab_size)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for i, layer in enumerate(model.model.layers):
        for theirs, ours in names.items():
            out.add_tensor(f"blk.{i}.{ours}.weight", layer.get_submodule(theirs).weight.detach().numpy())
    out.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    out.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    out.add_tensor("output.weight", model.lm_head.weight.detach().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
