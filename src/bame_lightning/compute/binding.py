"""Put sparse products under a module's forward pass, and take them off again; nothing is added to the model."""

from __future__ import annotations

import math
import sys
from types import MethodType
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.choice import PHASES, Choice
from bame_lightning.compute.choose import Call
from bame_lightning.compute.layer import DTYPES, SparseLayer, why_not_now
from bame_lightning.compute.operation import Conv2d, Linear, Operation

_WEIGHTS = DTYPES | {"cuda": (*DTYPES["cuda"], torch.float32)}  # of single precision under autocast only
BYPASSED = "inside nn.MultiheadAttention, which multiplies by itself"


class BoundForward:
    """Compute a module's forward pass by a `SparseLayer`; it replaces the method of this one instance.

    A copy of the module, by `copy.deepcopy` or pickle, computes densely by itself: it gets the method of its class.
    The layer's weight is read from the module at each call.

    Args:
        module: A linear layer or a two-dimensional convolution.
        layer: Computes the products; if None, the module computes as before, and its calls are watched.

    Attributes:
        call: The largest call that was watched; None if there was none.
        why_dense: Why that call could not have been computed sparsely; empty if it could.
    """

    def __init__(self, module: nn.Module, layer: SparseLayer | None) -> None:
        self.module, self.layer = module, layer
        self.call: Call | None = None
        self.why_dense = ""
        self.__wrapped__ = MethodType(type(module).forward, module)  # its signature is that of the method
        self.__code__ = type(module).forward.__code__  # torch.export reads the names of arguments here

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the module."""
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        if self.layer is None or not isinstance(x, Tensor) or self._falls_back(x):
            if self.layer is None and isinstance(x, Tensor) and not torch.compiler.is_compiling():
                self._watch(x)
            # The module's own arithmetic, so that no bit changes where nothing is sparse.
            made: Tensor = self.__wrapped__(*args, **kwargs)
            return made
        module: Any = self.module
        return self.layer.multiply(_padded(module, x), self._weight, module.bias)

    def _falls_back(self, x: Tensor) -> bool:
        """Whether a call must be computed densely, although a sparse product was chosen."""
        assert self.layer is not None
        why = self.layer.why_dense(x, self._weight)
        if why and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.why_dense = why
            self.layer.note(dense=PHASES)
        return bool(why)

    def _watch(self, x: Tensor) -> None:
        call = Call.of(_padded(self.module, x))
        if torch.is_grad_enabled() and (self.call is None or math.prod(call.shape) > math.prod(self.call.shape)):
            self.call, self.why_dense = call, why_not_now()

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.t() if _is_transposed(self.module) else weight

    def unbind(self) -> None:
        """Give the module back its own forward pass; nothing happens if somebody has replaced this one since."""
        if vars(self.module).get("forward") is self:
            del self.module.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.module), self.module)
        return MethodType(type(copied).forward, copied)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")  # of its class, for a module is made before its state is put into it


def bind(module: nn.Module, mask: Bool[Tensor, "out inp *kernel"], pattern: NMPattern, choice: Choice) -> BoundForward:
    """Let a module compute as a choice says, from now on until `unbind`.

    Args:
        module: The module.
        mask: True where its weight is kept, shape (out, in, *kernel).
        pattern: N:M.
        choice: What computes each phase.

    Returns:
        What replaces its forward pass. Tell its `layer` when the mask changes.

    Raises:
        ValueError: If the module cannot be bound (`why_not` tells before), or a block does not keep exactly N weights.
        UnavailableError: If an implementation is not available on this machine.
        TypeError: If an implementation does not know the operation.
    """
    if why := why_not(module):
        raise ValueError(f"`module` {type(module).__name__} can only be computed densely: {why}.")
    operation = operation_of(module)
    assert operation is not None
    return _put(BoundForward(module, SparseLayer(operation, mask, pattern, choice, module.weight.dtype)))  # type: ignore[arg-type]


def watch(module: nn.Module) -> BoundForward:
    """Watch how a module is called, from now on until `unbind`.

    Args:
        module: A module for which `why_not` returns nothing.

    Returns:
        What replaces its forward pass; it remembers the largest call.
    """
    return _put(BoundForward(module, None))


def _put(bound: BoundForward) -> BoundForward:
    bound.module.forward = bound
    return bound


def why_not(module: nn.Module, root: nn.Module | None = None) -> str:
    """Why a module cannot be bound; empty if it can.

    Args:
        module: The module.
        root: The model, if attention or a compiled module may hold the module.
    """
    weight = module._parameters.get("weight")
    if _bypassed(module, root):
        return BYPASSED
    if operation_of(module) is None:
        own = isinstance(module, (nn.Linear, nn.Conv2d))
        return "its class has a forward pass of its own" if own else f"no product for {type(module).__name__}"
    if "forward" in vars(module):
        return "somebody has replaced its forward pass"
    if root is not None and any(
        module is m for compiled in root.modules() if _is_compiled(compiled) for m in compiled.modules()
    ):
        return "inside a compiled module"
    if weight is None:
        return "its weight is computed from other parameters"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _WEIGHTS.get(weight.device.type, ()):
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    return ""


def operation_of(module: nn.Module) -> Operation | None:
    """What a module computes; None if that is not known."""
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return Linear()
    if _is_transposed(module):
        return Linear() if forward is _conv1d().forward else None
    if not isinstance(module, nn.Conv2d) or forward is not nn.Conv2d.forward:
        return None
    if type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return None
    pair = _symmetric_padding(module)
    return Conv2d(_pair(module.stride), pair or (0, 0), _pair(module.dilation), module.groups)


def _symmetric_padding(module: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros around an image; None if `_padded` must add something else than the same number of zeros on both sides."""
    if module.padding_mode != "zeros":
        return None
    left, right, top, bottom = module._reversed_padding_repeated_twice
    return (top, left) if (top, left) == (bottom, right) else None


def _padded(module: Any, x: Tensor) -> Tensor:
    if not isinstance(module, nn.Conv2d) or _symmetric_padding(module) is not None:
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, module._reversed_padding_repeated_twice, mode)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def _bypassed(module: nn.Module, root: nn.Module | None) -> bool:
    parents = () if root is None else (m for m in root.modules() if isinstance(m, nn.MultiheadAttention))
    return isinstance(module, NonDynamicallyQuantizableLinear) or any(m is module for p in parents for m in p.modules())


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _conv1d() -> Any:
    # A model can only hold one if somebody has imported the class.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return getattr(transformers, "Conv1D", None)


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is (in, out), as in GPT-2."""
    return (kind := _conv1d()) is not None and isinstance(module, kind)
