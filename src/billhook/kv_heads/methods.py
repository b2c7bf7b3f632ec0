"""Pooling methods for KV heads, from the first head to a truncated SVD.

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

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.arguments import check_fraction, check_int, check_one_of, check_types
from billhook.kv_heads.pooling import Pooled, first, mean, pooling
from billhook.model import Change

Grouping = Literal["consecutive", "similar"]
HINT = (
    "billhook: KV heads are mean-pooled, as in the paper. method='svd' starts much closer to the dense model (SmolLM2-135M, 3 "
    "-> 1 KV heads, perplexity before training: 14,841 with 'mean', 74 with 'svd'). With calibration data and no method, the "
    "best method on held-out batches is used."
)


class KVMethod(ABC):
    """Combines the heads of a group into a single head.

    A custom method only needs `pool`. `convert_kv_heads` takes an instance, and YAML its `class_path`:

        @dataclass(frozen=True)
        class Last(KVMethod):
            def pool(self, heads):
                return heads[-1]

    Attributes:
        least_batches: Minimum number of batches; with two or more, some are held out.
        pools_adapters: Whether LoRA's B can be pooled like the weight: pooling is linear, and the same for both.
    """

    least_batches: ClassVar[int] = 0
    pools_adapters: ClassVar[bool] = True

    @property
    def turns(self) -> bool:
        """True if heads are first rotated or reordered, together with their consumers."""
        return False

    @property
    def candidates(self) -> Sequence["Reconstructing"]:
        """Methods that can make the heads of a group equal before pooling.

        Held-out batches choose among several.
        """
        return ()

    @property
    def name(self) -> str:
        """Name in messages."""
        return type(self).__name__.lower()

    @abstractmethod
    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns a single head for the heads of a group.

        Args:
            heads: The heads in order, two or more: rows of a weight, bias, or optimizer state, of equal size.
        """

    def changes(self, model: PreTrainedModel, parameters: Mapping[str, Pooled]) -> dict[str, Change]:
        """Returns the change of each parameter and its optimizer state.

        Args:
            model: The unchanged model.
            parameters: Pooling by parameter.
        """
        return {name: pooling(pooled, self.pool) for name, pooled in parameters.items()}

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A head for several, with matrices B and P for each, `[heads, width, width]`."""

    basis: Tensor
    shared: Tensor


@dataclass(frozen=True)
class Reconstructing(KVMethod):
    """A method that makes the heads of a group equal at full size, before they are pooled.

    Args:
        grouping: Heads that share a group: `"consecutive"` heads, or `"similar"` heads, which one head reconstructs best. Query
            heads are reordered along.

    Attributes:
        changes_basis: Whether heads change their basis.
    """

    grouping: Grouping = "consecutive"
    changes_basis: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))

    @property
    def turns(self) -> bool:
        """True if heads are first rotated or reordered, together with their consumers."""
        return self.changes_basis or self.grouping == "similar"

    @property
    def candidates(self) -> "Sequence[Reconstructing]":
        """Only this method."""
        return (self,)

    @abstractmethod
    def reconstruct(self, metric: Tensor, moments: Tensor) -> Reconstruction:
        """Returns the reconstruction of a group from a single head.

        Args:
            metric: S_j^2 = the sum of E[r r^H] over the consumers of head j, `[heads, width, width]`, Hermitian.
            moments: Gram matrices of the heads, E[k_i k_j^H], `[heads, width, heads, width]`.
        """

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns the mean of the heads, which are equal by then."""
        return mean(heads)

    def factor(self, moments: Tensor, shared: Tensor) -> Tensor | float:
        """Returns the factor of the pooled head besides P; 1 for most methods.

        Args:
            moments: Gram matrices of the heads, E[k_i k_j^T], `[heads, width, heads, width]`, of all dimensions.
            shared: P, `[heads, width, width]`.
        """
        return 1.0

    def __str__(self) -> str:
        return self.name if self.grouping == "consecutive" else f"{self.name}, similar heads grouped"


TINY = 1e-12
"""Smallest eigenvalue relative to the largest, or square relative to those of its parts: float64 resolves no less."""


@dataclass(frozen=True)
class Averaging(Reconstructing):
    """A method whose pooled head is the mean of the heads, in their bases or in others.

    Args:
        grouping: Heads that share a group: `"consecutive"` or `"similar"` heads.
        renorm: If True, multiplies the pooled head by c = (mean over heads of E||k_j||^2 / E||kbar||^2)^1/2, which gives it the
            root mean square of its members. Without batches, these are the Frobenius norms of their weights.
    """

    renorm: bool = False

    @property
    def turns(self) -> bool:
        """True if heads are first rotated, reordered, or rescaled."""
        return self.renorm or super().turns

    def factor(self, moments: Tensor, shared: Tensor) -> Tensor | float:
        """Returns c with `renorm`; 1 if the heads cancel out."""
        if not self.renorm:
            return 1.0
        members = torch.einsum("jaja->", moments) / len(moments)
        pooled = torch.einsum("iab,ibjc,jac->", shared, moments, shared)
        return (members / pooled).sqrt() if pooled > TINY * members else 1.0

    def __str__(self) -> str:
        return super().__str__() + ", norms restored" * self.renorm


@dataclass(frozen=True)
class Mean(Averaging):
    """Pools the heads of a group to their mean, as in the GQA paper.

    W_group = 1/J sum over j of W_j.

    The mean is summed in float32 or wider.

    Args:
        grouping: Heads that share a group: `"consecutive"` heads, or `"similar"` heads, whose mean loses least. Query heads are
            reordered along.
        renorm: If True, the pooled head gets the root mean square of its members, because heads that differ cancel out in part.
            Defaults to False, the paper's mean.

    Example:
        >>> import billhook as bh
        >>> print(bh.kv_methods.Mean("similar"))
        mean, similar heads grouped
    """

    changes_basis: ClassVar[bool] = False

    def reconstruct(self, metric: Tensor, moments: Tensor) -> Reconstruction:
        """Returns B_j = I, P_j = I / J."""
        eye = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device).expand(len(moments), -1, -1)
        return Reconstruction(eye, eye / len(moments))


ROUNDS = 100
"""Maximum number of rotations of all heads."""


@dataclass(frozen=True)
class Aligned(Averaging):
    """Rotates the heads of a group toward each other, and takes their mean.

    Queries and outputs are rotated along, so that the rotations alone change nothing. Without batches, the rotations follow from
    the weights. They are unitary matrices R_j with the least sum over j of E||R_j k_j - m||^2, m = 1/J sum over j of R_j k_j. As
    rotations keep lengths, that is sum over j of E||k_j||^2 - J E||m||^2, so the mean should be as large as possible. J^2
    E||m||^2 is the sum over i and j of tr(R_i E[k_i k_j^H] R_j^H), in which one head's rotation has a part of 2 Re tr(M_j
    R_j^H), M_j = sum over i != j of R_i E[k_i k_j^H]. With the singular value decomposition M_j = U s V^H, it is largest for R_j
    = U V^H (Schönemann 1966,
    https://doi.org/10.1007/BF02289451). Heads are rotated one after another until they converge (Gower 1975,
    https://doi.org/10.1007/BF02291478). The mean never shrinks, so the result is no worse than without rotations. kbar = m, so
    P_j = R_j / J, and B_j = R_j^H. Modules that do not call transformers' attention interface are aligned by their weights.

    Args:
        grouping: Heads that share a group: `"consecutive"` heads, or `"similar"` heads, which align best. Query heads are
            reordered along.
        renorm: If True, the pooled head gets the root mean square of its members. Defaults to False.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> bh.convert_kv_heads(model, 2, bh.kv_methods.Aligned()).after
        2
    """

    def reconstruct(self, metric: Tensor, moments: Tensor) -> Reconstruction:
        """Returns the rotations; the consumers of the heads do not matter."""
        count, width = moments.shape[:2]
        turns = torch.eye(width, dtype=moments.dtype, device=moments.device).repeat(count, 1, 1)
        for _ in range(ROUNDS):
            before = turns.clone()
            for head in range(count):
                others = [i for i in range(count) if i != head]
                left, _, right = torch.linalg.svd(torch.einsum("iab,ibc->ac", turns[others], moments[others, :, head]))
                turns[head] = left @ right
            if (turns - before).abs().max() < 1e-9:
                break
        return Reconstruction(turns.mH, turns / count)


@dataclass(frozen=True)
class SVD(Reconstructing):
    """Replaces a group by the head with the best low-rank approximation on the batches.

    A consumer r of head j computes r^H k_j, and then r^H B_j kbar. The sum over consumers of the mean square difference is
    E||S_j (k_j - B_j kbar)||^2, S_j^2 = sum of E[r r^H]. The consumers of values are the rows of W_O. Those of keys are queries,
    treated as independent of the keys and, for rotary pairs, at any angle. E weighs a token by the attention that it gets, and
    keys are relative to the mean key that a query sees: with score changes d and attention weights p, KL(p || p') is about
    1/2 sum over s of p_s (d_s - sum p d)^2.

    Stack these over the heads, T = [S_1 k_1; ...; S_J k_J]. Any choice of B and P replaces T by [S_j B_j]_j kbar, of rank w. The
    nearest such approximation is U U^H T, where the columns of U are the w first eigenvectors of E[T T^H] = [S_i E[k_i k_j^H]
    S_j]_ij (Eckart and Young 1936, https://doi.org/10.1007/BF02288367), and the loss is the sum of the other eigenvalues. It is
    reached with kbar = D U^H T, so P_j = D U_j^H S_j and B_j = S_j^-1 U_j D^-1, U_j being the rows of U of head j, for any
    invertible D. D = c l^-1/4, l the w first eigenvalues, gives B and kbar equal parts of the singular values l^1/2. c gives
    kbar the mean square of the heads that it replaces, so that training continues at the same scale.

    A metric that is zero counts as the identity. If all Gram matrices are zero, nothing can be lost, and the mean is used.
    Attention must go through transformers' interface.

    With rotary embeddings, the pairs of dimensions of the new head go to the frequencies that keep the most in all layers (see
    `frequencies`). The model is then saved with `rope_type="longrope"`, which states the frequency of each pair. If its class
    cannot state them, if a norm follows the projections, or if only some layers are converted, each frequency keeps a pair.

    Args:
        grouping: Heads that share a group: `"consecutive"` heads, or `"similar"` heads, which one head reconstructs best. Query
            heads are reordered along.
        frequencies: If `"free"`, pairs of dimensions go to the frequencies that keep the most. Frequencies that are nearly equal
            over the context become equal, and the slowest become 0. If `"fixed"`, each frequency keeps a pair.
        context: Number of tokens over which frequencies count as nearly equal. Defaults to `max_position_embeddings`.
        tolerance: Highest relative increase of the dense model's perplexity by equal frequencies alone, as its KL divergence
            predicts. It is measured on rows of `context` tokens, at most 2,048, or as many as the batches have.

    Raises:
        ValueError: If an argument is not legal.

    Example:
        >>> import billhook as bh, torch
        >>> model, batches = bh.load("tiny"), [{"input_ids": torch.arange(3, 67)[None]}]
        >>> bh.convert_kv_heads(model, 2, bh.kv_methods.SVD(), batches).after
        2
    """

    least_batches: ClassVar[int] = 1
    frequencies: Literal["free", "fixed"] = "free"
    context: int | None = None
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context is not None:
            check_int("context", self.context)
        check_fraction("tolerance", self.tolerance, "[0, 1)")

    def reconstruct(self, metric: Tensor, moments: Tensor, rank: int | None = None) -> Reconstruction:
        """Returns B and P from the first eigenvectors of the stacked Gram matrices.

        Args:
            metric: As in `Reconstructing`.
            moments: As in `Reconstructing`.
            rank: Width of the new head. Defaults to that of the heads. B is `[heads, width, rank]`, P `[heads, rank, width]`.
        """
        count, width = moments.shape[:2]
        rank = width if rank is None else rank
        root, inverse = _roots(metric)
        values, vectors = torch.linalg.eigh(_stacked(root, moments))
        if not values[-1] > torch.finfo(values.dtype).tiny:
            mean = Mean().reconstruct(metric, moments)
            return Reconstruction(_resized(mean.basis, width, rank), _resized(mean.shared, rank, width))
        top = vectors.flip(1)[:, :rank].reshape(count, width, rank)
        values = values.flip(0)[:rank]
        scale = values.clamp_min(TINY * values.max()).pow(-0.25)
        shared = scale[None, :, None] * (top.mH @ root)
        basis = inverse @ top / scale
        within = torch.einsum("iab,ibjc,jdc->ad", shared, moments, shared.conj())
        factor = (torch.einsum("jaja->", moments).real / count / within.diagonal().sum().real).sqrt()
        return Reconstruction(basis / factor, shared * factor)

    def spectrum(self, metric: Tensor, moments: Tensor) -> Tensor:
        """Returns the eigenvalues l, falling. A head of width w keeps the sum of the w first."""
        root, _ = _roots(metric)
        size = torch.linalg.eigvalsh(metric).max()
        values = torch.linalg.eigvalsh(_stacked(root, moments))
        spectrum: Tensor = (size * values).flip(0).clamp_min(0)
        return spectrum


def _stacked(root: Tensor, moments: Tensor) -> Tensor:
    """Returns E[T T^H], `[heads * width, heads * width]`."""
    stacked = torch.einsum("iab,ibjc,jcd->iajd", root, moments, root).flatten(2).flatten(0, 1)
    return (stacked + stacked.mH) / 2


def _resized(matrices: Tensor, rows: int, columns: int) -> Tensor:
    """Returns matrices with the first rows and columns, or more with zeros."""
    new = matrices.new_zeros(len(matrices), rows, columns)
    new[:, : matrices.shape[1], : matrices.shape[2]] = matrices[:, :rows, :columns]
    return new


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Returns S and S^-1, with a small weight for dimensions without consumers."""
    values, vectors = torch.linalg.eigh((metric + metric.mH) / 2)
    values = values / values.max().clamp_min(torch.finfo(values.dtype).tiny)
    values = values.clamp_min(TINY).sqrt().to(metric.dtype)[:, None]
    return vectors * values @ vectors.mH, vectors / values @ vectors.mH


@dataclass(frozen=True)
class Auto(KVMethod):
    """Tries several methods and uses the closest on held-out batches.

    The distance is the mean KL divergence of logits, or without logits the relative square error of the hidden states. The
    candidates are the mean, and rotation and low-rank approximation of consecutive and of similar heads, where the model allows
    them. A subclass can set other `candidates`.

    Example:
        >>> import billhook as bh
        >>> [str(method) for method in bh.kv_methods.Auto().candidates[2:4]]
        ['svd', 'aligned, similar heads grouped']
    """

    least_batches: ClassVar[int] = 2
    turns = True
    candidates = (Mean(), Aligned(), SVD(), Aligned("similar"), SVD("similar"))

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns the mean of the heads, which are equal by then."""
        return mean(heads)


@dataclass(frozen=True)
class First(KVMethod):
    """Keeps the first head of a group."""

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns the first head."""
        return first(heads)


@dataclass(frozen=True)
class RandomHeads(KVMethod):
    """Draws a new head for each group like initial weights.

    Biases and the optimizer state of drawn weights start at zero, and norms are averaged.

    Args:
        seed: Seed of the draws.
    """

    seed: int = 0
    pools_adapters: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Name in messages."""
        return "random"

    def pool(self, heads: Sequence[Tensor]) -> Tensor:
        """Returns the mean, for parameters outside linear layers."""
        return mean(heads)

    def changes(self, model: PreTrainedModel, parameters: Mapping[str, Pooled]) -> dict[str, Change]:
        """Returns draws for linear layers, and means for other parameters."""
        generator = torch.Generator().manual_seed(self.seed)
        config = model.config.get_text_config(decoder=True)
        changes = {}
        for name, pooled in parameters.items():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
                size = pooled.size(model.get_parameter(name).shape)
                changes[name] = drawing(pooled, size, std_of(config, size, pooled.dim), generator)
            else:
                changes[name] = pooling(pooled, self.pool)
        return changes


def drawing(pooled: Pooled, size: tuple[int, ...], std: float, generator: torch.Generator) -> Change:
    """Draws the pooled positions (biases are zero), with optimizer state zero; others stay."""
    drawn = torch.randn(size, generator=generator) * std if len(size) > 1 else torch.zeros(size)
    several = pooled.along(drawn) > 1

    def weight(old: Tensor) -> Tensor:
        return torch.where(several.to(old.device), drawn.to(old), pooled.pool(old, first))

    return Change(weight, lambda _, value: pooled.pool(value, first).masked_fill(several.to(value.device), 0))


def std_of(config: object, size: tuple[int, ...], dim: int) -> float:
    """Returns the initial deviation with outputs along `dim`; 1 / sqrt(inputs) if unknown."""
    inputs = math.prod(size) // size[dim]
    usual = float(getattr(config, "initializer_factor", 1.0)) * inputs**-0.5
    stated = (getattr(config, name, None) for name in ("initializer_range", "init_std"))
    return float(next((value for value in stated if isinstance(value, float | int)), usual))


Name = Literal["mean", "first", "random", "aligned", "svd", "auto"]
METHODS: dict[Name, type[KVMethod]] = {
    "mean": Mean,
    "first": First,
    "random": RandomHeads,
    "aligned": Aligned,
    "svd": SVD,
    "auto": Auto,
}


def method_of(method: KVMethod | Name | None, has_data: bool = False) -> KVMethod:
    """Returns the method, made with its defaults if only its short name is given.

    None is the best on held-out batches with calibration data, and the paper's mean without.
    """
    if method is None:
        return Auto() if has_data else Mean()
    if isinstance(method, KVMethod):
        return method
    check_one_of("method", method, Name)
    return METHODS[method]()
