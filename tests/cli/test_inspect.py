"""`billhook inspect`: what it prints, and whether that is true."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import transformers
from small_configs import architectures, small_config

import billhook as bh
from billhook.cli.inspect import CHOICES
from billhook.cli.main import main
from billhook.display import COLUMNS


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config.json and no weights."""
    options = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "dtype": "bfloat16"}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
    transformers.LlamaForCausalLM.config_class(**options, **heads, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path / "config.json"


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["inspect", *map(str, arguments)])
    return capsys.readouterr().out


TABLE = """\
LlamaForCausalLM: 59,184 parameters in 30 tensors

unit                        groups x units  parameters  bytes  of each unit, in
-----------------------------------------------------------------------------------------------------------------------
KV head                              3 x 2       3,072  6,144  model.layers.*.self_attn: q_proj, k_proj, v_proj, o_proj
query head per KV head               3 x 3       1,536  3,072  model.layers.*.self_attn: q_proj, o_proj
channel                             3 x 80         144    288  model.layers.*.mlp: gate_proj, up_proj, down_proj
hidden dimension                        48       1,233  2,466  embed_tokens, q_proj, k_proj, v_proj and 8 more
value dimension, all heads           3 x 8         384    768  model.layers.*.self_attn: v_proj, o_proj

attention     q = q_proj; k = k_proj; v = v_proj; o = o_proj (3x)
MLP           gate = gate_proj; up = up_proj; down = down_proj (3x)
not pruned    rotary frequency (4, model: q_proj, k_proj and 1 more): a rotary frequency serves all heads of all layers, and the
              code derives it from the head dimension
not pruned    token (61, embed_tokens, lm_head): tokens belong to the tokenizer, too: remove them with tokens=

conversion    2 KV heads to 1
"""


def test_the_table(capsys, config) -> None:
    text = printed(capsys, config)
    assert text == TABLE
    assert printed(capsys, config.parent) == text  # the folder, without weights
    assert max(map(len, text.splitlines())) <= COLUMNS


def test_counts_are_those_of_the_parameters(capsys, config) -> None:
    plain = json.loads(printed(capsys, config, "--json"))
    shapes = {name: tuple(one["shape"]) for name, one in plain["parameters"].items()}
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(config.parent))
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(map(math.prod, shapes.values())) == 59184
    residual = next(group for group in plain["groups"] if group["kind"] == "residual")
    squares = sum(shape == (48, 48) for shape in shapes.values())  # q and o, which have 48 in one dimension for another reason
    assert squares == 6
    assert residual["parameters_per_unit"] == sum(math.prod(shape) // 48 for shape in shapes.values() if 48 in shape)
    assert residual["bytes_per_unit"] == 2 * residual["parameters_per_unit"]  # bfloat16
    assert plain["conversion"] == {"num_key_value_heads": 2, "legal": [1], "says": "2 KV heads to 1"}


def test_all_kinds_are_in_one_choice() -> None:
    kinds = [kind for choice in CHOICES.values() for kind in choice]
    assert sorted(kinds) == sorted(set(kinds))
    assert {group.kind for group in bh.trace("tiny").groups} <= set(kinds)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--group", "wrong"], "billhook inspect: group='wrong' must be one of heads, channels, residual"),
        (["/nowhere/at/all"], "is not a folder with a Hugging Face checkpoint"),
        (["tests"], "the folder 'tests' has no config.json"),
        (["pyproject.toml"], "'pyproject.toml' is not a config of a family that transformers knows"),
    ],
)
def test_refusals(arguments, said) -> None:
    with pytest.raises(SystemExit, match=said):
        main(["inspect", *arguments])


@pytest.mark.daily("mpt-*")
@pytest.mark.parametrize(
    ("family", "said"),
    [("t5", "6 KV heads to 1 or 2 or 3"), ("mpt", "no: MptForCausalLM does not support fewer KV heads")],
)
def test_long_names_go_on_below(capsys, tmp_path, family, said) -> None:
    config_class = next(architectures(family))[2]
    small_config(config_class).save_pretrained(tmp_path)
    text = printed(capsys, tmp_path)
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert f"conversion    {said}" in text


def test_who_reads_may_have_seen_enough(config, monkeypatch) -> None:
    """What is left in the buffer goes nowhere without a word, as at the end of a process behind `| head`."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", str(config), "--json"])
    assert stopped.value.code == 1
