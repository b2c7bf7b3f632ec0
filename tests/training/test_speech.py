"""Speech: files, arrays and tables to batches, a fit of a tiny Whisper that prunes it, and every operation on one."""

import json

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration

import billhook as bh
from billhook.model.linears import prunable
from billhook.model.preprocessors import tokenizer_of
from billhook.training.metrics import metrics_of
from billhook.training.speech import SpeechDataModule, heard
from billhook.units.find import find_units
from kit.families import llama
from kit.speech import RATE, WORDS, config, rows, tone, write_processor, write_wav

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
START, PLAIN, END = 257, 258, 256


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return write_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture
def whisper():
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config(init_std=0.3)).eval()


def module(processor, data=None, model=None, **options):
    given = datasets.Dataset.from_dict(rows(8)) if data is None else data
    made = SpeechDataModule(given, processor, **{"batch_size": 4, "validation": 0} | options)
    made.read(model)
    return made


def batch_of(data):
    return next(iter(data._loader("train")))


def test_arrays_become_features_and_tokens(processor, whisper):
    data = module(processor, model=whisper)
    batch = batch_of(data)
    extract = AutoFeatureExtractor.from_pretrained(processor)
    expected = extract([tone(number) for number in range(4)], sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(batch["input_features"], expected)
    spelt = [data.tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS]
    assert batch["labels"].tolist() == [[PLAIN, *own, END] for own in spelt], "the model itself begins with the start"
    words = {"text": ["a", "bee"], "audio": rows(2)["audio"]}
    padded = batch_of(module(processor, datasets.Dataset.from_dict(words), whisper, batch_size=2))["labels"]
    assert padded[0].tolist()[-2:] == [-100, -100]
    apart = module(processor)
    assert batch_of(apart)["labels"][0, 0] == START


def test_sound_is_read_from_files_tables_and_arrays(tmp_path):
    samples = tone(1)
    path = write_wav(tmp_path / "a.wav", samples)
    both = np.stack([samples, np.zeros_like(samples)], 1)
    stereo = write_wav(tmp_path / "b.wav", both.reshape(-1), channels=2)
    for value in (path, {"path": path, "bytes": None}, {"path": None, "bytes": (tmp_path / "a.wav").read_bytes()}):
        assert np.allclose(heard(value, RATE), samples, atol=1e-4)
    assert np.allclose(heard(stereo, RATE), samples / 2, atol=1e-4)
    for rate in (8000, 22050):
        found = heard({"array": tone(1, rate), "sampling_rate": rate}, RATE)
        assert len(found) == len(samples)
        assert np.allclose(found[800:-800], samples[800:-800], atol=5e-3), "a tone that ends where it began is itself"


@pytest.mark.parametrize("kind", ["paths", "parquet"])
def test_tables_of_files(tmp_path, processor, kind):
    files = [write_wav(tmp_path / f"{number}.wav", tone(number)) for number in range(2)]
    if kind == "paths":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"audio": one, "text": "ant"}) + "\n" for one in files))
        data = str(tmp_path / "a.jsonl")
    else:
        held = [{"bytes": (tmp_path / one).read_bytes(), "path": None} for one in files]
        table = datasets.Dataset.from_dict({"audio": held, "text": ["ant", "ant"]})
        table.cast_column("audio", datasets.Audio(decode=False)).to_parquet(data := str(tmp_path / "a.parquet"))
        assert isinstance(datasets.Dataset.from_parquet(data).features["audio"], datasets.Audio)
    found = batch_of(module(processor, data, batch_size=2))["input_features"]
    expected = batch_of(module(processor, batch_size=2))["input_features"]
    assert torch.allclose(found, expected, atol=1e-2)


def errors(said, words):
    """Edits that turn the words that are said into those that should be, over the number of these, by recursion."""

    def least(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(least(a[1:], b) + 1, least(a, b[1:]) + 1, least(a[1:], b[1:]) + (a[0] != b[0]))

    return sum(least(own.split(), word.split()) for own, word in zip(said, words, strict=True)) / len(" ".join(words).split())


@pytest.mark.slow
def test_a_fit_learns_prunes_saves_and_is_loaded(processor, tmp_path):
    torch.manual_seed(0)
    lit = bh.TransformerModule(config(), "speech-seq2seq", lr=1e-2, decay="constant")
    lit.model.generation_config.max_length = 8
    data = SpeechDataModule(
        datasets.DatasetDict(train=datasets.Dataset.from_dict(rows(16)), validation=datasets.Dataset.from_dict(rows(4))),
        processor,
        batch_size=8,
    )
    pruning = bh.WeightPruning(bh.Wanda(), sparsity=0.5, at=20, calibration=8)
    export = bh.Export(str(tmp_path / "out"))
    options = QUIET | {"enable_model_summary": False, "check_val_every_n_epoch": 20}
    trainer = pl.Trainer(max_steps=40, callbacks=[pruning, export], **options)
    trainer.fit(lit, datamodule=data)
    assert lit.metric_name == "wer"
    assert {"train_loss", "val_loss", "val_wer"} <= trainer.callback_metrics.keys()
    assert all(float((one.weight == 0).float().mean()) == 0.5 for one in prunable(lit.model).values())
    batch = next(iter(data.val_dataloader()[0]))
    plain = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").eval()
    read = AutoProcessor.from_pretrained(tmp_path / "out")
    said = read.batch_decode(plain.generate(batch["input_features"], max_length=8), skip_special_tokens=True)
    assert float(trainer.callback_metrics["val_wer"]) == pytest.approx(errors(said, WORDS))
    assert 0 < errors(said, WORDS) < 1, "some words are right"
    assert torch.equal(read(tone(0), sampling_rate=RATE, return_tensors="pt")["input_features"][0], batch["input_features"][0])
    (predicted,) = trainer.predict(lit, datamodule=data)
    assert read.batch_decode(predicted, skip_special_tokens=True) == said


def test_without_a_tokenizer_no_word_error_rate_is_logged(processor):
    torch.manual_seed(0)
    lit = bh.TransformerModule(config(), "speech-seq2seq")
    batch = batch_of(module(processor, model=lit.model))
    (found,) = pl.Trainer(enable_model_summary=False, **QUIET).validate(lit, DataLoader([batch], batch_size=None), verbose=False)
    assert found.keys() == {"val_loss"}
    with torch.no_grad():
        assert found["val_loss"] == pytest.approx(float(lit.model.eval()(**batch).loss), rel=1e-5)
    assert list(metrics_of("speech-seq2seq", None)) == ["wer"]


def attentions(model):
    heads = list(find_units(model, "head"))
    assert len([one for one in heads if "encoder_attn" in one]) == len([one for one in heads if "decoder" in one]) / 2 == 2
    assert len([one for one in heads if ".encoder." in one]) == 2
    return heads


@pytest.mark.parametrize("kind", ["head", "channel", "residual"])
def test_units_go_as_if_they_were_masked(processor, whisper, tmp_path, kind):
    """Heads of the encoder, and of the decoder's own attention and of that to the encoder; what is left speaks on."""
    batch = batch_of(module(processor, model=whisper))
    if kind == "head":
        attentions(whisper)
    units = find_units(whisper, kind)
    gone = {place: [number % 2, 2] for number, place in enumerate(units)}
    with torch.no_grad(), bh.mask(whisper, gone, kind):
        expected = whisper(**batch).logits
    whole = whisper(**batch).logits
    bh.prune_units(whisper, gone, kind=kind)
    with torch.no_grad():
        found = whisper(**batch).logits
    if kind != "residual":  # norms of fewer channels are others
        assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, whole, atol=1e-2)
    says_on(whisper, batch, tmp_path)


def says_on(model, batch, folder):
    """Saves a model, and compares what is loaded: logits, and what it writes."""
    bh.save(model, folder / "out")
    loaded = bh.load(folder / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    sound = batch["input_features"]
    assert torch.equal(loaded.generate(sound, max_new_tokens=5), model.generate(sound, max_new_tokens=5))


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_kv_heads_are_merged_in_all_attentions(processor, whisper, tmp_path, method):
    batch = batch_of(module(processor, model=whisper))
    bh.convert_kv_heads(whisper, 2, method, [batch])
    layer = whisper.model.decoder.layers[1]
    assert layer.encoder_attn.k_proj.weight.shape == layer.self_attn.v_proj.weight.shape == (8, 16)
    says_on(whisper, batch, tmp_path)


def test_scores_repair_and_weights(processor, whisper, tmp_path):
    batches = list(module(processor, model=whisper)._loader("train"))
    plan = bh.plan(whisper, bh.Taylor(), batches, heads=0.5, channels=0.25)
    bh.apply(whisper, plan, weights=bh.repair(whisper, plan, batches))
    bh.prune(whisper, bh.Wanda(), batches, sparsity=0.5)
    zeros = {name: float((one.weight == 0).float().mean()) for name, one in prunable(whisper).items()}
    assert set(zeros.values()) == {0.5}
    assert {"model.encoder.conv2", "model.decoder.layers.0.encoder_attn.q_proj"} <= zeros.keys()
    says_on(whisper, batches[0], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "words"}, "the split 'train' has no column 'words'; it has audio, text"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_what_is_refused(processor, options, message):
    with pytest.raises(ValueError, match=message):
        module(**{"processor": processor} | options)


def test_other_models_streams_and_what_is_no_sound_are_refused(processor, tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict(rows(2))
    with pytest.raises(ValueError, match="a LlamaForCausalLM does not write what it hears"):
        module(processor, model=llama())
    with pytest.raises(ValueError, match="sound is not read from a stream"):
        module(processor, table.to_iterable_dataset())
    (tmp_path / "a.mp3").write_bytes(b"no sound")
    for value, message in (
        (str(tmp_path / "none.wav"), "none.wav' cannot be read"),
        ({"bytes": None, "path": None}, "a dict is no sound"),
        (7, "an? int is no sound"),
        ({"array": [[0.0, 1.0]], "sampling_rate": 8}, r"sound of the shape \[1, 2\] is no row of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            heard(value, RATE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ValueError, match="a.mp3' is no WAV file of 8, 16 or 32 bits, .*: pip install soundfile"):
        heard(str(tmp_path / "a.mp3"), RATE)
    tokenizer_of(bh.load("tiny")).save_pretrained(tmp_path)
    AutoFeatureExtractor.from_pretrained(processor).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="language='german': a .* knows no languages"):
        module(str(tmp_path), language="german")


def test_a_folder_of_sound_needs_torchcodec(processor, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    (tmp_path / "speech" / "train").mkdir(parents=True)
    write_wav(tmp_path / "speech" / "train" / "0.wav", tone(0))
    (tmp_path / "speech" / "train" / "metadata.jsonl").write_text('{"file_name": "0.wav", "text": "ant"}\n')
    with pytest.raises(ValueError, match="is a folder of sound, which `datasets` reads with torchcodec alone: pip install"):
        module(processor, str(tmp_path / "speech"))
