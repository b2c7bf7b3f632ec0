"""A model that also learns from a teacher: what the loss is, where the teacher is and is not, and resuming."""

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

import billhook as bh
from billhook.assets import model_path
from billhook.model.find import find_transformer
from billhook.training import distillation
from billhook.training.distillation import Distillation, kl_divergence, weights_checksum
from kit import fits
from kit.families import BERT, T5, VIT, llama, tokens
from kit.fits import data, same, trainer, weights

# the resumed runs do without the ModelCheckpoint of the straight one
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
CLASSES = {"num_labels": 3}
BUILD = {
    "causal-lm": lambda: llama(),
    "masked-lm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "seq2seq-lm": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "sequence-classification": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, **CLASSES)),
    "image-classification": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, **CLASSES)),
}


def naive(student, teacher, temperature):
    """KL per row, in float64, as Hinton's formula is written."""
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher, student))
    return (p * (p / q).log()).sum(-1)


def example(task):
    """A batch with padding and labels that do not count, and which logits those are that do."""
    torch.manual_seed(1)
    if task == "image-classification":
        return {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 2, 1])}, torch.ones(3, dtype=bool)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if task == "sequence-classification":
        return batch | {"labels": torch.tensor([0, 2, 1])}, torch.ones(3, dtype=bool)
    labels = tokens(3, 9).masked_fill(mask == 0, -100)
    labels[2, :4] = -100
    counted = labels != -100
    if task == "causal-lm":
        counted = torch.cat([counted[:, 1:], torch.zeros(3, 1, dtype=bool)], 1)
    return batch | {"labels": labels}, counted


def distilled(task="causal-lm", build=None, **settings):
    """A student that has moved away from its teacher; without dropout."""
    torch.manual_seed(0)
    lit = bh.TransformerModule((build or BUILD[task])(), task, lr=1e-2, warmup=2, distillation=Distillation(**settings)).eval()
    lit.log = lambda *_, **__: None
    with torch.no_grad():
        for parameter in lit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return lit


class TestDivergence:
    @pytest.mark.parametrize("chunk", [1, 40, 2**22])
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_value_and_gradient_are_those_of_the_naive_formula(self, chunk, temperature, monkeypatch):
        monkeypatch.setattr(distillation, "CHUNK", chunk)
        student, teacher = 3 * torch.randn(2, 2, 7, 11, dtype=torch.float64)
        counted = torch.rand(2, 7) > 0.4
        student.requires_grad_()
        expected = naive(student, teacher, temperature)[counted].mean()
        (wanted,) = torch.autograd.grad(3 * expected, student)
        found = kl_divergence(student, teacher.clone(), counted, temperature)
        (got,) = torch.autograd.grad(3 * found, student)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
        assert found > 0.1
        assert not got[~counted].any()

    def test_half_precision_is_computed_in_float32(self):
        student, teacher = (4 * torch.randn(2, 6, 100)).bfloat16()
        student.requires_grad_()
        found = kl_divergence(student, teacher.clone(), torch.ones(6, dtype=bool), 2.0)
        assert (found.dtype, found.item()) == (torch.float32, pytest.approx(naive(student, teacher, 2.0).mean().item(), rel=1e-5))
        found.backward()
        exact = student.detach().double().requires_grad_()
        naive(exact, teacher, 2.0).mean().backward()
        torch.testing.assert_close(student.grad.double(), exact.grad, rtol=2**-7, atol=0)

    def test_small_gradients_survive_float16_under_loss_scaling(self):
        student, teacher = torch.randn(2, 512, 64).half()
        student.requires_grad_()
        (2.0**16 * kl_divergence(student, teacher.clone(), torch.ones(512, dtype=bool), 2.0)).backward()
        exact = student.detach().double().requires_grad_()
        naive(exact, teacher, 2.0).mean().backward()
        torch.testing.assert_close(student.grad.double() / 2**16, exact.grad, rtol=2e-3, atol=1e-9)

    def test_tokens_that_neither_model_can_say(self):
        student, teacher = torch.randn(2, 3, 8)
        student[:, 5], teacher[:, 5:7] = -torch.inf, -torch.inf
        teacher[:, 5] = student[:, 5] = -torch.inf
        found = kl_divergence(student.requires_grad_(), teacher, torch.ones(3, dtype=bool), 1.0)
        found.backward()
        assert found.isfinite()
        assert student.grad.isfinite().all()

    def test_nothing_counts(self):
        student = torch.randn(3, 8, requires_grad=True)
        found = kl_divergence(student, torch.randn(3, 8), torch.zeros(3, dtype=bool), 1.0)
        found.backward()
        assert found == 0
        assert not student.grad.any()


@pytest.mark.parametrize("task", BUILD)
def test_the_loss_by_hand(task):
    lit = distilled(task, temperature=3.0, weight=0.3)
    batch, counted = example(task)
    inputs = dict(batch)
    labels = inputs.pop("labels")
    if task == "seq2seq-lm":
        inputs["decoder_input_ids"] = torch.cat([torch.zeros(3, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)], 1)
    student = lit.model(**inputs).logits
    teacher = lit.teacher.model(**inputs).logits
    targets = labels if student.ndim == 2 else labels.roll(-1, 1) if task == "causal-lm" else labels
    expected = 0.7 * cross_entropy(student[counted], targets[counted]) + 0.3 * 9 * naive(student, teacher, 3.0)[counted].mean()
    loss = lit.training_step(batch, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert naive(student, teacher, 3.0)[counted].mean() > 1e-4
    parameters = list(lit.model.parameters())
    found, wanted = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (loss, expected))
    for left, right in zip(found, wanted, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_a_model_that_makes_its_decoders_inputs_in_no_other_way_than_from_labels():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "vocab_size": 2048}
    config = transformers.M2M100Config(**sizes)
    assert not hasattr(transformers.M2M100ForConditionalGeneration, "prepare_decoder_input_ids_from_labels")
    lit = distilled("seq2seq-lm", build=lambda: transformers.M2M100ForConditionalGeneration(config), weight=1.0, temperature=1.0)
    batch, counted = example("seq2seq-lm")
    expected = naive(lit.model(**batch).logits, lit.teacher.model(**batch).logits, 1.0)[counted].mean()
    assert lit.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


class TestHidden:
    def test_by_hand(self):
        lit = distilled(weight=0.0, hidden=2.0)
        batch, _ = example("causal-lm")
        keep = batch["attention_mask"].bool()
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (lit.model, lit.teacher.model))
        errors = [(ours.hidden_states[i] - theirs.hidden_states[i])[keep].square().mean() for i in (1, 2)]
        expected = ours.loss + 2 * (errors[0] + errors[1]) / 2
        assert lit.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_encoder_and_decoder(self):
        lit = distilled("seq2seq-lm", weight=0.0, hidden=2.0)
        batch, counted = example("seq2seq-lm")
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (lit.model, lit.teacher.model))
        keep = batch["attention_mask"].bool()
        encoder = (ours.encoder_hidden_states[1] - theirs.encoder_hidden_states[1])[keep].square().mean()
        decoder = (ours.decoder_hidden_states[1] - theirs.decoder_hidden_states[1])[counted].square().mean()
        assert lit.training_step(batch, 0).item() == pytest.approx((ours.loss + encoder + decoder).item(), rel=1e-5)

    def test_fewer_blocks_are_held_against_those_at_their_share_of_the_depth(self, tmp_path):
        llama(num_hidden_layers=6).save_pretrained(tmp_path)
        lit = distilled(build=lambda: llama(num_hidden_layers=4), teacher=str(tmp_path), weight=0.0, hidden=1.0)
        batch, _ = example("causal-lm")
        keep = batch["attention_mask"].bool()
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (lit.model, lit.teacher.model))
        pairs = [(1, 2), (2, 3), (3, 4), (4, 6)]  # 1.5 and 4.5 are rounded to even
        errors = [(ours.hidden_states[i] - theirs.hidden_states[j])[keep].square().mean() for i, j in pairs]
        expected = ours.loss + torch.stack(errors).mean()
        assert lit.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_another_width_is_refused(self, tmp_path):
        llama(hidden_size=48).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has hidden_size=48, but the student has 32"):
            bh.TransformerModule(llama(), distillation=Distillation(str(tmp_path), hidden=0.1))
        lit = bh.TransformerModule(llama(), distillation=Distillation(str(tmp_path)))
        assert lit.teacher.model.config.hidden_size == 48


class TestTheTeacher:
    def test_it_is_nowhere(self):
        lit, plain = distilled(), bh.TransformerModule(llama())
        assert lit.state_dict().keys() == plain.state_dict().keys()
        assert [name for name, _ in lit.named_modules()] == [name for name, _ in plain.named_modules()]
        assert find_transformer(lit) is lit.model
        held = {id(parameter) for parameter in lit.parameters()}
        assert not held & {id(parameter) for parameter in lit.teacher.model.parameters()}
        lit.train()
        assert not any(part.training for part in lit.teacher.model.modules())
        assert not any(parameter.requires_grad for parameter in lit.teacher.model.parameters())
        assert copy.deepcopy(lit).teacher is lit.teacher

    def test_it_is_the_dense_model_however_the_student_is_cut(self, files, tmp_path):
        before = llama(vocab_size=2048, num_key_value_heads=8)
        lit = bh.TransformerModule(copy.deepcopy(before), lr=1e-2, warmup=2, distillation=Distillation(weight=0.9, hidden=0.1))
        pruning = bh.HeadPruning(bh.schedules.MultiStep([0.25, 0.5], [2, 4]), remove="rounds", calibration=4, measure_batches=0)
        losses = Losses()
        trainer(tmp_path, [pruning, losses]).fit(lit, data(files))
        assert same(lit.teacher.model.state_dict(), before.state_dict())
        assert lit.model.model.layers[0].self_attn.q_proj.weight.shape[0] == 16
        assert losses.kl[0] == pytest.approx(0, abs=1e-6)
        assert min(losses.kl[2:]) > 1e-5  # the learning rate starts at 0

    def test_it_follows_device_and_precision(self, files, tmp_path):
        lit = bh.TransformerModule(llama(vocab_size=2048), distillation=Distillation())
        losses = Losses()
        trainer(tmp_path, [losses], max_steps=2, precision="bf16-true").fit(lit, data(files))
        assert lit.teacher.model.dtype == torch.bfloat16
        assert losses.kl[0] == 0

    def test_validation_knows_nothing_of_it(self, files, tmp_path):
        lit = distilled(build=lambda: llama(vocab_size=2048))
        del lit.log
        plain = bh.TransformerModule(copy.deepcopy(lit.model))
        said = [trainer(tmp_path, []).validate(one, data(files), verbose=False)[0] for one in (lit, plain)]
        assert said[0] == said[1]

    def test_a_fingerprint_tells_models_apart(self):
        model = llama()
        first = weights_checksum(model)
        assert weights_checksum(copy.deepcopy(model)) == first
        with torch.no_grad():
            model.lm_head.weight[3, 3] += 1e-4
        assert weights_checksum(model) != first
        assert weights_checksum(llama().bfloat16()) != first


class Losses(pl.Callback):
    """The KL at each training step."""

    def __init__(self):
        self.kl = []

    def on_train_batch_end(self, trainer, *_):
        self.kl.append(float(trainer.callback_metrics["train_kl"]))


class TestResuming:
    SETTINGS = Distillation(temperature=1.5, weight=0.7, hidden=0.2)

    def build(self, model=None, **options):
        torch.manual_seed(0)
        model = model or llama(vocab_size=2048, num_key_value_heads=8)
        return bh.TransformerModule(model, lr=1e-2, warmup=2, distillation=self.SETTINGS, **options)

    def callbacks(self):
        return [bh.HeadPruning(bh.schedules.MultiStep([0.25, 0.5], [2, 4]), remove="rounds", calibration=4, measure_batches=0)]

    @pytest.mark.daily("lora")
    @pytest.mark.parametrize(("options", "stops"), [({}, [3]), ({"lora": bh.training.LoRA(r=2)}, [1, 5])], ids=["full", "lora"])
    def test_resumed_equals_straight_through(self, files, tmp_path, options, stops):
        straight = self.build(**options)
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(tmp_path, [*self.callbacks(), every], max_steps=6).fit(straight, data(files))
        for stop in stops:
            resumed = self.build(**options)
            torch.manual_seed(stop)
            with torch.no_grad():  # the weights come from the checkpoint, the teacher does not
                resumed.model.model.layers[0].self_attn.q_proj.weight.zero_()
            trainer(tmp_path, self.callbacks(), max_steps=6).fit(resumed, data(files), ckpt_path=tmp_path / f"step={stop}.ckpt")
            assert same(weights(resumed), weights(straight)), stop
            assert resumed.teacher.fingerprint == straight.teacher.fingerprint
        held = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
        assert held["state_dict"].keys() == straight.state_dict().keys()
        assert held["hyper_parameters"]["distillation"] == vars(self.SETTINGS)

    def test_with_another_teacher_it_is_refused(self, files, tmp_path):
        run = trainer(tmp_path, [], max_steps=2)
        run.fit(first := self.build(), data(files))
        run.save_checkpoint(tmp_path / "a.ckpt")
        other = self.build(copy.deepcopy(first.model))
        before = weights(other)
        with pytest.raises(ValueError, match="the weights of teacher=None differ from"):
            trainer(tmp_path, [], max_steps=4).fit(other, data(files), ckpt_path=tmp_path / "a.ckpt")
        assert same(weights(other), before)
        trainer(tmp_path, []).validate(other, data(files), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        assert same(weights(other), weights(first))

    def test_load_from_checkpoint(self, files, tmp_path):
        llama(vocab_size=2048, num_key_value_heads=8).save_pretrained(tmp_path / "dense")
        lit = self.build(str(tmp_path / "dense"))
        run = trainer(tmp_path, [bh.KVHeadConversion(2, at="start", measure_batches=0)], max_steps=2)
        run.fit(lit, data(files))
        run.save_checkpoint(tmp_path / "a.ckpt")
        loaded = bh.TransformerModule.load_from_checkpoint(tmp_path / "a.ckpt")
        assert same(weights(loaded), weights(lit))
        assert loaded.teacher.settings == self.SETTINGS
        assert loaded.teacher.fingerprint == lit.teacher.fingerprint


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"teacher": float("nan")}, "teacher=nan must be a path"),
        ({"temperature": 0}, "temperature=0 must be a number above 0"),
        ({"weight": 1.1}, re.escape("weight=1.1 must be in [0, 1]")),
        ({"hidden": -1}, "hidden=-1 must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a number above 0"),
        ({"weight": 0}, "weight=0 and hidden=0 disable the teacher"),
    ],
)
def test_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Distillation(**settings)


def test_a_teacher_of_another_vocabulary(tmp_path):
    llama(vocab_size=65).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other' has vocab_size=65, but the student has 64"):
        bh.TransformerModule(llama(), distillation=Distillation(str(tmp_path / "other")))
    with pytest.raises(ValueError, match="is not a folder"):
        bh.TransformerModule(llama(), distillation=Distillation(str(tmp_path / "nowhere")))


def test_a_teacher_that_means_other_tokens_by_the_same_numbers(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path("tiny"))
    model = fits.module().model
    for name in ("same", "other"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    plain = (tmp_path / "other" / "tokenizer.json").read_text()
    vocabulary = tokenizer.get_vocab()
    one, two = sorted(word for word in vocabulary if word.isalpha() and word.isascii() and len(word) == 1)[:2]
    swapped = plain.replace(f'"{one}": {vocabulary[one]}', f'"{one}": {vocabulary[two]}')
    swapped = swapped.replace(f'"{two}": {vocabulary[two]}', f'"{two}": {vocabulary[one]}')
    assert swapped != plain
    (tmp_path / "other" / "tokenizer.json").write_text(swapped)
    assert bh.TransformerModule("tiny", distillation=Distillation(str(tmp_path / "same"))).teacher
    with pytest.raises(ValueError, match="has a different vocabulary than the student"):
        bh.TransformerModule("tiny", distillation=Distillation(str(tmp_path / "other")))


def test_classes_must_be_the_same(tmp_path):
    BUILD["sequence-classification"]().save_pretrained(tmp_path)
    config = transformers.BertConfig(**BERT, num_labels=2)
    with pytest.raises(ValueError, match="has num_labels=3, but the student has 2"):
        bh.TransformerModule(config, "sequence-classification", distillation=Distillation(str(tmp_path)))
