"""A sparse layer whose products are computed as a `Choice` says, and densely where that is not possible."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute import semi_structured
from bame_lightning.compute.bags import BagProducts
from bame_lightning.compute.choice import PHASES, Choice
from bame_lightning.compute.native.products import KernelProducts
from bame_lightning.compute.operation import Operation
from bame_lightning.compute.semi_structured import SemiStructuredProducts

DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": semi_structured.DTYPES}
"""Number types that the sparse implementations multiply, by kind of device."""


@runtime_checkable
class Products(Protocol):
    """The products of one sparse layer. If a product returns None, the caller computes it densely."""

    name: str
    device: str

    def update(self, mask: Tensor, rows: Tensor | None = None) -> int:
        """Follow a mask that has changed; returns how many blocks did."""

    def values(self, weight: Tensor) -> Tensor | None:
        """Gather the kept weights, for `forward` and `input_gradient`."""

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output."""

    def input_gradient(self, gradient: Tensor, values: Tensor, x: Tensor) -> Tensor | None:
        """The gradient of the input."""

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, also: Tensor | None = None) -> Tensor | None:
        """The gradient of the weight where it is kept, and at the positions `also`."""


IMPLEMENTATIONS: dict[str, type[KernelProducts] | type[BagProducts] | type[SemiStructuredProducts]] = {
    "kernels": KernelProducts,
    "embedding_bag": BagProducts,
    "semi_structured": SemiStructuredProducts,
}


def computing_type(tensor: Tensor) -> torch.dtype:
    """Type in which products with a tensor are computed now: that of autocast on a GPU, else the tensor's own."""
    if tensor.device.type == "cuda" and torch.is_autocast_enabled("cuda") and tensor.is_floating_point():
        return torch.get_autocast_dtype("cuda")
    return tensor.dtype


class SparseLayer:
    """Compute a layer whose weight is zero where a mask prunes.

    The dense weight stays the parameter that is trained. Its gradient has the weight's shape: it holds values where the
    weight is kept and at `contenders`, and zeros elsewhere. With `whole_gradient`, or where the choice or a fallback is
    dense, it is the whole dense gradient.

    What the choice cannot do is done densely, so that results differ by the order of sums only. This happens

    - where inputs, gradients or weights are not finite: a dense product has 0 * inf = nan;
    - where pruned weights are not zero, because somebody has put other values there, an average for example;
    - under autocast on a CPU, a compiler, a tracer, `torch.func`, a dispatch mode or forward-mode differentiation;
    - when the backward pass is to be differentiated itself.

    A dispatch mode cannot see sparse products. If it has a method `count_product(macs, input, weight)`, it is told of them.
    On a GPU values are not looked at while gradients are recorded, because that would wait for the device.

    Args:
        operation: What the layer computes.
        mask: True where kept, shape (out, in, *kernel), with exactly N in each block of M; the tensor itself is not stored.
        pattern: N:M.
        choice: What computes each phase.
        dtype: Of the weight.

    Raises:
        UnavailableError: If an implementation is not available on this machine; the message says why.
        ValueError: If a block does not keep exactly N weights.
        TypeError: If an implementation does not know the operation.
    """

    def __init__(
        self,
        operation: Operation,
        mask: Bool[Tensor, "out inp *kernel"],
        pattern: NMPattern,
        choice: Choice,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.operation, self.pattern, self.choice, self.dtype = operation, pattern, choice, dtype
        self._products: dict[str, Products] = {
            name: IMPLEMENTATIONS[name](operation, mask, pattern, dtype) for name in sorted(choice.used)
        }
        self._mask = mask if mask.device.type == "cuda" else None
        self.contenders: Int[Tensor, " contenders"] | None = None
        """Pruned positions whose gradients are computed, too, numbered in the order of `blocks.layout.to_blocks`."""
        self.whole_gradient = False
        """Whether backward passes give the whole dense gradient of the weight."""
        self.suspended = False
        """Whether all phases are computed densely for now."""
        self.version = 0
        """Counts changes of the mask."""
        self.ran: set[str] = set()
        """Phases that training has computed sparsely since this set was last emptied."""
        self.fell: set[str] = set()
        """Phases that it has computed densely since then."""

    def update(self, mask: Bool[Tensor, "out inp *kernel"], rows: Int[Tensor, " chosen"] | None = None) -> int:
        """Follow a mask that has changed.

        Args:
            mask: The mask.
            rows: Output rows in which it may have changed; all by default.

        Returns:
            How many blocks changed.

        Raises:
            ValueError: If a block does not keep exactly N weights.
        """
        self._mask = mask if self._mask is not None else None
        changed = [products.update(mask, rows) for products in self._products.values()]
        self.version += any(changed)
        return max(changed, default=0)

    def why_dense(self, x: Tensor, weight: Tensor) -> str:
        """Why a call must be computed densely; empty if it need not be."""
        if self.suspended or self.choice.dense:
            return "suspended" if self.suspended else self.choice.reason or "chosen"
        return why_not_now() or _why_not_these(x, weight, self.dtype) or self._why_not_outside(weight)

    def _why_not_outside(self, weight: Tensor) -> str:
        """Outside training, whether somebody has put in a weight that is not sparse; waits for the GPU."""
        if self._mask is None or torch.is_grad_enabled() or not bool((weight.detach() * ~self._mask).any()):
            return ""
        return "pruned weights are not zero"

    def note(self, *, sparse: Iterable[str] = (), dense: Iterable[str] = ()) -> None:
        """Remember how phases were computed."""
        self.ran.update(sparse)
        self.fell.update(dense)

    def __call__(
        self, x: Float[Tensor, ...], weight: Float[Tensor, "out inp *kernel"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, ...]:
        """The layer's output."""
        return self.operation.forward(x, weight, bias) if self.why_dense(x, weight) else self.multiply(x, weight, bias)

    def multiply(
        self, x: Float[Tensor, ...], weight: Float[Tensor, "out inp *kernel"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, ...]:
        """The layer's output, for a call that `why_dense` has let pass."""
        kind = computing_type(x)  # where autocast is on, the casts are differentiated, too
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        made: Tensor = _Multiply.apply(x, weight, bias, self, torch.is_grad_enabled())
        return made

    def products(self, phase: str) -> Products | None:
        """What computes a phase; None if it is computed densely."""
        return self._products.get(getattr(self.choice, phase))


def why_not_now() -> str:
    """Why nothing can be computed sparsely at this moment; empty if it can."""
    if torch.is_autocast_enabled("cpu"):
        return "autocast computes in another type"
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "a compiler sees dense products only"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms dense products only"
    if torch._C._len_torch_dispatch_stack() and any(
        _count_product(m) is None for m in _get_current_dispatch_mode_stack()
    ):
        return "a dispatch mode watches the operations"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return ""


def _count_product(mode: Any) -> Any:
    return getattr(mode, "count_product", None)


def _why_not_these(x: Tensor, weight: Tensor, dtype: torch.dtype) -> str:
    if type(x) is not Tensor or type(weight) not in (Tensor, torch.nn.Parameter):
        return "tensors of a class of their own"
    device = x.device.type
    if device not in DTYPES or weight.device != x.device or x.layout != torch.strided:
        return f"not on one CPU or GPU, but on {x.device} and {weight.device}"
    kind = computing_type(x)
    if weight.dtype != dtype or kind != computing_type(weight) or kind not in DTYPES[device]:
        return f"numbers of type {str(kind).removeprefix('torch.')}"
    if not x.numel() or x.dim() < 2 or (weight.dim() == 4 and x.dim() != 4):
        return "a batch of no samples, or without a dimension for them"
    return ""


class _Multiply(torch.autograd.Function):
    """The products of a `SparseLayer`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: SparseLayer, training: bool) -> Tensor:
        ctx.layer, ctx.version, ctx.biased = layer, layer.version, bias is not None
        ctx.values = ctx.valued_by = None
        ctx.save_for_backward(x, weight)
        made = None
        products = layer.products("forward")
        if products is not None:
            values = products.values(weight)
            # If the values cannot be gathered, the weight is not sparse now, and every product is computed densely.
            ctx.sparse = values is not None
            if values is not None:
                ctx.values, ctx.valued_by = values, products.name
                made = products.forward(x, values, bias)
        else:
            ctx.sparse = True
        if training:
            layer.note(**{"dense" if made is None else "sparse": ["forward"]})
        if made is None:
            return layer.operation.forward(x, weight, bias)
        for mode in _get_current_dispatch_mode_stack():
            _count_product(mode)(made.numel() * (weight.numel() // len(weight)), x, weight)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        layer: SparseLayer = ctx.layer
        needs = ctx.needs_input_grad
        of_input = of_weight = of_bias = None
        # If the backward pass is to be differentiated itself, it is made of operations that can be.
        sparse = ctx.sparse and ctx.version == layer.version and not torch.is_grad_enabled() and not layer.suspended
        if sparse and type(gradient) is Tensor and gradient.dtype == x.dtype:
            if needs[0]:
                of_input = _input_gradient(ctx, layer, gradient, x, weight)
            products = layer.products("weight_gradient")
            if needs[1] and products is not None and not layer.whole_gradient:
                of_weight = products.weight_gradient(gradient, x, weight, layer.contenders)
        missing = (needs[0] and of_input is None, needs[1] and of_weight is None)
        for phase, needed, lacking in zip(PHASES[1:], needs[:2], missing, strict=True):
            if needed:
                layer.note(**{"dense" if lacking else "sparse": [phase]})
        if any(missing):
            dense = layer.operation.backward(gradient, x, weight, missing)
            of_input = dense.input if missing[0] else of_input
            of_weight = dense.weight if missing[1] else of_weight
        if ctx.biased and needs[2]:
            channels = 1 if weight.dim() == 4 else gradient.dim() - 1
            of_bias = gradient.sum([d for d in range(gradient.dim()) if d != channels])
        return of_input, of_weight, of_bias, None, None


def _input_gradient(ctx: Any, layer: SparseLayer, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    products = layer.products("input_gradient")
    if products is None:
        return None
    values = ctx.values if ctx.valued_by == products.name else products.values(weight)
    return None if values is None else products.input_gradient(gradient, values, x)
