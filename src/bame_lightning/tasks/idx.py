"""The idx file format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

_UNSIGNED_BYTE = 0x08


def find_idx(folder: Path, name: str) -> Path | None:
    """Find an idx file, compressed or not.

    Args:
        folder: Where to look: in the folder itself and in the place where torchvision downloads Fashion-MNIST.
        name: Name of the file without `.gz`.

    Returns:
        Its path, or None.
    """
    folders = (folder, folder / "FashionMNIST" / "raw")
    candidates = [place / file for place in folders for file in (name, f"{name}.gz")]
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path) -> UInt8[Tensor, "*shape"]:
    """Read an idx file of unsigned bytes.

    Args:
        path: The file; gzip is recognised by the suffix `.gz`.

    Returns:
        Its array.

    Raises:
        ValueError: If the file is damaged, cut short, or no idx file of unsigned bytes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}). Delete it and get it again.") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTE)):
        raise ValueError(
            f"{path} is no idx file of unsigned bytes: such a file starts with 00 00 08, this one with "
            f"{content[:3].hex(' ') or 'nothing'}. Delete it and get it again."
        )
    dims = content[3]
    start = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", content[4:start]) if len(content) >= start else None
    expected = start + math.prod(shape) if shape else start
    if shape is None or len(content) != expected:
        raise ValueError(
            f"{path} is damaged or cut short: its header announces {expected} bytes, it holds {len(content)}. "
            "Delete it and get it again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
