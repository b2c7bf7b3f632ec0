"""ALPS against an implementation of the paper's algorithm 1 by explicit inverses, in float64, and what it promises."""

import numpy as np
import pytest
import torch

import billhook as bh
from billhook.engine.statistics import InputGram
from billhook.sparsity.alps import admm
from billhook.sparsity.masks import keep_layer, keep_n_of_m, keep_rows

KEEPS = {
    "layer": lambda scores: keep_layer(scores, 0.6),
    "row": lambda scores: keep_rows(scores, 0.6),
    "2:4": lambda scores: keep_n_of_m(scores, 2, 4),
}


def problem(rows=12, columns=40, tokens=300):
    torch.manual_seed(0)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns) / columns**0.5
    inputs = torch.randn(tokens, columns) @ mix
    return torch.randn(rows, columns), inputs


def moments_of(inputs):
    moments = InputGram(inputs.shape[1])
    moments.add(inputs)
    return moments


def scaled(weight, inputs, ridge=0.01):
    """W and H in the paper's units: inputs of norm one, the ridge within."""
    h = (inputs.t() @ inputs).double().numpy()
    h += ridge * h.diagonal().mean() * np.eye(len(h))
    norm = np.sqrt(h.diagonal())
    return weight.double().numpy() * norm, h / norm / norm[:, None], norm


def papers(dense, h, keep_of, rho, steps):
    """Algorithm 1, W transposed to what the paper has, with a list of the supports."""
    w0, n, supports = dense.T, len(h), []
    d, v = w0 * keep_of(torch.from_numpy(dense).float().abs()).numpy().T, np.zeros_like(w0)
    supports.append(d != 0)
    for t in range(steps):
        w = np.linalg.inv(h + rho * np.eye(n)) @ (h @ w0 - v + rho * d)
        keep = keep_of(torch.from_numpy((w + v / rho).T).float().abs()).numpy().T
        d = (w + v / rho) * keep
        v = v + rho * (w - d)
        if (t + 1) % 3 == 0:
            change = np.logical_xor(keep, supports[-1]).sum()
            supports.append(keep)
            if change == 0 or (t + 1 > 30 and change < 3e-4 * keep.sum()):
                return d.T, len(supports)
            k = keep.sum()
            rho *= 1.3 if change >= 0.1 * k else 1.2 if change >= 0.005 * k else 1.1
    return d.T, len(supports)


@pytest.mark.parametrize("steps", [2, 9, 300])
@pytest.mark.parametrize("compares", KEEPS)
def test_it_is_the_papers_algorithm(compares, steps):
    dense, h, _ = scaled(*problem())
    expected, checked = papers(dense, h, KEEPS[compares], 0.1, steps)
    found, keep = admm(torch.from_numpy(dense).float(), torch.from_numpy(h).float(), KEEPS[compares], 0.1, steps)
    assert np.array_equal(keep.numpy(), expected != 0)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
    assert checked > 3 or steps < 9, "the support was compared more than once"
    assert steps < 300 or checked < 60, "it stayed in the end"


def test_a_penalty_that_holds_the_first_mask_is_lowered():
    weight, inputs = problem()
    dense, h, _ = scaled(weight, inputs)
    first = KEEPS["layer"](torch.from_numpy(dense).float().abs())
    _, keep = admm(torch.from_numpy(dense).float(), torch.from_numpy(h).float(), KEEPS["layer"], 1e4, 300)
    assert not keep.equal(first)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (0.7, "unstructured"), (None, "2:4")])
def test_its_outputs_are_nearer_than_those_of_all_others(sparsity, pattern):
    weight, inputs = problem(rows=24, columns=64, tokens=500)

    def lost(criterion):
        pruned, _ = criterion.prune(weight, moments_of(inputs), sparsity, pattern)
        return float(((weight - pruned) @ inputs.t()).norm())

    others = [
        bh.Wanda(),
        bh.SparseGPT(),
        bh.criteria.Refit(),
        bh.criteria.Refit(bh.SparseGPT()),
        bh.criteria.Refit(bh.Wanda(compares="layer")),
    ]
    assert lost(bh.criteria.ALPS()) < 0.97 * min(map(lost, others))


def test_what_is_kept_is_solved_for():
    weight, inputs = problem()
    pruned, keep = bh.criteria.ALPS(refits=60).prune(weight, moments_of(inputs), 0.5)
    dense, h, norm = scaled(weight, inputs)
    for row, kept in enumerate(keep.numpy()):
        exact = np.linalg.solve(h[np.ix_(kept, kept)], (h @ dense[row])[kept]) / norm[kept]
        np.testing.assert_allclose(pruned[row, kept].numpy(), exact, atol=1e-3)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: bh.criteria.ALPS(compares="global"), r"compares='global' must be one of .*row.*layer"),
    (lambda: bh.criteria.ALPS(damping=0), r"damping=0 must be a number above 0"),
    (lambda: bh.criteria.ALPS(penalty=-1), r"penalty=-1 must be a number above 0"),
    (lambda: bh.criteria.ALPS(steps=0), r"steps=0 must be a whole number of at least 1"),
    (lambda: bh.criteria.ALPS(refits=-1), r"refits=-1 must be a whole number of at least 0"),
])  # fmt: skip
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scores_are_of_weights_and_input_norms_and_zero_for_inputs_that_are_zero():
    weight, inputs = problem()
    inputs[:, 3] = 0
    _, _, norm = scaled(weight, inputs)
    norm[3] = 0
    scores = bh.criteria.ALPS().score(weight, moments_of(inputs))
    assert scores.numpy() == pytest.approx(weight.abs().numpy() * norm, rel=1e-4)
