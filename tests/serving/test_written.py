"""GGUF files of folders and checkpoints: by the command, and at the end of a fit."""

import gguf
import pytest
import torch
from transformers import AutoTokenizer

import billhook as bh
from billhook.assets import model_path
from billhook.cli.main import main
from billhook.serving.engine import LlamaCpp
from billhook.serving.written import export_gguf
from kit import serving
from kit.cli import pytestmark as quiet
from kit.fits import trainer
from kit.serving import beside, longrope, saved, small

pytestmark = [*serving.pytestmark, *quiet, pytest.mark.filterwarnings("ignore:You defined a `validation_step`")]
IDS = list(range(3, 40))


def logits(file):
    with LlamaCpp() as engine:
        engine.load(file, 64)
        return engine.logits(IDS)


@torch.no_grad()
def expected(folder):
    return bh.load(folder, "float32").eval()(input_ids=torch.tensor([IDS])).logits[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture
def fast(monkeypatch, converter):
    """The converter of the session instead of one of its own."""

    class Shared:
        def __init__(self, path=None):
            assert path is None

        def __enter__(self):
            return converter

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("billhook.serving.written.Converter", Shared)


def test_the_command_writes_a_file_of_a_folder(folder, tmp_path, capsys, fast):
    out = tmp_path / "new" / "out.gguf"
    main(["export", str(folder), "--gguf", str(out)])
    assert capsys.readouterr().out == f"Saved to {out} (converted by llama.cpp's converter, text split as in gpt-2)\n"
    assert {one.tensor_type.name for one in gguf.GGUFReader(out).tensors} == {"F32"}
    assert torch.allclose(logits(out), expected(folder), atol=1e-4)
    types = {}
    for kind in ("Q8_0", "Q6_K", "Q5_K_M"):  # each replaces the file; K-quants need rows of multiples of 256
        main(["export", str(folder), "--gguf", str(out), "--kind", kind])
        types[kind] = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert types == {"Q8_0": {"F32", "Q8_0"}, "Q6_K": {"F32", "Q8_0"}, "Q5_K_M": {"F32", "Q5_1", "Q8_0"}}
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf"]


def test_a_failed_conversion_leaves_nothing(tmp_path, fast):
    small("llama").save_pretrained(tmp_path / "model")  # no tokenizer
    with pytest.raises(ValueError, match="gguf: '.*model' cannot be converted: the folder has no tokenizer"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rotary_factors_hold_beyond_the_original_length(tmp_path, fast):
    folder, out = saved(tmp_path, "llama", rope_parameters=longrope(32), max_position_embeddings=32), tmp_path / "out.gguf"
    export_gguf(folder, out)
    read = gguf.GGUFReader(out)
    (factors,) = [one.data.tolist() for one in read.tensors if one.name == "rope_freqs.weight"]
    assert factors == pytest.approx(longrope()["short_factor"])
    assert not any(key.startswith("llama.rope.scaling") for key in read.fields)
    assert torch.allclose(logits(out), expected(folder), atol=1e-4 * float(expected(folder).abs().max()))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen3", {}), ("llama", {"long_factor": [1.0] * 8}), ("llama", {"attention_factor": 2.0})],
    ids=lambda case: case if isinstance(case, str) else next(iter(case), "equal"),
)
def test_rotary_factors_that_llama_cpp_would_ignore_are_refused(family, changes, tmp_path, fast):
    folder = saved(tmp_path, family, rope_parameters=longrope() | changes)
    with pytest.raises(ValueError, match="cannot be converted: llama.cpp: its converter drops longrope factors, and "):
        export_gguf(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export {folder}", "' is a folder. Add --gguf FILE.gguf to convert it."),
        ("export {folder} --gguf out.bin", "gguf='out.bin' must be a path that ends in .gguf"),
        ("export {folder} --gguf {folder}/model.safetensors", "must be a path that ends in .gguf"),
        ("export {folder} --gguf {there}", "exists and is not a GGUF file"),
        ("export {folder} --gguf out.gguf --tokenizer tiny", "tokenizer='tiny': a folder is converted with its own tokenizer"),
        ("export one.ckpt", "paths: pass a Lightning checkpoint and an output folder, or a folder with --gguf"),
        ("export one.ckpt two three", "paths: pass a Lightning checkpoint and an output folder"),
        ("export {folder} --gguf out.gguf --converter nowhere", "converter='nowhere' must be llama.cpp's"),
    ],
)
def test_what_the_command_refuses(line, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_text("notes")
    words = line.format(folder=folder, there=tmp_path / "there.gguf").split()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert message in str(stopped.value.code)
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "notes"


def fit(tmp_path, model, *callbacks):
    lit = bh.TransformerModule(beside_of(tmp_path, model))
    rows = [{"input_ids": (ids := torch.arange(3 + i, 19 + i)), "labels": ids} for i in range(4)]
    cut = bh.StructuredPruning(bh.Amount(channels=0.5), importance=bh.importance.WeightNorm())
    run = trainer(tmp_path, [cut, *callbacks], max_steps=2)
    run.fit(lit, torch.utils.data.DataLoader(rows, batch_size=2))
    return run


def export_of(tmp_path, **options):
    return bh.Export(str(tmp_path / "out"), AutoTokenizer.from_pretrained(model_path("tiny")), **options)


def beside_of(tmp_path, model):
    model.save_pretrained(tmp_path / "first")
    return str(beside(tmp_path / "first"))


def test_a_fit_ends_with_a_file(tmp_path, fast):
    fit(tmp_path, small("llama"), export_of(tmp_path, gguf=str(tmp_path / "files" / "out.gguf")))
    folder = tmp_path / "out"
    assert bh.load(folder).config.intermediate_size < 96
    assert torch.allclose(logits(tmp_path / "files" / "out.gguf"), expected(folder), atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_the_command_writes_folder_and_file_of_a_checkpoint(tmp_path, fast):
    fit(tmp_path, small("llama")).save_checkpoint(tmp_path / "last.ckpt")
    folder, out = tmp_path / "out", tmp_path / "out.gguf"
    main(["export", str(tmp_path / "last.ckpt"), str(folder), "--gguf", str(out)])
    assert bh.load(folder).config.intermediate_size < 96
    assert torch.allclose(logits(out), expected(folder), atol=1e-4)


def test_what_cannot_be_converted_is_told_before_training(tmp_path, fast):
    with pytest.raises(ValueError, match="gguf: '.*rehearsal' cannot be converted: .*HeliumForCausalLM is not supported"):
        fit(tmp_path, small("helium", head_dim=16), export_of(tmp_path, gguf=str(tmp_path / "out.gguf")))
    assert not (tmp_path / "out").exists()


def test_the_model_stays_where_its_file_fails_at_the_end(tmp_path, fast):
    with pytest.warns(UserWarning, match="was not written .*HeliumForCausalLM is not supported"):
        fit(tmp_path, small("helium", head_dim=16), export_of(tmp_path, gguf=str(tmp_path / "out.gguf"), rehearse=False))
    assert bh.load(tmp_path / "out").config.intermediate_size < 96
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_of_another_ending_is_refused():
    with pytest.raises(ValueError, match="gguf='out.bin' must be a path that ends in .gguf"):
        bh.Export("out", gguf="out.bin")
