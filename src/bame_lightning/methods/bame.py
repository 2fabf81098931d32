"""Block-aware mask evolution as a method: read, accumulate, adapt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from bame_lightning.bame.evidence import Evidence, OneBatch
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.oscillation import oscillated_lately, oscillation_frequency
from bame_lightning.bame.reading import Reading
from bame_lightning.bame.schedule import Schedule
from bame_lightning.bame.table import EvolvingLayer
from bame_lightning.blocks.masks import zero_pruned_
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.statistics import percentiles, pooled_mean
from bame_lightning.ledger.cost import PRODUCTS, Cost
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.masked import Masked
from bame_lightning.methods.method import NextRead, Replica
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.mask_set import flip_rates


class BAME(Masked):
    """Block-aware mask evolution.

    Weights of one pattern, type, device and optimizer evolve together (`EvolvingBlocks`).

    Args:
        evidence: The rule: what is read, how it moves evidence, and which weights swap.
        schedule: When masks adapt.
        freeze_after: Oscillations that a block may make; one more freezes its mask for good. None never freezes.
        rescale: As in `Masked`.
        both_ways: As in `Masked`; swaps that do not fit are refused.

    Attributes:
        groups: The weights that evolve together.
        adaptations: Adaptations so far.
        discarded: Readings discarded for values that are not finite; scalar.
    """

    name = "BAMECallback"
    never = "BAME will never adapt a mask"
    cost = Cost("BAME", PRODUCTS, reads=True)
    schedule: Schedule

    def __init__(
        self,
        evidence: Evidence | OneBatch,
        schedule: Schedule,
        freeze_after: int | None = None,
        *,
        rescale: bool = False,
        both_ways: bool = False,
    ) -> None:
        super().__init__(rescale=rescale, both_ways=both_ways)
        self.evidence = evidence
        self.schedule = schedule
        self.freeze_after = freeze_after
        self.groups: list[EvolvingBlocks] = []
        self.adaptations = 0
        self.discarded = torch.zeros((), dtype=torch.int64)

    @property
    def layers(self) -> list[EvolvingLayer]:
        """What evolves in each weight, in the order of the run's weights."""
        found = {id(layer.sparse): layer for group in self.groups for layer in group.layers()}
        return [found[id(sparse)] for sparse in self.run.weights]

    @override
    def begin(self, restored: Mapping[str, Any] | None) -> None:
        known = {id(sparse) for group in self.groups for sparse in group.weights}
        if restored is None and self.run.steps and known & {id(sparse) for sparse in self.run.weights}:
            self._group()  # a second fit goes on where the first one ended
            return
        self.groups = []
        self._group()
        self.adaptations = 0
        self.discarded = torch.zeros((), dtype=torch.int64, device=self.run.weights[0].kept.device)
        if restored is not None:
            self.adaptations = int(restored["adaptations"])
            self.discarded += restored["discarded"].to(self.discarded.device)
            for group in self.groups:
                for layer, sparse in enumerate(group.weights):
                    group.load_state(layer, restored["layers"][sparse.name])

    @override
    def regroup(self) -> None:
        self._group()
        super().regroup()

    def _group(self) -> None:
        """Put weights together that evolve together; what is known of a weight goes along. Those that are new are dense."""
        wanted: dict[Any, list[SparseWeight]] = {}
        holder = {id(sparse): place for place, each in enumerate(self.run.holders) for sparse in each.weights}
        for sparse in self.run.weights:
            kind = (holder.get(id(sparse)), sparse.pattern, sparse.weight.dtype, sparse.kept.device)
            wanted.setdefault(kind, []).append(sparse)
        before = {id(sparse): (group, layer) for group in self.groups for layer, sparse in enumerate(group.weights)}
        kept = {tuple(map(id, group.weights)): group for group in self.groups}
        groups = []
        for weights in wanted.values():
            group = kept.get(tuple(map(id, weights)))
            if group is None:
                states = [
                    (known[0].state(known[1]) if known else None) for known in (before.get(id(s)) for s in weights)
                ]
                group = self.evidence.begin(weights, self.freeze_after)
                if self.both_ways:
                    group.keep_both_ways()
                for layer, state in enumerate(states):
                    if state is not None:
                        group.load_state(layer, state)
            groups.append(group)
        self.groups = groups

    @override
    def rescaled(self, sparse: SparseWeight, factor: float) -> None:
        for group in self.groups:
            for layer, weight in enumerate(group.weights):
                if weight is sparse:
                    group.table.of(layer, group.table.evidence).mul_(factor)

    def reading(self, holder: Holder) -> Reading | None:
        """What to read of the gradients of the step that is going on."""
        return self.evidence.reading(holder.steps, holder.window)

    @override
    def reads(self, holder: Holder) -> bool:
        return self.reading(holder) is not None

    @override
    def next_read(self, holder: Holder) -> NextRead:
        reading = self.reading(holder)
        if reading is None:
            return NextRead(everything=False)
        groups = self._groups_of(holder)
        contended = {s.name: own for group in groups for s, own in zip(group.weights, group.contended(), strict=True)}
        return NextRead(reading.everywhere, contended)

    @override
    def read(self, holder: Holder, gradients: Mapping[str, Tensor]) -> None:
        reading = self.reading(holder)
        assert reading is not None
        if isinstance(self.evidence, OneBatch):
            self.run.suspect(holder.weights)  # all that is pruned will be zeroed
        for group in self._groups_of(holder):
            found = [gradients.get(sparse.name) for sparse in group.weights]
            group.read(found, everywhere=reading.everywhere, adapts=holder.window.adapts(holder.steps))

    @override
    def evolve(self, holder: Holder) -> bool:
        reading, groups = self.reading(holder), self._groups_of(holder)
        if reading is None:
            for group in groups:
                group.read_shares = [0.0] * len(group.weights)
        else:
            self._accumulate(holder, groups, reading)
        adapts = holder.window.adapts(holder.steps)
        if adapts:
            with ExitStack() as observed:
                for observer in self.run.observers:
                    observed.enter_context(observer())
                self._adapt(holder, groups)
            self.adaptations += 1
        for group in groups:
            group.end_step()
        return adapts

    def _accumulate(self, holder: Holder, groups: list[EvolvingBlocks], reading: Reading) -> None:
        # One poisoned value would stay in the evidence for good, so all of a step's readings stand or fall together.
        extremes = [bound for group in groups for bound in group.extremes]
        bounds = torch.stack(extremes) if extremes else torch.zeros(1, device=self.discarded.device)
        finite = (bounds - bounds == 0).all()
        finite = self.run.everywhere(finite)
        self.discarded += ~finite
        for group in groups:
            group.accumulate(holder.optimizer, reading, finite, len(holder.window))
            if reading.everywhere:
                group.contend()

    def _adapt(self, holder: Holder, groups: list[EvolvingBlocks]) -> None:
        share = self.evidence.adaptable_share(holder.steps, holder.window)
        for group in groups:
            before = holder.masks_of_copies(group.weights)
            swaps = group.adapt(share)
            if swaps is None:
                # State was zero wherever weights were pruned, so a revived weight starts without history, too.
                self.enforce(group.weights)
            else:
                self._follow_swaps(holder, group, swaps)
            holder.restart_copies(before)

    def _follow_swaps(self, holder: Holder, group: EvolvingBlocks, places: list[Tensor]) -> None:
        """Put optimizer state to rest where weights were pruned."""
        for sparse, pruned in zip(group.weights, places, strict=True):
            for key, value in holder.state.elementwise(sparse.weight, sparse.name):
                rest = holder.state.rest(key)
                if sparse.oriented(value).stride() == sparse.kept.stride():
                    holder.memory(value).index_fill_(0, pruned, rest)
                elif rest:
                    sparse.oriented(value).masked_fill_(~sparse.kept, rest)
                else:
                    zero_pruned_(sparse.oriented(value), sparse.kept)

    def _groups_of(self, holder: Holder) -> list[EvolvingBlocks]:
        here = {id(sparse) for sparse in holder.weights}
        return [group for group in self.groups if id(group.weights[0]) in here]

    @override
    def read_shares(self, holder: Holder) -> Mapping[str, float]:
        return {
            sparse.name: share
            for group in self._groups_of(holder)
            for sparse, share in zip(group.weights, group.read_shares, strict=True)
        }

    @override
    def mean_read_share(self, pattern: NMPattern, steps: int) -> float:
        # Frozen blocks are not read, so that a run reads less; that contenders are rounded up in each row is left out.
        window = self.schedule.window(steps)
        readings = (self.evidence.reading(step, window) for step in range(steps))
        return sum(reading.share for reading in readings if reading is not None) / steps

    @override
    def metrics(self) -> dict[str, Tensor]:
        layers = self.layers
        frequencies = [oscillation_frequency(layer.oscillations, self.adaptations) for layer in layers]
        inside = self._inside()
        contenders = sum(
            sum(map(len, group.contended())) * share for group, share in zip(self.groups, inside, strict=True)
        )
        pruned = sum(group.table.pruned_positions for group in self.groups)
        designated = [group.designated.float() * share for group, share in zip(self.groups, inside, strict=True)]
        found = flip_rates(group.table.masks for group in self.groups) | {
            "bame/oscillation_frequency": pooled_mean(frequencies),
            "bame/frozen_fraction": pooled_mean(layer.frozen for layer in layers),
            "bame/designated_fraction": pooled_mean(designated),
            "bame/contender_fraction": torch.tensor(contenders / max(1, pruned)),
            "bame/predicted_loss_reduction": _total(layers, lambda layer: layer.predicted),
            "bame/discarded_readings": self.discarded.float(),
            "bame/oscillation_rate": pooled_mean(
                oscillated_lately(each.oscillations, each.quiet, 1) for each in layers
            ),
            "bame/oscillations_total": _total(layers, lambda layer: layer.oscillations),
            "bame/oscillating_blocks": _total(layers, lambda layer: layer.oscillations > 0),
            "bame/adaptations": torch.tensor(float(self.adaptations)),
        }
        refused = [layer.refused * layer.sparse.rows.parts for layer in layers if layer.refused is not None]
        if refused:
            found["bame/refused_swaps"] = torch.stack(refused).sum().float()
        for layer, frequency in zip(layers, frequencies, strict=True):
            key = f"bame/layer/{layer.sparse.label}"
            found[f"{key}/oscillation_frequency"] = frequency.mean()
            found[f"{key}/frozen_fraction"] = layer.frozen.float().mean()
        return found | self._percentiles(frequencies)

    def _inside(self) -> list[float]:
        """Whether each group is in the window of its optimizer; nothing contends any more once that is over."""
        found = []
        for group in self.groups:
            holder = next((each for each in self.run.holders if group in self._groups_of(each)), None)
            found.append(float(holder is not None and holder.steps in holder.window))
        return found

    def _percentiles(self, frequencies: list[Tensor]) -> dict[str, Tensor]:
        """Percentiles over all rows: a mean of percentiles is none."""
        of = [layer.closeness().amax(-1).clamp_min(0) for layer in self.layers]
        found: dict[str, Tensor] = {}
        for name, values, percents in (
            ("oscillation_frequency", frequencies, (50, 90, 99)),
            ("evidence_to_weight", of, (50, 90)),
        ):
            whole = [s.rows.gather(value) for s, value in zip(self.run.weights, values, strict=True)]
            each = percentiles(whole, percents)
            found |= {f"bame/{name}_p{p}": value for p, value in zip(percents, each, strict=True)}
        return found

    @override
    def replicas(self) -> Iterator[Replica]:
        yield from super().replicas()
        for group in self.groups:
            for layer, sparse in enumerate(group.weights):
                # Statistics of the whole layer, even where its rows are spread.
                if (noise := group.layer(layer).noise) is not None:
                    yield Replica("size of gradients", sparse.label, noise)
                if sparse.rows.whole:
                    yield from (Replica(what, sparse.label, value) for what, value in group.copies(layer).items())

    @override
    def state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        layers = {s.name: group.state(layer) for group in self.groups for layer, s in enumerate(group.weights)}
        return layers, {"adaptations": self.adaptations, "discarded": self.discarded.cpu().clone()}

    @override
    def summary(self, mean: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, Any]:
        layers = self.layers
        # Nothing that looks at the weights: Lightning has moved them to the CPU by now.
        frequencies = [oscillation_frequency(layer.oscillations, self.adaptations) for layer in layers]
        means = {
            "oscillation_frequency": pooled_mean(frequencies),
            "frozen_fraction": pooled_mean(layer.frozen for layer in layers),
        }
        refused = [layer.sparse.rows.total(layer.refused) for layer in layers if layer.refused is not None]
        tenth = -(-self.adaptations // 10)
        counts = {
            "blocks": _total(layers, lambda layer: torch.ones_like(layer.oscillations)),
            "oscillations": _total(layers, lambda layer: layer.oscillations),
            "oscillating_blocks": _total(layers, lambda layer: layer.oscillations > 0),
            "oscillating_blocks_in_last_tenth": _total(
                layers, lambda layer: oscillated_lately(layer.oscillations, layer.quiet, tenth)
            ),
        }
        return {
            "adaptations": self.adaptations,
            "flips": sum(group.table.masks.total() for group in self.groups),
            "discarded_readings": int(self.discarded),
            **({"refused_swaps": sum(map(int, refused))} if refused else {}),
            **{name: round(float(value)) for name, value in mean(counts).items()},
            **{name: float(value) for name, value in mean(means).items()},
        }


def _total(layers: Sequence[EvolvingLayer], values: Callable[[EvolvingLayer], Tensor]) -> Tensor:
    """Sum over all rows of all layers, written so that its mean over ranks is right."""
    totals = [values(layer).sum().double() * layer.sparse.rows.parts for layer in layers]
    return torch.stack(totals).sum() if totals else torch.zeros((), dtype=torch.float64)
