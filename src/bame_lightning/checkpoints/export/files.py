"""Files of tensors, written and compared."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bame_lightning.checkpoints.export.trained import ExportError


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a safetensors file.

    Args:
        path: The file.
        tensors: Tensors by name; they may share memory, which is then written several times.
        metadata: Text by key, for the file's `__metadata__`.

    Raises:
        ExportError: If safetensors has no such type of numbers.
        OSError: If the system refuses to write.
    """
    apart: dict[str, Tensor] = {}
    seen = set[int]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory.
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen.add(storage)
    try:
        save_file(apart, path, dict(metadata))
    except (SafetensorError, KeyError) as error:
        if refused := re.search(r"\(os error (\d+)\)", str(error)):  # of a full disk, for instance
            raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(path)) from error
        raise ExportError(f"cannot be written as safetensors ({type(error).__name__}: {error}).") from error


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names, types, shapes and bits.

    Args:
        left: One.
        right: The other.

    Returns:
        True if nothing differs, not even the payload of a NaN.
    """
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype
        and tensor.shape == right[name].shape
        and torch.equal(_bytes(tensor), _bytes(right[name]))
        for name, tensor in left.items()
    )


def same_values(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names, types, shapes and numbers; 0 and -0 are one, and so are all NaNs.

    Args:
        left: One.
        right: The other.

    Returns:
        True if nothing differs.
    """
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype
        and tensor.shape == right[name].shape
        and torch.allclose(tensor, right[name], rtol=0, atol=0, equal_nan=tensor.is_floating_point())
        for name, tensor in left.items()
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
