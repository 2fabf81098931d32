import gzip
import struct
from pathlib import Path

import pytest
import torch

from bame_lightning.tasks.idx import find_idx, read_idx

# Two arrays of 2x3 bytes, written by hand after the format's description: magic, sizes (big-endian), bytes.
CONTENT = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])


@pytest.mark.parametrize("name", ["file", "file.gz"])
def test_reads_plain_and_compressed_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(CONTENT) if name.endswith("gz") else CONTENT)
    array = read_idx(path)
    assert array.dtype == torch.uint8
    assert array.tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize("size", [0, 2, 3, 6, 11, 17])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, size: int, compressed: bool) -> None:
    path = tmp_path / ("cut.gz" if compressed else "cut")
    path.write_bytes(gzip.compress(CONTENT[:size]) if compressed else CONTENT[:size])
    with pytest.raises(ValueError, match=r"cut(\.gz)? is .*Delete it and get it again"):
        read_idx(path)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:12] + b"\xff" * 8 + b[20:], lambda b: b"no gzip"])
def test_damaged_compression_is_named(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "broken.gz"
    path.write_bytes(damage(gzip.compress(CONTENT * 50)))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"broken\.gz is damaged or cut short"):
        read_idx(path)


def test_bytes_beyond_the_announced_ones_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(CONTENT + b"\0")
    with pytest.raises(ValueError, match="announces 18 bytes, it holds 19"):
        read_idx(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "floats"
    path.write_bytes(struct.pack(">BBBBIf", 0, 0, 0x0D, 1, 1, 1.5))
    with pytest.raises(ValueError, match="starts with 00 00 08, this one with 00 00 0d"):
        read_idx(path)


def test_finds_files_in_the_folder_and_where_torchvision_lays_them(tmp_path: Path) -> None:
    assert find_idx(tmp_path, "images") is None
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "images.gz").touch()
    assert find_idx(tmp_path, "images") == raw / "images.gz"
    (raw / "images").touch()
    assert find_idx(tmp_path, "images") == raw / "images"
    (tmp_path / "images.gz").touch()
    assert find_idx(tmp_path, "images") == tmp_path / "images.gz"
