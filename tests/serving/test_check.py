"""`billhook serve-check`: yes where llama.cpp computes what transformers does, and otherwise no, with the reason."""

import json

import pytest
import torch

import billhook as bh
from billhook.cli.main import main
from billhook.serving import converter as converters
from billhook.serving import engine as engines
from billhook.serving.check import ServeResult, serve_check
from billhook.serving.engine import LlamaCpp
from billhook.serving.worker import Missing, Worker, WorkerError
from kit import serving
from kit.printed import assert_printed
from kit.serving import longrope, saved
from kit.small_tokenizers import LINES, byte_level

pytestmark = serving.pytestmark


def test_the_embedded_model_is_served(converter):
    found = serve_check("tiny", converter=converter, tokens=64)
    assert found.supported, found
    assert found.difference < 1e-4
    assert found.matching_tokens == (24, 24)
    eight, four = found.quantized
    assert (eight.kind, four.kind) == ("Q8_0", "Q4_K_M")
    assert 8.5 <= eight.bits < 8.6
    assert 4.5 <= four.bits < 6.2
    assert abs(eight.perplexity - 1) < 0.02
    assert abs(four.perplexity - 1) < 0.2
    assert (
        str(found).splitlines()[0].startswith("llama.cpp: supported: converted by llama.cpp's converter, text split as in gpt-2")
    )


def test_the_command_prints_yes(tmp_path, capsys):
    main(["serve-check", str(saved(tmp_path, "llama")), "--tokens", "32"])
    assert_printed("serve-check", capsys.readouterr().out)


def test_the_command_prints_no_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(
        "billhook.serving.check.serve_check", lambda *given, **named: ServeResult("folder", "llama.cpp", False, "a reason")
    )
    with pytest.raises(SystemExit) as stopped:
        main(["serve-check", "folder"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "llama.cpp: not supported: a reason\n"


def test_another_activation_than_the_engine_computes(tmp_path, converter):
    config = json.loads((saved(tmp_path, "llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))  # llama.cpp's graph is of silu
    found = serve_check(tmp_path, converter=converter, tokens=32, new_tokens=8, quantized=())
    assert not found.supported
    assert found.reason.startswith("logits differ by ")
    assert "of 32; greedy tokens differ after " in found.reason


@pytest.mark.daily("llama", "qwen2")
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "mixtral", "seed_oss", "phi3"])
def test_each_rotary_frequency_has_its_own_factor(family, tmp_path, converter):
    changes = {} if family in ("llama", "qwen2", "phi3") else {"head_dim": 16}
    saved(tmp_path, family, rope_parameters=longrope(), **changes)
    found = serve_check(tmp_path, converter=converter, tokens=64, new_tokens=8, quantized=())
    assert found.supported, found
    assert found.difference < 1e-4
    assert ("architecture deci" in found.reason) == (family in ("qwen2", "seed_oss"))  # whose own code reads no factors


def test_a_window_that_the_engine_does_not_know(tmp_path, converter):
    saved(tmp_path, "mistral", sliding_window=12)
    found = serve_check(tmp_path, converter=converter, tokens=32, quantized=())
    assert not found.supported
    assert "from token 13 of 32" in found.reason
    assert "valid up to 12 tokens, because the engine uses other attention windows" in found.reason
    short = serve_check(tmp_path, converter=converter, tokens=10, new_tokens=2, quantized=())
    assert short.supported
    assert "up to 12 tokens" in short.reason


def test_a_tokenizer_that_the_converter_does_not_read(tmp_path, converter):
    found = serve_check(saved(tmp_path, "gemma2"), converter=converter, tokens=32, quantized=())
    assert not found.supported
    assert "cannot read the tokenizer (FileNotFoundError: File not found: " in found.reason
    assert found.difference < 1e-3
    assert found.matching_tokens == (24, 24)


def test_a_folder_without_a_tokenizer(tmp_path, converter):
    serving.small("llama").save_pretrained(tmp_path)
    found = serve_check(tmp_path, converter=converter, tokens=16, new_tokens=2, quantized=())
    assert not found.supported
    assert found.reason.startswith("the folder has no tokenizer (converted by llama.cpp's converter; logits differ by ")


def test_a_tokenizer_that_splits_text_otherwise(tmp_path, converter):
    said = saved(tmp_path, "llama") / "tokenizer.json"
    state = json.loads(said.read_text())
    said.write_text(json.dumps(state | {"normalizer": {"type": "Lowercase"}}))
    found = serve_check(tmp_path, converter=converter, tokens=16, new_tokens=2, quantized=())
    assert not found.supported
    assert "BPE pre-tokenizer was not recognized" in found.reason


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_vocabulary_that_lost_tokens_splits_text_as_before(tmp_path, converter, split):
    tokenizer = byte_level(split=split)
    batches = [{"input_ids": torch.tensor([tokenizer(text)["input_ids"]])} for text in LINES[:2]]
    model = serving.small("llama", vocab_size=400, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    plan = bh.plan(model, batches=batches, amount=bh.Amount(tokens=0.25, round_to=1), tokenizer=tokenizer)
    bh.apply(model, plan)
    bh.save(model, tmp_path / "out", plan.trim_tokenizer(tokenizer))
    found = serve_check(str(tmp_path / "out"), converter=converter, tokens=32, new_tokens=8, quantized=())
    assert found.supported, found
    assert f"text split as in {split}" in found.reason


def test_a_family_that_the_converter_does_not_know(tmp_path, converter):
    found = serve_check(saved(tmp_path, "helium", head_dim=16), converter=converter, tokens=16, new_tokens=2, quantized=())
    assert found.reason == "conversion failed: RuntimeError: Model HeliumForCausalLM is not supported"
    assert (found.supported, found.difference, found.matching_tokens) == (False, None, None)


def test_a_file_that_the_engine_does_not_load(tmp_path):
    (tmp_path / "wrong.gguf").write_bytes(b"GGUF" + bytes(60))
    with LlamaCpp() as engine, pytest.raises(WorkerError, match="the file cannot be loaded; .*"):
        engine.load(tmp_path / "wrong.gguf")


def test_a_process_that_ends_is_an_error_of_ours():
    with Worker("run_llama_cpp") as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(WorkerError, match="the process ended with status -9: no output"):
            worker.ask(do="quantize")


class TestWhatIsMissing:
    @pytest.fixture(autouse=True)
    def _no_package(self, monkeypatch):
        monkeypatch.setattr(converters, "find_spec", lambda name: None)
        monkeypatch.setattr(engines, "find_spec", lambda name: None)

    def test_it_says_what_to_install(self):
        with pytest.raises(Missing, match=r"the converter|converter is not installed. Run: pip install 'billhook\[serve\]'"):
            converters.Converter()
        with pytest.raises(Missing, match=r"llama.cpp is not installed. Run: pip install 'billhook\[serve\]'"):
            LlamaCpp()

    def test_the_command_says_it_without_a_traceback(self):
        with pytest.raises(SystemExit) as stopped:
            main(["serve-check", "tiny"])
        assert str(stopped.value.code).startswith(
            "billhook serve-check: llama.cpp's converter is not installed. Run: pip install "
        )


def test_a_converter_that_is_given(tmp_path):
    path = converters.find_converter()
    assert converters.find_converter(path.parent) == path == converters.find_converter(path)
    (tmp_path / path.name).write_text("")  # alone, without the modules that it imports
    for wrong in (tmp_path, tmp_path / path.name, tmp_path / "none.py"):
        with pytest.raises(ValueError, match="converter=.* must be llama.cpp's convert_hf_to_gguf.py .next to its folder"):
            converters.find_converter(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"folder": "nowhere"}, "folder='nowhere' must be a local folder"),
        ({"engine": "vllm"}, "engine='vllm' must be "),
        ({"tokens": 1}, "tokens=1 must be a whole number of at least 2"),
        ({"new_tokens": 0}, "new_tokens=0 must be a whole number of at least 1"),
        ({"threads": 0}, "threads=0 must be a whole number of at least 1"),
        ({"quantized": ["Q2_K"]}, "quantized=.* must be "),
        ({"new_tokens": 511}, "new_tokens=511 leaves fewer than 2 tokens of the maximum length of LlamaForCausalLM"),
        ({"converter": "nowhere"}, "converter='nowhere' must be llama.cpp's"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_wrong_arguments(wrong, message, converter):
    with pytest.raises(ValueError, match=message):
        serve_check(**{"folder": "tiny", "converter": converter} | wrong)
