"""Swaps that leave masks 2:4 along the output dimension, too."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bame_lightning.bame.evidence import Evidence, OneBatch
from bame_lightning.bame.evolution import ContendingBlocks
from bame_lightning.bame.room import admitted
from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.masks import top_n_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.transposable import both_ways_mask
from bame_lightning.methods.rigl import drop_and_grow
from bame_lightning.weights.layers import SparseWeight

PATTERNS = ["1:16", "1:8", "1:4", "2:4"]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.booleans()), max_size=7), st.integers(0, 26))
def test_no_other_choice_of_swaps_fits_that_is_more_urgent(swaps: list[tuple[int, int, bool]], seed: int) -> None:
    in_group = [seed % 3, seed // 3 % 3, seed // 9]
    group, urgency, wanted = (list(values) for values in zip(*swaps, strict=True)) if swaps else ([], [], [])
    ranked = sorted((i for i in range(len(swaps)) if wanted[i]), key=lambda i: (-urgency[i], i))
    best: list[bool] = []
    for size in range(len(ranked) + 1):
        for chosen in combinations(ranked, size):
            entering = [sum(group[i] == g for i in chosen) for g in range(3)]
            if all(new == 0 or new + kept <= 2 for new, kept in zip(entering, in_group, strict=True)):
                # The most urgent swap first, then the next one: whoever has it is ahead.
                best = max(best, [i in chosen for i in ranked])
    expected = [any(i == r and has for r, has in zip(ranked, best, strict=True)) for i in range(len(swaps))]
    kept = torch.tensor([in_group[g] for g in group], dtype=torch.int8)
    found = admitted(
        torch.tensor(group, dtype=torch.int64), kept, torch.tensor(urgency).float(), torch.tensor(wanted).bool()
    )
    assert found.tolist() == expected


def weight_of(name: str, shape: tuple[int, ...], pattern: str, seed: int) -> SparseWeight:
    n, m = map(int, pattern.split(":"))
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    blocks = to_blocks(weight.detach(), m)
    mask = both_ways_mask(top_n_mask(blocks.abs(), n), blocks, shape[0])
    return SparseWeight(name, weight, NMPattern(n, m), from_blocks(mask, weight.shape).contiguous())


def matrix(values: Tensor) -> Tensor:
    """A weight's rows, each with its kernel positions one after the other."""
    return values.movedim(1, -1).flatten(1)


def by_hand(
    weight: Tensor, evidence: Tensor, kept: Tensor, contends: Tensor, pattern: NMPattern, margin: float
) -> tuple[Tensor, int]:
    """The mask after an adaptation, and how many swaps were refused, in plain loops over rows and columns."""
    rows, columns = kept.shape
    refused, swaps = 0, []

    def in_group(row: int, column: int) -> int:
        return sum(int(kept[r, column]) for r in range(row // 4 * 4, min(row // 4 * 4 + 4, rows)))

    for row in range(rows):
        found = []
        for column in range(columns):
            if not contends[row, column]:
                continue
            first = column // pattern.m * pattern.m
            drop = min(
                (c for c in range(first, first + pattern.m) if kept[row, c]), key=lambda c: abs(float(weight[row, c]))
            )
            ratio = abs(float(evidence[row, column])) / abs(float(weight[row, drop]))
            if in_group(row, column) < 2:
                found.append((ratio, column, drop))
            elif ratio > 1 + margin:
                refused += 1
        if found:
            ratio, column, drop = max(found, key=lambda f: f[0])
            if ratio > 1 + margin:
                swaps.append((ratio, row, column, drop))
    after, entered = kept.clone(), dict[tuple[int, int], int]()
    for _, row, column, drop in sorted(swaps, reverse=True):
        group = row // 4, column
        if in_group(row, column) + entered.get(group, 0) < 2:
            entered[group] = entered.get(group, 0) + 1
            after[row, column], after[row, drop] = True, False
        else:
            refused += 1
    return after, refused


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("outputs", [3, 5, 8, 11])
@pytest.mark.parametrize("seed", range(4))
def test_adaptations_are_those_that_are_found_by_hand(pattern: str, outputs: int, seed: int) -> None:
    # All weights of a table at once: a linear layer, and a convolution of two kernel positions.
    parsed = NMPattern.parse(pattern)
    weights = [
        weight_of("linear", (outputs, 2 * parsed.m), pattern, seed),
        weight_of("convolution", (outputs + 1, parsed.m, 2, 1), pattern, seed + 100),
    ]
    rule = Evidence(contenders=0.4, margin=0.1)
    blocks = rule.begin(weights, None)
    assert isinstance(blocks, ContendingBlocks)
    blocks.keep_both_ways()
    assert blocks.room is not None
    blocks.sizes.noise.fill_(1.0)
    moved = 0
    for step in range(6):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        blocks.table.evidence.copy_(torch.randn(blocks.table.evidence.shape, generator=generator))
        # Many rows want the same column.
        for layer in range(2):
            blocks.table.of(layer, blocks.table.evidence)[:, step % parsed.m] *= 4
        blocks.contend()
        for layer, sparse in enumerate(weights):
            # What is full comes last, unless all others contend already.
            own = [int(p) - blocks.table.positions.starts[layer] for p in blocks.contenders.by_weight()[layer]]
            contends = torch.zeros(matrix(sparse.kept).shape, dtype=torch.bool)
            contends.view(-1)[own] = True
            full = torch.stack(
                [matrix(sparse.kept)[r // 4 * 4 : r // 4 * 4 + 4].sum(0) >= 2 for r in range(len(contends))]
            )
            for row in range(len(contends)):
                open_places = ~matrix(sparse.kept)[row] & ~full[row]
                assert not (contends[row] & full[row]).any() or (contends[row] >= open_places).all()
        expected = []
        for layer, sparse in enumerate(weights):
            own = [int(p) - blocks.table.positions.starts[layer] for p in blocks.contenders.by_weight()[layer]]
            contends = torch.zeros(matrix(sparse.kept).shape, dtype=torch.bool)
            contends.view(-1)[own] = True
            evidence = blocks.table.of(layer, blocks.table.evidence).view(contends.shape).clone()
            args = matrix(sparse.values).clone(), evidence, matrix(sparse.kept).clone(), contends
            expected.append((*by_hand(*args, parsed, 0.1), matrix(sparse.kept).clone()))
        before = blocks.room.refused.clone()
        blocks.adapt()
        blocks.end_step()
        for sparse, (mask, _, old) in zip(weights, expected, strict=True):
            assert torch.equal(matrix(sparse.kept), mask)
            moved += int((mask != old).sum())
        assert (blocks.room.refused - before).tolist() == [refused for _, refused, _ in expected]
        known = blocks.room.kept.clone()
        for layer in range(2):
            blocks.room.recount(layer)
        assert torch.equal(known, blocks.room.kept)
    # With two of four in every column of four rows nothing can move, but in rows that are left over.
    assert moved > 0 or (pattern == "2:4" and outputs in (8, 3))
    assert int(blocks.room.refused.sum()) > 0


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rows", [3, 4, 7, 12])
@pytest.mark.parametrize("seed", range(5))
def test_rigl_swaps_the_smallest_weights_first_while_there_is_room(pattern: str, rows: int, seed: int) -> None:
    parsed = NMPattern.parse(pattern)
    n, m = parsed.n, parsed.m
    weight, gradient = torch.randn(2, rows, 2 * m, generator=torch.Generator().manual_seed(seed))
    gradient[:, 1] *= 4
    mask = both_ways_mask(top_n_mask(weight.abs().view(-1, m), n), weight.view(-1, m), rows)
    found = drop_and_grow(weight.view(-1, m), gradient.view(-1, m), mask, 0.6, rows)

    kept, expected = mask.view(rows, -1), mask.view(rows, -1).clone()
    swaps = []
    for row in range(rows):
        for first in (0, m):
            inside = range(first, first + m)
            drop = min((c for c in inside if kept[row, c]), key=lambda c: abs(float(weight[row, c])))
            grow = max((c for c in inside if not kept[row, c]), key=lambda c: abs(float(gradient[row, c])))
            swaps.append((abs(float(weight[row, drop])), row, drop, grow))
    entered: dict[tuple[int, int], int] = {}
    for _, row, drop, grow in sorted(swaps)[: -(-6 * len(swaps) // 10)]:
        held = int(kept[row // 4 * 4 : row // 4 * 4 + 4, grow].sum()) + entered.get((row // 4, grow), 0)
        if held < 2:
            entered[row // 4, grow] = entered.get((row // 4, grow), 0) + 1
            expected[row, drop], expected[row, grow] = False, True
    assert torch.equal(found.view(rows, -1), expected)


def test_a_rule_that_cannot_refuse_a_swap_says_so() -> None:
    blocks = OneBatch().begin([weight_of("layer", (4, 8), "1:4", 0)], None)
    with pytest.raises(
        ValueError, match=r"`both_ways=True` needs a rule that can refuse a swap.*Use evidence=Evidence\(\)"
    ):
        blocks.keep_both_ways()
