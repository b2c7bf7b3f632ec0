"""Experts of a mixture, as linear layers.

transformers stacks a matrix of all experts in one parameter, `[experts, out, in]`, or `[experts, in, out]` if it is transposed.
Its forward pass is a function of a public interface. Within `expert_layers`, each matrix is a linear layer. It has a name, such
as `model.layers.3.mlp.experts.7.down_proj`, the tokens routed to the expert as inputs, and a weight that is a view.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from billhook.engine import overridden, store_of
from billhook.model.transformers_internals import EXPERTS

EXPERT_BY_EXPERT = "billhook"  # name of the forward pass in transformers' interface


class ExpertLinear(nn.Linear):
    """A matrix of an expert, as a linear layer without parameters of its own.

    State dicts, optimizers, and shards are therefore those of the model.

    Args:
        experts: The module that stacks the experts.
        stack: Name of the parameter that stacks this matrix of all experts.
        number: Number of the expert.

    Attributes:
        tokens: Numbers of the tokens of a call, `[tokens]`, among the `of` tokens that all experts receive.
        gates: Factors of the expert's outputs in a call, `[tokens]`.
    """

    experts: Any

    def __init__(self, experts: nn.Module, stack: str, number: int) -> None:
        nn.Module.__init__(self)
        vars(self)["experts"] = experts  # not as a submodule of its own submodule
        self.stack, self.number = stack, number
        rows, columns = getattr(experts, stack).shape[1:]
        self.out_features, self.in_features = (columns, rows) if experts.is_transposed else (rows, columns)
        self.tokens, self.gates, self.of = torch.empty(0, dtype=torch.int64), torch.empty(0), 0

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The matrix `[out_features, in_features]`, a view of the stack without gradient."""
        return nn.Parameter(self._matrix().detach(), requires_grad=False)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The bias `[out_features]`, a view of the stacked biases without gradient."""
        bias = self._bias()
        return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Multiplies by the matrix, with gradients to the stack."""
        return linear(input, self._matrix(), self._bias())

    def stacked(self, name: str) -> str:
        """Returns the name of the parameter that holds the weight, from that of this layer."""
        return name.removesuffix(f"{self.number}.{self.stack}") + self.stack

    def of_stack(self, stack: Tensor) -> Tensor:
        """Returns this layer's part of a tensor like the stack, `[out_features, in_features]`."""
        matrix = stack[self.number]
        return matrix.mT if self.experts.is_transposed else matrix

    def _matrix(self) -> Tensor:
        if "weight" in vars(self):  # by `replaced`
            return cast(Tensor, vars(self)["weight"])
        # read at each call, as it may be another one: of a block store, a parametrization, or `functional_call`
        return self.of_stack(getattr(self.experts, self.stack))

    def _bias(self) -> Tensor | None:
        if "bias" in vars(self) or not self.experts.has_bias:
            return vars(self).get("bias")
        return cast(Tensor, getattr(self.experts, f"{self.stack}_bias")[self.number])


def stacks_of(module: nn.Module) -> list[str]:
    """Returns the parameters that stack matrices of experts, in the order of the forward pass."""
    if not hasattr(module, "_apply_gate") or not isinstance(vars(module).get("is_transposed"), bool):
        return []
    stacks = ["gate_up_proj" if vars(module)["has_gate"] else "up_proj", "down_proj"]
    return stacks if all(isinstance(stack := getattr(module, name, None), Tensor) and stack.dim() == 3 for name in stacks) else []


def holder_of(layer: nn.Module) -> tuple[nn.Module, str]:
    """Returns the module and the name of the parameter that holds the weight of a layer."""
    return (layer.experts, layer.stack) if isinstance(layer, ExpertLinear) else (layer, "weight")


def routed(layer: nn.Module, keep: Tensor) -> Tensor:
    """Returns a mask of tokens for the tokens that a layer receives in the current call."""
    return keep.flatten()[layer.tokens] if isinstance(layer, ExpertLinear) and keep.numel() == layer.of else keep


def after_norm(experts: Any, outputs: Tensor) -> Tensor:  # noqa: ANN401
    """Applies the norm of an expert's outputs, if the experts have one."""
    has_norm = getattr(experts, "has_post_expert_norm", False)  # transformers 5.16 has no such attribute
    return experts.post_expert_norm(outputs) if has_norm else outputs


@contextmanager
def expert_layers(model: nn.Module) -> Iterator[None]:
    """Makes each matrix of an expert a linear layer within the context, also nested."""
    store = store_of(model)
    with ExitStack() as stack:
        for module in list(model.modules()):
            stacks = stacks_of(module)
            if not stacks or "0" in module._modules:
                continue
            block = store.owner.get(module)
            for number in range(len(getattr(module, stacks[0]))):
                expert = nn.ModuleDict({name: ExpertLinear(module, name, number) for name in stacks})
                module.add_module(str(number), expert)
                stack.callback(module._modules.pop, str(number))
                if block is not None:
                    for name, part in expert.named_modules():
                        store.owner[part], store.names[part] = block, f"{store.names[module]}.{number}.{name}".rstrip(".")
                        stack.callback(store.owner.pop, part, None)
                        stack.callback(store.names.pop, part, None)
            stack.enter_context(overridden(cast(PretrainedConfig, module.config), **{EXPERTS: EXPERT_BY_EXPERT}))
        yield


def _expert_by_expert(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # noqa: ANN401
    """Computes as transformers' "eager" forward, through the linear layers of experts.

    Args:
        experts: The module that stacks the experts.
        hidden_states: `[tokens, hidden_size]`.
        top_k_index: Numbers of each token's experts, `[tokens, k]`.
        top_k_weights: Their gates, `[tokens, k]`.
    """
    output = torch.zeros_like(hidden_states)
    for number in range(len(experts.down_proj)):
        tokens, places = torch.where(top_k_index == number)
        if not len(tokens):
            continue
        first, second = layers = list(experts.get_submodule(str(number)).children())
        gates = top_k_weights[tokens, places]
        for layer in layers:
            layer.tokens, layer.gates, layer.of = tokens, gates, len(hidden_states)
        hidden = first(hidden_states[tokens])
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        outputs = after_norm(experts, second(hidden))
        output.index_add_(0, tokens, (outputs * gates[:, None]).to(output.dtype))
    return output


ALL_EXPERTS_FUNCTIONS.register(EXPERT_BY_EXPERT, _expert_by_expert)
