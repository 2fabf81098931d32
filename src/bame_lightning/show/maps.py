"""Maps of masks and of what happens to blocks: bounded arrays for any picture, filters down, input positions across."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from bame_lightning.blocks.pattern import NMPattern

CHANGES: tuple[tuple[str, str], ...] = (
    ("pruned", "#F2F2F2"),
    ("pruned, kept at first", "#E69F00"),
    ("kept, pruned at first", "#009E73"),
    ("kept, as at first", "#0072B2"),
)
"""What the codes of `changes` mean, and a colour for each: Okabe and Ito's, told apart with any colour vision."""


def mask_map(
    kept: Bool[Tensor, "out inp *kernel"], m: int, *, rows: int = 64, columns: int = 128
) -> Bool[Tensor, "filters positions"]:
    """Cut the first filters and input positions out of a mask.

    Cut, not scaled down: every block keeps N of M weights, so a mean over blocks would show the same grey everywhere.
    Positions are ordered as blocks are: by kernel position, then input.

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
    # Before positions are laid out: a large layer has far more filters than are shown.
    flat = kept[:rows].movedim(1, -1).flatten(1)
    return flat[:, : max(m, columns // m * m)].clone()


def block_map(
    values: Shaped[Tensor, " blocks"], filters: int, *, rows: int = 32, columns: int = 64
) -> Float[Tensor, "rows columns"]:
    """Lay out one value per block, a row for each filter; of more than fit, a cell is the mean of several.

    Args:
        values: Numbers or booleans, ordered as `pattern.to_blocks` orders blocks.
        filters: Output dimension of the weight.
        rows: Rows at most.
        columns: Columns at most.

    Returns:
        Means of equally large patches of blocks; those at the right and the lower edge may be smaller.

    Example:
        >>> block_map(torch.tensor([0, 2, 4, 6, 8, 10]), 2, columns=2)
        tensor([[ 1.,  4.],
                [ 7., 10.]])
    """
    grid = values.float().view(filters, -1)
    return functional.avg_pool2d(grid[None], patch(grid.shape, rows, columns), ceil_mode=True)[0]


def patch(shape: Sequence[int], rows: int, columns: int) -> tuple[int, int]:
    """Filters and blocks that a cell of `block_map` stands for.

    Args:
        shape: Filters, and blocks of each.
        rows: Rows at most.
        columns: Columns at most.

    Returns:
        Filters, blocks.

    Example:
        >>> patch((512, 60), rows=32, columns=64)
        (16, 1)
    """
    return -(-shape[0] // rows), -(-shape[1] // columns)


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
        shown: Those of the map.

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


def block_title(label: str, size: Sequence[int], shown: Sequence[int]) -> str:
    """Say what a cell of a map of blocks stands for.

    Args:
        label: Name of the layer.
        size: Filters of the layer, and blocks of each.
        shown: Rows and columns of the map.

    Returns:
        A title.

    Example:
        >>> block_title("conv1", (512, 72), (32, 36))
        'conv1: 512 filters x 72 blocks; a cell is the mean of 16 x 2'
    """
    cell = patch(size, *shown)
    text = f"{label}: {size[0]:,} filters x {size[1]:,} blocks"
    return text if cell == (1, 1) else f"{text}; a cell is the mean of {cell[0]} x {cell[1]}"
