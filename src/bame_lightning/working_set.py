"""Blocks that are worked on step after step, gathered side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class BlockState(NamedTuple):
    """What evolves in some blocks, to be changed in place.

    Args:
        kept: Their masks.
        evidence: Their evidence.
        mean: Running mean of their gradients; None where there is none.
    """

    kept: Bool[Tensor, "blocks m"]
    evidence: Float[Tensor, "blocks m"]
    mean: Float[Tensor, "blocks m"] | None


class WorkingSet:
    """Some blocks, gathered to be changed in place step after step, and put back together.

    Blocks that lie scattered over memory cost a cache miss each, in every step and tensor; side by side, the processor sees
    them coming (`docs/performance.md` has the times).

    Args:
        index: Which blocks, ascending, each once.
        whole: State of all blocks. Its evidence and mean are out of date until `put_back`; its masks never are, since who
            changes masks changes them here and there.

    Attributes:
        index: Which blocks.
        state: Their state, and a row more that nobody reads: what is done to blocks outside the set goes there.
    """

    def __init__(self, index: Int[Tensor, " chosen"], whole: BlockState) -> None:
        self.index = index
        self._whole = whole
        kept, evidence, mean = whole
        self.state = BlockState(
            _gather(kept, index), _gather(evidence, index), None if mean is None else _gather(mean, index)
        )

    def places(self, blocks: Int[Tensor, " wanted"]) -> Int[Tensor, " wanted"]:
        """Where to find blocks in `state`; those outside the set are at the row that nobody reads.

        Example:
            >>> whole = BlockState(torch.ones(8, 4, dtype=torch.bool), torch.zeros(8, 4), None)
            >>> WorkingSet(torch.tensor([2, 5, 6]), whole).places(torch.tensor([5, 3, 7, 2]))
            tensor([1, 3, 3, 0])
        """
        place, behind = (torch.searchsorted(self.index, blocks, right=right) for right in (False, True))
        return torch.where(behind > place, place, len(self.index))

    def put_back(self) -> None:
        """Write evidence and mean back to where they came from."""
        self._whole.evidence.index_copy_(0, self.index, self.state.evidence[:-1])
        if self._whole.mean is not None and self.state.mean is not None:
            self._whole.mean.index_copy_(0, self.index, self.state.mean[:-1])


def _gather(values: Tensor, index: Tensor) -> Tensor:
    rows = values.new_zeros(len(index) + 1, values.shape[1])
    torch.index_select(values, 0, index, out=rows[:-1])
    return rows
