import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

import billhook
from billhook.atomic_folder import RECORD, check_target
from billhook.checkpoints import save as checkpoint
from billhook.checkpoints.save import load, save
from billhook.checkpoints.verify import make_probe

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 64}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    "CausalLM llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)),
    "CausalLM qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    ),
    "Seq2SeqLM t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "MaskedLM bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)),
    "SequenceClassification bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**TEXT, num_labels=3)
    ),
    "ImageClassification vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)
    ),
}
ROUNDING = 1e-7  # by where in memory the same weights lie
LOAD = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = getattr(transformers, f"AutoModelFor{folder.name.split()[0]}").from_pretrained(folder)
    expected = load_file(Path(sys.argv[2]) / folder.name)
    logits = expected.pop("logits")
    with torch.no_grad():
        assert (model(**expected).logits - logits).abs().max() <= 1e-7, folder
assert not [name for name in sys.modules if name.startswith("billhook")]
"""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def llama(**fields) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | fields))


def logits(model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**make_probe(model)).logits


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.slow
def test_plain_transformers_loads_what_was_saved(tmp_path):
    (tmp_path / "inputs").mkdir()
    for name, build in BUILD.items():
        model = build()
        saved = save(model, tmp_path / "models" / name, record={"events": [1]})
        assert saved.difference <= ROUNDING
        probe = {key: value.clone() for key, value in make_probe(model).items() if key != "use_cache"}
        save_file(probe | {"logits": logits(model)}, tmp_path / "inputs" / name)
        record = json.loads((tmp_path / "models" / name / RECORD).read_text())
        assert record["events"] == [1]
        assert record["saved"]["way"] == "plain"
        assert set(record["files"]) == set(os.listdir(tmp_path / "models" / name))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "models"), str(tmp_path / "inputs")]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["CausalLM qwen3", "Seq2SeqLM t5"])
def test_the_model_is_left_as_it_was(name, dtype, tmp_path):
    model = BUILD[name]().to(dtype)
    model.train()
    list(model.children())[0].eval()
    weights = list(model.parameters())
    weights[0].requires_grad_(False)
    weights[1].grad = torch.ones_like(weights[1])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.config.use_cache = False

    def state():
        modes = [module.training for module in model.modules()]
        tensors = [(id(p), p.requires_grad, p.dtype, p._version) for p in model.parameters()]
        hooks = [len(module._forward_hooks) for module in model.modules()]
        config, generation = dict(vars(model.config)), model.generation_config.to_dict()
        return modes, tensors, hooks, config, generation, torch.get_rng_state().tolist(), torch.get_default_dtype()

    before, gradient = state(), weights[1].grad
    save(model, tmp_path / "a")
    assert state() == before
    assert weights[1].grad is gradient
    assert weights[0].grad is None
    assert load(tmp_path / "a").dtype == dtype
    assert len(calls) == 1  # the probe


def test_a_model_inside_modules_and_with_a_tokenizer(tmp_path):
    model = billhook.TransformerModule("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(billhook.assets.model_path("tiny"))
    save(model, tmp_path / "a", tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again("to be or not")["input_ids"] == tokenizer("to be or not")["input_ids"]


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "BartForSequenceClassification", "LlamaModel"])
def test_models_that_do_not_take_any_batch(kind, tmp_path):
    if kind.startswith("Bart"):
        layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in [("layers", 1), ("ffn_dim", 8)]}
        config = transformers.BartConfig(
            vocab_size=50, d_model=8, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, **layers
        )
    else:
        config = transformers.LlamaConfig(**TEXT)
    assert save(getattr(transformers, kind)(config), tmp_path / "a").difference <= ROUNDING


def test_the_probe_is_the_callers_own_where_given(tmp_path):
    probe = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
    seen = []
    model = llama()
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    assert save(model, tmp_path / "a", probe=probe).difference <= ROUNDING
    assert seen == [[[1, 2, 3]]]


def test_a_model_that_reads_something_else_needs_a_probe():
    model = transformers.PatchTSTModel(
        transformers.PatchTSTConfig(d_model=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(
        ValueError, match="probe=None: cannot guess the inputs past_values of PatchTSTModel. Pass a batch of inputs as probe"
    ):
        make_probe(model)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_the_umasks(mask, tmp_path):
    old = os.umask(mask)
    try:
        save(llama(), tmp_path / "a")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o666 & ~mask}


def test_a_folder_that_stands_keeps_its_permissions(tmp_path):
    (tmp_path / "a").mkdir(mode=0o700)
    for _ in range(2):
        save(llama(), tmp_path / "a")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_stays_and_its_end_is_replaced(dangling, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "best"
    link.symlink_to(tmp_path / "runs" / "1")
    if not dangling:
        save(llama(), tmp_path / "runs" / "1")
    model = llama(vocab_size=51)
    save(model, link)
    assert link.is_symlink()
    assert load(tmp_path / "runs" / "1").config.vocab_size == 51
    assert os.listdir(tmp_path / "links") == ["best"]
    assert os.listdir(tmp_path / "runs") == ["1"]


def test_names_that_are_patterns_and_neighbours(tmp_path):
    neighbour = tmp_path / ".a[1].draft-mine"
    neighbour.mkdir()
    debris = tmp_path / ".a[1].draft-0123abcd"
    debris.mkdir()
    save(llama(), tmp_path / "a[1]")
    assert sorted(os.listdir(tmp_path)) == [neighbour.name, "a[1]"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"a": torch.ones(1)}, "Tensor is not JSON serializable"),
        ({"a": {1, 2}}, "set is not JSON serializable"),
        ({"a": Path("x")}, "is not JSON serializable"),
        ({("a", "b"): 1}, "keys must be str"),
    ],
)
def test_a_record_that_json_cannot_hold_is_refused_first(what, message, tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_: pytest.fail("written"))
    with pytest.raises(ValueError, match=f"record must be plain data .JSON.: .*{message}"):
        save(llama(), tmp_path / "deep" / "a", record=what)
    assert os.listdir(tmp_path) == []


def test_a_measured_infinity_does_not_cost_the_checkpoint(tmp_path):
    save(llama(), tmp_path / "a", record={"events": ({"perplexity": float("inf"), "loss": float("nan")}, -float("inf"))})
    text = (tmp_path / "a" / RECORD).read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert record["events"] == [{"perplexity": "Infinity", "loss": "NaN"}, "-Infinity"]


@pytest.mark.parametrize(("worth", "message"), [(1.0, "the model was not saved, because the logits"), (float("nan"), "diverged")])
def test_other_logits_leave_everything(worth, message, tmp_path):
    save(llama(), tmp_path / "a")
    before, model = listing(tmp_path), llama(vocab_size=51)
    model.lm_head.register_forward_hook(lambda *args: args[-1] + torch.arange(51) * worth)
    with pytest.raises(RuntimeError, match=message):
        save(model, tmp_path / "a")
    assert listing(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("folders", ["aa", "ab"])
def test_threads_save_one_after_the_other(folders, tmp_path):
    models = [llama().half() for _ in folders]
    with ThreadPoolExecutor() as pool:
        saves = [pool.submit(save, model, tmp_path / name) for _ in range(4) for model, name in zip(models, folders, strict=True)]
        assert {done.result().way for done in saves} == {"plain"}
    assert torch.get_default_dtype() == torch.float32
    assert load(tmp_path / "a").dtype == torch.float16


def _raise(error: Exception):
    raise error


def test_what_billhook_did_not_write_is_refused(tmp_path):
    save(llama(), tmp_path / "a")
    (tmp_path / "a" / "notes.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "weights").write_text("mine")
    before = listing(tmp_path)
    for name, message in [
        ("a", "not a billhook checkpoint .notes.md"),
        ("file", "not a billhook checkpoint .a file"),
        ("b", f"not a billhook checkpoint .no {RECORD}"),
        ("file/a/b", "'.*/file' is a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            save(llama(), tmp_path / name)
    assert listing(tmp_path) == before
    with pytest.raises(ValueError, match="mount point"):
        check_target("/proc")
    (tmp_path / "b" / RECORD).write_text("[")
    with pytest.raises(ValueError, match="is malformed"):
        check_target(tmp_path / "b")


def test_infinite_logits_on_both_sides_are_equal(tmp_path):
    class Masked(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[..., 0] = -torch.inf
            return output

    assert save(Masked(transformers.LlamaConfig(**TEXT)), tmp_path / "a").difference <= ROUNDING


def test_load_refuses_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is not a folder with a Hugging Face checkpoint"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)
    for classes, message in [(["Sequential"], "names the class"), ([], "names the class None")]:
        transformers.LlamaConfig(**TEXT, architectures=classes).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint_or_none(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    run = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    kills = json.loads(run.stdout.splitlines()[-1])
    assert kills["nothing"] >= 10
    assert kills["older"] >= 16


def _kill_everywhere(folder: Path) -> None:
    """Kills a save before each of its calls that touch the disk, over each kind of target; runs in a process of its own."""
    torch.set_num_threads(1)
    old, new, after = (llama(vocab_size=size, num_hidden_layers=1) for size in (50, 51, 52))
    save(old, folder / "pristine")
    kills = {}
    for standing in ("nothing", "empty", "older"):
        for count in range(1, 100):
            target = folder / f"{standing}{count}" / "a"
            target.parent.mkdir()
            if standing == "empty":
                target.mkdir()
            if standing == "older":
                shutil.copytree(folder / "pristine", target)
            if (process := os.fork()) == 0:
                _die_at(count)
                save(new, target)
                os._exit(0)
            status = os.waitpid(process, 0)[1]
            assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
            if status == 0:
                break
            _check_whole(target, (old, new))
            save(after, target)
            assert torch.equal(logits(load(target)), logits(after)), (standing, count)
            save(after, target)  # clears away an older checkpoint that was renamed
            assert os.listdir(target.parent) == ["a"], (standing, count)
        kills[standing] = count - 1
    print(json.dumps(kills))


def _die_at(count: int) -> None:
    calls = 0

    def deadly(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                if name == "safe_save_file":  # half of the weights
                    real(*args, **kwargs)
                    os.truncate(args[1], 2000)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, call)

    deadly(PreTrainedModel, "save_pretrained")
    deadly(transformers.modeling_utils, "safe_save_file")
    deadly(checkpoint, "verify")
    for owner, name in [(os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "rename"), (Path, "write_text")]:
        deadly(owner, name)


def _check_whole(target: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    if not target.exists() or not os.listdir(target):
        old = list(target.parent.glob(f".{target.name}.old-*"))
        assert not target.parent.name.startswith("older") or torch.equal(logits(load(old[0])), logits(models[0]))
        return
    found = logits(load(target))
    assert any(found.shape == logits(model).shape and torch.equal(found, logits(model)) for model in models)
    assert (target / RECORD).is_file()


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _kill_everywhere(Path(sys.argv[1]))
