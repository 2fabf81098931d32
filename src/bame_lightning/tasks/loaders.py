"""How all data modules serve their samples."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader


def make_loader(
    samples: Any, batch_size: int, num_workers: int, *, training: bool = False, **options: Any
) -> DataLoader[Any]:
    """Serve samples in batches: in training shuffled, without an incomplete last batch.

    Args:
        samples: A data set.
        batch_size: Samples per batch.
        num_workers: Processes that load batches.
        training: Whether the samples are trained on.
        options: Further arguments of `DataLoader`.

    Returns:
        The loader.
    """
    return DataLoader(
        samples,
        batch_size=batch_size,
        shuffle=training,
        drop_last=training,
        # New ones in each epoch, whose random numbers a resumed run can draw again: the generators of workers that persist are
        # nowhere saved.
        num_workers=num_workers,
        **options,
    )
