"""Arguments of all commands that read checkpoints from anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from bame_lightning.blocks.pattern import NMPattern


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that tell `audit_checkpoint` what to check."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a .ckpt, a file of torch.save or safetensors, an index of shards, or the folder of a distributed checkpoint",
    )
    parser.add_argument("--pattern", metavar="N:M", help="e.g. 1:16; not needed if the checkpoint says it")
    parser.add_argument("--key", metavar="KEY", help="which set of weights, if a file holds several, e.g. params_ema")
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
    """Refuse wrong arguments before anything heavy is imported.

    Args:
        checkpoint: Path of the weights.
        pattern: The value of `--pattern`.

    Raises:
        ValueError: If the path does not exist, or the pattern is not one.
    """
    if not checkpoint.exists():
        raise ValueError(f"`{checkpoint}` does not exist. Check the path.")
    if pattern is not None:
        NMPattern.parse(pattern)
