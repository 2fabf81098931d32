"""Whole adaptations with every number worked out by hand."""

from __future__ import annotations

import copy

import torch

from bame_lightning.evidence import Evidence, OneBatch
from bame_lightning.evolution import EvolvingWeight
from tests.helpers import learn, read, sgd, sparse_linear

YES = torch.tensor(True)


def test_accumulated_evidence_by_hand_under_sgd() -> None:
    # SGD: eta = 0.1 / (1 - 0.9) = 1. A reading everywhere: r k eta = 2 * 0.5 * 1 = 1, and evidence shrinks by
    # 1 * (0.1 + 0.15) = 1/4. A reading of designated blocks: r k eta = 1/2, shrinks by 1/8. 99 marks gradients of kept
    # weights, and -99 those of blocks that are not designated: neither may matter.
    sparse = sparse_linear(
        [[1.0, 0.5, 0.0, 0.0, 0.0, 2.0, 0.0, 0.25], [0.75, 0.0, 1.5, 0.0, 0.0, 0.0, 4.0, 3.0]],
        [[1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0, 1, 1]],
        "2:4",
    )
    weight = EvolvingWeight(sparse, Evidence(read_every=4, share=0.5, step_size=0.5, decay=0.15), freeze_after=1)
    optimizer = sgd(weight, lr=0.1, momentum=0.9, weight_decay=0.1)
    parameter, storage = sparse.weight, sparse.weight.data_ptr()

    # v = 3/4 * 0 - 1 * g
    learn(weight, optimizer, [[99, 99, -0.25, 0.5, 1, 99, 0.125, 99], [99, -0.5, 99, 0.25, -1, 2, 99, 99]], steps=2)
    v = [[0, 0, 0.25, -0.5], [-1, 0, -0.125, 0], [0, 0.5, 0, -0.25], [1, -2, 0, 0]]
    torch.testing.assert_close(weight.evidence, torch.tensor(v))
    torch.testing.assert_close(weight.learning_time, torch.ones(4))

    # Urgency 0.5 / 0.5, 1 / 0.25, 0.5 / 0.75 and 2 / 3: half of the four blocks are the first two.
    weight.designate(0.5)
    assert weight.designated.tolist() == [0, 1]

    # v = 7/8 v - 1/2 g: 7/32 + 1/2 = 0.71875, -7/16 - 1/8 = -0.5625; -7/8 + 1 = 0.125, -7/64 - 13/8 = -1.734375.
    # Learning time decays alike: 7/8 * 1 + 1/2 = 1.375.
    learn(weight, optimizer, [[99, 99, -1, 0.25, -2, 99, 3.25, 99], [-99] * 8], everywhere=False)
    v = [[0, 0, 0.71875, -0.5625], [0.125, 0, -1.734375, 0], [0, 0.5, 0, -0.25], [1, -2, 0, 0]]
    torch.testing.assert_close(weight.evidence, torch.tensor(v))
    torch.testing.assert_close(weight.learning_time, torch.tensor([1.375, 1.375, 1, 1]))

    # Block 0: 0.71875 for 0.5, then 0.5625 is less than 0.71875. Block 1: 1.734375 for 0.25. The others stay.
    weight.adapt(1.0)
    w = [[1, 0, 0.71875, 0, 0, 2, -1.734375, 0], [0.75, 0, 1.5, 0, 0, 0, 4, 3]]
    torch.testing.assert_close(sparse.weight.detach(), torch.tensor(w))
    assert sparse.weight is parameter
    assert sparse.weight.data_ptr() == storage
    v = [[0, 0.5, 0, -0.5625], [0.125, 0, 0, 0.25], [0, 0.5, 0, -0.25], [1, -2, 0, 0]]
    torch.testing.assert_close(weight.evidence, torch.tensor(v))
    assert sparse.mask().int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
    assert (~sparse.pruned).int().tolist() == [[1, 0, 1, 0, 0, 1, 1, 0], [1, 0, 1, 0, 0, 0, 1, 1]]
    assert weight.history.oscillations.tolist() == [0, 0, 0, 0]
    pruned_before = [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert weight.history.pruned_before.int().tolist() == pruned_before
    assert (int(weight.last_flips), int(weight.flips)) == (4, 4)
    # (x^2 revived - x^2 pruned) / (2 S) with S = 1.375: (0.5166015625 - 0.25) / 2.75 + (3.008056640625 - 0.0625) / 2.75
    torch.testing.assert_close(weight.predicted, torch.tensor(0.09694602 + 1.07111151))

    # Block 0 revives position 3 (never pruned before): v = -0.421875 - 1 beats 0.71875. Block 1 revives position 3 again,
    # which it has just pruned: v = 0.1875 + 3 beats 1.734375. S = 3/4 * 1.375 + 1 = 2.03125.
    learn(weight, optimizer, [[99, 0, 99, 1, 0, 99, 99, -3], [99, 0, 99, 0, 0, 0, 99, 99]], steps=2)
    torch.testing.assert_close(weight.learning_time, torch.tensor([2.03125, 2.03125, 1.75, 1.75]))
    weight.adapt(1.0)
    w = [[1, 0, 0, -1.421875, 0, 2, 0, 3.1875], [0.75, 0, 1.5, 0, 0, 0, 4, 3]]
    torch.testing.assert_close(sparse.weight.detach(), torch.tensor(w))
    assert weight.history.oscillations.tolist() == [0, 1, 0, 0]
    pruned_before = [[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert weight.history.pruned_before.int().tolist() == pruned_before
    assert (int(weight.last_flips), int(weight.flips)) == (4, 8)
    assert not weight.frozen.any()

    # Block 1 revives position 2 again, in place of 2: its second oscillation, one more than it may make.
    learn(weight, optimizer, [[0, 0, 0, 0, 0, 0, 3, 0], [0] * 8], steps=2)
    weight.adapt(1.0)
    torch.testing.assert_close(sparse.weight[0, 4:].detach(), torch.tensor([0, 0, 0.75 * -1.734375 - 3, 3.1875]))
    assert (int(weight.last_flips), int(weight.flips)) == (2, 10)
    assert weight.history.oscillations.tolist() == [0, 2, 0, 0]
    assert weight.frozen.tolist() == [False, True, False, False]
    assert weight.designated.tolist() == [0]

    # It is neither read nor adapted any more, whatever comes.
    before = [sparse.weight[0, 4:].detach().clone(), weight.evidence[1].clone(), weight.learning_time[1].clone()]
    read(weight, [[0, 0, 0, 0, 99, 99, 99, 99], [0] * 8])
    assert weight.reading is not None
    assert weight.reading.blocks is not None
    assert weight.reading.blocks.tolist() == [0, 2, 3]
    weight.accumulate(optimizer, 2, YES)
    weight.adapt(1.0)
    weight.designate(1.0)
    assert weight.designated.tolist() == [0, 2, 3]
    after = [sparse.weight[0, 4:].detach(), weight.evidence[1], weight.learning_time[1]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert weight.last_flips == 0


def test_accumulated_evidence_by_hand_under_adam() -> None:
    # After one step of Adam the second moment, corrected for its bias, is the squared gradient. Block 0 keeps weights with
    # gradients 1 and 7: mean square 25, more than the 22.75 of all four, eta = 0.5 / 5 = 0.1. Block 1 keeps 1 and 1, less
    # than the mean square of all four, 9: eta = 0.5 / 3. r k = 2 * 0.5 = 1.
    sparse = sparse_linear([[2, 0, 0, 0.9, 0, 5, 4, 0]], [[1, 0, 0, 1, 0, 1, 1, 0]], "2:4")
    weight = EvolvingWeight(sparse, Evidence(step_size=0.5, decay=0.2), freeze_after=1)
    optimizer = torch.optim.Adam([sparse.weight], lr=0.5, betas=(0.5, 0.75), eps=1e-12)
    read(weight, [[1, 4, -5, 7, 5, 1, -1, 3]])
    optimizer.step()  # moves every kept weight by lr against the sign of its gradient
    torch.testing.assert_close(sparse.weight.detach(), torch.tensor([[1.5, 0, 0, 0.4, 0, 4.5, 4.5, 0]]))
    weight.accumulate(optimizer, 2, YES)
    torch.testing.assert_close(weight.evidence, torch.tensor([[0, -0.4, 0.5, 0], [-5 / 6, 0, 0, -0.5]]))
    torch.testing.assert_close(weight.learning_time, torch.tensor([0.1, 0.5 / 3]))
    # Evidence decays by lr (wd + lambda), not by the adaptive rate: 1 - 2 * 0.5 * 0.5 * 0.2 = 0.9. Without a gradient the
    # second moments of the kept weights alone give the rates, 0.1 and 0.5.
    read(weight, torch.zeros(1, 8))
    weight.accumulate(optimizer, 2, YES)
    torch.testing.assert_close(weight.evidence, torch.tensor([[0, -0.36, 0.45, 0], [-0.75, 0, 0, -0.45]]))
    torch.testing.assert_close(weight.learning_time, torch.tensor([0.19, 0.65]))
    # 0.45 for 0.4, then 0.36 is less than 0.45. The second block keeps what it has.
    weight.adapt(1.0)
    torch.testing.assert_close(sparse.weight.detach(), torch.tensor([[1.5, 0, 0.45, 0, 0, 4.5, 4.5, 0]]))
    torch.testing.assert_close(weight.evidence, torch.tensor([[0, -0.36, 0, 0.4], [-0.75, 0, 0, -0.45]]))
    torch.testing.assert_close(weight.predicted, torch.tensor((0.45**2 - 0.4**2) / 0.38))


def test_one_batch_by_hand() -> None:
    # eta = 0.5: cost |g w| of kept weights, gain 0.5 g^2 of pruned ones; four blocks of 2:4.
    sparse = sparse_linear(
        [[1, 2, 0, 0, 3, 3, 0, 0], [0, 0, 2.0, 4, 0, 1, 0, 1]],
        [[1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 0, 1]],
        "2:4",
    )
    weight = EvolvingWeight(sparse, OneBatch(share=1.0), freeze_after=1)
    optimizer = sgd(weight, lr=0.5, weight_decay=0.5)
    gradient = [[0.5, 0.25, 2, -1, 0, 0, 4, 0], [1, 1, 0.5, 0.5, 2, 8, 3, 8]]
    learn(weight, optimizer, gradient)
    # Costs 0.5, 0.5; gains 2, 0.5: one swap (a tie does not swap), worth 1.5. | Costs 0, 0; gains 8, 0: 8.
    # Gains 0.5, 0.5; costs 1, 2: none. | Gains 2, 4.5; costs 8, 8: none.
    kept_of = copy.deepcopy(weight)
    kept_of.adapt(0.25)  # one block of four: the second
    assert kept_of.sparse.mask().int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert kept_of.predicted == 8
    weight.adapt(0.5)
    assert sparse.mask().int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert sparse.weight.tolist() == [[0, 2, -1, 0, 0, 3, -2, 0], [0, 0, 2, 4, 0, 1, 0, 1]]
    assert weight.predicted == 9.5
    assert weight.last_flips == 4
    # The next reading starts from nothing.
    learn(weight, optimizer, torch.zeros(2, 8))
    assert not weight.evidence.any()
    assert weight.learning_time.tolist() == [0.5] * 4
    weight.adapt(1.0)
    assert weight.last_flips == 0
