from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bame_lightning.bame.evidence import Evidence, OneBatch
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.one_batch import choose_masks
from bame_lightning.bame.reading import Reading
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.layers import SparseWeight
from tests.helpers import (
    WINDOW,
    Case,
    block_positions,
    cases,
    contend_at,
    evolving,
    learn,
    patterns,
    random_kept,
    read,
    sgd,
    sparse_linear,
)

YES, NO = torch.tensor(True), torch.tensor(False)


# Which masks one batch chooses.


@given(patterns(), st.integers(0, 10**6), st.sampled_from([0.0, 0.125, 0.5, 0.75, 1.0]))
def test_the_choice_of_masks_against_loops(pattern: NMPattern, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks, (n, m) = 7, (pattern.n, pattern.m)
    worth = torch.randint(0, 5, (blocks, m), generator=generator).float()
    adaptable = torch.rand(blocks, generator=generator) > 0.3
    mask = random_kept(blocks, pattern, seed)
    new = choose_masks(worth, mask, adaptable, n, share=share)

    assert new.sum(-1).tolist() == [n] * blocks
    # What each block could gain: the n greatest worths less those that are kept.
    gains = []
    for values, kept, may in zip(worth.tolist(), mask.tolist(), adaptable.tolist(), strict=True):
        best = sum(sorted(values, reverse=True)[:n])
        gains.append((best - sum(v for v, k in zip(values, kept, strict=True) if k)) if may else 0.0)
    allowed = sorted(range(blocks), key=lambda b: (-gains[b], b))[: math.ceil(share * blocks)]
    for b in range(blocks):
        realised = (worth[b] * new[b]).sum() - (worth[b] * mask[b]).sum()
        assert realised == (gains[b] if b in allowed else 0)
        if not realised:
            assert torch.equal(new[b], mask[b])


def test_the_share_counts_all_blocks_and_takes_the_largest_gains() -> None:
    worth = torch.tensor([[1.0, 2.0], [1.0, 5.0], [1.0, 3.0], [1.0, 9.0]])
    mask = torch.tensor([[True, False]] * 4)
    adaptable = torch.tensor([True, True, True, False])
    # Gains 1, 4, 2, and 8 in a block that may not. A quarter of four blocks is one; 0.26 of them, rounded up, two.
    for share, changed in [(0.25, [1]), (0.26, [1, 2]), (0.75, [0, 1, 2]), (1.0, [0, 1, 2])]:
        new = choose_masks(worth, mask, adaptable, 1, share=share)
        assert new[:, 1].nonzero().flatten().tolist() == changed


# Readings.


def test_one_batch_has_nothing_to_go_by_without_a_gradient() -> None:
    sparse = sparse_linear([[1.0, 0.0]], [[1, 0]], "1:2")
    weight = evolving(sparse, OneBatch(), freeze_after=1)
    optimizer = sgd(weight)
    learn(weight, optimizer, [[0.0, 9.0]])
    sparse.weight.grad = None
    weight.read([None], everywhere=True, adapts=True)
    weight.accumulate(optimizer, Reading(True, 1), YES, WINDOW)
    weight.adapt(1.0)
    assert sparse.weight.tolist() == [[1.0, 0.0]]
    assert weight.table.masks.last_flips == 0


@given(cases(), st.booleans(), st.integers(0, 1000))
def test_evidence_moves_where_it_is_read_and_the_strongest_contender_of_a_block_swaps(
    case: Case, everywhere: bool, seed: int
) -> None:
    pattern, gradient = case
    positions = block_positions(gradient.shape, pattern.m)
    kept = random_kept(len(positions), pattern, seed)
    pruned = torch.zeros_like(gradient, dtype=torch.bool)
    for row, block in zip(kept.tolist(), positions, strict=True):
        for keep, place in zip(row, block, strict=True):
            pruned[place] = not keep
    parameter = nn.Parameter(torch.ones_like(gradient) * ~pruned)
    weight = evolving(
        SparseWeight("layer.weight", parameter, pattern, ~pruned),
        Evidence(momentum=0.0, one_per_row=False),
        freeze_after=0,
    )
    generator = torch.Generator().manual_seed(seed)
    frozen = torch.rand(len(positions), generator=generator) < 0.3
    weight.table.history.oscillations = frozen.int()
    # As many pruned positions of each row, drawn at random, numbered through all blocks.
    flat = [place for block in positions for place in block]
    rows = [[i for i, place in enumerate(flat) if place[0] == row and pruned[place]] for row in range(len(gradient))]
    chosen = [torch.randperm(len(row), generator=generator)[: -(-len(row) // 2)].tolist() for row in rows]
    contenders = [[row[i] for i in picks] for row, picks in zip(rows, chosen, strict=True)]
    contend_at(weight, contenders)
    contending = {i for row in contenders for i in row}
    read_places = {
        i
        for i, place in enumerate(flat)
        if pruned[place] and (everywhere or i in contending) and not frozen[i // pattern.m]
    }

    if everywhere:
        # All kept weights are 1; gradients count in unfrozen blocks at pruned positions.
        square = sum(gradient[flat[i]].item() ** 2 for i in read_places) / max(1, len(read_places))
        unit = 1 / math.sqrt(square) if square else 0.0
    else:
        weight.sizes.noise, weight.sizes.unit, unit = torch.tensor([1.0]), torch.tensor([0.5]), 0.5
    learn(weight, sgd(weight, lr=0.5, weight_decay=0.25), gradient, everywhere=everywhere)
    evidence = [-unit * gradient[place].item() if i in read_places else 0.0 for i, place in enumerate(flat)]
    torch.testing.assert_close(weight.table.evidence.flatten(), torch.tensor(evidence))

    before = gradient.new_zeros(gradient.shape) + parameter.detach()
    weight.adapt(1.0)
    for b in range(len(positions)):
        inside = range(b * pattern.m, (b + 1) * pattern.m)
        # All kept weights are 1, so the first of them is the weakest.
        strong = [i for row in contenders for i in row if i in inside and i in read_places and abs(evidence[i]) > 1.2]
        into = max(strong, key=lambda i: abs(evidence[i]), default=None)
        out = None if into is None else next(i for i in inside if kept[b, i - inside.start])
        assert sum(not weight.weights[0].pruned[flat[i]] for i in inside) == pattern.n
        for i in inside:
            place, left = flat[i], weight.table.evidence.flatten()[i].item()
            if i == into:
                assert parameter[place].item() == pytest.approx(math.copysign(1.2, evidence[i]))
                assert left == 0
            elif i == out:
                assert (parameter[place], left) == (0, 1)
            else:
                assert parameter[place] == before[place]
                assert left == pytest.approx(evidence[i])
            assert bool(weight.weights[0].pruned[place]) == (parameter[place] == 0)


def test_a_reading_is_a_copy_of_the_gradient_before_it_is_masked() -> None:
    for everywhere in (True, False):
        sparse = sparse_linear([[1.0, 0.0]], [[1, 0]], "1:2")
        weight = evolving(sparse, Evidence(), freeze_after=1)
        contend_at(weight, [[1]])
        read(weight, [[3.0, 4.0]], everywhere)
        assert sparse.weight.grad is not None
        sparse.weight.grad.fill_(0)
        assert weight.reading is not None
        if everywhere:
            assert weight.reading.everywhere.tolist() == [[3.0, 4.0]]
        else:
            assert weight.reading.contenders.tolist() == [4.0]
            assert weight.reading.kept.tolist() == [[3.0]]


def remembered(weight: Any) -> list[Tensor]:
    """What a discarded reading must leave alone."""
    layer = weight.layers()[0]
    known = (layer.evidence, layer.mean_gradient, layer.noise)
    return [value.clone() for value in known if value is not None]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [Evidence(), OneBatch()])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_poisoned_reading_is_discarded_whole(bad: float, config: Any, optimizer: Any) -> None:
    # The gradient of another weight is poisoned, or one value of this one; all readings of the step go.
    for gradient in ([[1.0, 2.0, 3.0, bad]], [[1.0, 2.0, 3.0, 4.0]], [[bad, 2.0, 3.0, 4.0]]):
        sparse = sparse_linear([[1.0, 0, 2.0, 0]], [[1, 0, 1, 0]], "1:2")
        weight = evolving(sparse, config, freeze_after=1)
        real = optimizer([sparse.weight], lr=0.5)
        if isinstance(config, Evidence):
            read(weight, [[0.1, 0.2, 0.3, 0.4]])
            real.step()
            weight.accumulate(real, Reading(True, 3), YES, WINDOW)
        before = remembered(weight)
        read(weight, gradient)
        real.step()
        weight.accumulate(real, Reading(True, 3), NO, WINDOW)
        after = remembered(weight)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        if math.isfinite(gradient[0][0]):
            weight.adapt(1.0)
            assert sparse.weight.isfinite().all()
            if isinstance(config, OneBatch):
                assert weight.table.masks.last_flips == 0
                assert weight.table.predicted == 0


def test_a_weight_without_a_gradient_learns_nothing() -> None:
    weight = evolving(sparse_linear([[1.0, 0.0]], [[1, 0]], "1:2"), Evidence(), freeze_after=1)
    weight.read([None], everywhere=True, adapts=True)
    weight.accumulate(sgd(weight), Reading(True, 3), YES, WINDOW)
    assert not weight.table.evidence.any()
    assert weight.reading is None


def test_nothing_swaps_before_anything_is_known_of_pruned_weights() -> None:
    # Evidence starts at the pruned initial weights, larger than the kept ones.
    sparse = sparse_linear([[1.0, 2.0, 1.0, 2.0]], [[1, 0, 1, 0]], "1:2")
    weight = evolving(sparse, Evidence(init="weights", margin=0.5), freeze_after=1)
    assert weight.table.evidence.tolist() == [[0, 2], [0, 2]]
    sparse.weight.detach().masked_fill_(sparse.pruned, 0)
    weight.adapt(1.0)  # nothing contends
    assert sparse.weight.tolist() == [[1, 0, 1, 0]]
    weight.contend(1.0)
    weight.adapt(1.0)  # nothing was read
    assert sparse.weight.tolist() == [[1, 0, 1, 0]]
    contend_at(weight, [[3]])
    weight.sizes.noise = torch.tensor([1.0])
    weight.adapt(1.0)
    assert sparse.weight.tolist() == [[1, 0, 0, 1.5]]
    assert weight.table.evidence.tolist() == [[0, 2], [1, 0]]


def test_nothing_moves_or_adapts_before_the_first_gradient() -> None:
    sparse = sparse_linear([[1.0, 2.0]], [[1, 0]], "1:2")
    weight = evolving(sparse, Evidence(), freeze_after=None)
    learn(weight, sgd(weight), torch.zeros(1, 2))
    weight.adapt(1.0)
    assert (weight.sizes.noise.item(), weight.sizes.unit.item()) == (0, 0)
    assert weight.table.evidence.tolist() == [[0, 2]]
    # Nor does a first one that is not finite count; the second one counts whole.
    read(weight, [[0.0, math.inf]])
    weight.accumulate(sgd(weight), Reading(True, 1), NO, WINDOW)
    assert (weight.sizes.noise.item(), weight.sizes.unit.item()) == (0, 0)
    learn(weight, sgd(weight), [[0.0, 4.0]])
    assert weight.sizes.noise.item() == 16


def test_noise_is_a_running_mean_over_readings_everywhere() -> None:
    weight = evolving(sparse_linear([[2.0, 0.0]], [[1, 0]], "1:2"), Evidence(), freeze_after=None)
    contend_at(weight, [[1]])
    noise = []
    for gradient, everywhere in [(2.0, True), (9.0, False), (-4.0, True), (0.0, True), (1.0, True), (5.0, False)]:
        learn(weight, sgd(weight), [[7.0, gradient]], everywhere=everywhere)
        noise.append(weight.sizes.noise.item())
    # 4; 3.6 + 1.6; 4.68 + 0; 4.212 + 0.1
    assert noise == pytest.approx([4, 4, 5.2, 4.68, 4.312, 4.312])
    assert weight.sizes.unit.item() == pytest.approx(2 / math.sqrt(4.312))


def test_evidence_starts_at_pruned_weights_unless_it_shall_start_at_zero() -> None:
    for config, start in [(Evidence(), [[0, 2]]), (Evidence(init="zero"), [[0, 0]]), (OneBatch(), [[0, 0]])]:
        weight = evolving(sparse_linear([[1.0, 2.0]], [[1, 0]], "1:2"), config, freeze_after=1)
        assert weight.table.evidence.tolist() == start


@given(
    st.sampled_from(["1:4", "2:4", "3:8"]),
    st.integers(-20, 20),
    st.integers(-20, 20),
    st.sampled_from(["zero", "weights"]),
)
def test_neither_the_scale_of_weights_nor_that_of_gradients_matters(
    pattern: str, weights: int, gradients: int, init: Any
) -> None:
    # Powers of two, so that scaling rounds nothing and equality is exact.
    a, b = 2.0**weights, 2.0**gradients
    n, m = map(int, pattern.split(":"))
    kept = random_kept(48 // m, NMPattern(n, m), seed=weights)
    start = torch.randn(3, 16, generator=torch.Generator().manual_seed(gradients))
    pair = []
    for scale in (1.0, a):
        sparse = SparseWeight("w", nn.Parameter(scale * start), NMPattern(n, m), kept.reshape(3, 16))
        pair.append(evolving(sparse, Evidence(init=init), freeze_after=1))
        sparse.weight.detach().masked_fill_(sparse.pruned, 0)
    flips = 0
    for step in range(9):
        gradient = torch.randn(3, 16, generator=torch.Generator().manual_seed(step))
        for weight, scale in zip(pair, (1.0, b), strict=True):
            # The optimizer's rate, which would have to be a / b, is another one.
            learn(weight, sgd(weight), scale * gradient, distance=0.5, everywhere=step % 3 == 0)
            if step % 3 == 0:
                weight.contend(0.5)
            if step % 2:
                weight.adapt(1.0)
        one, other = pair
        assert torch.equal(other.table.evidence, a * one.table.evidence)
        assert torch.equal(other.weights[0].weight.detach(), a * one.weights[0].weight.detach())
        assert torch.equal(other.weights[0].pruned, one.weights[0].pruned)
        # In units of weights times gradients, as the loss is.
        assert other.table.predicted == a * b * one.table.predicted
        flips = int(one.table.masks.flips)
    assert flips > 0


def test_only_contenders_swap_and_others_wait_for_the_next_reading_of_all() -> None:
    # Every block would swap; that of the contender does, then the closest half of them.
    sparse = sparse_linear([[1.0, 0.0] * 4], [[1, 0] * 4], "1:2")
    weight = evolving(sparse, Evidence(margin=0.0, one_per_row=False), freeze_after=None)
    learn(weight, sgd(weight), [[0.0, 1.0] * 4], distance=0.5)
    contend_at(weight, [[5]])
    weight.table.evidence[:, 1] = torch.tensor([5.0, 4, 3, 2])
    weight.adapt(1.0)
    assert sparse.weight.tolist() == [[1, 0, 1, 0, 0, 1, 1, 0]]
    assert weight.contenders.positions.tolist() == [4]
    weight.adapt(1.0)
    assert int(weight.table.masks.last_flips) == 0
    weight.contend(0.5)
    weight.adapt(1.0)
    assert sparse.weight.tolist() == [[0, 1, 0, 1, 0, 1, 1, 0]]
    assert (int(weight.table.masks.last_flips), int(weight.table.masks.flips)) == (4, 6)


@pytest.mark.parametrize(("freeze_after", "adaptations"), [(0, 2), (1, 3), (2, 4), (None, 6)])
def test_a_block_freezes_after_one_oscillation_more_than_it_may_make(
    freeze_after: int | None, adaptations: int
) -> None:
    # The pruned weight is pushed ever harder, so the block swaps back and forth at every adaptation, until it is frozen.
    weight = evolving(sparse_linear([[0.5, 0.0]], [[1, 0]], "1:2"), Evidence(momentum=0.0), freeze_after)
    changes = 0
    for c in range(6):
        learn(weight, sgd(weight), [[-(10.0**c), -(10.0**c)]], distance=2)
        weight.contend(1.0)
        weight.adapt(1.0)
        changes += bool(weight.table.masks.last_flips)
    assert changes == adaptations
    assert weight.table.frozen.tolist() == [freeze_after is not None]
    # Not even if training brings its kept weight down below the evidence that it has.
    weight.weights[0].weight.detach().mul_(1e-6)
    learn(weight, sgd(weight), torch.zeros(1, 2))
    weight.contend(1.0)
    weight.adapt(1.0)
    assert bool(weight.table.masks.last_flips) == (freeze_after is None)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_evidence_is_kept_in_single_precision_at_least(dtype: torch.dtype, state: torch.dtype) -> None:
    sparse = sparse_linear([[1.0, 0, 0, 0]], [[1, 0, 0, 0]], "1:4")
    sparse.weight = nn.Parameter(sparse.weight.detach().to(dtype))
    weight = evolving(sparse, Evidence(momentum=0.0, margin=0.5), freeze_after=1)
    contend_at(weight, [[1, 2, 3]])
    weight.sizes.noise = torch.tensor([1.0], dtype=state)
    weight.sizes.unit = weight.sizes.noise.clone()
    for _ in range(3):
        # bfloat16 cannot hold 3 + 3 / 512
        learn(weight, sgd(weight), torch.tensor([[0, -(2.0**-9), -1.0, 0]]), everywhere=False)
    assert {weight.table.evidence.dtype, weight.sizes.noise.dtype} == {state}
    assert weight.table.evidence[0].tolist() == pytest.approx([0, 3 * 2.0**-9, 3, 0], rel=1e-12)
    weight.adapt(1.0)
    assert sparse.weight.dtype == dtype
    assert sparse.weight.tolist() == [[0, 0, 1.5, 0]]
    learn(weight, sgd(weight), torch.ones(1, 4))
    assert {weight.table.evidence.dtype, weight.sizes.noise.dtype, weight.sizes.unit.dtype} == {state}
    weight.contend(1.0)
    weight.adapt(1.0)
    assert sparse.weight.dtype == dtype


def test_large_blocks_are_no_trouble() -> None:
    parameter = nn.Parameter(torch.ones(2, 2048))
    pruned = (torch.arange(2048) % 1024 >= 512).repeat(2, 1)
    born = pruned.clone()
    sparse = SparseWeight("layer.weight", parameter, NMPattern(512, 1024), ~pruned)
    parameter.data.masked_fill_(pruned, 0)
    weight = evolving(sparse, Evidence(momentum=0.0, one_per_row=False), freeze_after=1)
    learn(weight, sgd(weight), torch.full((2, 2048), 7.0), distance=2)
    weight.contend(1.0)
    weight.adapt(1.0)
    # The first pruned weight of each of the four blocks takes the place of the first kept one.
    assert weight.table.masks.flips == 2 * 4
    expected = torch.where(born, 0.0, 1.0)
    expected[:, [0, 1024]], expected[:, [512, 1536]] = 0.0, -1.2
    torch.testing.assert_close(sparse.weight.detach(), expected)
    assert torch.equal(sparse.pruned, expected == 0)


def test_a_reading_forgets_a_part_of_the_evidence_before_it() -> None:
    weight = evolving(sparse_linear([[1.0, 8.0, 1.0, 4.0]], [[1, 0, 1, 0]], "1:2"), Evidence(), None)
    contend_at(weight, [[3]])
    # Half of 1 / 4 is forgotten where it is read, and nothing is learned from a gradient of zero.
    read(weight, torch.zeros(1, 4), everywhere=False)
    weight.accumulate(sgd(weight), Reading(everywhere=False, steps=1.0, forgets=0.5), YES, 4)
    assert weight.table.evidence.tolist() == [[0, 8], [0, 3.5]]
    # A discarded reading takes nothing away either.
    weight.accumulate(sgd(weight), Reading(everywhere=False, steps=1.0, forgets=0.5), NO, 4)
    assert weight.table.evidence.tolist() == [[0, 8], [0, 3.5]]


# Saving.


def evolved() -> tuple[EvolvingBlocks, torch.optim.Optimizer]:
    kept = random_kept(24, NMPattern(2, 4), seed=3)
    pruned = ~kept.reshape(6, 16)
    parameter = nn.Parameter(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)) * ~pruned)
    weight = evolving(SparseWeight("layer.weight", parameter, NMPattern(2, 4), ~pruned), Evidence(), freeze_after=0)
    return weight, sgd(weight, lr=0.5, momentum=0.5)


def evolve(weight: EvolvingBlocks, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        everywhere = seed % 3 == 0
        gradient = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
        learn(weight, optimizer, gradient, everywhere=everywhere)
        if everywhere:
            weight.contend(0.25)
        weight.adapt(1.0)
        weight.end_step()


def everything(weight: EvolvingBlocks) -> list[Tensor]:
    tensors = [
        weight.weights[0].weight.detach(),
        weight.weights[0].pruned,
        weight.table.evidence,
        weight.table.accumulated.mean,
        weight.sizes.noise,
        weight.sizes.unit,
        weight.table.history.oscillations,
        weight.table.history.quiet(),
        weight.table.history.pruned_before(),
    ]
    return [
        *tensors,
        weight.contenders.positions,
        weight.designated,
        weight.table.masks.flips,
        weight.table.masks.last_flips,
        weight.table.predicted,
        weight.table.frozen,
    ]


def test_a_restored_weight_goes_on_bit_by_bit() -> None:
    weight, optimizer = evolved()
    evolve(weight, optimizer, range(6))
    assert weight.table.masks.flips > 0
    assert 0 < weight.table.frozen.sum() < 24
    saved = {key: value.clone() for key, value in weight.state(0).items()}
    handed = weight.state(0)

    twin, twin_optimizer = evolved()
    twin.weights[0].weight.data.copy_(weight.weights[0].weight.data)
    twin.weights[0].kept.copy_(weight.weights[0].kept)
    twin.load_state(0, handed)
    assert all(torch.equal(a, b) for a, b in zip(everything(twin), everything(weight), strict=True))
    halfway = weight.weights[0].pruned.clone()
    evolve(weight, optimizer, range(6, 12))
    evolve(twin, twin_optimizer, range(6, 12))
    for resumed, uninterrupted in zip(everything(twin), everything(weight), strict=True):
        assert resumed.dtype == uninterrupted.dtype
        assert torch.equal(resumed, uninterrupted)
    assert not torch.equal(weight.weights[0].pruned, halfway)
    # What was handed in is left alone, and may be loaded again.
    assert all(torch.equal(handed[key], saved[key]) for key in saved)


def test_the_saved_state_is_a_compact_copy() -> None:
    weight, optimizer = evolved()
    evolve(weight, optimizer, range(4))
    state = weight.state(0)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "evidence": (48,),  # of pruned positions only
        "contenders": (6, 2),  # a quarter of the 8 that are pruned in each of 6 rows
        "mean_gradient": (48,),
        "noise": (),
        "unit": (),
        "oscillations": (24,),
        "quiet": (24,),
        "pruned_before": (12,),  # one bit for each of 96 positions
        "flips": (),
        "last_flips": (),
        "predicted": (),
    }
    before = {key: value.clone() for key, value in state.items()}
    evolve(weight, optimizer, range(4, 12))
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert not torch.equal(weight.state(0)["evidence"], before["evidence"])
