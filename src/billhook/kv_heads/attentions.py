"""Attention modules to convert: their statistics, and weights that make heads equal.

`equal_heads` in `convert.py` calls, in this order:

1. `allowed` refuses methods that do not suit the symmetries of the modules (`find_symmetries`).
2. `run` makes a run of each batch.
3. `reconstructed` yields equal heads, by `_with_slots` if rotary frequencies are free, or else by `_equal`.
   - `_with_slots` compares frequencies (`_bands`), sums spectra block by block (`key_spectra`), and allots slots (`allot`).
   - `_equal` finds the bases of each module (`find_bases`), pools its heads (`pooled`), and stages each block.
   - Both receive Gram matrices from `_by_block`: those of data (`gather`), or of weights (`weight_moments`).
4. `repaired` refits the output layers (`repair_linears`).

`best_method` calls 3 and 4 for all candidates, and `distances` on held-out batches, before `equal_heads` does for the best.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn

from billhook.adapters.merge import MERGE_HINT, adapter_layers
from billhook.engine import (
    SINGLE_PROCESS,
    Comm,
    LazyTensors,
    Loss,
    Run,
    blocks_of,
    by_parameter,
    run_with_loss,
    runs_fingerprint,
    store_of,
)
from billhook.kv_heads.basis import find_bases, key_spectra, pooled, similar_order
from billhook.kv_heads.distance import EqualHeads, distances
from billhook.kv_heads.frequencies import Band, Rotation, Slots, allot, bands_within, find_rotation, lost
from billhook.kv_heads.layout import HeadTensors, find_projections, read, ties_of, written
from billhook.kv_heads.methods import SVD, Grouping, KVMethod, Reconstructing
from billhook.kv_heads.moments import NOT_SEEN, Moments, T, Use, gather, weight_moments
from billhook.kv_heads.symmetry import find_symmetries
from billhook.linalg import float64_device
from billhook.model import is_linear, rope_parameters, rotary_embeddings, rotating_with, size_of, text_config
from billhook.progress import OnProgress
from billhook.repairs.repair import RepairConfig, repair_linears
from billhook.tracing.trace import trace
from billhook.units import find_heads

ANGLES = (0.5, 0.35, 0.25, 0.15)
"""Radians over the context by which rotary frequencies may change, in the order in which they are tried.

With 0.5, tokens of SmolLM2 beyond 4,096 of 8,192 lose 0.6%, and 5.7% with 1.
"""
TEXT = {"input_ids", "attention_mask", "labels"}
"""Inputs of batches of text, whose tokens can be joined to longer rows."""
NOTHING = 1e-9
"""Share of keys that counts as nothing, so that frequencies need not become equal."""
MOST = 2048
"""Maximum number of tokens in a row that compares frequencies, as all logits of a row are in memory."""


def _moves_frequencies(method: Reconstructing) -> bool:
    return isinstance(method, SVD) and method.frequencies == "free"


class Attentions:
    """The attention modules to convert, with their number of groups and their symmetries."""

    def __init__(self, model: nn.Module, groups: Mapping[str, int], comm: Comm = SINGLE_PROCESS) -> None:
        for layer, name in product(adapter_layers(model), groups):
            if layer.startswith(f"{name}."):
                why = "heads stay in their bases, where 'mean' and 'first' can pool them without a repair"
                raise ValueError(f"model: with LoRA attached to {layer}, {why}: or {MERGE_HINT}")
        structure = trace(model)
        self.model = model
        self.groups = groups
        self._comm = comm
        self.store = store_of(model)
        self.projections = find_projections(model, structure, groups)
        self._every = find_heads(model, structure).keys()
        self.symmetries = find_symmetries(model, self.projections)
        downs = dict.fromkeys(part.name.rpartition(".")[0] for ffn in structure.feed_forward for part in ffn.down)
        self.downs = [name for name in downs if is_linear(model.get_submodule(name))]
        self.not_refitted = list[str]()  # by the last repair

    def check(self, method: Reconstructing) -> None:
        """Raises a ValueError if the method needs an unsupported reordering or change of basis."""
        fixed = [name for name, symmetries in self.symmetries.items() if not symmetries.order]
        if isinstance(method, SVD) and method.context is not None and method.context > self._longest:
            raise ValueError(f"context={method.context} must be at most max_position_embeddings={self._longest}")
        if method.grouping == "similar" and fixed:
            raise ValueError(
                f"grouping='similar' reorders heads, which changes the output of {fixed[0]} (its code depends on "
                "the position of each head). Use grouping='consecutive'."
            )
        if method.changes_basis and not any(symmetries.keys or symmetries.values for symmetries in self.symmetries.values()):
            raise ValueError(
                f"method='{method.name}': no change of basis preserves the output of {next(iter(self.projections))} (a "
                "norm or a gate follows its projections): 'mean' works"
            )
        if method.least_batches and not self.interface:
            raise ValueError(f"method='{method.name}': {NOT_SEEN}")

    def allowed(self, methods: Sequence[Reconstructing], repair: RepairConfig | None) -> list[Reconstructing]:
        """Returns the methods that suit the modules; raises for none, or repairs with adapters."""
        if repair is not None and (layers := adapter_layers(self.model)):
            raise ValueError(f"repair refits weights, and {next(iter(layers))} has adapters: leave it out, or {MERGE_HINT}")
        allowed = []
        refusal = None
        for method in methods:
            try:
                self.check(method)
                allowed.append(method)
            except ValueError as error:
                refusal = error
        if not allowed and refusal is not None:
            raise refusal
        return allowed

    def run(self, batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
        """Returns a run of a batch, with the non-padding tokens of each linear layer."""
        names = {linear for attention in self.projections.values() for linear in attention.linears} | set(self.downs)
        return run_with_loss(self.model, {name: self.model.get_submodule(name) for name in names}, batch, loss)

    def held_out_batches(self, runs: int, repair: RepairConfig | None = None) -> set[int]:
        """Returns the indices of this rank's runs that are held out to choose a ridge penalty."""
        return (repair or RepairConfig()).held_out_on_rank(runs, self._comm)

    def summed(self, *numbers: float) -> list[float]:
        """Returns sums over ranks."""
        return self._comm(torch.tensor(numbers, dtype=torch.float64, device=float64_device(self._comm.device))).tolist()

    @torch.no_grad()
    def reconstructed(
        self, methods: Sequence[Reconstructing], runs: Sequence[Run]
    ) -> Iterator[tuple[Reconstructing, EqualHeads]]:
        """Yields for each method the parameters with equal heads in each group.

        The methods have the same grouping. One pass serves all that keep the rotary frequencies, and statistics are dropped with
        their block.
        """
        rotation, why = self.rotation if any(map(_moves_frequencies, methods)) else (None, "")
        fixed = [method for method in methods if rotation is None or not _moves_frequencies(method)]
        for method, values in self._equal(fixed, runs) if fixed else ():
            yield method, EqualHeads(values, how=why if _moves_frequencies(method) else "")
        for method in methods:
            if rotation is not None and isinstance(method, SVD) and method not in fixed:
                yield method, self._with_slots(method, rotation, runs)

    def _equal(
        self, methods: Sequence[Reconstructing], runs: Sequence[Run], slots: Slots | None = None
    ) -> Iterator[tuple[Reconstructing, LazyTensors]]:
        """Yields equal heads by each method; reuses blocks of an interrupted process."""
        store = self.store
        grouping = methods[0].grouping
        new = LazyTensors({})

        def equal(block: nn.Module | None, moments: Iterable[tuple[str, Moments]]) -> LazyTensors:
            values = dict[str, Tensor]()
            for name, of_heads in moments:
                for number, method in enumerate(methods):
                    tensors, ordered = self._in_order(name, method, of_heads)
                    bases = find_bases(tensors, ordered, self.symmetries[name], method, slots)
                    written_out = written(self.model, self.projections[name], pooled(tensors, *bases))
                    values |= {f"{number} {parameter}": value for parameter, value in by_parameter(written_out).items()}
            return store.stage(block, values)

        with store.step(f"heads of {self.groups} by {methods} {slots}", partial(runs_fingerprint, runs)):
            finished = [block for block in store.blocks.values() if store.read_staged(block) is not None]
            for part in (*(store.stage(block, {}) for block in finished), *self._by_block(grouping, runs, equal, finished)):
                new |= part
        for number, method in enumerate(methods):
            prefix = f"{number} "
            reads = {name.removeprefix(prefix): read for name, read in new.reads.items() if name.startswith(prefix)}
            yield method, LazyTensors(reads)

    def _by_block(self, grouping: Grouping, runs: Sequence[Run], use: Use[T], finished: Sequence[nn.Module] = ()) -> list[T]:
        """Passes the moments of data, or of weights without data, to `use` by unfinished block."""
        inside = defaultdict(list)
        for name in self.projections:
            inside[self.store.owner.get(self.model.get_submodule(name))].append(name)
        left = {block: names for block, names in inside.items() if block not in finished}
        groups = self._seen_in(grouping)
        if left and self.interface and any(self.summed(len(runs))):
            attentions = {name: self.projections[name] for names in left.values() for name in names}
            return gather(self.model, attentions, groups, runs, use, self._comm)
        return [
            use(block, ((name, weight_moments(self._read(name), groups[name])) for name in names))
            for block, names in left.items()
        ]

    def _seen_in(self, grouping: Grouping) -> dict[str, int]:
        """Returns the number of groups for the statistics: one if the method groups the heads."""
        return {name: 1 if grouping == "similar" else self.groups[name] for name in self.projections}

    def _read(self, name: str) -> HeadTensors:
        self.store.load(self.model.get_submodule(name))
        return read(self.model, self.projections[name])

    @property
    def interface(self) -> bool:
        """True if all modules call transformers' attention interface."""
        return all(symmetries.interface for symmetries in self.symmetries.values())

    @property
    def _longest(self) -> float:
        """Maximum number of tokens that the config states."""
        return getattr(text_config(self.model.config), "max_position_embeddings", None) or math.inf  # type: ignore[arg-type]

    @cached_property
    def rotation(self) -> tuple[Rotation | None, str]:
        """How keys rotate if their frequencies can be chosen, or else the reason."""
        if getattr(text_config(self.model.config), "rope_parameters", None) is None:  # type: ignore[arg-type]
            return None, ""
        try:
            if self.projections.keys() != self._every:
                raise ValueError("other layers keep their KV heads and rotate with the same frequencies")
            symmetries = [symmetries.keys for symmetries in self.symmetries.values()]
            return find_rotation(self.model, self.projections, symmetries), ""
        except ValueError as error:
            return None, f"rotary frequencies stay, because {error}"

    def _with_slots(self, method: SVD, rotation: Rotation, runs: Sequence[Run]) -> EqualHeads:
        """Returns the parameters with slots at the frequencies that keep the most."""
        bands, how = self._bands(method, rotation, runs)
        turning = rotating_with(self.model, rotation.rope(self.model, rotation.within(bands)), runs)
        separate = bands_within(rotation, 0)
        mixings = [rotation.mixing(band.pairs, band.frequency) for band in (*bands, *separate)]

        def of_block(_: nn.Module | None, moments: Iterable[tuple[str, Moments]]) -> list[list[Tensor]]:
            return [key_spectra(self._in_order(name, method, of_heads)[1], method, mixings) for name, of_heads in moments]

        of_modules = chain.from_iterable(self._by_block(method.grouping, turning, of_block))
        spectra = [torch.stack(of_band).sum(0).cpu() for of_band in zip(*of_modules, strict=True)]
        slots = allot(rotation, separate, spectra[len(bands) :])
        if lost(slots, spectra[len(bands) :]) > NOTHING:  # frequencies that stay apart cost nothing, so bands come second
            slots = allot(rotation, bands, spectra[: len(bands)])
        slots = self._comm.decide(lambda: slots)
        ((_, values),) = self._equal([method], turning, slots)
        if slots.frequencies == list(rotation.frequencies):
            return EqualHeads(values, None, "rotary frequencies stay")
        rope = rotation.rope(self.model, slots.frequencies)
        types = dict.fromkeys([rope_parameters(self.model)["rope_type"], rope["rope_type"]])
        notes = [how] * (slots.bands == bands) + [f"rope_type: {' -> '.join(types)}"]
        return EqualHeads(values, rope, "; ".join(notes))

    def _bands(self, method: SVD, rotation: Rotation, runs: Sequence[Run]) -> tuple[tuple[Band, ...], str]:
        """Returns the widest bands within the tolerance of the method, and a description."""
        context = method.context or (int(self._longest) if self._longest < math.inf else MOST)
        # a long row of each source if its batches can be joined, or else the runs
        rows = defaultdict(list)
        joins = all(isinstance(run.batch, Mapping) and {"input_ids"} <= run.batch.keys() <= TEXT for run in runs)
        for run in runs if joins else ():
            ids = run.batch["input_ids"]
            mask = run.batch.get("attention_mask")
            rows[run.source].append(ids.flatten() if mask is None else ids[mask.bool()])
        joined = [self.run({"input_ids": torch.cat(ids)[None, : min(context, MOST)]}) for ids in rows.values()]
        choices = [bands_within(rotation, angle / context) for angle in ANGLES]
        ropes = [rotation.rope(self.model, rotation.within(bands)) for bands in choices]
        distances = self.distances([EqualHeads(LazyTensors({}), rope) for rope in ropes], joined or runs)
        for angle, bands, distance in zip(ANGLES, choices, distances, strict=True):
            if distance <= math.log1p(method.tolerance):
                cost = f"which alone costs {math.expm1(distance):.1%}"
                return bands, f"angles change by up to {angle} radians over {context} tokens, {cost}"
        return bands_within(rotation, 0), "no angle changes"

    def _in_order(self, name: str, method: Reconstructing, moments: Moments) -> tuple[HeadTensors, Moments]:
        """Returns heads, in float64, and their Gram matrices, with the heads of groups together."""
        symmetries = self.symmetries[name]
        groups = self.groups[name]
        tensors = self._read(name)
        if method.grouping == "similar":
            # all ranks take the order of the first, as that follows from floats
            order = self._comm.decide(lambda: similar_order(tensors, moments, symmetries, method, groups))
            tensors = tensors.in_order(order)
            moments = moments.in_order(order, groups)
        return tensors, moments

    def repaired(
        self, new: EqualHeads, runs: Sequence[Run], repair: RepairConfig, progress: OnProgress | None = None
    ) -> EqualHeads:
        """Returns the parameters with refitted output layers of attention and MLP modules."""
        kept = {name: torch.ones(width, dtype=torch.bool) for name, width in self.widths.items()}
        self.not_refitted.clear()
        pruned = rotating_with(self.model, new.rope, runs)
        in_blocks = {module for block in blocks_of(self.model) for module in block.modules()}
        if repair.match is not None and new.rope is not None and not in_blocks.isdisjoint(rotary_embeddings(self.model)):
            kind = type(self.model).__name__  # tuning runs a block alone, and the module in it keeps the old frequencies
            raise ValueError(f"match: the blocks of {kind} rotate keys themselves. Use SVD(frequencies='fixed').")
        ties = ties_of(self.model, self.projections, self.groups)
        fitted = repair_linears(self.model, kept, pruned, repair, self._comm, new.values, progress, self.not_refitted, runs, ties)
        return replace(new, values=new.values | fitted)

    @property
    def widths(self) -> dict[str, int]:
        """Number of inputs of the output layers of attention and MLP that a repair refits."""
        readers = [attention.o.linear for attention in self.projections.values()]
        return {name: size_of(self.model.get_submodule(name))[1] for name in dict.fromkeys([*readers, *self.downs])}

    def distances(self, news: Sequence[EqualHeads], runs: Sequence[Run]) -> list[float]:
        """Returns mean distances to the unchanged model's outputs, in one read of blocks."""
        *_, last = self.projections.values()
        return distances(self.model, news, runs, self._comm, last.o.linear)

    def passes(self, method: KVMethod, repair: RepairConfig | None) -> int:
        """Returns how often the blocks of a model in files are read at most until heads are equal."""
        refit = 0 if repair is None else 2  # to see what is called, and to refit
        moving = any(map(_moves_frequencies, method.candidates)) and self.rotation[0] is not None
        match = repair is not None and repair.match is not None
        last = 1 + 2 * moving + refit + match  # to compare frequencies, and to see what each of them keeps
        if len(method.candidates) == 1:
            return last
        allowed = [m for m in self.allowed(method.candidates, repair) if m.grouping == "consecutive" or self.may_group]
        apart = [m for m in allowed if moving and _moves_frequencies(m)]
        together = {m.grouping for m in allowed if m not in apart}
        return len(together) + 3 * len(apart) + len(allowed) * (1 + refit) + last

    def bytes(self, method: KVMethod) -> int:
        """Returns the bytes of the largest Gram matrices of an attention module."""
        groups = self._seen_in("similar" if any(m.grouping == "similar" for m in method.candidates) else "consecutive")
        largest = 0
        for name, attention in self.projections.items():
            number = groups[name]
            sizes = (attention.k.index.size, attention.v.index.size)
            largest = max(largest, sum(number * (size // number) ** 2 for size in sizes))
        return 2 * 8 * largest

    @property
    def may_group(self) -> bool:
        """True if there is a choice which heads share a group, and heads may change places."""
        some = any(1 < self.groups[name] < attention.kv_heads for name, attention in self.projections.items())
        return some and all(symmetries.order for symmetries in self.symmetries.values())
