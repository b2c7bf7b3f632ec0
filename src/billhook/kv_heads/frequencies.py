"""The rotary frequencies of a KV head that replaces several.

A head of width d has d / 2 slots: pairs of dimensions that rotate at one frequency. The head that replaces J others need not have
a slot for each frequency. A frequency whose pairs matter little in all heads gets none, and another one several, up to J. Slots
of one frequency hold any complex mixture of the pairs that rotate at it, so neighboring frequencies are first made equal, as a
band, if that changes angles little over the context of the model. The slowest become 0, and hold any real mixture.

The model with such frequencies computes otherwise as before, and `rope_type="longrope"` states any of them. Related: FreqFold and
RoRoPE (TransMLA, https://arxiv.org/abs/2502.07864), EliteKV (https://arxiv.org/abs/2503.01586), and MHA2MLA
(https://arxiv.org/abs/2502.14837) also mix or omit frequencies, but by real factors, or for another architecture.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine import overridden
from billhook.kv_heads.layout import Projections
from billhook.kv_heads.symmetry import Mixing, Symmetry, find_symmetries
from billhook.model import longrope, rope_parameters, rotary_embeddings, text_config, with_modules, with_rope_parameters

EXACT = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotary types with the same frequencies for texts of all lengths, provided that both lists of a longrope are equal."""

STILL = 2e-9
"""Largest frequency that counts as 0: what `longrope` states for it."""


@dataclass(frozen=True)
class Band:
    """Pairs of each head that rotate at one frequency, or at 0.

    Attributes:
        pairs: Their numbers.
        frequency: Radians per token.
    """

    pairs: tuple[int, ...]
    frequency: float


@dataclass(frozen=True)
class Rotation:
    """How the keys of a model rotate.

    Attributes:
        frequencies: Radians per token of each pair, in the order of the model.
        scaling: Factor of all cosines and sines.
        pairs: The two positions of each pair in a head.
        rest: Positions that do not rotate.
    """

    frequencies: tuple[float, ...]
    scaling: float
    pairs: tuple[tuple[int, int], ...]
    rest: tuple[int, ...]

    def mixing(self, numbers: Sequence[int], frequency: float) -> Mixing:
        """Returns the positions of pairs, and of the rest if the frequency is 0."""
        first = tuple(self.pairs[n][0] for n in numbers)
        second = tuple(self.pairs[n][1] for n in numbers)
        return Mixing(first, second) if frequency else Mixing(self.rest + first + second)

    def within(self, bands: Sequence[Band]) -> list[float]:
        """Returns the frequency of each pair, equal within a band."""
        of_pair = {pair: band.frequency for band in bands for pair in band.pairs}
        return [of_pair[pair] for pair in range(len(of_pair))]

    def rope(self, model: nn.Module, frequencies: Sequence[float]) -> dict[str, Any]:
        """Returns the rotary parameters that give pairs these frequencies."""
        return longrope(model, torch.tensor(frequencies, dtype=torch.float64), self.scaling)


def find_rotation(model: nn.Module, projections: Mapping[str, Projections], symmetries: Sequence[Symmetry]) -> Rotation:
    """Finds how keys rotate, and proves that the model's code follows other rotary parameters.

    Args:
        model: The model.
        projections: Its attention modules.
        symmetries: The symmetry of the keys of each attention module.

    Raises:
        ValueError: If its frequencies cannot be chosen.
    """
    stated = rope_parameters(model)
    modules = rotary_embeddings(model)
    if not stated or not modules:
        raise ValueError("its config has no rope_parameters for all layers")
    lists = [name for name, value in stated.items() if isinstance(value, list)]
    if stated["rope_type"] not in EXACT or (lists and stated.get("short_factor", lists) != stated.get("long_factor")):
        raise ValueError(f"rope_type='{stated['rope_type']}' ({', '.join(stated)}) permits no other frequencies")
    symmetry, *different = set(symmetries)
    pairs = [mixing for mixing in symmetry if mixing.imaginary]
    if different or not pairs:
        raise ValueError("its keys pass a norm, or do not rotate equally in all layers")
    frequencies = [frequency if frequency > STILL else 0.0 for frequency in modules[0].get_buffer("inv_freq").tolist()]
    if len(pairs) != len(frequencies):
        raise ValueError(f"it has {len(frequencies)} frequencies, but {len(pairs)} pairs of dimensions rotate")
    rest = tuple(position for mixing in symmetry if not mixing.imaginary for position in mixing.real)
    positions = tuple((pair.real[0], pair.imaginary[0]) for pair in pairs)
    scaling: Any = modules[0].attention_scaling
    rotation = Rotation(tuple(frequencies), float(scaling), positions, rest)
    # The code must follow other frequencies: a third of them equal, and a third 0, so that keys mix within both.
    numbers = range(len(frequencies))
    first = next(iter(projections))
    slow = frequencies[len(numbers) // 2]  # of fast ones, float32 would round the angles differently
    others = [(slow, 0.0, frequencies[n])[n % 3] for n in numbers]
    mixings = [rotation.mixing(numbers[0::3], 1.0), rotation.mixing(numbers[1::3], 0.0)]
    symmetry = (*mixings, *(rotation.mixing([n], 1.0) for n in numbers[2::3]))
    try:
        parameters = rotation.rope(model, others)
        rotary = with_rope_parameters(model, parameters)
        config: Any = model.config
        with overridden(text_config(config), rope_parameters=parameters):  # attention modules may read them as well
            of_module = with_modules(rotary, lambda: find_symmetries(model, {first: projections[first]}, [symmetry]))
    except Exception as error:  # whatever a class of models raises
        raise ValueError(
            f"{type(model).__name__} does not accept rope_type='longrope' ({type(error).__name__}: {error})"
        ) from error
    rounded = torch.tensor(others, dtype=torch.float64), 1e-5, 1e-8
    follow = (torch.allclose(module.get_buffer("inv_freq").cpu().double(), *rounded) for module in rotary.values())
    if of_module[first].keys != symmetry or not all(follow):
        raise ValueError(f"{type(model).__name__} does not follow rope_type='longrope'")
    return rotation


def bands_within(rotation: Rotation, angle: float) -> tuple[Band, ...]:
    """Returns bands of frequencies that change by at most `angle` radians per token."""
    frequencies = rotation.frequencies
    order = sorted(range(len(frequencies)), key=frequencies.__getitem__)
    slow = [number for number in order if frequencies[number] <= angle]
    groups = list[list[int]]()
    for number in order[len(slow) :]:
        if not groups or frequencies[number] - frequencies[groups[-1][0]] > 2 * angle:
            groups.append([])
        groups[-1].append(number)
    bands = [Band(tuple(sorted(slow)), 0.0)] if slow else []
    for group in groups:
        least = frequencies[group[0]]
        most = frequencies[group[-1]]
        bands.append(Band(tuple(sorted(group)), least if least == most else (least + most) / 2))
    return tuple(bands)


@dataclass(frozen=True)
class Slots:
    """The frequencies of the slots of a new head, and the pairs that each may hold.

    Attributes:
        rotation: How the old heads rotate.
        bands: The bands of the old heads.
        counts: Number of slots of each band.
    """

    rotation: Rotation
    bands: tuple[Band, ...]
    counts: tuple[int, ...]

    @property
    def frequencies(self) -> list[float]:
        """Radians per token of each slot, from fast to slow."""
        counted = zip(self.bands, self.counts, strict=True)
        return sorted((band.frequency for band, count in counted for _ in range(count)), reverse=True)

    @property
    def mixings(self) -> list[tuple[Mixing, Mixing]]:
        """Positions of each band, in an old head and in the new head."""
        mixings = []
        first = 0
        for band, count in sorted(zip(self.bands, self.counts, strict=True), key=lambda pair: -pair[0].frequency):
            new = self.rotation.mixing(range(first, first + count), band.frequency)
            mixings.append((self.rotation.mixing(band.pairs, band.frequency), new))
            first += count
        if self.rotation.rest and self.bands[0].frequency:
            mixings.append((Mixing(self.rotation.rest), Mixing(self.rotation.rest)))
        return mixings


def allot(rotation: Rotation, bands: Sequence[Band], spectra: Sequence[Tensor]) -> Slots:
    """Gives each slot of a new head to the band where it keeps the most.

    Args:
        rotation: How the old heads rotate.
        bands: The bands of the old heads.
        spectra: By band, the eigenvalues of `SVD.spectrum`, falling. A slot takes one of a band, and keeps half of it, as the
            phases of queries and keys differ; or two of the band with frequency 0.
    """
    gains = [(gain, number) for number, of_band in enumerate(_gains(rotation, bands, spectra)) for gain in of_band]
    taken = Counter(number for _, number in heapq.nlargest(len(rotation.pairs), gains))
    return Slots(rotation, tuple(bands), tuple(taken[number] for number in range(len(bands))))


def lost(slots: Slots, spectra: Sequence[Tensor]) -> float:
    """Returns the share of keys, as queries see them, that slots do not keep."""
    gains = _gains(slots.rotation, slots.bands, spectra)
    total = sum(map(sum, gains))
    return sum(sum(of_band[count:]) for of_band, count in zip(gains, slots.counts, strict=True)) / total if total else 0.0


def _gains(rotation: Rotation, bands: Sequence[Band], spectra: Sequence[Tensor]) -> list[list[float]]:
    """Returns the gain of each further slot of a band, falling."""
    gains = []
    for band, spectrum in zip(bands, spectra, strict=True):
        kept = spectrum / 2 if band.frequency else spectrum[len(rotation.rest) :].reshape(-1, 2).sum(1)
        gains.append(kept.tolist())
    return gains
