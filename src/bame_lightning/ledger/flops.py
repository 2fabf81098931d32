# mypy: disable-error-code="no-untyped-call"
# TorchDispatchMode's methods have no annotations.
"""What training costs: multiply-accumulates counted from one traced forward pass, and a ledger over optimizer steps.

Except in the executed column, all numbers say what kernels would need that skip every zero. The convention is that of
publications: the forward pass, the gradient of its input and the gradient of its weight cost a layer the same. This includes
the first layer, although nobody needs the gradient of the images. Only matrix products and convolutions count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nested._internal.nested_tensor import NestedTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bame_lightning.ledger.cost import SR_STE, Shares

LABEL = "counted, not executed"
"""Belongs beside every number of a ledger, unless a sparse kernel ran."""
OTHER = ""
"""Name for products without a weight among the parts of a ledger."""

_aten = torch.ops.aten
# Matrix products, and the place of the left factor among their arguments; the right one follows it.
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.mv: 0, _aten.addmm: 1, _aten.baddbmm: 1, _aten.addmv: 1}
_CONVOLUTIONS = (_aten.convolution, _aten._convolution)
_ATTENTION = "aten::_scaled_dot_product_"
# Results of these take only shape and type from their arguments.
_HOLLOW = {_aten.set_, _aten.new_empty, _aten.empty_like, _aten.new_zeros, _aten.zeros_like, _aten.ones_like}
# Results of these have the values of their arguments, as views have, which share memory.
_COPIES = {_aten._to_copy, _aten.clone, _aten.copy_, _aten.cat, _aten.stack, _aten.index, _aten.index_select}


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of dense training.

    Args:
        forward: Of the forward pass.
        input_gradient: Of the gradient with respect to the input (of a product without a weight: to the left factor).
        weight_gradient: Of the gradient with respect to the weight (to the right factor).
    """

    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0

    def __add__(self, other: Macs) -> Macs:
        return Macs(
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )

    @property
    def total(self) -> int:
        """All three together."""
        return self.forward + self.input_gradient + self.weight_gradient


class MacCounter(TorchDispatchMode):
    """Count the multiply-accumulates of the forward passes that run inside, weight by weight.

    A product counts for the parameter whose memory it multiplies with. The parameter may be transposed, cut in pieces, cast
    by autocast, or otherwise combined with parameters and buffers alone. So tied weights, packed projections of attention
    and functional calls are counted right. Backward passes inside are not counted, nor forward passes that they recompute.
    Results do not change, so a real training step may run inside.

    Counted are matrix products, convolutions and scaled dot-product attention (a causal mask saves nothing). Nothing else is:
    also no recurrent layers on CUDA, flex attention or products of sharded tensors (tensor parallelism). A weight that FSDP2
    gathers for the forward pass counts as its parameter.

    Args:
        model: Its parameters give the names. The counter keeps casts of them alive; drop it after use.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> with MacCounter(model) as counter:
        ...     _ = model(torch.ones(3, 8))
        >>> counter.weights
        {'weight': Macs(forward=96, input_gradient=96, weight_gradient=96)}
    """

    supports_higher_order_operators = True  # flex attention is one

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights: dict[str, Macs] = {}
        """Cost of the products with each weight, by its name in `named_parameters()`."""
        self.other = Macs()
        """Cost of products without a weight: attention's scores."""
        self.computed: set[str] = set()
        """Weights that no product takes as they are, only values computed from them (weight standardisation)."""
        # By address of their memory. The tensors are kept alive: freed memory would be given to others.
        self._owners: dict[int, tuple[str, Tensor]] = {}
        self._changed: set[int] = set()
        self._model = model
        self._stopped = False
        for name, tensor in [*(("", buffer) for buffer in model.buffers()), *model.named_parameters()]:
            self._owners |= {_address(strided): (name, strided) for strided in _tensors(tensor)}
        self._fast_attention = True

    def __enter__(self) -> MacCounter:
        # In evaluation mode nn.MultiheadAttention may run as one operation that shows no products.
        self._fast_attention = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        # Compiled code would hide its products, and a full graph refuses to be watched.
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        super().__enter__()
        return self

    def stop(self) -> None:
        """Count nothing more. The mode itself ends where it was entered, because others may have been entered since."""
        self._stopped = True

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stance.__exit__(*exception)
        torch.backends.mha.set_fastpath_enabled(self._fast_attention)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        if any(issubclass(kind, NestedTensor) for kind in types):
            return NotImplemented  # it calls operations on its values, which come here in turn
        if self._stopped or isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet] :][:2]
            self._count(left.numel() * (right.shape[-1] if right.dim() > 1 else 1), left, right)
            return func(*args, **kwargs)
        if packet in _CONVOLUTIONS:
            result = func(*args, **kwargs)
            image, weight, transposed = args[0], args[1], args[6]
            positions = image if transposed else result
            self._count(weight.numel() * (positions.numel() // positions.shape[1]), image, weight)
            return result
        if func.name().startswith(_ATTENTION):
            query, key, value = args[:3]
            scores = query.shape[:-1].numel() * key.shape[-2]
            self._count(scores * query.shape[-1], query, key)
            self._count(scores * value.shape[-1], query, value)
            return func(*args, **kwargs)
        if func is not torch.ops.prim.device.default:
            # Under inference mode operations arrive whole, such as `linear`.
            super().__enter__()
            try:
                parts = func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        self._inherit(func, (args, kwargs), result)
        return result

    def count_product(self, macs: int, left: Tensor, right: Tensor) -> None:
        """Count a product with a weight that no operation of torch computes.

        Args:
            macs: Multiply-accumulates of the dense product.
            left: The layer's input.
            right: The weight.
        """
        if not self._stopped and torch._C._current_graph_task_id() == -1:
            self._count(macs, left, right)

    def _count(self, macs: int, left: Tensor, right: Tensor) -> None:
        """Book a product: all three parts for a trained weight, else the forward pass and the gradients that are needed."""
        # The weight stands on the right in linear layers; their input may be a parameter, too (learned queries).
        for weight, factor in ((right, left), (left, right)):
            owner = self._owner(weight)
            if owner:
                # `torch.is_grad_enabled()` does not tell: it is false inside of custom autograd functions.
                trained = weight.requires_grad
                moved = trained or factor.requires_grad
                self.weights[owner] = self.weights.get(owner, Macs()) + Macs(macs, moved * macs, trained * macs)
                if self._is_changed(_address(weight)):
                    self.computed.add(owner)
                return
        self.other += Macs(macs, left.requires_grad * macs, right.requires_grad * macs)

    def _owner(self, tensor: Tensor) -> str | None:
        """Name the parameter that a tensor comes from; empty for buffers, None for activations."""
        address = _address(tensor)
        if address not in self._owners and isinstance(tensor, nn.Parameter):
            # FSDP2 puts whole weights into the model for the forward pass only.
            for name, parameter in self._model.named_parameters():
                self._owners.setdefault(_address(parameter), (name, parameter))
        return self._owners.get(address, (None, None))[0]

    def _is_changed(self, address: int) -> bool:
        # A parameter is itself, even if FSDP2 has put it together from others. Functional calls put plain tensors there.
        return address in self._changed and all(
            _address(p) != address for p in self._model.parameters() if isinstance(p, nn.Parameter)
        )

    def _inherit(self, func: Any, arguments: Any, result: Any) -> None:
        """Give a result that comes from parameters and buffers alone to the largest parameter among them."""
        if func.overloadpacket in _HOLLOW:
            return
        sources = [(tensor.numel(), self._owner(tensor), _address(tensor)) for tensor in _tensors(arguments)]
        names = [(size, owner) for size, owner, _ in sources if owner]
        if not names or any(owner is None for _, owner, _ in sources):
            return
        copied = func.overloadpacket in _COPIES and not any(address in self._changed for *_, address in sources)
        for tensor in _tensors(result):
            address = _address(tensor)
            if not copied and (address not in self._owners or func._schema.is_mutable):
                self._changed.add(address)
            self._owners.setdefault(address, (max(names)[1], tensor))


def _tensors(tree: Any) -> Iterator[Tensor]:
    # Other layouts, sparse ones for example, have no memory block of their own.
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided)


def _address(tensor: Tensor) -> int:
    """Address of a tensor's memory block, which its views share."""
    return int(tensor.untyped_storage()._cdata)


class Ledger:
    """What the optimizer steps of a run cost so far, beside dense training and SR-STE for the same steps.

    There are three columns. The algorithmic one takes the shares as they are. The hardware one books only what a kernel for
    row-wise N:M weights can save. The input gradient multiplies with the transposed weight, so it is dense there unless the
    masks have a pattern in that direction, too. The executed one books what was really computed.

    Args:
        weights: Dense cost of each weight for one batch, as `MacCounter` found it.
        other: Dense cost of products without a weight.
        densities: N / M of each weight that SR-STE and the method keep sparse, by name.
        transposed_share: As in `Cost`.

    Example:
        >>> ledger = Ledger({"fc": Macs(100, 100, 100)}, Macs(), {"fc": 0.25})
        >>> ledger.book({"fc": Shares(0.25, 0.25, 0.25)})
        >>> ledger.metrics()["flops/train_total"], ledger.metrics()["flops/hardware/train_total"]
        (150.0, 300.0)
    """

    def __init__(
        self,
        weights: Mapping[str, Macs],
        other: Macs,
        densities: Mapping[str, float],
        *,
        transposed_share: float = 1.0,
    ) -> None:
        self.transposed_share = transposed_share
        self.uncounted = sorted(name for name in densities if name not in weights)
        """Sparse weights that no counted product multiplies with; the ledger lacks them."""
        self._weights = dict(weights)
        self._other = other
        self._sr_ste = {name: SR_STE.shares(density) for name, density in densities.items()}
        self._booked = dict.fromkeys(("algorithmic", "hardware", "executed", "dense", "sr_ste"), 0.0)

    @property
    def parts(self) -> Set[str]:
        """What may be booked: names of weights, and `OTHER`."""
        return self._weights.keys() | {OTHER}

    def book(
        self,
        shares: Mapping[str, Shares],
        *,
        executed: Mapping[str, Shares] | None = None,
        batches: int = 1,
        only: Set[str] | None = None,
    ) -> None:
        """Book one optimizer step.

        Args:
            shares: Share of each weight's dense cost that the step needs; weights left out are dense.
            executed: Share of it that the step has really computed; all of it unless given.
            batches: Batches whose gradients the step accumulates.
            only: Which `parts` to book; all of them unless given.
        """
        least = self.transposed_share
        executable = {
            name: Shares(share.forward, max(least, share.input_gradient), share.weight_gradient)
            for name, share in shares.items()
        }
        algorithmic, hardware = self._macs(shares, only), self._macs(executable, only)
        self._booked["algorithmic"] += batches * algorithmic
        self._booked["hardware"] += batches * hardware
        self._booked["executed"] += batches * self._macs(executed or {}, only)
        self._booked["dense"] += batches * self._macs({}, only)
        self._booked["sr_ste"] += batches * self._macs(self._sr_ste, only)

    def metrics(self) -> dict[str, float]:
        """Return what is logged: FLOPs (2 x MACs) since the run began, and ratios to dense and to SR-STE.

        Returns:
            `flops/train_total`, `flops/train_vs_dense`, `flops/train_vs_sr_ste`, and the same under `flops/hardware/` and
            `flops/executed/`; nothing before the first step.
        """
        if not self._booked["dense"]:
            return {}
        metrics = {}
        for column in ("algorithmic", "hardware", "executed"):
            prefix = "flops/" if column == "algorithmic" else f"flops/{column}/"
            booked = self._booked[column]
            metrics[f"{prefix}train_total"] = 2 * booked
            metrics[f"{prefix}train_vs_dense"] = booked / self._booked["dense"]
            metrics[f"{prefix}train_vs_sr_ste"] = booked / self._booked["sr_ste"]
        return metrics

    def state_dict(self) -> dict[str, float]:
        """Return what was booked so far, in MACs."""
        return dict(self._booked)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what `state_dict` returned; the costs of the model are counted anew."""
        # Where nothing was booked as executed, all was computed densely.
        self._booked = {column: float(state.get(column, state["dense"])) for column in self._booked}

    def _macs(self, shares: Mapping[str, Shares], only: Set[str] | None) -> float:
        """MACs of one batch, of all parts or of some."""
        total = float(self._other.total) if only is None or OTHER in only else 0.0
        for name, macs in self._weights.items():
            if only is not None and name not in only:
                continue
            share = shares.get(name, _DENSE)
            total += share.forward * macs.forward
            total += share.input_gradient * macs.input_gradient
            total += share.weight_gradient * macs.weight_gradient
        return total


_DENSE = Shares()
