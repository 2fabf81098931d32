from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bame_lightning.evidence import Evidence, OneBatch
from bame_lightning.evolution import EvolvingWeight, adapt
from bame_lightning.layers import SparseWeight
from bame_lightning.pattern import NMPattern
from tests.helpers import Case, block_positions, cases, learn, patterns, random_kept, read, sgd, sparse_linear

YES, NO = torch.tensor(True), torch.tensor(False)


# The pure adaptation.


@given(patterns(), st.integers(0, 10**6), st.sampled_from([0.0, 0.125, 0.5, 0.75, 1.0]))
def test_adaptation_against_loops(pattern: NMPattern, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks, (n, m) = 7, (pattern.n, pattern.m)
    latent = torch.randint(-9, 10, (blocks, m), generator=generator).float()
    worth = torch.randint(0, 5, (blocks, m), generator=generator).float()
    adaptable = torch.rand(blocks, generator=generator) > 0.3
    mask = random_kept(blocks, pattern, seed)
    new = adapt(latent, worth, mask, adaptable, n, share)

    assert new.mask.sum(-1).tolist() == [n] * blocks
    # Every latent value is in exactly one of the two places.
    assert torch.equal(new.weight + new.evidence, latent)
    assert not new.weight[~new.mask].any()
    assert not new.evidence[new.mask].any()

    # What each block could gain: the n greatest worths less those that are kept.
    gains = []
    for values, kept, may in zip(worth.tolist(), mask.tolist(), adaptable.tolist(), strict=True):
        best = sum(sorted(values, reverse=True)[:n])
        gains.append((best - sum(v for v, k in zip(values, kept, strict=True) if k)) if may else 0.0)
    allowed = sorted(range(blocks), key=lambda b: (-gains[b], b))[: math.ceil(share * blocks)]
    assert new.predicted == sum(gains[b] for b in allowed)
    for b in range(blocks):
        realised = (worth[b] * new.mask[b]).sum() - (worth[b] * mask[b]).sum()
        assert realised == (gains[b] if b in allowed else 0)
        if not realised:
            assert torch.equal(new.mask[b], mask[b])


def test_the_share_counts_all_blocks_and_takes_the_largest_gains() -> None:
    latent = torch.tensor([[1.0, 2.0], [1.0, 5.0], [1.0, 3.0], [1.0, 9.0]])
    mask = torch.tensor([[True, False]] * 4)
    adaptable = torch.tensor([True, True, True, False])
    # Gains 1, 4, 2, and 8 in a block that may not. A quarter of four blocks is one; 0.26 of them, rounded up, two.
    for share, changed, predicted in [(0.25, [1], 4), (0.26, [1, 2], 6), (0.75, [0, 1, 2], 7), (1.0, [0, 1, 2], 7)]:
        new = adapt(latent, latent, mask, adaptable, 1, share)
        assert new.mask[:, 1].nonzero().flatten().tolist() == changed
        assert new.predicted == predicted


# Readings.


def test_one_batch_has_nothing_to_go_by_without_a_gradient() -> None:
    sparse = sparse_linear([[1.0, 0.0]], [[1, 0]], "1:2")
    weight = EvolvingWeight(sparse, OneBatch(), freeze_after=1)
    optimizer = sgd(weight)
    learn(weight, optimizer, [[0.0, 9.0]])
    sparse.weight.grad = None
    weight.read(everywhere=True)
    weight.accumulate(optimizer, 1, YES)
    weight.adapt(1.0)
    assert sparse.weight.tolist() == [[1.0, 0.0]]
    assert weight.last_flips == 0


@given(cases(), st.booleans(), st.integers(0, 1000))
def test_evidence_moves_in_the_blocks_that_are_read_and_at_pruned_positions_only(
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
    weight = EvolvingWeight(SparseWeight("layer.weight", parameter, pattern, pruned), Evidence(), freeze_after=0)
    frozen = torch.rand(len(positions), generator=torch.Generator().manual_seed(seed)) < 0.3
    weight.history = weight.history._replace(oscillations=frozen.int())
    open_blocks = (~frozen).nonzero().flatten()
    weight.designated = open_blocks[::2]
    chosen = set((open_blocks if everywhere else open_blocks[::2]).tolist())

    learn(weight, sgd(weight, lr=0.5, weight_decay=0.25), gradient, everywhere=everywhere)
    for b, block in enumerate(positions):
        moved = [-0.5 * gradient[place].item() * bool(pruned[place]) * (b in chosen) for place in block]
        assert weight.evidence[b].tolist() == moved
        assert weight.learning_time[b] == 0.5 * (b in chosen)

    weight.adapt(1.0)
    for b, block in enumerate(positions):
        values = [parameter[place].item() for place in block]
        before = [float(keep) for keep in kept[b]]
        assert sum(not pruned[place] for place in block) == pattern.n
        if b not in chosen:
            assert values == before
        # The multiset of latent values is conserved.
        moved = [-0.5 * gradient[p].item() * (not k) * (b in chosen) for p, k in zip(block, kept[b], strict=True)]
        latent = [v + k for v, k in zip(moved, before, strict=True)]
        both = [v + e for v, e in zip(values, weight.evidence[b].tolist(), strict=True)]
        assert sorted(both) == sorted(latent)
        assert not any(v for v, place in zip(values, block, strict=True) if pruned[place])


def test_a_reading_is_a_copy_of_the_gradient_before_it_is_masked() -> None:
    for everywhere in (True, False):
        sparse = sparse_linear([[1.0, 0.0]], [[1, 0]], "1:2")
        weight = EvolvingWeight(sparse, Evidence(), freeze_after=1)
        weight.designated = torch.tensor([0])
        read(weight, [[3.0, 4.0]], everywhere)
        assert sparse.weight.grad is not None
        sparse.weight.grad.fill_(0)
        assert weight.reading is not None
        assert weight.reading.gradient.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [Evidence(), OneBatch()])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_poisoned_reading_is_discarded_whole(bad: float, config: Any, optimizer: Any) -> None:
    # The gradient of another weight is poisoned, or one value of this one; all readings of the step go.
    for gradient in ([[1.0, 2.0, 3.0, bad]], [[1.0, 2.0, 3.0, 4.0]], [[bad, 2.0, 3.0, 4.0]]):
        sparse = sparse_linear([[1.0, 0, 2.0, 0]], [[1, 0, 1, 0]], "1:2")
        weight = EvolvingWeight(sparse, config, freeze_after=1)
        real = optimizer([sparse.weight], lr=0.5)
        if config.remembers:
            read(weight, [[0.1, 0.2, 0.3, 0.4]])
            real.step()
            weight.accumulate(real, 3, YES)
        evidence, time = weight.evidence.clone(), weight.learning_time.clone()
        read(weight, gradient)
        real.step()
        weight.accumulate(real, 3, NO)
        assert torch.equal(weight.evidence, evidence)
        assert torch.equal(weight.learning_time, time)
        if math.isfinite(gradient[0][0]):
            weight.adapt(1.0)
            assert sparse.weight.isfinite().all()
            if not config.remembers:
                assert weight.last_flips == 0
                assert weight.predicted == 0


def test_a_weight_without_a_gradient_learns_nothing() -> None:
    weight = EvolvingWeight(sparse_linear([[1.0, 0.0]], [[1, 0]], "1:2"), Evidence(), freeze_after=1)
    weight.read(everywhere=True)
    weight.accumulate(sgd(weight), 3, YES)
    assert weight.learning_time.tolist() == [0]


def test_blocks_that_were_never_read_do_not_adapt() -> None:
    # Evidence starts at the pruned initial weights, larger than the kept ones; only block 1 is read.
    sparse = sparse_linear([[1.0, 2.0, 1.0, 2.0]], [[1, 0, 1, 0]], "1:2")
    weight = EvolvingWeight(sparse, Evidence(init="weights", decay=0.0), freeze_after=1)
    assert weight.evidence.tolist() == [[0, 2], [0, 2]]
    sparse.weight.detach().masked_fill_(sparse.pruned, 0)
    weight.designated = torch.tensor([1])
    learn(weight, sgd(weight), torch.zeros(1, 4), everywhere=False)
    weight.adapt(1.0)
    assert sparse.weight.tolist() == [[1, 0, 0, 2]]
    assert weight.evidence.tolist() == [[0, 2], [1, 0]]


def test_evidence_starts_at_zero_by_default() -> None:
    weight = EvolvingWeight(sparse_linear([[1.0, 2.0]], [[1, 0]], "1:2"), Evidence(), freeze_after=1)
    assert not weight.evidence.any()


@pytest.mark.parametrize(("freeze_after", "adaptations"), [(0, 2), (1, 3), (2, 4), (None, 6)])
def test_a_block_freezes_after_one_oscillation_more_than_it_may_make(
    freeze_after: int | None, adaptations: int
) -> None:
    # The pruned weight is pushed ever harder, so the block swaps back and forth at every adaptation, until it is frozen.
    weight = EvolvingWeight(sparse_linear([[0.5, 0.0]], [[1, 0]], "1:2"), Evidence(decay=0.0), freeze_after)
    changes = 0
    for c in range(6):
        learn(weight, sgd(weight), [[-(10.0**c), -(10.0**c)]])
        weight.adapt(1.0)
        changes += bool(weight.last_flips)
    assert changes == adaptations
    assert weight.frozen.tolist() == [freeze_after is not None]
    # Not even if training brings its kept weight down below the evidence that it has.
    weight.sparse.weight.detach().mul_(1e-6)
    weight.adapt(1.0)
    assert bool(weight.last_flips) == (freeze_after is None)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_evidence_is_kept_in_single_precision_at_least(dtype: torch.dtype, state: torch.dtype) -> None:
    sparse = sparse_linear([[1.0, 0, 0, 0]], [[1, 0, 0, 0]], "1:4")
    sparse.weight = nn.Parameter(sparse.weight.detach().to(dtype))
    weight = EvolvingWeight(sparse, Evidence(decay=0.0), freeze_after=1)
    for _ in range(3):
        learn(weight, sgd(weight), torch.tensor([[0, -(2.0**-9), -1.0, 0]]))  # bfloat16 cannot hold 3 + 3 / 512
    assert weight.evidence.dtype == state
    assert weight.evidence[0].tolist() == [0, 3 * 2.0**-9, 3, 0]
    weight.designate(1.0)
    weight.adapt(1.0)
    assert sparse.weight.dtype == dtype
    assert sparse.weight.tolist() == [[0, 0, 3, 0]]


def test_large_blocks_are_no_trouble() -> None:
    parameter = nn.Parameter(torch.ones(2, 2048))
    pruned = (torch.arange(2048) % 1024 >= 512).repeat(2, 1)
    born = pruned.clone()
    sparse = SparseWeight("layer.weight", parameter, NMPattern(512, 1024), pruned)
    parameter.data.masked_fill_(pruned, 0)
    weight = EvolvingWeight(sparse, Evidence(), freeze_after=1)
    learn(weight, sgd(weight), torch.full((2, 2048), 7.0))
    weight.adapt(1.0)
    assert weight.flips == 2 * 2048
    assert torch.equal(sparse.weight.detach(), -7.0 * born)


# Saving.


def evolved() -> tuple[EvolvingWeight, torch.optim.Optimizer]:
    kept = random_kept(24, NMPattern(2, 4), seed=3)
    pruned = ~kept.reshape(6, 16)
    parameter = nn.Parameter(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)) * ~pruned)
    weight = EvolvingWeight(
        SparseWeight("layer.weight", parameter, NMPattern(2, 4), pruned), Evidence(), freeze_after=0
    )
    return weight, sgd(weight, lr=0.5, momentum=0.5)


def evolve(weight: EvolvingWeight, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        everywhere = seed % 3 == 0
        gradient = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
        learn(weight, optimizer, gradient, everywhere=everywhere)
        if everywhere:
            weight.designate(0.25)
        weight.adapt(1.0)
        weight.reading = None


def everything(weight: EvolvingWeight) -> list[Tensor]:
    tensors = [
        weight.sparse.weight.detach(),
        weight.sparse.pruned,
        weight.evidence,
        weight.learning_time,
        *weight.history,
    ]
    return [*tensors, weight.designated, weight.flips, weight.last_flips, weight.predicted, weight.frozen]


def test_a_restored_weight_goes_on_bit_by_bit() -> None:
    weight, optimizer = evolved()
    evolve(weight, optimizer, range(6))
    assert weight.flips > 0
    assert 0 < weight.frozen.sum() < 24
    saved = {key: value.clone() for key, value in weight.state_dict().items()}
    handed = weight.state_dict()

    twin, twin_optimizer = evolved()
    twin.sparse.weight.data.copy_(weight.sparse.weight.data)
    twin.sparse.pruned.copy_(weight.sparse.pruned)
    twin.load_state_dict(handed)
    assert all(torch.equal(a, b) for a, b in zip(everything(twin), everything(weight), strict=True))
    halfway = weight.sparse.pruned.clone()
    evolve(weight, optimizer, range(6, 12))
    evolve(twin, twin_optimizer, range(6, 12))
    for resumed, uninterrupted in zip(everything(twin), everything(weight), strict=True):
        assert resumed.dtype == uninterrupted.dtype
        assert torch.equal(resumed, uninterrupted)
    assert not torch.equal(weight.sparse.pruned, halfway)
    # What was handed in is left alone, and may be loaded again.
    assert all(torch.equal(handed[key], saved[key]) for key in saved)


def test_the_saved_state_is_a_compact_copy() -> None:
    weight, optimizer = evolved()
    evolve(weight, optimizer, range(4))
    state = weight.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "evidence": (48,),  # of pruned positions only
        "learning_time": (24,),
        "oscillations": (24,),
        "pruned_before": (12,),  # one bit for each of 96 positions
        "designated": (len(weight.designated),),
        "flips": (),
        "last_flips": (),
        "predicted": (),
    }
    before = {key: value.clone() for key, value in state.items()}
    evolve(weight, optimizer, range(4, 12))
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert not torch.equal(weight.state_dict()["evidence"], before["evidence"])
