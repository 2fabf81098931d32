"""Maps of masks and blocks: arrays of limited size for any picture, filters down, input positions across."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern

CHANGES: tuple[tuple[str, str], ...] = (
    ("pruned", "#F2F2F2"),
    ("pruned, kept at first", "#E69F00"),
    ("kept, pruned at first", "#009E73"),
    ("kept, as at first", "#0072B2"),
)
"""The meaning of the codes of `changes`, and a colour for each, from Okabe and Ito, for any colour vision."""
COUNTS: tuple[str, ...] = ("#FDE725", "#5EC962", "#21918C", "#3B528B", "#440154")
"""Colours of counts, from few to many: viridis, reversed. Zero has the colour of pruned positions."""
NOTHING = CHANGES[0][1]
FROZEN = "#D55E00"
ROWS, COLUMNS = 64, 128
"""The most filters and positions that a map shows."""


def mask_map(
    kept: Bool[Tensor, "out inp *kernel"], m: int, *, rows: int = ROWS, columns: int = COLUMNS
) -> Bool[Tensor, "filters positions"]:
    """Cut the first filters and input positions out of a mask.

    A map is cut, not scaled down: every block keeps N of M weights, so a mean over blocks would show the same grey
    everywhere. Positions are in the order of blocks: by kernel position, then input.

    Args:
        kept: True where kept; shaped like the weight.
        m: Weights in a block.
        rows: Filters at most.
        columns: Positions at most, rounded down to whole blocks; at least one block.

    Returns:
        The cut.

    Example:
        >>> kept = torch.tensor([[True, False, False, True], [False, True, True, False]])
        >>> mask_map(kept, 2, columns=3)
        tensor([[ True, False],
                [False,  True]])
    """
    # First the filters are cut: a large layer has far more of them than are shown.
    flat = kept[:rows].movedim(1, -1).flatten(1)
    return flat[:, : max(m, columns // m * m)].clone()


def block_map(
    values: Shaped[Tensor, " blocks"], filters: int, m: int, *, rows: int = ROWS, columns: int = COLUMNS
) -> Shaped[Tensor, "filters columns"]:
    """Cut the blocks that `mask_map` shows out of one value per block.

    Args:
        values: One per block, ordered as `to_blocks` orders blocks.
        filters: Output dimension of the weight.
        m: Weights in a block.
        rows: As in `mask_map`.
        columns: As in `mask_map`.

    Returns:
        A row for each filter; the block in column c covers the positions from c * m on.

    Example:
        >>> block_map(torch.tensor([0, 2, 4, 6, 8, 10]), 2, 4, columns=11)
        tensor([[0, 2],
                [6, 8]])
    """
    return values.view(filters, -1)[:rows, : max(1, columns // m)].clone()


def changes(
    kept: Bool[Tensor, "filters positions"], first: Bool[Tensor, "filters positions"]
) -> UInt8[Tensor, "filters positions"]:
    """Compare a mask with the one that a run started with.

    Args:
        kept: Now; true where kept.
        first: At first.

    Returns:
        An index into `CHANGES` per position.

    Example:
        >>> changes(torch.tensor([[False, False, True, True]]), torch.tensor([[False, True, False, True]]))
        tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    """
    return first.to(torch.uint8) + 2 * kept.to(torch.uint8)


def mask_title(label: str, pattern: NMPattern, size: Sequence[int], shown: Sequence[int]) -> str:
    """Say which part of a mask is shown.

    Args:
        label: Name of the layer.
        pattern: Its pattern.
        size: Filters and input positions of the layer.
        shown: Filters and input positions of the map.

    Returns:
        A title.

    Example:
        >>> mask_title("conv1", NMPattern(1, 16), (512, 1152), (64, 128))
        'conv1, 1:16: first 64 of 512 filters x first 128 of 1,152 input positions'
    """
    parts = [
        f"{whole:,}" if whole == part else f"first {part:,} of {whole:,}"
        for whole, part in zip(size, shown, strict=True)
    ]
    return f"{label}, {pattern}: {parts[0]} filters x {parts[1]} input positions"
