"""Masks that have a pattern along the input *and* along the output dimension."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int8, Shaped
from torch import Tensor
from torch.nn import functional

from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.pattern import NMPattern

ROWS, MOST = 4, 2
"""The pattern of sparse tensor cores: at most 2 of 4 consecutive weights are kept."""


def transposable_mask(scores: Shaped[Tensor, "out inp *kernel"], n: int, m: int) -> Bool[Tensor, "out inp *kernel"]:
    """Keep exactly `n` of every `m` weights along the input and along the output dimension.

    Such a mask serves the forward pass and, transposed, the input gradient. In every tile of m x m weights, take the highest
    scores first unless their row or column is full (the 2-approximation of Hubara et al., "Accelerated Sparse Neural
    Training: A Provable and Efficient Method to Find N:M Transposable Masks", NeurIPS 2021). Then fill the rows and
    columns that were left short; if necessary, move a weight that was taken (ours).

    Args:
        scores: One score per weight; higher means keep. `m` divides both the input and the output dimension.
        n: Weights kept per row and column of a tile.
        m: Side of a tile.

    Returns:
        Mask shaped like `scores`.

    Raises:
        ValueError: If `m` does not divide the output dimension.

    Example:
        >>> transposable_mask(torch.tensor([[3.0, 2.0], [2.0, 0.0]]), n=1, m=2)
        tensor([[ True, False],
                [False,  True]])
    """
    if scores.shape[0] % m:
        raise ValueError(
            f"A transposable mask needs tiles of {m} x {m} weights, so {m} must divide the output dimension; got a weight of "
            f"shape {tuple(scores.shape)}. Keep the layer dense or choose another M."
        )
    # Blocks are ordered by filter first: `m` filters at a time, one block of each, make a tile.
    blocks = to_blocks(scores, m)
    grid = blocks.view(len(scores) // m, m, -1, m).transpose(1, 2)
    tiles = grid.reshape(-1, m, m)
    kept = _fill(_greedy(tiles, n, n), tiles, n, n)
    return from_blocks(kept.view(grid.shape).transpose(1, 2).reshape(-1, m), scores.shape)


def fits_forward(pattern: NMPattern) -> bool:
    """Whether every mask of a pattern keeps at most 2 of 4 consecutive inputs.

    Example:
        >>> [fits_forward(NMPattern.parse(pattern)) for pattern in ("1:16", "2:4", "4:8")]
        [True, True, False]
    """
    return (pattern.n == 1 and pattern.m > 1) or (pattern.n == MOST and pattern.m % ROWS == 0)


def column_counts(mask: Bool[Tensor, "blocks m"], rows: int) -> Int8[Tensor, "groups columns"]:
    """Count what is kept of every four consecutive rows of a column; the last group may have fewer rows.

    Args:
        mask: True where kept, in the order of `to_blocks`.
        rows: Rows of the weight.

    Example:
        >>> column_counts(torch.tensor([[True, False]] * 5), rows=5)
        tensor([[4, 0],
                [1, 0]], dtype=torch.int8)
    """
    matrix = functional.pad(mask.view(rows, -1), (0, 0, 0, -rows % ROWS))
    return matrix.view(-1, ROWS, matrix.shape[1]).sum(1, dtype=torch.int8)


def fits_both_ways(mask: Bool[Tensor, "blocks m"], rows: int) -> bool:
    """Whether a mask keeps at most 2 of any four consecutive rows of a column; waits for the device."""
    return not bool((column_counts(mask, rows) > MOST).any())


def both_ways_mask(
    mask: Bool[Tensor, "blocks m"], weight: Float[Tensor, "blocks m"], rows: int
) -> Bool[Tensor, "blocks m"]:
    """Repair a mask: keep at most 2 of four consecutive rows of a column, and N in each block as before.

    Four blocks that lie below each other make a tile, which needs nothing of other tiles. A tile in which a column keeps too
    many is made anew as in `transposable_mask`. It takes positions that were kept first, then those that were pruned, both
    in the order of magnitude (ours).

    Args:
        mask: The mask, exactly N kept per block, of a pattern that `fits_forward`; in the order of `to_blocks`.
        weight: The weights.
        rows: Rows of the weight.

    Returns:
        The repaired mask.

    Example:
        >>> weight = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 0.0, 0.5]])
        >>> both_ways_mask(weight == weight.amax(1, keepdim=True), weight, rows=3).int()
        tensor([[1, 0, 0],
                [1, 0, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    kept, scores = _tiles(mask, rows), _tiles(weight.abs(), rows)
    broken = (kept.sum(1) > MOST).any(-1).nonzero().squeeze(-1)
    if not len(broken):
        return mask
    # Ranks put positions that were kept before those that were not, whatever their scale.
    order = scores[broken].flatten(1).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], 0, -1, dtype=torch.float32, device=mask.device).expand(order.shape)
    ranked = torch.empty_like(ranks).scatter_(1, order, ranks).view(-1, *kept.shape[1:])
    ranked += kept[broken] * order.shape[1]
    n = int(kept[0, 0].sum())
    kept = kept.index_copy(0, broken, _fill(_greedy(ranked, n, MOST), ranked, n, MOST))
    return kept.view(-(-rows // ROWS), -1, ROWS, mask.shape[1]).transpose(1, 2).reshape(-1, mask.shape[1])[: len(mask)]


def _tiles(blocks: Shaped[Tensor, "blocks m"], rows: int) -> Shaped[Tensor, "tiles 4 m"]:
    """Put together the blocks that lie below each other in four rows; missing rows at the end are zero."""
    grid = functional.pad(blocks.reshape(rows, -1), (0, 0, 0, -rows % ROWS))
    return grid.view(-1, ROWS, grid.shape[1] // blocks.shape[1], blocks.shape[1]).transpose(1, 2).flatten(0, 1)


def _greedy(tiles: Shaped[Tensor, "tiles side m"], n: int, most: int) -> Bool[Tensor, "tiles side m"]:
    """Take the highest scores unless their row holds `n` already, or their column `most`."""
    count, side, m = tiles.shape
    order = tiles.flatten(1).argsort(dim=-1, descending=True, stable=True)
    every = torch.arange(count, device=tiles.device)
    kept = torch.zeros(tiles.shape, dtype=torch.bool, device=tiles.device)
    rows, columns = (torch.zeros(count, size, dtype=torch.int32, device=tiles.device) for size in (side, m))
    for rank in range(side * m):
        row, column = order[:, rank] // m, order[:, rank] % m
        free = (rows[every, row] < n) & (columns[every, column] < most)
        kept[every, row, column] = free
        rows[every, row] += free
        columns[every, column] += free
    return kept


def _fill(
    kept: Bool[Tensor, "tiles side m"], tiles: Shaped[Tensor, "tiles side m"], n: int, most: int
) -> Bool[Tensor, "tiles side m"]:
    """Fill rows that hold fewer than `n` from columns that hold fewer than `most`: one weight per tile and round."""
    while (short := (kept.sum(-1) < n).any(-1)).any():
        index = short.nonzero().squeeze(-1)
        part, scores = kept[index], tiles[index]
        every = torch.arange(len(index), device=kept.device)
        row_short, column_short = part.sum(2) < n, part.sum(1) < most
        # Where a short row meets a short column at a free place, take it.
        open_places = row_short[:, :, None] & column_short[:, None, :] & ~part
        simple = open_places.flatten(1).any(-1)
        place = open_places.flatten(1).int().argmax(-1)
        row = torch.where(simple, place // part.shape[2], row_short.int().argmax(-1))
        column = torch.where(simple, place % part.shape[2], column_short.int().argmax(-1))
        # Else (row, column) is taken: move a weight (r, c) that leaves (row, c) and (r, column) free to hold one each.
        in_row, in_column = part[every, row], part[every, :, column]
        movable = part & ~in_row[:, None, :] & ~in_column[:, :, None]
        gain = scores[every, row][:, None, :] + scores[every, :, column][:, :, None] - scores
        best = gain.masked_fill(~movable, -torch.inf).flatten(1).argmax(-1)
        r, c = best // part.shape[2], best % part.shape[2]
        part[every[simple], row[simple], column[simple]] = True
        moved = ~simple
        part[every[moved], r[moved], c[moved]] = False
        part[every[moved], row[moved], c[moved]] = True
        part[every[moved], r[moved], column[moved]] = True
        kept[index] = part
    return kept
