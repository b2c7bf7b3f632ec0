"""Small models whose KV heads are mixes of one another, so that fewer can do what all do."""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.kv_heads.bases.freedom import Freedom, Freedoms
from billhook.kv_heads.bases.stacks import Projections, Stacks, written
from kit import families, kv_zoo


def model_of(family: str, heads: int = 4, queries: int = 1, **changes: object) -> PreTrainedModel:
    """In float64, with weights that make attention sharp: KV heads of width 8 (families of `kv_zoo` have 8 of width 4)."""
    torch.manual_seed(0)
    if family in families.EXTRA:
        wide = {"num_attention_heads": heads * queries, "num_key_value_heads": heads, "hidden_size": 8 * heads * queries}
        model = families.build(family, **wide | changes)
    elif family == "phi3":
        model = kv_zoo.build(family, **{"num_attention_heads": heads * queries, "num_key_value_heads": heads} | changes)
    elif family == "gpt2":
        model = kv_zoo.build(family, **{"n_head": heads} | changes)
    elif family == "bart":
        model = kv_zoo.build(family, **{"encoder_attention_heads": heads, "decoder_attention_heads": heads} | changes)
    else:
        model = kv_zoo.build(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.mul_(0.2 / parameter.std())
    return model.double()


def draw(freedom: Freedom, width: int, turn: bool, generator: torch.Generator) -> Tensor:
    """A matrix that mixes what may be mixed; with `turn`, one that keeps lengths."""
    matrix = torch.eye(width, dtype=torch.float64)
    for block in freedom:
        real = torch.tensor(block.real)
        if block.imaginary:
            angle = float(torch.rand(1, generator=generator)) * 2 * math.pi
            size = 1.0 if turn else 0.5 + float(torch.rand(1, generator=generator))
            a, b = size * math.cos(angle), size * math.sin(angle)
            both = torch.tensor([*block.real, *block.imaginary])
            matrix[both[:, None], both] = torch.tensor([[a, -b], [b, a]], dtype=torch.float64)
        else:
            square = torch.randn(len(real), len(real), generator=generator, dtype=torch.float64)
            matrix[real[:, None], real] = torch.linalg.qr(square)[0] if turn else square
    return matrix


def mixed(stacks: Stacks, freedoms: Freedoms, groups: int, turn: bool = False) -> Stacks:
    """The heads of each group replaced by mixes of its first one; numbers that may not be mixed are the same in all."""
    generator, size = torch.Generator().manual_seed(7), len(stacks.k) // groups
    k, v = (
        torch.stack([draw(free, one.shape[1], turn, generator) @ one[head // size * size] for head in range(len(one))])
        for one, free in ((stacks.k, freedoms.keys), (stacks.v, freedoms.values))
    )
    return Stacks(stacks.q, k, v, stacks.o)


@torch.no_grad()
def with_stacks(model: nn.Module, place: Projections, stacks: Stacks) -> None:
    """Writes them into the model."""
    for linear, own in written(model, place, stacks).items():
        for name, value in own.items():
            model.get_submodule(linear).get_parameter(name).copy_(value)
