"""`billhook bench`: what it prints, writes, draws and refuses; how fast anything is, no test says."""

import json

import pytest
import torch
import transformers

import billhook as bh
from billhook.cli import bench as command
from billhook.cli.bench import timing_table
from billhook.cli.main import main
from billhook.report.speed import Timing
from kit.families import EXTRA, SMALL
from kit.printed import assert_printed
from kit.shaped import uneven_llama

QUICK = ["--batch_sizes", "1", "2", "--contexts", "8", "--new_tokens", "2", "--rounds", "2", "--device", "cpu"]


@pytest.fixture
def folders(tmp_path):
    """Configs and no weights: of 8 KV heads, and of 1."""
    for name, heads in (("dense", 8), ("mqa", 1)):
        sizes = SMALL | {"num_key_value_heads": heads, "num_hidden_layers": 1}
        transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / name)
    return [str(tmp_path / "dense"), str(tmp_path / "mqa")]


def bench(*arguments):
    main(["bench", *map(str, arguments)])


def row(model, phase, batch, seconds, ratios, ideal, peak=2_500_000):
    return Timing(
        model, phase, batch, 2048, seconds, ratios, 10_000_000, 4_000_000 // (1 + model), 2052, 3_000_000_000, ideal, peak
    )


ROWS = [
    row(0, "prefill", 16, (0.2, 0.2, 0.3), (1.0, 1.0, 1.0), 1.0),
    row(1, "prefill", 16, (0.1, 0.2, 0.2), (2.0, 1.0, 1.5), 1.2),
    row(0, "decode", 16, (0.02, 0.03, 0.04), (1.0, 1.0, 1.0), 1.0),
    row(1, "decode", 16, (0.01, 0.01, 0.02), (2.0, 3.0, 2.0), 2.5, None),
]
TABLE = """\
prefill  batch  context      ms      (quartiles)   tokens/s  peak MB  cache MB  GFLOP/s  speed-up  (quartiles)  ideal  reached
------------------------------------------------------------------------------------------------------------------------------
dense       16    2,048  200.00  (200.00-250.00)  163,840.0      2.5       4.0     15.0
mqa         16    2,048  200.00  (150.00-200.00)  163,840.0      2.5       2.0     15.0      1.50  (1.25-1.75)   1.20     125%

decode  batch  context  ms/token    (quartiles)  tokens/s  peak MB  cache MB  GB/s  speed-up  (quartiles)  ideal  reached
-------------------------------------------------------------------------------------------------------------------------
dense      16    2,048     30.00  (25.00-35.00)     533.3      2.5       4.0   0.5
mqa        16    2,048     10.00  (10.00-15.00)   1,600.0        -       2.0   1.2      2.00  (2.00-2.50)   2.50      80%"""


def test_the_table():
    assert "\n".join(line.rstrip() for line in timing_table(ROWS, ["dense", "mqa"]).splitlines()) == TABLE
    assert "speed-up" not in timing_table(ROWS[::2], ["dense"])


def test_it_measures_configs_without_weights_and_says_by_how_much_the_cache_shrinks(folders, tmp_path, capsys):
    threads = torch.get_num_threads()
    picture, file = tmp_path / "o.png", tmp_path / "o.json"
    bench(*folders, "--random", *QUICK, "--threads", 1, "--plot", picture, "--json", file)
    printed = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert "1 thread, float32, cache=static" in printed
    assert "KV cache of dense: 256 bytes per token and sequence (256 expected), 8 KV heads\n" in printed
    assert "KV cache of mqa: 32 bytes per token and sequence (32 expected), 1 KV head: 8.00x smaller" in printed
    assert "8.00x fewer heads" in printed
    assert_printed("bench", printed)
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(file.read_text())
    assert [(one["name"], one["kv_heads"], one["dtype"]) for one in found["models"]] == [
        (folders[0], 8, "float32"), (folders[1], 1, "float32"),
    ]  # fmt: skip
    assert len(found["rows"]) == 2 * 2 * 2
    assert found["rows"][0]["cache_bytes"] == 8 * found["rows"][1]["cache_bytes"]
    assert (found["settings"]["rounds"], found["settings"]["random"], found["settings"]["cache"]) == (2, True, "static")
    assert "1 thread" in found["machine"]
    assert set(found["versions"]) == {"python", "billhook", "torch", "transformers"}


def test_it_measures_a_checkpoint_in_the_dtype_asked_for(capsys):
    bench("tiny", *QUICK, "--phases", "[decode]", "--dtype", "bfloat16")
    printed = capsys.readouterr().out
    assert "bfloat16" in printed
    assert "prefill" not in printed
    assert "speed-up" not in printed


def test_what_is_assumed_or_missing_is_said(tmp_path, capsys, monkeypatch):
    heads = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
    transformers.BertConfig(**heads, architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    sizes = SMALL | EXTRA["qwen3_moe"] | {"num_hidden_layers": 1}
    transformers.Qwen3MoeConfig(**sizes, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path / "moe")
    bench(tmp_path / "bert", tmp_path / "moe", "--random", *QUICK)
    printed = capsys.readouterr().out
    assert "prefill only, without next-token prediction: bert" in printed
    assert "decode " not in printed
    assert "ideal: all experts of moe count as read in each step" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "int8"], "dtype='int8' must be one of auto, float32"),
        (["--threads", "0"], "threads=0 must be a whole number of at least 1"),
        (["--plot", "o.svg"], "plot='o.svg' must be a .png file in an existing folder"),
        (["--json", "nowhere/o.json"], "json='nowhere/o.json'"),
        (["--rounds", "0"], "rounds=0 must be a whole number of at least 1"),
        (["--contexts", "[100]"], "supports 64. Use fewer"),
        (["--device", "cuda:99"], "device"),
    ],
)
def test_refusals_come_before_weights_are_read(arguments, said, folders, monkeypatch):
    monkeypatch.setattr(command, "load", None)
    with pytest.raises(SystemExit, match="^billhook bench: ") as refusal:
        bench(*folders, *arguments)
    assert said in str(refusal.value)


def test_random_weights_have_no_shape_of_their_own(tmp_path):
    bh.save(uneven_llama(), tmp_path / "uneven")
    with pytest.raises(SystemExit, match=r"random=True does not support the billhook checkpoint '.*uneven'\. Remove --random"):
        bench(tmp_path / "uneven", "--random", *QUICK)
    bench(tmp_path / "uneven", *QUICK)
