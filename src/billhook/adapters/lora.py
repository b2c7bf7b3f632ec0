"""LoRA on a Hugging Face model, attached as in LLM-Pruner.

"LoRA: Low-Rank Adaptation of Large Language Models", Hu et al., 2021, https://arxiv.org/abs/2106.09685; "LLM-Pruner: On the
Structural Pruning of Large Language Models", Ma, Fang & Wang, 2023, https://arxiv.org/abs/2305.11627.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.merge import has_adapters
from billhook.arguments import check_fraction, check_int, check_number, check_types
from billhook.model import is_linear

ALL = "all-linear"


@dataclass(frozen=True)
class LoRA:
    """LoRA settings: W x + alpha / r B A x on frozen linear layers, by default LLM-Pruner's.

    Args:
        r: Rank of the product. A is `[r, in_features]`; B is `[out_features, r]`, initially zero.
        alpha: Scaling: the product is multiplied by alpha / r.
        dropout: Fraction of the inputs of A that are zeroed in training.
        target: Linear layers to adapt: name endings such as `[q_proj, v_proj]`, or `"all-linear"`. The latter excludes the output
            embedding, a classification head, and experts stored as one tensor.

    Raises:
        ValueError: If a number is out of range, or `target` is empty.

    Example:
        >>> LoRA(r=16, target=["q_proj", "v_proj"])
        LoRA(r=16, alpha=16, dropout=0.05, target=['q_proj', 'v_proj'])
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target: str | list[str] = ALL

    def __post_init__(self) -> None:
        check_types(LoRA, vars(self))
        check_int("r", self.r)
        check_number("alpha", self.alpha, above=0)
        check_fraction("dropout", self.dropout)
        if not self.target:
            raise ValueError(f"target={self.target!r} must be {ALL!r} or name endings of linear layers")


def attach(model: PreTrainedModel, lora: LoRA | LoraConfig, classifies: bool = False) -> None:
    """Freezes a model and attaches LoRA in place. The model keeps its class.

    Adapters are float32, also on half-precision weights.

    Args:
        model: The model.
        lora: LoRA settings, or a PEFT config, which is used unchanged.
        classifies: If True, modules outside the base model are a classification head and are trained in full. With a PEFT config,
            set its `modules_to_save` instead.
    """
    if has_adapters(model):
        raise ValueError("lora: the model already has adapters. Merge them first with bh.training.merge, or remove lora.")
    head = dict(model.named_children()) if classifies and isinstance(lora, LoRA) and model.base_model is not model else {}
    head = {name: module for name, module in head.items() if module is not model.base_model}  # such as a classification head
    config: Any = lora
    if isinstance(lora, LoRA):
        skipped = []
        for name, module_outside in head.items():
            skipped += [f"{name}.{inner}".rstrip(".") for inner, module in module_outside.named_modules() if is_linear(module)]
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number
            lora_dropout=lora.dropout,
            target_modules=lora.target,
            exclude_modules=skipped or None,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"lora={lora}: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    for module in head.values():
        module.requires_grad_(True)
