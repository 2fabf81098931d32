"""A checksum of a tensor's bits, computed where the tensor lies."""

from __future__ import annotations

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20
_MIXER = -7046029254386353131
"""2^64 over the golden ratio, as a signed number."""


def checksum(tensor: Shaped[Tensor, "*shape"]) -> Int[Tensor, ""]:
    r"""Sum the words of a tensor's bits, each times a scrambled number of its place, modulo $2^{64}$.

    A plain sum would not do: a swap within a block does not change the sum of a mask. Nor would a sum weighted by places: two
    opposite swaps do not change it. A long tensor is taken in pieces of 8 MiB, so that no copy of its size is made.

    Args:
        tensor: Numbers or booleans of at most 8 bytes.

    Returns:
        The checksum, on the tensor's device.

    Example:
        >>> one, other = torch.tensor([[False, True], [True, False]]), torch.tensor([[True, False], [False, True]])
        >>> bool(checksum(one) == checksum(other)), bool(checksum(one) == checksum(one.clone()))
        (False, True)
    """
    flat = tensor.detach().reshape(-1)
    # Eight bytes at once where the length allows it: a mask then needs an eighth of the multiplications.
    whole = flat.numel() * flat.element_size() % 8 == 0
    words = flat.view(torch.int64 if whole else _INTEGERS[flat.element_size()])
    place = torch.arange(1, min(len(words), _CHUNK) + 1, device=words.device) * _MIXER
    place = (place ^ (place >> 29)) * _MIXER | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for index, piece in enumerate(torch.split(words, _CHUNK)):
        total += (piece * place[: len(piece)]).sum() * ((2 * index + 1) ** 3)
    return total
