"""Whole adaptations with every number worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from bame_lightning.bame.evidence import Evidence, OneBatch
from bame_lightning.bame.reading import Reading
from tests.helpers import WINDOW, contend_at, evolving, learn, read, reading, sgd, sparse_linear

YES = torch.tensor(True)


def test_accumulated_evidence_by_hand() -> None:
    # 99 marks gradients of kept weights, and -99 those of pruned ones that do not contend: neither may move evidence.
    sparse = sparse_linear(
        [[1.0, 0.5, 0.0, 0.0, 0.0, 2.0, 0.0, 0.25], [1.25, 0.0, 2.75, 0.0, 0.0, 0.0, 4.0, 1.25]],
        [[1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0, 1, 1]],
        "2:4",
    )
    weight = evolving(sparse, Evidence(momentum=0.0, init="zero", margin=0.25, one_per_row=False), freeze_after=1)
    optimizer = sgd(weight, lr=0.1, momentum=0.9, weight_decay=0.1)
    parameter, storage = sparse.weight, sparse.weight.data_ptr()

    # Squares of pruned gradients, in 64ths: 25 + 36 + 16 + 1 + 4 + 1 + 9 + 36 = 128 = 8 * 16, so noise is 1/4. Squares of
    # kept weights, in 16ths: 16 + 4 + 64 + 1 + 25 + 121 + 256 + 25 = 512 = 8 * 64, so a typical weight is 2; the unit is
    # 2 / (1/2) = 4, and half of it a step of 2: v = -2 g.
    e = 0.125
    gradient = [[99, 99, -5 * e, 6 * e, 4 * e, 99, e, 99], [99, -2 * e, 99, e, -3 * e, 6 * e, 99, 99]]
    learn(weight, optimizer, gradient, distance=0.5)
    assert (weight.sizes.noise.item(), weight.sizes.unit.item()) == pytest.approx((0.25, 4))
    v = [[0, 0, 1.25, -1.5], [-1, 0, -0.25, 0], [0, 0.5, 0, -0.25], [0.75, -1.5, 0, 0]]
    torch.testing.assert_close(weight.table.evidence, torch.tensor(v))

    # Over the weakest kept weight of the block: 2.5, 3; 4, 1 in the first row, 0.4, 0.2; 0.6, 1.2 in the second. Half of the
    # four pruned positions of each row contend. They lie in three of the four blocks.
    weight.contend(0.5)
    assert weight.contenders.positions.tolist() == [3, 4, 12, 13]
    assert weight.designated.tolist() == [True, True, False, True]

    # A quarter of the unit is a step of 1: v = v - g. Neither noise nor unit follow what only contenders show.
    gradient = [[99, 99, -99, 0.25, 0.5, 99, -99, 99], [99, -99, 99, -99, -0.25, 0, 99, 99]]
    learn(weight, optimizer, gradient, distance=0.25, everywhere=False)
    v = [[0, 0, 1.25, -1.75], [-1.5, 0, -0.25, 0], [0, 0.5, 0, -0.25], [1, -1.5, 0, 0]]
    torch.testing.assert_close(weight.table.evidence, torch.tensor(v))
    assert (weight.sizes.noise.item(), weight.sizes.unit.item()) == pytest.approx((0.25, 4))
    assert weight.read_shares[0] == 4 / 8

    # Block 0: 1.75 for 0.5, more than 1.25 times as much: it starts at 1.25 * 0.5. Block 1: 1.5 for 0.25, starting at 0.3125.
    # Block 3: 1.5 is more than 1.25, but less than 1.25 times as much.
    weight.adapt(1.0)
    w = [[1, 0, 0, -0.625, -0.3125, 2, 0, 0], [1.25, 0, 2.75, 0, 0, 0, 4, 1.25]]
    torch.testing.assert_close(sparse.weight.detach(), torch.tensor(w))
    assert sparse.weight is parameter
    assert sparse.weight.data_ptr() == storage
    v = [[0, 0.5, 1.25, 0], [0, 0, -0.25, 0.25], [0, 0.5, 0, -0.25], [1, -1.5, 0, 0]]
    torch.testing.assert_close(weight.table.evidence, torch.tensor(v))
    assert sparse.mask().int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
    assert (~sparse.pruned).int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1, 1]]
    # What was pruned contends in place of what was revived.
    assert weight.contenders.positions.tolist() == [1, 7, 12, 13]
    assert weight.table.history.oscillations.tolist() == [0, 0, 0, 0]
    pruned_before = [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert weight.table.history.pruned_before().int().tolist() == pruned_before
    assert (int(weight.table.masks.last_flips), int(weight.table.masks.flips)) == (4, 4)
    # Minus gradient times change. Block 0 changes by [0, -0.5, 0, -0.625]: 49.5 + 0.15625. Block 1 by [-0.3125, 0, 0, -0.25]:
    # 0.15625 + 24.75.
    torch.testing.assert_close(weight.table.predicted[0], torch.tensor(49.65625 + 24.90625))

    # Block 0 revives position 1, which it has just pruned: 0.5 + 0.5 beats 1.25 * 0.625. Position 2 would as well, with 1.25,
    # but does not contend. Block 1 has 0.25 for 0.3125. Block 3: 1 + 1 beats 1.25 * 1.25, before position 13 with 1.5.
    gradient = [[99, -0.5, 99, 99, 99, 99, 99, 0], [99, 99, 99, 99, -1, 0, 99, 0]]
    learn(weight, optimizer, gradient, distance=0.25, everywhere=False)
    weight.adapt(1.0)
    w = [[1, 0.78125, 0, 0, -0.3125, 2, 0, 0], [1.25, 0, 2.75, 0, 1.5625, 0, 4, 0]]
    torch.testing.assert_close(sparse.weight.detach(), torch.tensor(w))
    v = [[0, 0, 1.25, -0.625], [0, 0, -0.25, 0.25], [0, 0.5, 0, -0.25], [0, -1.5, 0, 1.25]]
    torch.testing.assert_close(weight.table.evidence, torch.tensor(v))
    assert weight.contenders.positions.tolist() == [3, 7, 15, 13]
    assert weight.table.history.oscillations.tolist() == [1, 0, 0, 0]
    pruned_before = [[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert weight.table.history.pruned_before().int().tolist() == pruned_before
    assert (int(weight.table.masks.last_flips), int(weight.table.masks.flips)) == (4, 8)
    # Block 0 changes by [0, 0.78125, 0, 0.625]: 0.390625 - 61.875. Block 3 by [1.5625, 0, 0, -1.25]: 1.5625.
    torch.testing.assert_close(weight.table.predicted[0], torch.tensor(0.390625 - 61.875 + 1.5625))
    assert not weight.table.frozen.any()

    # Training makes all weights 1. Mean square of pruned gradients (9 + 4 + 49) / 8 = 7.75, a tenth of it and nine tenths of
    # 0.25 are 1: the unit is 1, half of it a step of 1/2.
    sparse.weight.data = torch.tensor([[1.0, 1, 0, 0, -1, 1, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0]])
    learn(weight, optimizer, [[99, 99, 0, 3, 99, 99, 0, 0], [99, -2, 99, 0, 99, 0, 99, -7]], distance=0.5)
    torch.testing.assert_close(torch.cat([weight.sizes.noise, weight.sizes.unit]), torch.ones(2))
    v = [[0, 0, 1.25, -2.125], [0, 0, -0.25, 0.25], [0, 1.5, 0, -0.25], [0, -1.5, 0, 4.75]]
    torch.testing.assert_close(weight.table.evidence, torch.tensor(v))
    weight.contend(0.25)
    assert weight.contenders.positions.tolist() == [3, 15]
    # Block 0 revives position 3, its second oscillation, one more than it may make; block 3 position 15, its first one. Of
    # equal kept weights the first one goes.
    weight.adapt(1.0)
    w = [[0, 1, 0, -1.25, -1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 1, 1.25]]
    torch.testing.assert_close(sparse.weight.detach(), torch.tensor(w))
    assert weight.table.history.oscillations.tolist() == [2, 0, 0, 1]
    assert weight.table.frozen.tolist() == [True, False, False, False]
    assert weight.contenders.positions.tolist() == [0, 12]
    assert weight.designated.tolist() == [False, False, False, True]

    # It is neither read nor adapted any more, whatever comes, nor does it count as noise: nine tenths of 1, and nothing.
    sparse.weight.data[0, :4] *= 1e-3
    before = [sparse.weight[0, :4].detach().clone(), weight.table.evidence[0].clone()]
    for everywhere, share in ((True, 3 / 4), (False, 1 / 8)):
        read(weight, [[99, 99, 99, 99, 0, 0, 0, 0], [0] * 8], everywhere)
        assert weight.read_shares[0] == share
        weight.accumulate(optimizer, reading(weight, everywhere=everywhere), YES, WINDOW)
    torch.testing.assert_close(weight.sizes.noise, torch.tensor([0.9]))
    weight.adapt(1.0)
    assert weight.table.masks.last_flips == 0
    weight.contend(1.0)
    assert weight.designated.tolist() == [False, True, True, True]
    after = [sparse.weight[0, :4].detach(), weight.table.evidence[0]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_evidence_starts_at_pruned_weights_and_moves_alike_under_every_optimizer() -> None:
    # Kept: 3 and 5, mean square 17. Pruned gradients -1 and 4, mean square 8.5: the unit is sqrt(2).
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-3),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ):
        sparse = sparse_linear([[3.0, -1.0, 0.5, -5.0]], [[1, 0, 0, 1]], "2:4")
        weight = evolving(sparse, Evidence(momentum=0.0), freeze_after=None)
        sparse.weight.detach().masked_fill_(sparse.pruned, 0)
        optimizer = make([sparse.weight])
        read(weight, [[2.0, -1.0, 4.0, 7.0]])
        optimizer.step()
        # The optimizer may move pruned weights, too, which does not matter: 99.
        sparse.weight.data = torch.tensor([[3.0, 99, 99, -5.0]])
        # In a window of 8 steps and blocks of 4, sqrt(2 * 8 * ln 4) steps are one unit.
        weight.accumulate(optimizer, Reading(True, math.sqrt(16 * 1.3862943611198906)), YES, 8)
        torch.testing.assert_close(weight.table.evidence, torch.tensor([[0, -1 + 2**0.5, 0.5 - 4 * 2**0.5, 0]]))


def test_evidence_follows_a_mean_of_gradients_by_hand() -> None:
    # The mean forgets half at a reading. The unit stays 1 here, since only one position is read.
    sparse = sparse_linear([[1.0, 0.0, 1.0, 0.0]], [[1, 0, 1, 0]], "1:2")
    weight = evolving(sparse, Evidence(momentum=0.5, init="zero", margin=0.5), freeze_after=None)
    contend_at(weight, [[3]])
    weight.sizes.noise, weight.sizes.unit = torch.tensor([1.0]), torch.tensor([1.0])
    optimizer = sgd(weight)

    def follow(gradient: list[float]) -> None:
        learn(weight, optimizer, [gradient], everywhere=False)

    # Block 1, position 1: means -1 / 2 and (-1 / 2 - 1) / 2; evidence goes the other way.
    follow([9, 9, 9, -1])
    assert weight.table.evidence.tolist() == [[0, 0], [0, 0.5]]
    follow([9, 9, 9, -1])
    assert weight.table.evidence.tolist() == [[0, 0], [0, 1.25]]
    # A discarded reading leaves the mean alone: -3 / 8 follows from -3 / 4, and 0.
    read(weight, [[0, 0, 0, 1e30]], everywhere=False)
    weight.accumulate(optimizer, reading(weight, everywhere=False), torch.tensor(False), WINDOW)
    assert weight.table.evidence.tolist() == [[0, 0], [0, 1.25]]
    follow([9, 9, 9, 0])
    assert weight.table.evidence.tolist() == [[0, 0], [0, 1.625]]
    # They swap. What was pruned starts at its value, with a mean that knows nothing of the time before.
    weight.adapt(1.0)
    assert sparse.weight.tolist() == [[1, 0, 0, 1.5]]
    follow([9, 9, -2, 9])
    assert weight.table.evidence.tolist() == [[0, 0], [2, 0]]
    # Back and forth again: the mean of the one that was kept meanwhile starts anew, too.
    sparse.weight.data[0, 3] = 1.0
    weight.adapt(1.0)
    assert sparse.weight.tolist() == [[1, 0, 1.5, 0]]
    follow([9, 9, 9, -4])
    assert weight.table.evidence.tolist() == [[0, 0], [0, 3]]


def test_one_batch_by_hand() -> None:
    # eta = 0.5: cost |g w| of kept weights, gain 0.5 g^2 of pruned ones; four blocks of 2:4.
    sparse = sparse_linear(
        [[1, 2, 0, 0, 3, 3, 0, 0], [0, 0, 2.0, 4, 0, 1, 0, 1]],
        [[1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 0, 1]],
        "2:4",
    )
    weight = evolving(sparse, OneBatch(share=1.0), freeze_after=1)
    optimizer = sgd(weight, lr=0.5, weight_decay=0.5)
    gradient = [[0.5, 0.25, 2, -1, 0, 0, 4, 0], [1, 1, 0.5, 0.5, 2, 8, 3, 8]]
    learn(weight, optimizer, gradient)
    # Costs 0.5, 0.5; gains 2, 0.5: one swap (a tie does not swap). | Costs 0, 0; gains 8, 0: 8.
    # Gains 0.5, 0.5; costs 1, 2: none. | Gains 2, 4.5; costs 8, 8: none.
    kept_of = copy.deepcopy(weight)
    kept_of.adapt(0.25)  # one block of four: the second
    assert kept_of.weights[0].mask().int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert kept_of.table.predicted == 8
    weight.adapt(0.5)
    assert sparse.mask().int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert sparse.weight.tolist() == [[0, 2, -1, 0, 0, 3, -2, 0], [0, 0, 2, 4, 0, 1, 0, 1]]
    # To first order the weight of cost 0.5 is pruned for a gain, since its gradient has its sign: 0.5 + 2, and 8.
    assert weight.table.predicted == 10.5
    assert weight.table.masks.last_flips == 4
    # The next reading starts from nothing.
    learn(weight, optimizer, torch.zeros(2, 8))
    assert not weight.table.evidence.any()
    weight.adapt(1.0)
    assert weight.table.masks.last_flips == 0


def test_one_block_of_each_row_swaps_at_a_time() -> None:
    # Evidence over the weakest kept weight: row 0 has 3, 4 and 4 (the first of the two swaps), row 1 has 2, 0 and 1.1 (less
    # than the margin asks for), row 2 has 1.1 at most.
    sparse = sparse_linear(
        [[1.0, 3, 1, 4, 2, 8], [1.0, 2, 1, 0, 1, 1.1], [1, 1, 1, 1.1, 1, 1]],
        [[1, 0, 1, 0, 1, 0]] * 3,
        "1:2",
    )
    weight = evolving(sparse, Evidence(), freeze_after=0)
    sparse.weight.detach().masked_fill_(sparse.pruned, 0)
    weight.sizes.noise = torch.tensor([1.0])
    contend_at(weight, [[1, 3, 5], [7, 9, 11], [13, 15, 17]])
    weight.adapt(1.0)
    swapped = [[1.0, 0, 0, 1.2, 2, 0], [0, 1.2, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0]]
    torch.testing.assert_close(sparse.weight.detach(), torch.tensor(swapped))
    assert weight.table.masks.last_flips == 4
    # The others of row 0 follow, one at a time; a frozen block does not stand in their way.
    weight.table.history.oscillations[2] = 1
    weight.table.evidence[2] = torch.tensor([0, 99.0])
    weight.adapt(1.0)
    torch.testing.assert_close(sparse.weight[0].detach(), torch.tensor([0, 1.2, 0, 1.2, 2, 0]))
    # Once it is not, it comes first.
    weight.table.history.oscillations[2] = 0
    weight.adapt(1.0)
    torch.testing.assert_close(sparse.weight[0].detach(), torch.tensor([0, 1.2, 0, 1.2, 0, 2.4]))
