"""Bring a callback's state home from the child processes in which some strategies train."""

from __future__ import annotations

import os
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Any

import torch

from bame_lightning.checkpoints.replacing import replacing


class Home:
    """A file by which the first of the child processes tells the callback that stayed behind how training went.

    Strategies that spawn or fork (`ddp_spawn`, `ddp_fork`, `ddp_notebook`) train copies of the callbacks. Lightning brings
    back the weights, but nothing of a callback. It calls no hook where `fit` was called, so the file is read when needed.
    """

    def __init__(self) -> None:
        self._path = Path(tempfile.gettempdir()) / f"bame_lightning-{uuid.uuid4().hex}.pt"
        self._seen = 0
        self._away = False
        weakref.finalize(self, _remove, self._path, os.getpid())

    def leave(self, strategy: Any) -> None:
        """Call when a fit begins, after `fetch`."""
        self._away = getattr(strategy.launcher, "_start_method", None) is not None

    def send(self, told: dict[str, Any], *, first: bool) -> None:
        """Call in every process when a fit has ended, with tensors and plain types; does nothing at home."""
        if self._away and first:
            with replacing(self._path) as part:
                torch.save(told, part)

    def fetch(self) -> dict[str, Any] | None:
        """Return what a child process has reported since the last call; None in the child itself."""
        if self._away or not self._path.exists():
            return None
        changed = self._path.stat().st_mtime_ns
        if changed == self._seen:
            return None
        self._seen = changed
        told: dict[str, Any] = torch.load(self._path, weights_only=True)
        return told

    def __deepcopy__(self, memo: dict[int, Any]) -> Home:
        """A copy of a callback trains on its own and has a home of its own."""
        return Home()

    def __reduce__(self) -> Any:
        """A started process keeps the way home."""
        return _travelled, (str(self._path), self._seen)


def _travelled(path: str, seen: int) -> Home:
    home = Home()
    home._path, home._seen = Path(path), seen
    return home


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
