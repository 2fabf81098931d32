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
        # Workers are new in each epoch, so that a resumed run can draw their random numbers again: generators of
        # persistent workers are
        # nowhere saved.
        num_workers=num_workers,
        **options,
    )
