"""Views of tensors, remembered until these move."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class Views:
    """Remember one view of each of some tensors, since a view is an operation, too; they keep its memory until forgotten.

    Args:
        make: Makes a view of a tensor.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._of: dict[Hashable, tuple[Any, Tensor]] = {}

    def of(self, name: Hashable, tensor: Tensor) -> Tensor:
        """The view of a tensor; made anew when it lies elsewhere, or otherwise."""
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        found = self._of.get(name)
        if found is None or found[0] != where:
            found = self._of[name] = where, self._make(tensor.detach())
        return found[1]

    def forget(self) -> None:
        """Let the tensors go."""
        self._of = {}
