"""Models whose units have every kind, and what reads them."""

import re

from kit.oracle_families import FAMILIES

EVERY = [*FAMILIES, "T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration"]


DOWN = re.compile(
    r"(?<!attention\.)(?<!attn\.)\b(down_proj|fc2|c_proj|dense_4h_to_h|fc_out|wo|lin2|pwconv2|output_dense|Wo|output\.dense|ffn_output)$"
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


WITHOUT = ("mamba", "mamba2", "resnet")  # a feed-forward


def down_projections(model):
    return [name for name, _ in model.named_modules() if DOWN.search(name)]
