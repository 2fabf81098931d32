"""Masks that are N:M along the input *and* along the output dimension."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from bame_lightning.blocks.layout import from_blocks, to_blocks


def transposable_mask(scores: Shaped[Tensor, "out inp *kernel"], n: int, m: int) -> Bool[Tensor, "out inp *kernel"]:
    """Keep exactly `n` of every `m` weights along the input and along the output dimension.

    Such a mask serves the forward pass and, transposed, the input gradient. In every tile of m x m weights: take the highest
    scores first unless their row or column is full (the 2-approximation of Hubara et al., "Accelerated Sparse Neural
    Training: A Provable and Efficient Method to Find N:M Transposable Masks", NeurIPS 2021), then fill the rows and
    columns that were left short, where need be by moving a weight that was taken (ours).

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
    kept = _fill(_greedy(tiles, n), tiles, n)
    return from_blocks(kept.view(grid.shape).transpose(1, 2).reshape(-1, m), scores.shape)


def _greedy(tiles: Shaped[Tensor, "tiles m m"], n: int) -> Bool[Tensor, "tiles m m"]:
    count, m, _ = tiles.shape
    order = tiles.reshape(count, m * m).argsort(dim=-1, descending=True, stable=True)
    every = torch.arange(count, device=tiles.device)
    kept = torch.zeros(tiles.shape, dtype=torch.bool, device=tiles.device)
    rows, columns = (torch.zeros(count, m, dtype=torch.int32, device=tiles.device) for _ in range(2))
    for rank in range(m * m):
        row, column = order[:, rank] // m, order[:, rank] % m
        free = (rows[every, row] < n) & (columns[every, column] < n)
        kept[every, row, column] = free
        rows[every, row] += free
        columns[every, column] += free
    return kept


def _fill(kept: Bool[Tensor, "tiles m m"], tiles: Shaped[Tensor, "tiles m m"], n: int) -> Bool[Tensor, "tiles m m"]:
    """Complete rows and columns that hold fewer than `n`, one weight per tile and round."""
    while (short := (kept.sum(-1) < n).any(-1)).any():
        index = short.nonzero().squeeze(-1)
        part, scores = kept[index], tiles[index]
        every = torch.arange(len(index), device=kept.device)
        row_short, column_short = part.sum(2) < n, part.sum(1) < n
        # Where a short row meets a short column at a free place, take it.
        open_places = row_short[:, :, None] & column_short[:, None, :] & ~part
        simple = open_places.flatten(1).any(-1)
        place = open_places.flatten(1).int().argmax(-1)
        row = torch.where(simple, place // part.shape[1], row_short.int().argmax(-1))
        column = torch.where(simple, place % part.shape[1], column_short.int().argmax(-1))
        # Else (row, column) is taken: move a weight (r, c) that leaves (row, c) and (r, column) free to hold one each.
        in_row, in_column = part[every, row], part[every, :, column]
        movable = part & ~in_row[:, None, :] & ~in_column[:, :, None]
        gain = scores[every, row][:, None, :] + scores[every, :, column][:, :, None] - scores
        best = gain.masked_fill(~movable, -torch.inf).flatten(1).argmax(-1)
        r, c = best // part.shape[1], best % part.shape[1]
        part[every[simple], row[simple], column[simple]] = True
        moved = ~simple
        part[every[moved], r[moved], c[moved]] = False
        part[every[moved], row[moved], c[moved]] = True
        part[every[moved], r[moved], column[moved]] = True
        kept[index] = part
    return kept
