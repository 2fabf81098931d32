"""What commands share that read checkpoints of anyone."""

from __future__ import annotations

import argparse
from pathlib import Path

from bame_lightning.blocks.pattern import NMPattern


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which `audit_checkpoint` is told what to check."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a .ckpt, a file of torch.save or safetensors, an index of shards, or the folder of a distributed checkpoint",
    )
    parser.add_argument("--pattern", metavar="N:M", help="e.g. 1:16; optional if the checkpoint says it itself")
    parser.add_argument("--key", metavar="KEY", help="which weights, where a file holds several sets, e.g. params_ema")
    parser.add_argument(
        "--dense",
        metavar="GLOB",
        action="append",
        default=[],
        help="weights or modules that are dense on purpose, e.g. 'model.fc' or '*.head*'; repeatable",
    )
    parser.add_argument(
        "--transposed",
        metavar="GLOB",
        action="append",
        default=[],
        help="weights or modules whose input dimension is the first one, as in GPT-2's Conv1D; repeatable",
    )


def check_given(checkpoint: Path, pattern: str | None) -> None:
    """Find out about wrong arguments before anything heavy is imported.

    Args:
        checkpoint: Where the weights are.
        pattern: What `--pattern` was.

    Raises:
        ValueError: If the path does not exist, or the pattern is none.
    """
    if not checkpoint.exists():
        raise ValueError(f"`{checkpoint}` does not exist. Check the path.")
    if pattern is not None:
        NMPattern.parse(pattern)
