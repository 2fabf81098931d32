"""Products by the sparse tensor cores of NVIDIA's GPUs: 2:4 weights, packed anew for each forward pass.

Nothing here has run on a GPU yet. Packing for CUTLASS is plain torch, and tests on a CPU unpack it again. Tests check
shapes on the meta device, and training with the kernels replaced. cuSPARSELt's own packing is untested, and no speed was
measured.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.utils._python_dispatch import _disable_current_modes

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.native.build import UnavailableError
from bame_lightning.compute.operation import Linear, Operation

DTYPES = (torch.float16, torch.bfloat16)
"""Number types whose products are 2:4; those of single precision would be 1:2."""
Backend = type[SparseSemiStructuredTensorCUTLASS] | type[SparseSemiStructuredTensorCUSPARSELT]


def backend_of(device: torch.device) -> Backend:
    """Torch's class for the sparse tensor cores of a device.

    Raises:
        UnavailableError: If the device has none, or torch cannot use them.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        raise UnavailableError(f"sparse tensor cores are part of NVIDIA's GPUs, and the weight is on {device.type}")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise UnavailableError(f"sparse tensor cores need compute capability 8.0, and {device} has {major}.{minor}")
    if major == 8:
        return SparseSemiStructuredTensorCUTLASS
    if not torch.backends.cusparselt.is_available():
        raise UnavailableError(
            f"compute capability {major}.{minor} needs cuSPARSELt, which this torch was built without"
        )
    return SparseSemiStructuredTensorCUSPARSELT


class SemiStructuredProducts:
    """A linear layer's forward pass and input gradient with 2:4 weights; its weight gradient is dense.

    The dense parameter stays what is trained. Its kept weights are packed for each forward pass, and for the input gradient
    once more, transposed. Torch packs any weight that it is given and drops the third kept weight of four without a word, so
    the mask is checked whenever it changes. If the transposed weight does not fit, the input gradient is dense.

    Only a change of the mask waits for the device. So inputs are not searched for values that are not finite: an infinity that
    meets a pruned weight makes NaN in a dense product, and nothing here.

    Args:
        operation: A linear layer.
        mask: True where kept, shape (out, in), on a GPU.
        pattern: N:M.
        dtype: Of the weight; single precision is multiplied under autocast only.

    Raises:
        UnavailableError: If the device has no sparse tensor cores.
        ValueError: If the mask keeps more than 2 of 4 consecutive inputs, or torch does not multiply such shapes or numbers.
        TypeError: If the operation is not a linear layer.
    """

    name, device = "semi_structured", "cuda"

    def __init__(
        self, operation: Operation, mask: Bool[Tensor, "out inp *kernel"], pattern: NMPattern, dtype: torch.dtype
    ) -> None:
        if not isinstance(operation, Linear):
            raise TypeError("sparse tensor cores multiply linear layers only")
        self.backend = backend_of(mask.device)
        if dtype not in (*DTYPES, torch.float32):
            raise ValueError(f"sparse tensor cores multiply 2:4 in float16 and bfloat16, not in {dtype}")
        if why := self._why_not(mask.shape):
            raise ValueError(why)
        self._forward: _Packing | None = None
        self._transposed: _Packing | None = None
        self.update(mask)

    def _why_not(self, shape: torch.Size) -> str:
        """Why a matrix of some shape cannot be packed; empty if it can."""
        least = self.backend._DTYPE_SHAPE_CONSTRAINTS[DTYPES[0]]  # the same for all of them
        rows, columns = least.sparse_min_rows, least.sparse_min_cols
        if shape[0] % rows or shape[1] % columns:
            return f"{self.backend.BACKEND} takes multiples of {rows} x {columns} weights, not {shape[0]} x {shape[1]}"
        return ""

    def update(self, mask: Bool[Tensor, "out inp"], rows: Int[Tensor, " chosen"] | None = None) -> int:
        """Follow a mask that has changed; waits for the device.

        Args:
            mask: The mask.
            rows: Not used: the whole mask is checked.

        Returns:
            1.

        Raises:
            ValueError: If it keeps more than 2 of 4 consecutive inputs.
        """
        forward, transposed = torch.stack((_most_of_four(mask), _most_of_four(mask.t()))).le(2).tolist()
        if not forward:
            raise ValueError(
                "the mask keeps more than 2 of 4 consecutive inputs, which sparse tensor cores cannot multiply"
            )
        self._forward = _Packing(mask, self.backend)
        packs = transposed and not self._why_not(mask.t().shape)
        self._transposed = _Packing(mask, self.backend, transposed=True) if packs else None
        return 1

    @property
    def both_ways(self) -> bool:
        """Whether the input gradient is computed sparsely, too."""
        return self._transposed is not None

    def values(self, weight: Float[Tensor, "out inp"]) -> Tensor:
        """The packed weight, and the packed transposed one where that fits."""
        assert self._forward is not None
        packed, meta = self._forward.pack(weight)
        packed_t, meta_t = (None, None) if self._transposed is None else self._transposed.pack(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls the classes a prototype
            backend: Any = self.backend
            made: Tensor = backend(weight.shape, packed, meta, packed_t, meta_t, None)
        return made

    def forward(self, x: Float[Tensor, "*samples inp"], values: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""
        samples = x.reshape(-1, x.shape[-1])
        # A counter is told of this product, and must not see its operations as well.
        with _disable_current_modes():
            return functional.linear(samples, values, bias).view(*x.shape[:-1], -1)

    def input_gradient(self, gradient: Float[Tensor, "*samples out"], values: Tensor, x: Tensor) -> Tensor | None:
        """The gradient of the input; None if the transposed weight does not fit."""
        if not self.both_ways:
            return None
        return (gradient.reshape(-1, gradient.shape[-1]) @ values).view(x.shape)

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, also: Tensor | None = None) -> None:
        """None: neither factor of this product is sparse, so dense code computes it."""
        return


class _Packing:
    """How a weight is packed: for CUTLASS which values are taken, and their metadata; cuSPARSELt packs by itself.

    Args:
        mask: A mask of at most 2 in any 4 consecutive values of a row, or of a column if transposed.
        backend: Whose format.
        transposed: Whether the transposed weight is packed.
    """

    def __init__(self, mask: Bool[Tensor, "out inp"], backend: Backend, *, transposed: bool = False) -> None:
        self.transposed = transposed
        self.index: Tensor | None = None
        self.meta: Tensor | None = None
        if backend is SparseSemiStructuredTensorCUTLASS:
            # A kept weight may be zero. So the mask is packed, not the weight: the format must follow the mask alone.
            ones, self.meta = _pack((mask.t() if transposed else mask).contiguous().to(DTYPES[0]))
            taken = _unpack(torch.ones_like(ones), self.meta).view(-1, 4)
            places = taken.argsort(dim=1, descending=True, stable=True)[:, :2]
            places += torch.arange(0, mask.numel(), 4, device=mask.device)[:, None]
            if transposed:
                places = places % mask.shape[0] * mask.shape[1] + places // mask.shape[0]
            self.index = places.reshape(ones.shape)

    def pack(self, weight: Float[Tensor, "out inp"]) -> tuple[Tensor, Tensor | None]:
        """The kept values, and where they lie; the weight must be zero where the mask prunes."""
        if self.index is None:
            return torch._cslt_compress((weight.t() if self.transposed else weight).contiguous()), None
        return weight.reshape(-1)[self.index], self.meta


def _pack(values: Tensor) -> tuple[Tensor, Tensor]:
    packed: tuple[Tensor, Tensor] = sparse_semi_structured_from_dense_cutlass(values)  # type: ignore[no-untyped-call]
    return packed


def _unpack(packed: Tensor, meta: Tensor) -> Tensor:
    values: Tensor = sparse_semi_structured_to_dense_cutlass(packed, meta)  # type: ignore[no-untyped-call]
    return values


def _most_of_four(mask: Bool[Tensor, "rows columns"]) -> Int[Tensor, ""]:
    """The largest number kept in any four consecutive places of a row."""
    return functional.pad(mask, (0, -mask.shape[1] % 4)).reshape(-1, 4).sum(1).max()
