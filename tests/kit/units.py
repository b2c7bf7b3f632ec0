"""Small models whose units have every kind, heads, channels and blocks, and what reads them."""

import functools
import re
import warnings

import oracle
import torch
import transformers
from small_configs import architectures, build, has_experts, small_config

from billhook.model.inputs import make_inputs
from billhook.units.find import find_units

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "cohere", "glm4",
    "stablelm", "starcoder2", "smollm3", "granite", "nemotron", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt",
    "bloom", "mpt", "falcon", "codegen", "biogpt", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx",
    "mamba", "mamba2", "falcon_h1", "recurrent_gemma", "bert", "roberta", "electra", "albert", "distilbert", "deberta-v2",
    "modernbert", "mpnet", "t5", "mt5", "bart", "pegasus", "marian", "whisper", "vit", "deit", "dinov2", "swin", "convnext",
    "resnet", "wav2vec2", "hubert",
]  # fmt: skip


WITHOUT_HEADS = ("mamba", "recurrent_gemma", "convnext", "resnet")  # two layers of recurrent_gemma have none


ATTENTIVE = [family for family in FAMILIES if family not in WITHOUT_HEADS]


SEQ2SEQ = ["BartForConditionalGeneration", "WhisperForConditionalGeneration"]  # others than the first class of a family


class Small:
    """A small model in float64 with every parameter random, what it is run with, and its heads."""

    def __init__(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()
            made = next(architectures(name))
            config = small_config(made[2], **({"n_heads": 8} if name == "mpt" else {}))
            self.model = build(config, made[3], "batched_mm" if has_experts(config) else "eager")
            inputs = make_inputs(self.model)
            self.heads = find_units(self.model, "head")
        self.model.double()
        oracle.randomise(self.model)
        self.inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}

    def run(self):
        return oracle.answer(self.model(**self.inputs))

    def loss(self, *_):
        """A weighted sum of the answer, so that no gradient is zero by symmetry."""
        answer = self.run()
        weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1), dtype=answer.dtype)
        return (answer * weights).sum()


small = functools.cache(Small)


def weight_of(model, reader):
    """The weight of what reads heads, its columns first."""
    weight = model.get_submodule(reader).weight
    return weight if isinstance(model.get_submodule(reader), transformers.pytorch_utils.Conv1D) else weight.T


def hooks(model):
    return {
        (name, kind): list(found.items())
        for name, module in model.named_modules()
        for kind, found in vars(module).items()
        if kind.endswith("_hooks") and isinstance(found, dict)
    }


EVERY = [*FAMILIES, "T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration"]


DOWN = re.compile(
    r"(?<!attention\.)(?<!attn\.)\b(down_proj|fc2|c_proj|dense_4h_to_h|fc_out|wo|lin2|pwconv2|output_dense|Wo|output\.dense|ffn_output"
    r"|layer\.[12]\.convolution)$"
)  # what reads the channels of a feed-forward, by the names that families give it


HELD = {  # of those that are parameters of all experts together: name -> the dimension that reads
    "mixtral": ("experts.down_proj", 2),
    "qwen2_moe": ("experts.down_proj", 2),
    "qwen3_moe": ("experts.down_proj", 2),
    "deepseek_v3": ("experts.down_proj", 2),
    "gpt_oss": ("experts.down_proj", 1),
    "dbrx": ("mlp.w2", 0),
}


EXPERTS = {"mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2, "gpt_oss": 2, "deepseek_v3": 1, "dbrx": 2}


WITHOUT_CHANNELS = ("mamba", "mamba2")  # a feed-forward


def down_projections(model):
    return [name for name, _ in model.named_modules() if DOWN.search(name)]


MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"], "sliding_window": 4}


def other(name, **changes):
    """A small model of any class, with random weights."""
    kind = getattr(transformers, name)
    return kind(small_config(kind.config_class, **changes)).eval()


def t5(**changes):
    model = other("T5ForConditionalGeneration", num_layers=3, num_decoder_layers=4, **changes)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    return model


def influence(model, batch):
    """1 - cos of what each block takes and gives, over tokens that count, from the model's own hidden states."""
    last = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    with torch.no_grad():
        states = [*model(**batch, output_hidden_states=True).hidden_states[:-1], last[0]]
    hook.remove()
    counts = batch["attention_mask"].bool()
    pairs = [(a[counts].double(), b[counts].double()) for a, b in zip(states, states[1:], strict=False)]
    return torch.stack([1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean() for a, b in pairs])
