"""Python source text as data for language models whose tokens are bytes."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from typing_extensions import override

from bame_lightning.tasks.splits import Splits

EXCLUDED = (
    *("site-packages", "dist-packages"),  # not the standard library's
    *("test", "tests", "idlelib", "lib2to3"),
    *("encodings", "pydoc_data", "config-*", "_sysconfigdata*"),  # generated
)
"""Globs over names of folders and files that are left out."""
TEST_SHARE = 0.1
"""Share of the files that are for testing."""


class Windows:
    """Every window of a text, one after another; the targets are the bytes that follow.

    Args:
        text: Bytes, more than `context` of them, or none at all.
        context: Bytes of a window. Bytes left over at the end of the text are not used.
    """

    def __init__(self, text: UInt8[Tensor, " bytes"], context: int) -> None:
        # One byte more than the window, as the target of its last byte; the next window starts with it.
        self.windows = text.unfold(0, context + 1, context) if len(text) else text.view(0, 1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(
        self, indices: Sequence[int]
    ) -> tuple[Int64[Tensor, "windows context"], Int64[Tensor, "windows context"]]:
        chosen = self.windows[list(indices)].long()
        return chosen[:, :-1], chosen[:, 1:]


class PythonSource(Splits):
    """The source text of Python's standard library, or of another folder, as bytes; nothing is downloaded.

    Every file `*.py` at any depth is read, except those that `EXCLUDED` names. A whole file is for training, for validation or
    for testing: files are ordered by a checksum of their path. The first tenth (at least one file) is for testing, the next
    ones are for validation. Another version of Python has another text, but splits it in the same way.

    Args:
        folder: Where to read; None for the standard library of the running interpreter.
        context: Bytes of a window: what a model sees at once.
        batch_size: Windows per batch. An incomplete last batch is left out of training.
        val_share: Share of the files put aside for validation; 0 validates on none.
        num_workers: Processes that load batches.

    Raises:
        ValueError: If a size is out of range, or the folder holds too little text.
        FileNotFoundError: If the folder does not exist.
    """

    num_classes = 256
    """Values of a byte."""

    def __init__(
        self,
        folder: str | None = None,
        context: int = 128,
        batch_size: int = 32,
        val_share: float = 0.05,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, evaluation_batch_size=100, collate_fn=tuple)
        if context < 1:
            raise ValueError(f"`context` must be at least 1 byte; got {context}.")
        if not 0 <= val_share < 1 - TEST_SHARE:
            raise ValueError(
                f"`val_share` must lie in [0, {1 - TEST_SHARE}), as a share of the files; got {val_share}."
            )
        self.folder = Path(folder or sysconfig.get_path("stdlib")).expanduser()
        self.context, self.val_share = context, val_share
        self.input_shape = (context,)

    @override
    def split(self) -> tuple[Windows, Windows, Windows]:
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"`folder` must be a folder of Python files; there is no folder {self.folder}. Name one "
                "(data.folder=...), or leave it out for Python's standard library."
            )
        texts = (bytearray().join(map(Path.read_bytes, part)) for part in self._files())
        train, val, test = (torch.from_numpy(np.frombuffer(text, dtype=np.uint8)) for text in texts)
        needed = {"training": (train, self.batch_size), "testing": (test, 1)}
        if self.val_share:
            needed["validation"] = (val, 1)
        for purpose, (text, windows) in needed.items():
            if len(text) <= windows * self.context:
                raise ValueError(
                    f"`folder` {self.folder} holds too little Python source: {len(text)} bytes are for {purpose}, which "
                    f"needs more than {windows} x `context` {self.context}. Name a larger one (data.folder=...), or "
                    "choose a smaller `context`, `batch_size` or another `val_share`."
                )
        return Windows(train, self.context), Windows(val, self.context), Windows(test, self.context)

    def _files(self) -> tuple[list[Path], list[Path], list[Path]]:
        """Files for training, validation and testing, each sorted by path."""
        names = [path.relative_to(self.folder) for path in self.folder.rglob("*.py") if path.is_file()]
        names = [name for name in names if not any(fnmatchcase(part, glob) for part in name.parts for glob in EXCLUDED)]
        # Not at random: a file that two versions of Python share is nearly always in the same part in both.
        names.sort(key=lambda name: (zlib.crc32(name.as_posix().encode()), name))
        test = max(1, round(TEST_SHARE * len(names)))
        val = test + (max(1, round(self.val_share * len(names))) if self.val_share else 0)
        train, validation, testing = (
            [self.folder / name for name in sorted(part)] for part in (names[val:], names[test:val], names[:test])
        )
        return train, validation, testing
