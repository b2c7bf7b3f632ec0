"""What is said of engines follows from the config and from what was read in their code."""

import json
import re

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

import billhook as bh
from billhook.checkpoints.equivalent import EQUIVALENT
from billhook.checkpoints.save import save
from billhook.cli.main import main
from billhook.model.meta import read_config
from billhook.pruning.planning import prune_units
from billhook.serving.engines import GPUS, Verdict, can_split, engines, grouped, multiple_of, verdicts
from kit.families import build, llama
from kit.serving import longrope
from kit.shaped import uneven_llama

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}


def reads_head_dim(kind: str, engine: str) -> bool:
    return kind not in engines()["computes_head_dim"][engine]


def said(kind: str, config: PretrainedConfig, **more: object) -> dict[str, Verdict]:
    return {one.engine: one for one in verdicts(kind, config, **more)}


def served(model, folder) -> dict[str, Verdict]:
    """The verdicts on a model as it is saved."""
    save(model, folder)
    config = read_config(str(folder))
    return said(config.architectures[0], config, entry=vars(config).get("billhook"))


def test_a_model_of_round_sizes_is_served_everywhere():
    found = said("LlamaForCausalLM", transformers.LlamaConfig(**WIDE))
    assert {engine: one.supported for engine, one in found.items()} == dict.fromkeys(
        ["transformers", "llama.cpp", "vLLM", "SGLang"], True
    )
    assert found["llama.cpp"].notes == ("K-quants apply to all rows (multiples of 256)",)
    assert found["vLLM"].notes == found["SGLang"].notes == ("tensor parallelism over 2, 4 or 8 GPUs",)


@pytest.mark.parametrize("engine", ["llama.cpp", "vLLM", "SGLang"])
@pytest.mark.parametrize("kind", engines()["files"])
def test_each_yes_cites_class_file_and_release(kind, engine):
    config = getattr(transformers, kind).config_class()
    one = said(kind, config)[engine]
    assert one.supported
    assert re.fullmatch(r"\w+, [\w/.-]+\.(py|cpp) \(.*\d+\.\d+\.\d+\)", one.reason)


@pytest.mark.parametrize("kind", engines()["files"])
def test_heads_of_another_width_are_served_where_head_dim_is_read(kind):
    config = getattr(transformers, kind).config_class()
    config.hidden_size, config.num_attention_heads, config.head_dim = 512, 6, 64
    for engine in ("llama.cpp", "vLLM", "SGLang"):
        one = said(kind, config)[engine]
        as_deci = (kind, engine) == ("Phi3ForCausalLM", "llama.cpp")  # billhook writes it as deci, which takes widths
        assert one.supported == (reads_head_dim(kind, engine) or as_deci)
        assert ("writes its architecture deci" in one.reason) == as_deci
        assert one.supported or "the head dimension is 64, but " in one.reason


def test_the_family_that_stands_for_one_that_engines_misread_is_read_by_all():
    names = ("llama.cpp", "vLLM", "SGLang")
    assert not all(reads_head_dim("Qwen2ForCausalLM", engine) for engine in names)
    assert all(reads_head_dim(f"{family.name}ForCausalLM", engine) for family in EQUIVALENT["Qwen2"] for engine in names)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "smollm3"])
@pytest.mark.parametrize("what", ["kv heads", "heads", "channels", "residual", "blocks"])
def test_what_billhook_makes_of_these_families_is_served(family, what, tmp_path):
    model = build(family, hidden_size=48, intermediate_size=80)  # which Gemma's config wants the number of heads to divide
    if what == "kv heads":
        bh.convert_kv_heads(model, 1)
    elif what == "heads":
        prune_units(model, {0: [0, 1], 1: [2, 3]})
    elif what == "blocks":
        bh.pruning.prune_units(model, {"model.layers": [1]}, kind="block")
    else:
        bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), **{what: 0.34}))
    assert all(one.supported for one in served(model, tmp_path).values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    ("family", "refusing"),
    [("granite", {"llama.cpp"}), ("cohere", {"llama.cpp", "SGLang"}), ("starcoder2", {"llama.cpp", "SGLang"})],
)
def test_families_that_nothing_stands_for_are_refused_by_name_where_heads_go(family, refusing, tmp_path):
    model = build(family, num_attention_heads=4, num_key_value_heads=4)
    prune_units(model, {0: [1], 1: [2]})
    assert {engine for engine, one in served(model, tmp_path).items() if not one.supported} == refusing


def test_layers_that_differ_run_in_llama_cpp_alone(tmp_path):
    found = served(uneven_llama(), tmp_path)
    assert {engine for engine, one in found.items() if one.supported} == {"llama.cpp"}
    assert all(one.reason.startswith("layers differ in size") for one in found.values())
    assert "architecture deci, src/models/deci.cpp" in found["llama.cpp"].reason


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"model_type": "granite"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_layers_that_differ_and_that_deci_does_not_compute(change):
    entry = {"shape": {"tensors": {"model.layers.0.mlp.up_proj.weight": [40, 32]}, "attributes": {}}}
    config = transformers.LlamaConfig(num_hidden_layers=2)
    assert said("LlamaForCausalLM", config, entry=entry)["llama.cpp"].supported
    for name, value in change.items():
        setattr(config, name, value)
    assert said("LlamaForCausalLM", config, entry=entry)["llama.cpp"].supported is False


@pytest.mark.parametrize(
    ("kind", "changes", "refusing"),
    [
        ("LlamaForCausalLM", {}, set()),
        ("Qwen2ForCausalLM", {}, set()),
        ("Qwen3ForCausalLM", {}, {"llama.cpp"}),
        ("MixtralForCausalLM", {}, {"SGLang"}),
        ("LlamaForCausalLM", {"original_max_position_embeddings": 64}, {"vLLM", "SGLang"}),  # which scale attention then
        ("LlamaForCausalLM", {"attention_factor": 2.0}, {"llama.cpp"}),
    ],
)
def test_factors_of_rotary_frequencies(kind, changes, refusing):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    config = getattr(transformers, kind).config_class(**sizes, max_position_embeddings=128, rope_parameters=longrope() | changes)
    assert {engine for engine, one in said(kind, config).items() if not one.supported} == refusing


def test_heads_that_are_handed_out(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=64, **sizes)).eval()
    bh.convert_kv_heads(model, 2)
    found = served(model, tmp_path)
    assert not any(one.supported for one in found.values())
    assert "store fewer KV heads than their class computes with" in found["transformers"].reason
    assert "load it with billhook.load" in found["transformers"].reason


def test_a_width_that_is_alike_in_all_layers_and_no_field_says():
    entry = {"shape": {"tensors": {f"model.layers.{i}.mlp.up_proj.weight": [40, 32] for i in range(2)}, "attributes": {}}}
    found = said("LlamaForCausalLM", transformers.LlamaConfig(num_hidden_layers=2), entry=entry)
    assert found["vLLM"].reason.startswith("no config field expresses its sizes")


@pytest.mark.parametrize("exact", [False, True])
def test_shared_out_means_that_every_gpu_holds_as_many_heads(exact):
    for kv_heads in range(1, 17):
        for gpus in GPUS:
            copies = [gpu * kv_heads // gpus for gpu in range(gpus)]  # the head of each, where there are fewer
            whole = kv_heads % gpus == 0
            fewer = kv_heads < gpus and len({copies.count(head) for head in range(kv_heads)}) == 1
            assert can_split(kv_heads, gpus, exact) == (whole or (fewer and not exact))


def test_what_tensor_parallelism_cannot_share_is_named():
    config = transformers.LlamaConfig(**WIDE | {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 3})
    for engine in ("vLLM", "SGLang"):
        note = said("LlamaForCausalLM", config)[engine].notes[0]
        assert note == "one GPU, not 2 or 4 (3 KV heads), not 8 (12 query heads and 3 KV heads)"
    config = transformers.LlamaConfig(**WIDE | {"num_key_value_heads": 1, "intermediate_size": 1022})
    note = said("LlamaForCausalLM", config)["vLLM"].notes[0]
    assert note == "tensor parallelism over 2 GPUs, not 4 or 8 (an MLP width of 1,022)"


def test_sglang_copies_no_kv_heads_in_code_for_all_models():
    config = transformers.SeedOssConfig(**WIDE | {"num_key_value_heads": 1, "head_dim": 64})
    found = said("SeedOssForCausalLM", config)
    assert found["vLLM"].notes == ("tensor parallelism over 2, 4 or 8 GPUs",)
    assert found["SGLang"].notes == ("one GPU, not 2, 4 or 8 (1 KV head)",)


def test_rows_that_k_quants_do_not_divide_are_named():
    config = transformers.LlamaConfig(**WIDE | {"hidden_size": 576, "num_attention_heads": 9, "intermediate_size": 1228})
    note = said("LlamaForCausalLM", config)["llama.cpp"].notes[0]
    assert "576 (hidden size, a multiple of 64)" in note
    assert "1,228 (MLP width, F16)" in note


@pytest.mark.parametrize(("size", "block"), [(1024, 256), (384, 128), (576, 64), (1248, 32), (1228, 1)])
def test_blocks(size, block):
    assert multiple_of(size) == block


def test_windows_that_llama_cpp_does_not_see():
    config = transformers.MistralConfig(**WIDE, sliding_window=100)
    assert "correct up to 100 tokens, because it has no sliding window" in said("MistralForCausalLM", config)["llama.cpp"].notes
    for window in ({}, {"use_sliding_window": True, "max_window_layers": 32}):
        full = transformers.Qwen2Config(**WIDE, num_hidden_layers=2, **window)
        assert len(said("Qwen2ForCausalLM", full)["llama.cpp"].notes) == 1


def test_zeros_are_no_faster():
    found = said("LlamaForCausalLM", transformers.LlamaConfig(**WIDE), zeros=True)
    assert all("sparse weights run at dense speed" in found[engine].notes for engine in ("llama.cpp", "vLLM", "SGLang"))


def test_biases_that_llama_cpp_has_not():
    config = transformers.SeedOssConfig(**WIDE, attention_out_bias=True)
    assert not said("SeedOssForCausalLM", config)["llama.cpp"].supported


def test_a_class_that_was_not_looked_up_is_unknown():
    found = verdicts("BertForMaskedLM", transformers.BertConfig())
    assert [one.supported for one in found] == [True, None, None, None]
    assert grouped(found)[1] == ("llama.cpp, vLLM, SGLang", "unknown: BertForMaskedLM was not reviewed")


def test_a_config_of_two_texts():
    config = transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(),
        audio_encoder=transformers.EncodecConfig(),
        decoder=transformers.MusicgenDecoderConfig(),
    )
    assert [one.supported for one in verdicts("MusicgenForConditionalGeneration", config)] == [True, None, None, None]


def test_inspect_says_who_serves_the_model_and_what_is_left_of_it(tmp_path, capsys):
    build("granite", num_attention_heads=4, num_key_value_heads=4).config.save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    text = " ".join(capsys.readouterr().out.split())
    assert "standard checkpoint (hidden_size, head_dim); llama.cpp will not run it" in text
    assert "engines transformers yes: from_pretrained loads it" in text
    main(["inspect", str(tmp_path), "--json"])
    engines = {one["engine"]: one["supported"] for one in json.loads(capsys.readouterr().out)["serving"]}
    assert engines == dict.fromkeys(["transformers", "llama.cpp", "vLLM", "SGLang"], True)


def test_inspect_names_kv_heads_that_gpus_cannot_share(tmp_path, capsys):
    llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=6).config.save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    text = " ".join(capsys.readouterr().out.split())
    assert "6 KV heads to 1 or 2 or 3; vLLM and SGLang cannot split 3 over 2 or 4 or 8 GPUs" in text


@pytest.mark.parametrize(("zeros", "fast"), [(0, False), (12, True)])
def test_the_model_card_has_them(tmp_path, zeros, fast):
    event = {"step": 1, "what": "pruned", "before": {}, "after": {"zeros": zeros}}
    bh.save(llama(), tmp_path / "a", record={"events": [event]})
    text = (tmp_path / "a" / "README.md").read_text()
    assert "| vLLM | yes: LlamaForCausalLM, model_executor/models/llama.py" in text
    assert ("sparse weights run at dense speed" in text) == fast


def test_no_plain_llama_is_built_of_a_config_for_each_layer():
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**small, per_layer_config={1: {"intermediate_size": 16}})
    with torch.device("meta"):
        with pytest.raises(RuntimeError, match="intermediate_size"):
            transformers.LlamaForCausalLM(config)
        config.allow_global_per_layer_attribute_access = True
        model = transformers.LlamaForCausalLM(config)
    assert [len(layer.mlp.up_proj.weight) for layer in model.model.layers] == [48, 48], "save may write per_layer_config now"
