"""Answers where a result depends on values that nobody knows: that every entry is taken, or that the first is."""

from collections.abc import Callable

import torch
from torch import Tensor

from billhook.tracing.axes import Axis, product
from billhook.tracing.tape import SMALL, axes_of, broadcast, join, keep_order, note, put


def _all_nonzero(x: Tensor) -> Tensor:
    """Returns the places of all entries, as if none were zero: [entries, dimensions]."""
    axes = axes_of(x)
    places = torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).reshape(-1, x.dim())
    keep_order(axes, "the code asks where along it something is")
    out = places if places.numel() <= SMALL else places.to("meta")
    put(out, [product(axes), Axis(x.dim())], [x], points=axes[0] if x.dim() == 1 else None).columns = tuple(axes)
    return out


def first_nonzero(x: Tensor) -> Tensor:
    """Returns the place of the first entry, as if the others were zero: [1, dimensions]."""
    out = torch.zeros(1, x.dim(), dtype=torch.int64)
    put(out, [Axis(1), Axis(x.dim())], [x], points=axes_of(x)[0] if x.dim() == 1 else None).columns = tuple(axes_of(x))
    return out


def _all_selected(x: Tensor, mask: Tensor) -> Tensor:
    """Returns x[mask] as if the mask held everywhere."""
    broadcast(x.shape, [x, mask])
    keep_order(axes_of(x), "the code picks along it by a mask")
    out = x.flatten().clone()
    put(out, [product(axes_of(x))], [x, mask], note(x).points)
    return out


def _all_indexed(x: Tensor, indices: list[Tensor | None]) -> Tensor | None:
    """Returns x[..., mask] as if the mask held everywhere; None where nothing is masked."""
    masks = [(d, i) for d, i in enumerate(indices) if i is not None and i.dtype == torch.bool]
    if len(masks) != 1 or sum(i is not None for i in indices) != 1:
        return None
    d, mask = masks[0]
    out = x.flatten(d, d + mask.dim() - 1).clone()
    axes = axes_of(x)
    put(out, [*axes[:d], product(axes[d : d + mask.dim()]), *axes[d + mask.dim() :]], [x, mask], note(x).points)
    for axis, own in zip(axes[d : d + mask.dim()], axes_of(mask), strict=True):
        join(axis, own)
    keep_order(axes_of(mask), "the code picks along it by a mask")
    return out


EVERYTHING: dict[str, Callable[..., Tensor | None]] = {
    "nonzero": _all_nonzero,
    "masked_select": _all_selected,
    "index": _all_indexed,
}
