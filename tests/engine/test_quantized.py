"""Experts and blocks leave quantized files in their format, byte for byte."""

import itertools
import json
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

import billhook as bh
from billhook.cli.main import main
from billhook.engine import files as engine_files
from billhook.engine.tensors import TensorFiles
from billhook.pruning.repair import repair_if_requested
from kit import quantized
from kit.quantized import change_config, tensors_of

CASES = [("qwen3_moe", (8, 8)), ("qwen3_moe", (16, 16)), ("qwen3_moe", (128, 128)), ("deepseek_v3", (8, 8)), ("gpt_oss", None)]
READERS = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}


def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 64, (2, 16), generator=generator)} for _ in range(4)]


@torch.no_grad()
def logits(model):
    return torch.cat([model(**batch).logits for batch in batches()])


def read_by_transformers(folder):
    """Loads a folder as transformers does on a CPU: dequantized."""
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    options = {} if fields["quant_method"] == "mxfp4" else {"weight_block_size": fields["weight_block_size"]}
    how = READERS[fields["quant_method"]](dequantize=True, **options)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=how).eval()


def unroute(model, plan):
    """Routes no token to the removed experts of a dense model."""
    for name, numbers in plan.units.items():
        mixture = model.get_submodule(name)
        router = mixture.gate if hasattr(mixture, "gate") else mixture.router
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[numbers] = -torch.inf
            continue

        def forward(hidden, forward=router.forward, numbers=numbers):
            def masked(*inputs):
                return linear(*inputs).index_fill(-1, torch.tensor(numbers), -torch.inf)

            with mock.patch("torch.nn.functional.linear", masked):
                return forward(hidden)

        router.forward = forward


def original_of(name, removed):
    """The name that a tensor of a kept expert had, given the removed experts of each layer; and the rows that it has left."""
    parts = name.split(".")
    if "experts" in parts and parts[parts.index("experts") + 1].isdigit():
        place = parts.index("experts") + 1
        parts[place] = str([number for number in range(8) if number not in removed[parts[2]]][int(parts[place])])
        return ".".join(parts), None
    has_rows = any(part in name for part in (".mlp.experts.", ".mlp.gate.", ".mlp.router."))
    return name, [number for number in range(8) if number not in removed[parts[2]]] if has_rows else None


@pytest.mark.daily("deepseek_v3-*", "gpt_oss-*")
@pytest.mark.parametrize(("family", "block"), CASES)
def test_kept_experts_are_stored_as_they_were(family, block, tmp_path):
    torch.manual_seed(0)
    dense = quantized.write(tmp_path / "in", family, block)
    model = bh.stream(tmp_path / "in", tmp_path / "out")
    assert torch.equal(logits(model), logits(dense))
    plan = bh.plan(model, batches=batches(), experts=0.25)
    bh.apply(model, plan)
    assert bh.save(model, tmp_path / "out").difference == 0

    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    removed, kept = {name.split(".")[2]: numbers for name, numbers in plan.units.items()}, set()
    for name, tensor in after.items():
        original, rows = original_of(name, removed)
        expected = before[original] if rows is None else before[original][rows]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
        kept.add(original)
    lost = [name.split(".experts.") for name in before.keys() - kept]
    assert all(int(rest.split(".")[0]) in removed[start.split(".")[2]] for start, rest in lost)

    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(model), logits(bh.stream(tmp_path / "out")))
    if block in ((8, 8), None):  # transformers reads partial blocks wrongly
        assert torch.equal(logits(model), logits(read_by_transformers(tmp_path / "out")))
    assert not torch.equal(logits(model), logits(dense))
    unroute(dense, plan)
    assert torch.equal(logits(model), logits(dense))


def stack(folder):
    """Stacks the experts of a file, as other files do."""
    tensors = tensors_of(folder)
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer, end in itertools.product(range(2), ("", "_scale_inv")):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{experts}.{number}.{part}_proj.weight{end}"] for number in range(8)])
            for part in ("gate", "up", "down")
        )
        stacked |= {f"{experts}.gate_up_proj{end}": torch.cat((gate, up), 1), f"{experts}.down_proj{end}": down}
    save_file(stacked, folder / "model.safetensors", {"format": "pt"})


def test_stacked_experts_stay_stacked(tmp_path):
    torch.manual_seed(0)
    dense = quantized.write(tmp_path / "in", "qwen3_moe", (8, 8))
    stack(tmp_path / "in")
    model = bh.stream(tmp_path / "in", tmp_path / "out")
    plan = bh.plan(model, batches=batches(), experts=0.25)
    for either in (model, dense):
        bh.apply(either, bh.ModelPlan.from_json(plan.to_json(), either))
    bh.save(model, tmp_path / "out")
    assert torch.equal(logits(model), logits(dense))
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        rows = original_of(name, {name.split(".")[2]: numbers for name, numbers in plan.units.items()})[1]
        expected = before[name] if rows is None else before[name][rows]
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name


def second_block(model):
    """A plan without the second block."""
    scores = torch.ones(len(model.model.layers))
    scores[1] = 0
    return bh.plan(model, bh.importance.BlockInfluence(), scores={"model.layers": scores}, blocks=1)


@pytest.mark.slow
def test_experts_and_blocks_are_removed_one_after_the_other(tmp_path):
    torch.manual_seed(0)
    dense = quantized.write(tmp_path / "in", "qwen3_moe", (8, 8), num_hidden_layers=4)
    fields = json.loads((tmp_path / "in" / "config.json").read_text())["quantization_config"]
    named = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.layers.3.mlp.gate"]
    change_config(tmp_path / "in", quantization_config=fields | {"modules_to_not_convert": named})
    model = bh.stream(tmp_path / "in", tmp_path / "out")
    for removal in (
        lambda model: bh.plan(model, batches=batches(), experts=0.25),
        second_block,
        lambda model: bh.plan(model, batches=batches(), experts=0.34),
    ):
        plan = removal(model).to_json()
        for either in (model, dense):
            bh.apply(either, bh.ModelPlan.from_json(plan, either))
        bh.save(model, tmp_path / "out")
        assert torch.equal(logits(model), logits(dense))
    assert torch.equal(logits(read_by_transformers(tmp_path / "out")), logits(dense))
    left = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert left == ["lm_head", "model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]


@pytest.mark.slow
def test_the_command_writes_the_format_of_the_file(tmp_path, capsys):
    quantized.write(tmp_path / "in", "qwen3_moe", vocab_size=2048)
    options = [
        "--stream",
        "true",
        "--tokenizer",
        "tiny",
        "--data",
        "tiny",
        "--examples",
        "4",
        "--evaluate",
        "2",
        "--length",
        "16",
    ]
    main(["prune-structure", str(tmp_path / "in"), str(tmp_path / "out"), "--experts", "0.25", *options])
    assert "Verified: largest logit difference 0" in capsys.readouterr().out
    sizes = {name: tensor.shape for name, tensor in tensors_of(tmp_path / "out").items() if name.endswith("scale_inv")}
    assert sum(".layers.0.mlp.experts." in name for name in sizes) == 6 * 3


ONLY = r"model: its files are quantized \(fp8\), so only experts and blocks can be removed, without a repair"
REFUSED = {
    "weights": lambda model: bh.prune(model, bh.Magnitude(), sparsity=0.5),
    "KV heads": lambda model: bh.convert_kv_heads(model, 1, "mean"),
    "heads": lambda model: bh.plan(model, bh.importance.WeightNorm(), kv_heads=0.5),
    "hidden dimensions": lambda model: bh.plan(model, bh.importance.WeightNorm(), residual=0.25),
    "channels by name": lambda model: bh.pruning.plan_units(model, {0: [0]}, ["channel"]),
    "tokens": lambda model: bh.plan(model, batches=batches(), tokens=0.25),
}
COMMANDS = {
    "weights": ["prune", "--sparsity", "0.5"],
    "KV heads": ["convert", "--num_key_value_heads", "1"],
    "channels": ["prune-structure", "--channels", "0.25", "--experts", "0.25"],
    "tokens": ["prune-vocabulary", "--tokens", "0.25"],
    "heads": ["prune-heads", "--ratio", "0.5", "--importance", "OutputNorm"],
    "repair": ["prune-structure", "--blocks", "1", "--repair", "RepairConfig"],
}


@pytest.fixture
def read(monkeypatch):
    """The names of tensors of blocks that are read."""
    found, slices = [], TensorFiles.slices
    monkeypatch.setattr(TensorFiles, "slices", lambda self, names: found.extend(names) or slices(self, names))
    return lambda: [name for name in found if ".layers." in name]


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_other_changes_are_refused_before_a_block_is_read(call, tmp_path, read):
    quantized.write(tmp_path / "in", "qwen3_moe")
    model = bh.stream(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match=ONLY):
        call(model)
    assert read() == []
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_refuse_other_changes_before_a_block_is_read(command, tmp_path, read):
    quantized.write(tmp_path / "in", "qwen3_moe", vocab_size=2048)
    with pytest.raises(SystemExit, match=ONLY):
        main(
            [
                command[0],
                str(tmp_path / "in"),
                str(tmp_path / "out"),
                *command[1:],
                "--data",
                "tiny",
                "--stream",
                "--tokenizer",
                "tiny",
            ]
        )
    assert read() == []
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_blocks_are_removed_without_a_repair(tmp_path):
    quantized.write(tmp_path / "in", "qwen3_moe")
    model = bh.stream(tmp_path / "in", tmp_path / "out")
    plan = second_block(model)
    with pytest.raises(ValueError, match=ONLY):
        bh.repair(model, plan, batches())
    with pytest.raises(ValueError, match=ONLY):
        bh.apply(model, plan, weights={"model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)})
    weights, why = repair_if_requested(model, plan, batches(), "auto")
    assert weights is None
    assert "only experts and blocks can be removed" in why


FORMATS = [
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "compressed-tensors"},
    {"load_in_4bit": True, "quant_method": "bitsandbytes"},
    {"quant_method": "fp8", "weight_block_size": None},
    {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "static"},
]


@pytest.mark.parametrize("fields", FORMATS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_other_formats_are_refused(fields, tmp_path):
    quantized.write(tmp_path / "in", "qwen3_moe")
    change_config(tmp_path / "in", quantization_config=fields)
    refusal = rf"a checkpoint with quant_method='{fields['quant_method']}' cannot be streamed. Legal are 'mxfp4', and 'fp8' with "
    with pytest.raises(ValueError, match=refusal):
        bh.stream(tmp_path / "in", tmp_path / "out")


def without_scales(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("0.up_proj.weight_scale_inv")}


def with_byte_scales(tensors):
    return {name: tensor.to(torch.uint8) if name.endswith("scale_inv") else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "block", "refusal"),
    [
        (without_scales, [16, 16], "experts.0.up_proj.weight is quantized and has no scales"),
        (
            with_byte_scales,
            [16, 16],
            r"has values \[.*\] of torch.float8_e4m3fn and scales \[.*\] of torch.uint8, which do not fit",
        ),
        (dict, [8, 16], "which do not fit quant_method='fp8'"),
    ],
)
def test_files_that_contradict_the_config_are_refused(change, block, refusal, tmp_path):
    quantized.write(tmp_path / "in", "qwen3_moe")
    file = tmp_path / "in" / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    change_config(tmp_path / "in", quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(ValueError, match=refusal):
        bh.stream(tmp_path / "in")


def test_a_stopped_save_leaves_nothing(tmp_path, monkeypatch):
    quantized.write(tmp_path / "in", "qwen3_moe")
    model = bh.stream(tmp_path / "in", tmp_path / "out")
    bh.apply(model, bh.plan(model, batches=batches(), experts=0.25))
    calls, save = [], engine_files.save_file

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(engine_files, "save_file", stopping)
    with pytest.raises(KeyboardInterrupt):
        bh.save(model, tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert bh.save(model, tmp_path / "out").difference == 0
