"""docs/export.md read once more, in plain Python: the expectations of the tests of packed files."""

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "read_exports.py"))
"""Names of the example that reads such files."""

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "U8": 1, "BOOL": 1}
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Raw = tuple[torch.dtype, list[int], bytes]
"""Type, shape, and content in row-major order."""


def raw_state(state: dict[str, Tensor]) -> dict[str, Raw]:
    """The same of tensors in memory."""
    return {
        name: (tensor.dtype, list(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()))
        for name, tensor in state.items()
    }


def read_file(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]]]:
    """Metadata and tensors of a safetensors file: length of the header, header, content."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: (entry["dtype"], entry["shape"], content[start:][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def read_packed(path: Path) -> dict[str, Raw]:
    """The dense state dict of a packed file."""
    metadata, tensors = read_file(path)
    assert (metadata["format"], metadata["version"]) == ("bame_lightning.packed", "1")
    state: dict[str, Raw] = {}
    for name, layer in json.loads(metadata["layers"]).items():
        kind, (blocks, n), values = tensors.pop(name + ".nm_values")
        index_kind, (length,), indices = tensors.pop(name + ".nm_indices")
        m = int(layer["pattern"].split(":")[1])
        assert layer["pattern"] == f"{n}:{m}"
        bits, size = 0, BYTES[kind]
        while 2**bits < m:
            bits += 1
        assert (index_kind, length) == ("U8", -(-blocks * n * bits // 8))
        # The lowest bit of the first byte is the lowest bit of a little-endian number.
        stream = int.from_bytes(indices, "little")
        transposed = layer.get("transposed", False)
        out, inp, *kernel = reversed(layer["shape"]) if transposed else layer["shape"]
        places = itertools.product(range(out), *map(range, kernel), range(inp // m))
        content = bytearray(out * inp * size)
        for extent in kernel:
            content *= extent
        for block, (row, *position, column) in enumerate(places):
            previous = -1
            for k in range(n):
                value = block * n + k
                offset = (stream >> value * bits) & (2**bits - 1)
                assert previous < offset < m
                previous = offset
                flat = (column * m + offset) * out + row if transposed else row * inp + column * m + offset
                for extent, p in zip(kernel, position, strict=True):
                    flat = flat * extent + p
                content[flat * size : (flat + 1) * size] = values[value * size : (value + 1) * size]
        assert stream >> blocks * n * bits == 0
        state[name] = (TYPES[kind], layer["shape"], bytes(content))
    state |= {name: (TYPES[kind], shape, content) for name, (kind, shape, content) in tensors.items()}
    return state | {alias: state[name] for alias, name in json.loads(metadata["same_as"]).items()}
