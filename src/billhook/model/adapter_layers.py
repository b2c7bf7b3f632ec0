"""Layers that peft has put around a model's own; without adapters peft is not imported, which takes a second."""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper


def is_adapter(module: object) -> TypeGuard["BaseTunerLayer"]:
    """Tells whether a module holds a layer of the model, and adapters to it; as long as nobody has imported peft, none does."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_trained_copy(module: object) -> TypeGuard["AuxiliaryTrainingWrapper"]:
    """Tells whether a module holds one of the model, and a copy that is trained instead (`modules_to_save`)."""
    if "peft" not in sys.modules:
        return False
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, AuxiliaryTrainingWrapper)


def base_of(module: "BaseTunerLayer") -> nn.Module:
    """Returns the model's own layer beneath all adapters; some layers of peft have a `get_base_layer` that returns another."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer.get_base_layer(module)


def active_in(layer: Any) -> list[str]:  # noqa: ANN401 - PEFT does not type its layers
    """Lists the adapters with which a layer of LoRA computes now."""
    return [] if layer.disable_adapters else [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
