"""Several heads rendered by one: the algebra of fewer KV heads.

The heads of a group, k_1 ... k_J, each of width w, become one, kbar = sum over j of P_j k_j, and head j is taken for B_j kbar.
What reads head j takes B_j in, so that nothing of it is left to compute. Of keys that is the query, whose score q^H k_j becomes
q^H B_j kbar = (B_j^H q)^H kbar; of values the output, W_O v_j, which becomes (W_O B_j) vbar. So all query heads of the group read
kbar.

Numbers are real, or complex where a rotary embedding stands between the projections and the score. It takes numbers in pairs and
turns each by an angle that depends on the pair and on the token: z = a + ib becomes e^(i angle) z. A complex factor commutes with
that, and of all matrices that mix a head's numbers nothing else does, for all angles at once. So there each pair is a head of
width 1 of its own, B_j and P_j are complex numbers, and the score is the real part of the sum of conj(q) k over the pairs.

A method is a choice of B and P. All of them look at nothing but second moments: E[k_i k_j^H], and E[r r^H] of the readers r.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-12
"""Eigenvalues below this share of the largest count as this share: float64 tells no more."""


@dataclass(frozen=True, eq=False)
class Rendering:
    """One head for several.

    Attributes:
        basis: B, `[heads, width, width]`.
        shared: P, `[heads, width, width]`.
    """

    basis: Tensor
    shared: Tensor


def mean(metric: Tensor, moments: Tensor) -> Rendering:
    """The mean of the heads (GQA, 2305.13245, section 2.1): B_j = I, P_j = I / J.

    Args:
        metric: As in `low_rank`; a mean does not look at it.
        moments: The second moments of the heads, `[heads, width, heads, width]`.
    """
    eye = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device).expand(len(moments), -1, -1)
    return Rendering(eye, eye / len(moments))


def aligned(metric: Tensor, moments: Tensor, rounds: int = 100) -> Rendering:
    """Each head turned so that they agree as far as turns can make them, and then the mean: generalised Procrustes analysis.

    Sought are unitary R_j with the least sum over j of E||R_j k_j - m||^2, m = 1/J sum over j of R_j k_j. As turns keep lengths,
    that is sum over j of E||k_j||^2 - J E||m||^2: the mean is to be as large as it can. In J^2 E||m||^2, which is the sum over i
    and j of tr(R_i E[k_i k_j^H] R_j^H), one head's turn has a say in 2 Re tr(M_j R_j^H), M_j = sum over i != j of
    R_i E[k_i k_j^H], and with the singular value decomposition M_j = U s V^H the unitary matrix that makes it largest is
    R_j = U V^H (Schoenemann 1966). Each head in its turn, until nothing moves (Gower 1975): the mean never shrinks, so the
    outcome is no worse than without turns. kbar = m, so P_j = R_j / J, and B_j = R_j^H. To turn, without the mean, changes
    nothing in the model.

    Args:
        metric: As in `low_rank`; turns do not look at it.
        moments: The second moments of the heads, `[heads, width, heads, width]`.
        rounds: How often, at most, all heads are turned.
    """
    count, width = moments.shape[:2]
    turns = torch.eye(width, dtype=moments.dtype, device=moments.device).repeat(count, 1, 1)
    for _ in range(rounds if count > 1 else 0):
        before = turns.clone()
        for head in range(count):
            others = [i for i in range(count) if i != head]
            left, _, right = torch.linalg.svd(torch.einsum("iab,ibc->ac", turns[others], moments[others, :, head]))
            turns[head] = left @ right
        if (turns - before).abs().max() < 1e-9:
            break
    return Rendering(turns.mH, turns / count)


def low_rank(metric: Tensor, moments: Tensor) -> Rendering:
    """The best there is: the truncated singular value decomposition of the group, in the metric of what reads it.

    A reader r of head j sees r^H k_j, and would see r^H B_j kbar. The sum over the readers of the mean square of the difference
    is E||S_j (k_j - B_j kbar)||^2, S_j^2 = sum of E[r r^H]. The readers of values are the rows of W_O; those of keys are queries,
    taken for independent of the keys as if any could meet any, and, of pairs, turned by any angle.

    Stack these over the heads, T = [S_1 k_1; ...; S_J k_J]. Any choice of B and P puts [S_j B_j]_j kbar, of rank w, in the place
    of T, and of all such the nearest is U U^H T, where the columns of U are the w first eigenvectors of
    E[T T^H] = [S_i E[k_i k_j^H] S_j]_ij (Eckart and Young 1936); what is lost is the sum of the other eigenvalues. It is reached
    with kbar = D U^H T, so P_j = D U_j^H S_j and B_j = S_j^-1 U_j D^-1, U_j being the rows of U that are of head j, for any
    invertible D. D = c l^-1/4, l the w first eigenvalues, gives B and kbar equal parts of the singular values l^1/2, and c gives
    kbar the mean square of the heads that it stands for, so that training goes on at the scale that it had.

    Args:
        metric: S_j^2, `[heads, width, width]`, Hermitian; where it is zero altogether, the identity.
        moments: The second moments of the heads, E[k_i k_j^H], `[heads, width, heads, width]`; where they are zero, so is what
            can be lost, and the mean is given.
    """
    count, width = moments.shape[:2]
    root, inverse = _roots(metric)
    stacked = torch.einsum("iab,ibjc,jcd->iajd", root, moments, root).reshape(count * width, count * width)
    values, vectors = torch.linalg.eigh((stacked + stacked.mH) / 2)
    if not values[-1] > torch.finfo(values.dtype).tiny:
        return mean(metric, moments)
    scale = values[-width:].clamp_min(TINY * values[-1]).pow(-0.25)
    first = vectors[:, -width:].reshape(count, width, width)
    shared = scale[None, :, None] * (first.mH @ root)
    basis = inverse @ first / scale
    within = torch.einsum("iab,ibjc,jdc->ad", shared, moments, shared.conj())
    factor = (torch.einsum("jaja->", moments).real / count / within.diagonal().sum().real).sqrt()
    return Rendering(basis / factor, shared * factor)


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """S and S^-1. What has no reader is taken for read a little: it then follows what the others need."""
    values, vectors = torch.linalg.eigh((metric + metric.mH) / 2)
    values = values / values.max().clamp_min(torch.finfo(values.dtype).tiny)
    values = values.clamp_min(TINY).sqrt().to(metric.dtype)[:, None]
    return vectors * values @ vectors.mH, vectors / values @ vectors.mH
