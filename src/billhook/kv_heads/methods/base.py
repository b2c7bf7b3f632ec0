"""How several heads become one: the base class of all methods, and of those that first put heads in one basis.

The heads of a group, k_1 ... k_J, each of width w, become one, kbar = sum over j of P_j k_j, and B_j kbar stands for head j.
What reads head j absorbs B_j, so that nothing of it is left to compute. Keys are read by the query, whose score q^H k_j becomes
q^H B_j kbar = (B_j^H q)^H kbar; values by the output, W_O v_j, which becomes (W_O B_j) vbar. So all query heads of the group
read kbar.

Numbers are real, or complex where a rotary embedding stands between the projections and the score. It takes numbers in pairs and
turns each by an angle that depends on the pair and on the token: z = a + ib becomes e^(i angle) z. A complex factor commutes with
that, and of all matrices that mix a head's numbers nothing else does, for all angles at once. So there each pair is a head of
width 1 of its own, B_j and P_j are complex numbers, and the score is the real part of the sum of conj(q) k over the pairs.

A method that renders is a choice of B and P. All of them see second moments alone: E[k_i k_j^H], and E[r r^H] of the readers r.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel

from billhook.arguments import one_of
from billhook.kv_heads.pooling import Pooled, mean, pooling
from billhook.model.surgery import Change

Grouping = Literal["consecutive", "similar"]


class KVMethod(ABC):
    """How the heads of a group become one.

    A method in a file of its own need only say how heads are pooled. `convert_kv_heads` takes an object of it, and YAML its
    `class_path`:

        @dataclass(frozen=True)
        class Last(KVMethod):
            def pool(self, heads):
                return heads[-1]

    Attributes:
        least_batches: How many batches it needs at least; with two or more, some are held out.
        has_path: Whether heads can move step by step towards what they become, as `KVHeadConversion(over=)` moves them.
        pools_adapters: Whether LoRA's B can be pooled as the weight is: whether pooling is linear, and the same for both.
    """

    least_batches: ClassVar[int] = 0
    has_path: ClassVar[bool] = True
    pools_adapters: ClassVar[bool] = True

    @property
    def turns(self) -> bool:
        """True if heads are first put in another basis or order, and what reads them along with them."""
        return False

    @property
    def candidates(self) -> Sequence["Rendered"]:
        """The methods that can make the heads of a group equal before they are pooled; held-out batches choose among several."""
        return ()

    @property
    def name(self) -> str:
        """The name that messages use."""
        return type(self).__name__.lower()

    @abstractmethod
    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns one head for those of a group.

        Args:
            heads: The heads in their order, two or more: those rows of a weight, a bias or an optimizer's state, of one size.
        """

    def changes(self, model: PreTrainedModel, parameters: Mapping[str, Pooled]) -> dict[str, Change]:
        """Returns how each parameter and the optimizer's state of it shrink.

        Args:
            model: The model as it is.
            parameters: By parameter, which positions become one.
        """
        return {name: pooling(pooled, self.pool) for name, pooled in parameters.items()}

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Rendering:
    """One head for several, by the matrices B (`basis`) and P (`shared`) of each, `[heads, width, width]`."""

    basis: Tensor
    shared: Tensor


@dataclass(frozen=True)
class Rendered(KVMethod):
    """A method that makes the heads of a group equal, in the sizes that the model has; then to pool them loses nothing more.

    Args:
        grouping: Which heads share a group: `"consecutive"`, those next to each other, or `"similar"`, those that one head
            renders best; query heads then change places along with them.

    Attributes:
        changes_basis: Whether it puts heads in another basis.
    """

    grouping: Grouping = "consecutive"
    changes_basis: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("grouping", self.grouping, Grouping)

    @property
    def turns(self) -> bool:
        """True if heads are first put in another basis or order, and what reads them along with them."""
        return self.changes_basis or self.grouping == "similar"

    @property
    def candidates(self) -> "Sequence[Rendered]":
        """This method alone."""
        return (self,)

    @abstractmethod
    def render(self, metric: Tensor, moments: Tensor) -> Rendering:
        """Returns how one head renders those of a group.

        Args:
            metric: S_j^2 = the sum of E[r r^H] over what reads head j, `[heads, width, width]`, Hermitian.
            moments: The second moments of the heads, E[k_i k_j^H], `[heads, width, heads, width]`.
        """

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns the mean of heads that are equal by then."""
        return mean(heads)

    def __str__(self) -> str:
        return self.name if self.grouping == "consecutive" else f"{self.name}, similar heads grouped"
