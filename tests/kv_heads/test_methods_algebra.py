"""The algebra against samples: numpy's decomposition of the stacked data, plain loops over tokens, many random turns."""

import numpy as np
import pytest
import torch

from billhook.kv_heads.methods import SVD, Aligned, Mean

mean, aligned, low_rank = Mean().reconstruct, Aligned().reconstruct, SVD().reconstruct
KINDS = {"real": torch.float64, "complex": torch.complex128}


def heads(kind, count, width, tokens=200, seed=0):
    """Samples of heads that have to do with each other, `[tokens, count, width]`."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, width + 1, generator=generator, dtype=KINDS[kind])
    mix = torch.randn(count, width, width + 1, generator=generator, dtype=KINDS[kind])
    own = torch.randn(tokens, count, width, generator=generator, dtype=KINDS[kind])
    return torch.einsum("jab,tb->tja", mix, shared) + 0.5 * own


def readers(kind, count, width, seed=1):
    """What reads each head: some rows, `[count, rows, width]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2 * width, width, generator=generator, dtype=KINDS[kind]) * torch.linspace(1, 3, width)


def moments_of(samples):
    return torch.einsum("tia,tjb->iajb", samples, samples.conj()) / len(samples)


def metric_of(rows):
    return torch.einsum("jra,jrb->jab", rows.conj(), rows)


def rendered(found, samples):
    """What each head is taken for, token by token."""
    outcome = torch.empty_like(samples)
    for number, sample in enumerate(samples):
        shared = sum(found.shared[head] @ sample[head] for head in range(len(sample)))
        for head in range(len(sample)):
            outcome[number, head] = found.basis[head] @ shared
    return outcome


def lost(rows, samples, outcome):
    """The mean over tokens of what all readers of all heads miss."""
    missing = torch.einsum("jra,tja->tjr", rows, samples - outcome)
    return float(missing.abs().square().sum() / len(samples))


def unitary(kind, count, width, generator):
    return torch.linalg.qr(torch.randn(count, width, width, generator=generator, dtype=KINDS[kind]))[0]


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_loses_what_the_singular_values_of_the_stacked_data_say_and_no_other_choice_less(kind, width):
    samples, rows = heads(kind, 3, width), readers(kind, 3, width)
    found = low_rank(metric_of(rows), moments_of(samples))
    stacked = torch.einsum("jra,tja->jrt", rows, samples).reshape(-1, len(samples)).numpy()  # all that is read, of all tokens
    values = np.linalg.svd(stacked, compute_uv=False)
    best = float((values[width:] ** 2).sum() / len(samples))
    assert lost(rows, samples, rendered(found, samples)) == pytest.approx(best, rel=1e-9)
    assert best > 0.01 * float((values**2).sum() / len(samples))
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        noise = 0.05 * torch.randn(3, width, width, generator=generator, dtype=KINDS[kind])
        other = type(found)(found.basis + noise, found.shared + noise)
        assert lost(rows, samples, rendered(other, samples)) > best
    for method in (mean, aligned):
        assert lost(rows, samples, rendered(method(metric_of(rows), moments_of(samples)), samples)) > best


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_one_head_has_the_mean_square_of_those_it_is_for_and_shares_the_scale(kind, width):
    samples, rows = heads(kind, 3, width), readers(kind, 3, width)
    found = low_rank(metric_of(rows), moments_of(samples))
    shared = torch.einsum("jab,tjb->ta", found.shared, samples)
    assert float(shared.abs().square().sum(1).mean()) == pytest.approx(float(samples.abs().square().sum(2).mean()))
    read = torch.einsum("jra,jab->jrb", rows, found.basis).flatten(
        0, 1
    )  # the columns that read kbar, and kbar: of one proportion
    columns, numbers = read.abs().square().sum(0), shared.abs().square().mean(0)
    torch.testing.assert_close(columns / columns[0], numbers / numbers[0])
    scaled = low_rank(7 * metric_of(rows), 9 * moments_of(samples))
    torch.testing.assert_close(scaled.basis @ scaled.shared, found.basis @ found.shared)


def test_one_complex_number_against_all_directions():
    samples, rows = heads("complex", 2, 1), readers("complex", 2, 1)
    found = lost(rows, samples, rendered(low_rank(metric_of(rows), moments_of(samples)), samples))
    tried = []
    size = rows.abs().square().sum(1).sqrt()[:, 0]
    read = samples[:, :, 0] * size
    for angle in torch.linspace(0, torch.pi / 2, 31):
        for phase in torch.linspace(0, 2 * torch.pi, 61):
            one = torch.stack([angle.cos() + 0j, angle.sin() * torch.exp(1j * phase)]).to(read.dtype)
            missing = read - (read @ one.conj())[:, None] * one
            tried.append(float(missing.abs().square().sum() / len(read)))
    assert found <= min(tried)
    assert found == pytest.approx(min(tried), rel=1e-2)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_turns_are_unitary_and_no_others_bring_heads_nearer(kind, width):
    samples, generator = heads(kind, 3, width), torch.Generator().manual_seed(3)
    found = aligned(metric_of(readers(kind, 3, width)), moments_of(samples))
    eye = torch.eye(width, dtype=KINDS[kind]).expand(3, -1, -1)
    torch.testing.assert_close(found.basis @ found.basis.mH, eye)
    torch.testing.assert_close(found.shared, found.basis.mH / 3)

    def apart(turns):
        turned = torch.einsum("jab,tjb->tja", turns, samples)
        return float((turned - turned.mean(1, keepdim=True)).abs().square().sum() / len(samples))

    best = apart(found.basis.mH)
    assert best == pytest.approx(float((samples - rendered(found, samples)).abs().square().sum() / len(samples)))
    assert best < 0.95 * apart(eye)
    others = [unitary(kind, 3, width, generator) for _ in range(200)]
    near = [found.basis.mH @ torch.matrix_exp(0.1 * (one - one.mH)) for one in others]
    assert best <= min(map(apart, others + near)) + 1e-9


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_turns_of_one_another_lose_nothing(kind, count):
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(300, 5, generator=generator, dtype=KINDS[kind]) * torch.linspace(0.3, 1, 5)
    samples = torch.einsum("jab,tb->tja", unitary(kind, count, 5, generator), one)
    found = aligned(metric_of(readers(kind, count, 5)), moments_of(samples))
    torch.testing.assert_close(rendered(found, samples), samples, atol=1e-6, rtol=1e-6)
    assert (rendered(mean(found.basis, moments_of(samples)), samples) - samples).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_mixes_of_one_another_lose_nothing(kind):
    generator = torch.Generator().manual_seed(5)
    one = torch.randn(300, 4, generator=generator, dtype=KINDS[kind])
    samples = torch.einsum("jab,tb->tja", torch.randn(3, 4, 4, generator=generator, dtype=KINDS[kind]), one)
    found = low_rank(metric_of(readers(kind, 3, 4)), moments_of(samples))
    torch.testing.assert_close(rendered(found, samples), samples)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_the_mean(kind):
    samples = heads(kind, 3, 4)
    found = mean(metric_of(readers(kind, 3, 4)), moments_of(samples))
    torch.testing.assert_close(rendered(found, samples), samples.mean(1, keepdim=True).expand_as(samples))


@pytest.mark.parametrize("method", [mean, aligned, low_rank], ids=["mean", "aligned", "svd"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_degenerate_stays_finite(kind, method):
    samples, rows = heads(kind, 3, 4), readers(kind, 3, 4)
    usual = moments_of(samples), metric_of(rows)
    flat, unread, silent = samples[:2], rows.clone(), samples.clone()  # two tokens; a head nobody reads; a head that says nothing
    unread[0], silent[:, 0] = 0, 0
    for moments, metric in (
        (usual[0], torch.zeros_like(usual[1])),
        (torch.zeros_like(usual[0]), usual[1]),
        (moments_of(flat), usual[1]),
        (usual[0], metric_of(unread)),
        (moments_of(silent), usual[1]),
        (1e-120 * usual[0], 1e-150 * usual[1]),
        (1e60 * usual[0], 1e150 * usual[1]),
    ):
        found = method(metric, moments)
        for matrices in (found.basis, found.shared):
            assert matrices.isfinite().all()
            assert matrices.abs().max() < 1e4
    alone = method(usual[1][:1], usual[0][:1, :, :1])
    torch.testing.assert_close(rendered(alone, samples[:, :1]), samples[:, :1])
    if method is low_rank:  # the metric of nobody is the plain one, and whom nobody reads is rendered from what the others need
        torch.testing.assert_close(
            (found := method(torch.zeros_like(usual[1]), usual[0])).basis @ found.shared,
            (plain := method(torch.eye(4, dtype=KINDS[kind]).expand(3, -1, -1), usual[0])).basis @ plain.shared,
        )
        two, all_three = low_rank(usual[1][1:], usual[0][1:, :, 1:]), low_rank(metric_of(unread), usual[0])
        expected, outcome = rendered(two, samples[:, 1:]), rendered(all_three, samples)[:, 1:]
        torch.testing.assert_close(outcome, expected, atol=1e-4, rtol=1e-4)
