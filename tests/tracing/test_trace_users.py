"""What people bring to trace: wrappers, adapters, hooks, threads, odd inputs; what it says holds, or it says why it cannot."""

import threading
import warnings
from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
import torchmetrics
import transformers
from oracle import answer, check, randomise
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import billhook as bh
from billhook.model.cache import clear_cache

pytestmark = [  # of torch.compile, of transformers and of PEFT with it
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IDS = torch.arange(3, 17).view(2, 7)
X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0}


def llama(**options):
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=4, **options)
    return transformers.LlamaForCausalLM(config)


def bert(kind=transformers.BertModel):
    return kind(transformers.BertConfig(**SIZES, num_attention_heads=3, max_position_embeddings=32))


def asked(model, inputs, given=None, inside=None):
    """The structure of a model, after the oracle has found none of its groups wrong; `inside` names what was traced of it."""
    model = model.double().eval()
    randomise(model)
    structure = bh.trace(model, given)
    inner = model.get_submodule(inside) if inside else model
    run = (lambda: answer(model(**inputs))) if isinstance(inputs, dict) else (lambda: answer(model(*inputs)))
    for finding in check(inner, structure, run, [group for group in structure.groups if not group.reason]):
        assert finding.holds, f"{finding.group.kind} of {[(m.name, m.dim) for m in finding.group.members]}: {finding.error:.1e}"
    return structure


def free(structure):
    """Kinds and sizes of the groups that may be pruned."""
    return {(group.kind, group.size) for group in structure.groups if not group.reason}


def reason_of(structure, kind):
    return structure.of_kind(kind)[0].reason


ALL = {("kv_head", 2), ("query_head", 3), ("value", 4), ("channel", 40), ("residual", 24)}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = bert()
        self.head = nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, input_ids):
        return self.head(self.backbone(input_ids).last_hidden_state[:, 0])


class Captioner(nn.Module):
    """Features of something else stand before the tokens."""

    def __init__(self):
        super().__init__()
        self.language, self.projection = llama(), nn.Linear(5, 24)

    def forward(self, input_ids, features):
        tokens = self.language.get_input_embeddings()(input_ids)
        return self.language(inputs_embeds=torch.cat([self.projection(features), tokens], 1)).logits


def test_a_wrapper_is_traced_whole_with_inputs_and_its_model_alone_without():
    inputs = {"input_ids": IDS}
    whole = asked(Classifier(), inputs, inputs)
    assert {("residual", 24), ("channel", 10), ("channel", 40), ("head", 3)} <= free(whole)
    members = {member.name for member in whole.of_kind("residual")[0].members}
    assert members >= {"head.0.weight", "backbone.encoder.layer.1.output.dense.weight"}
    alone = asked(Classifier(), inputs, inside="backbone")
    assert "the model's output has it" in reason_of(alone, "residual")


def test_what_stands_beside_the_model_may_belong_to_it():
    inputs = {"input_ids": IDS, "features": torch.randn(2, 3, 5).double()}
    alone = asked(Captioner(), inputs, inside="language")
    assert reason_of(alone, "residual").startswith("projection.weight, outside of the model that was traced, may have it too")
    assert ("residual", 24) in free(asked(Captioner(), inputs, inputs))


def test_a_student_beside_a_frozen_teacher_and_a_metric():
    class Distillation(pl.LightningModule):
        def __init__(self, name):
            super().__init__()
            self.add_module(name, llama())
            self.teacher, self.accuracy = llama().requires_grad_(False), torchmetrics.Accuracy(task="binary")

    assert free(bh.trace(Distillation("model"))) == ALL
    one = r"more than one Hugging Face model \(student, teacher\)\. Assign .* attribute `model`"
    message = rf"{one}\. Or pass only the model to trace\.$"
    with pytest.raises(ValueError, match=message):
        bh.trace(Distillation("student"))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.ModuleDict({"anything": m})])
def test_wrappers_that_add_nothing(wrap):
    assert str(bh.trace(wrap(llama()))) == str(bh.trace(llama()))


def change(do):
    model = llama()
    do(model)
    return model


SAME = {
    "half": lambda: llama().half(),
    "frozen": lambda: llama().requires_grad_(False),
    "gradient checkpointing": lambda: change(lambda m: (m.gradient_checkpointing_enable(), m.enable_input_require_grads())),
    "compiled in place": lambda: change(lambda m: m.compile()),
    "has collected hidden states": lambda: change(lambda m: m(IDS, output_hidden_states=True)),
    "eager": lambda: llama(attn_implementation="eager"),
    "flex": lambda: change(lambda m: setattr(m.config, "_attn_implementation", "flex_attention")),
}


@pytest.mark.parametrize("name", SAME)
def test_states_that_change_nothing(name):
    structure = bh.trace(SAME[name]())
    assert free(structure) == ALL
    assert not structure.assumed
    assert not structure.opaque


LORA = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("name", LORA)
def test_kinds_of_lora(name):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=5, **({"target_modules": ["q_proj", "down_proj"]} | LORA[name])))
    structure = asked(model, {"input_ids": IDS}, inside="base_model.model")
    assert free(structure) >= ALL
    assert 5 in {group.size for group in structure.groups if not group.reason}


@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_transposed_weights(dora):
    sizes = {"vocab_size": 61, "n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    lora = peft.LoraConfig(r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=dora)
    structure = asked(peft.get_peft_model(model, lora), {"input_ids": IDS}, inside="base_model.model")
    kinds = {("head", 3), ("query_key", 8), ("value", 8), ("channel", 96), ("residual", 24), ("rank", 5)}
    assert free(structure) == kinds


def test_other_adapters_two_of_them_merged_and_switched_off():
    inside, inputs = "base_model.model", {"input_ids": IDS}
    ia3 = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    assert free(asked(peft.get_peft_model(llama(), ia3), inputs, inside=inside)) == ALL
    saved = peft.LoraConfig(r=5, target_modules=["q_proj"], modules_to_save=["lm_head"])
    structure = asked(peft.get_peft_model(llama(), saved), inputs, inside=inside)
    assert "lm_head.original_module.weight, which the run never used" in reason_of(structure, "residual")
    two = peft.get_peft_model(llama(), peft.LoraConfig(r=5, target_modules=["q_proj"]))
    two.add_adapter("two", peft.LoraConfig(r=5, target_modules=["v_proj"]))
    assert any("two" in name for name in asked(two, inputs, inside=inside).untouched)
    two.merge_adapter()
    assert len(asked(two, inputs, inside=inside).untouched) == 8


PROMPTS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "encoder": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=10),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_traced_with_the_model(name):
    structure = asked(peft.get_peft_model(llama(), PROMPTS[name]), {"input_ids": IDS})
    members = {member.name for group in structure.groups for member in group.members}
    assert any("prompt_encoder" in member for member in members)
    assert ("channel", 40) in free(structure)


def test_all_logits_are_answers():
    structure = bh.trace(bert(transformers.BertForPreTraining))
    labels = [group.members[0].name for group in structure.of_kind("label")]
    assert labels == ["cls.seq_relationship.weight"]
    both = Layers(lambda s, x: {"hidden": (h := s.a(x)), "logits": s.b(h)})
    assert not free(bh.trace(both, X.float()))


class Layers(nn.Module):
    """Two linear layers and what a forward makes of them."""

    def __init__(self, forward=lambda s, x: s.b(F.relu(s.a(x))), **parts):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(8, 12), nn.Linear(12, 5), forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def normed(wrap, part="a"):
    model = Layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrap(getattr(model, part))
    return model


WEIGHTS = {
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(m),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m),
    "old weight_norm": lambda m: nn.utils.weight_norm(m),
    "a mask": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "two masks": lambda m: (prune.ln_structured(m, "weight", 0.3, 2, 1), prune.random_unstructured(m, "weight", 0.3)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_computed(name):
    assert free(asked(normed(WEIGHTS[name]), [X], [X])) == {("channel", 12)}


def test_hooks_are_not_called_but_minded():
    model, seen = Layers(), []

    def look(module, inputs, output):
        seen.append(output)

    model.a.register_forward_hook(look)
    structure = bh.trace(model, X.float())
    assert free(structure) == {("channel", 12)}
    (assumed,) = structure.assumed
    assert "look after the forward of Linear is not called: it returns nothing" in assumed
    model.b.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(-1),))
    structure = bh.trace(model, X.float())
    assert not free(structure)
    assert "before the forward of Linear is not called: what it returns would count" in structure.groups[0].reason
    assert not seen


def test_attributes_that_cannot_be_copied():
    odd = {"lock": threading.Lock(), "rows": (i for i in ()), "module": warnings, "made": nn.Linear(3, 3)(torch.ones(3))}
    assert free(bh.trace(Layers(**odd), X.float())) == {("channel", 12)}


@pytest.mark.slow
def test_code_that_is_compiled_inside():
    model = Layers(lambda s, x: s.b(s.c(s.a(x))), c=torch.compile(nn.ReLU()))
    assert free(bh.trace(model, X.float())) == {("channel", 12)}


class Rotary(nn.Module):
    """Grouped queries, turned as complex numbers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(24, 5)
        self.register_buffer("frequencies", torch.rand(2))

    def forward(self, x):
        q, k, v = (w(x).view(2, 7, -1, 4).transpose(1, 2) for w in (self.q, self.k, self.v))
        angles = torch.outer(torch.arange(7, device=x.device).to(x.dtype), self.frequencies)
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.view_as_real(torch.view_as_complex(y.reshape(*y.shape[:-1], 2, 2)) * turn).flatten(-2) for y in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).reshape(2, 7, 24))


def moved(s, x):
    h = s.a(x)
    memory = h.new_zeros(h.shape)
    memory[..., :4] = h[..., 4:8] * 2
    memory[..., 4:] += torch.where(h[..., 4:] > 0, h[..., 4:], -h[..., 4:])
    return s.b(memory)


def tried(s, x):
    try:
        return s.b(s.a(x).view(3, 5))
    except RuntimeError:
        return s.b(s.a(x))


def times_identity(s, x):
    return s.b(s.a(x) @ (torch.eye(12, dtype=x.dtype) * 2 + s.low @ s.low.T))


PEOPLE = {
    "grouped queries, complex rotary": (Rotary(), {("value", 4), ("kv_head", 2), ("query_head", 3)}),
    "memory written in place": (Layers(moved), {("rank", 4), ("channel", 4)}),
    "vmap": (Layers(lambda s, x: s.b(torch.vmap(s.a)(x))), {("rank", 12)}),
    "try": (Layers(tried), {("rank", 12)}),
    "print": (Layers(lambda s, x: s.b((h := s.a(x), str(h))[0])), {("rank", 12)}),
    "identity": (Layers(times_identity, low=nn.Parameter(torch.rand(12, 3))), {("state", 12), ("channel", 3)}),
    "transposed": (
        Layers(lambda s, x: s.b(F.linear(s.a(x), nn.Parameter(s.c.T))), c=nn.Parameter(torch.rand(12, 12))),
        {("rank", 12)},
    ),
    "constant mask": (Layers(lambda s, x: s.b(s.a(x) * torch.arange(12, device=x.device).gt(5))), set()),
}


@pytest.mark.parametrize("name", PEOPLE)
def test_code_as_people_write_it(name):
    model, expected = PEOPLE[name]
    assert free(asked(model, [X], [X])) == expected


def state(model):
    """All that a trace could leave behind."""
    modules = {name: (sorted(vars(m)), m.training, len(m._forward_hooks)) for name, m in model.named_modules()}
    tensors = [(t.device, t.requires_grad, t.grad, sorted(vars(t))) for t in (*model.parameters(), *model.buffers())]
    configs = model.config.to_json_string(use_diff=False), model.generation_config.to_json_string()
    return modules, tensors, configs, torch.get_rng_state().tolist(), "__getitem__" in vars(torch.Tensor)


def test_nothing_is_left_behind_also_not_by_failures_and_threads():
    model = llama().train()
    before, expected, found = state(model), str(bh.trace(model)), []
    with pytest.raises(ValueError, match="these example_inputs"):
        bh.trace(model, {"input_ids": torch.ones(2, 3, 4, 5).long()})
    threads = [threading.Thread(target=lambda: (clear_cache(), found.append(str(bh.trace(model))))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert state(model) == before


AROUND = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "cuda": lambda: torch.device("cuda"),
}


@pytest.mark.parametrize("name", AROUND)
def test_whatever_is_on_around(name):
    model = llama()
    expected = str(bh.trace(model))
    with AROUND[name]():
        for one in (model, model.config):
            clear_cache()
            assert str(bh.trace(one)) == expected


SOURCE = """
from torch import nn

class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x).view(3, 5)
"""


@pytest.mark.parametrize(
    "folder", ["/home/billhook/torch", "/billhook/.venv/site-packages/own", f"{Path(bh.__file__).parent}_own"]
)
def test_code_in_a_folder_of_billhooks_name_is_the_models_code(folder):
    module = {}
    exec(compile(SOURCE, f"{folder}/models.py", "exec"), module)
    with pytest.raises(ValueError, match=r"Wrong does not run .*: at models\.py:10, op view: RuntimeError"):
        bh.trace(module["Wrong"](), [X.float()])


INPUTS = {
    "no module": (None, None, "model=None must be a Module or a .*Config or a string or a PathLike"),
    "a string": (Layers(), "hello", "example_inputs='hello' must be a Mapping.* or a Sequence.* or a Tensor or None"),
    "another name": (Layers(), {"y": X}, r"Layers does not run on meta tensors with these example_inputs \(y\)"),
    "another shape": (Layers(), X[..., 0], r"these example_inputs \(1 of them\): at test_trace_users\.py:\d+, op addmm"),
    "lazy": (nn.LazyLinear(3), X, "model: parameter weight is lazy and has no shape yet"),
    "nowhere": ("/nowhere/at/all", None, "is not a folder with a Hugging Face checkpoint"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_refusals_of_what_came(name):
    model, inputs, match = INPUTS[name]
    with pytest.raises(ValueError, match=match):
        bh.trace(model, inputs)


def test_a_quantised_config_is_taken_as_not_quantised(tmp_path: Path):
    config = llama().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    structure = bh.trace(tmp_path)
    assert free(structure) == ALL
    assert any("the config is of a quantized model" in what for what in structure.assumed)
