"""The state that an optimizer keeps of each weight, wherever it keeps it, and which part of it follows a mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal
from warnings import warn

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bame_lightning.weights.nested_optimizers import nested_optimizers
from bame_lightning.weights.sharding import local

Kind = Literal["value", "copy"]
# State of torch's optimizers that holds one value per weight, and of others that use the same names.
ELEMENTWISE = set(
    {
        "acc_delta",  # Adadelta
        "ax",  # ASGD
        "exp_avg",  # Adam, AdamW, NAdam, RAdam, Adamax
        "exp_avg_sq",
        "exp_inf",  # Adamax
        "grad_avg",  # RMSprop, centered
        "max_exp_avg_sq",  # Adam, amsgrad
        "momentum_buffer",  # SGD, RMSprop
        "prev",  # Rprop
        "square_avg",  # RMSprop, Adadelta
        "sum",  # Adagrad
    }
)
# One value per weight as well, but a zero would stop the weight for good.
STEP_SIZES = frozenset({"step_size"})  # Rprop
COPIES = frozenset({"ax"})
"""Copies and averages of the weights that may start at zero: ASGD's."""
_NEAR = 0.25
"""A copy differs from the weights by less than this share of their square: no training step is that long."""


class WeightState:
    """The state that an optimizer, and the optimizers inside it, keep for the weights that they hold.

    There are three kinds of state. One value per weight follows the mask. A copy of the weights, such as Lookahead's slow
    weights, follows it, too; where a weight is revived, its copy starts anew. State in another basis or layout is left alone.
    A matrix factor, a list that holds one, or a projector beside the state shows that, whatever its name is (SOAP, Shampoo,
    GaLore).

    Where weights are pruned, values rest at zero, or at the constant that the first step leaves there. (D-Adaptation divides
    by the root of such accumulators.) So a revived weight starts as at the first step.

    Args:
        optimizer: An optimizer; others may be nested in it. This object remembers what it learns of the state, so keep it.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._holders = [optimizer, *nested_optimizers(optimizer)]
        names = [type(holder).__name__ for holder in self._holders]
        self._name = names[0] + (f" around {', '.join(names[1:])}" if names[1:] else "")
        self._kinds: dict[str, Kind] = {}
        self._rests: dict[str, float] = {}
        self._factors: dict[tuple[int, str], bool] = {}
        self._shown: set[int] = set()
        self._told: set[str] = set()

    def found(self, weight: nn.Parameter) -> dict[str, Any]:
        """Find all state of a weight, by a path of keys: tensors, and objects that are not plain values."""
        found: dict[str, Any] = {}
        for holder in self._holders:
            for path, value in _kept_by(holder, weight):
                if not (_is_view(value, weight) or any(value is other for other in found.values())):
                    found[path if path not in found else f"{type(holder).__name__}.{path}"] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the first steps have shown of the state, in plain types; later steps do not show it any more."""
        return {"optimizer": self._name, "kinds": dict(self._kinds), "rests": dict(self._rests)}

    def take_over(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, if that was of an optimizer of the same name."""
        if saved.get("optimizer") == self._name:
            self._kinds, self._rests = dict(saved["kinds"]), dict(saved["rests"])

    def rest(self, key: str) -> float:
        """The value of state where weights are pruned, by its key: 0, or the constant that it started with."""
        return self._rests.get(key, 0.0)

    def elementwise(self, weight: nn.Parameter, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the state that rests where the weight is pruned: values and copies.

        Args:
            weight: A parameter that the optimizer holds.
            name: Its name in messages.

        Yields:
            Key and tensor, shaped like the weight, or like the part of it that this process holds.

        Raises:
            ValueError: If state has the shape of the weight, but a zero in it may mean something else: codes of a quantised
                optimizer, or, under an unknown key of a square weight, a factor that mixes inputs or outputs.
        """
        yield from ((key, local(value)) for key, value in self._of_its_shape(weight, name))

    def copies(self, weight: nn.Parameter, name: str) -> list[Tensor]:
        """State that is a copy of the weight."""
        return [local(value) for key, value in self._of_its_shape(weight, name) if self._kinds.get(key) == "copy"]

    def check_shown(self, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Check after a step that the state of sparse weights is visible if other parameters have state.

        Args:
            weights: Names and parameters.

        Raises:
            ValueError: If a weight had a gradient but shows no state, although the optimizer keeps state.
        """
        for name, weight in weights:
            if id(weight) in self._shown or weight.grad is None:
                continue
            if _sized(self.found(weight).values()):
                self._shown.add(id(weight))
            elif not _keeps_none(self._holders, weight) and self._keeps_some(weight):
                raise ValueError(
                    f"`configure_optimizers` returns {self._name}, which keeps state for other parameters but shows none for "
                    f"the sparse weight `{name}`, so it could not be zeroed where weights are pruned. Keep it in "
                    f"`state[parameter]`, use another optimizer, or keep the layer dense with layers={{'{name}': 'dense'}}."
                )

    def _of_its_shape(self, weight: nn.Parameter, name: str) -> Iterator[tuple[str, Tensor]]:
        found = self.found(weight)
        shaped = {
            key: value
            for key, value in found.items()
            if isinstance(value, Tensor) and value.shape == weight.shape and _last(key) not in STEP_SIZES
        }
        if self._has_factor(weight, found, shaped):
            self._tell(
                f"Optimizer {self._name} keeps state of `{name}` in another basis or layout, beside a matrix factor: it is "
                "left alone, so a revived weight starts with what is known of its row and column."
            )
            return
        for key, value in shaped.items():
            _check_type(self.optimizer, key, value, name)
            if key not in self._kinds and _last(key) not in ELEMENTWISE:
                self._check_square(weight, name, key)
            if self._kind(key) == "value" and _last(key) not in ELEMENTWISE:
                rest = self.rest(key)
                self._tell(
                    f"Optimizer {type(self.optimizer).__name__} is unknown; its state '{key}' has the shape of the weights and "
                    f"is taken to hold one value per weight: it is {f'put to {rest:g}' if rest else 'zeroed'} where weights "
                    "are pruned."
                )
            yield key, value

    @torch.no_grad()
    def _kind(self, key: str) -> Kind:
        """Decide which kind of state a key holds, from all matrices, when it is first seen."""
        if _last(key) in COPIES:
            self._kinds[key] = "copy"
        elif _last(key) in ELEMENTWISE:
            self._kinds[key] = "value"
        elif key not in self._kinds:
            off = size = 0.0
            starts: set[float] = set()
            for parameter, value in self._matrices(key):
                if value.shape == parameter.shape:
                    here, there = local(parameter).double(), local(value).double()
                    off += float((there - here)[here != 0].square().sum())
                    size += float(here.square().sum())
                    if (here == 0).any():
                        starts |= {float(bound) for bound in there[here == 0].aminmax()}
            self._kinds[key] = "copy" if off < _NEAR * size else "value"
            if self._kinds[key] == "value" and size and len(starts) == 1:
                self._rests[key] = starts.pop()
        return self._kinds[key]

    def _check_square(self, weight: nn.Parameter, name: str, key: str) -> None:
        if not _square(weight):
            return
        if not any(not _square(other) and value.shape == other.shape for other, value in self._matrices(key)):
            raise ValueError(
                f"`optimizer` {type(self.optimizer).__name__} keeps '{key}' for `{name}`, of the same square shape "
                f"{tuple(weight.shape)}: one value per weight and a matrix factor look alike there. Keep the layer dense with "
                f"layers={{'{name}': 'dense'}}, use an optimizer of torch.optim, or add the key to "
                "`bame_lightning.weights.weight_state.ELEMENTWISE` if it is elementwise."
            )

    def _has_factor(self, weight: nn.Parameter, found: Mapping[str, Any], shaped: Mapping[str, Tensor]) -> bool:
        for key in found.keys() - shaped.keys():
            known = (id(weight), key)
            if known not in self._factors:  # looking at values waits for the device
                self._factors[known] = _is_factor(found[key], weight)
            if self._factors[known]:
                return True
        # A factor has the shape of its weight only if the weight is square.
        return _square(weight) and any(
            not _square(other) and _is_factor(value, other)
            for key in shaped
            if _last(key) not in ELEMENTWISE and key not in self._kinds
            for other, value in self._matrices(key)
        )

    def _matrices(self, key: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """All weights of two or more dimensions that have state under a key, with it."""
        for parameter in _parameters(self.optimizer):
            if parameter.dim() >= 2:
                value = self.found(parameter).get(key)
                if isinstance(value, Tensor):
                    yield parameter, value

    def _keeps_some(self, weight: nn.Parameter) -> bool:
        everybody = [p for holder in self._holders for p in _parameters(holder) if p is not weight]
        return any(_sized(self.found(parameter).values()) for parameter in everybody)

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warn(message, stacklevel=2)


@torch.no_grad()
def restart_(copy: Tensor, weight: Tensor, revived: Bool[Tensor, "*shape"]) -> None:
    """Set a copy of a weight to the weight where it was revived, in place."""
    copy.copy_(torch.where(revived, weight.to(copy.dtype), copy))


def _check_type(optimizer: Any, key: str, value: Tensor, name: str) -> None:
    plain = type(value) in (Tensor, nn.Parameter, DTensor)
    if value.dtype == torch.bool and plain:
        raise ValueError(
            f"`optimizer` {type(optimizer).__name__} chooses by a mask of its own, '{key}', which weights of `{name}` it "
            "moves, so they would not follow the N:M mask. Use an optimizer that moves all weights, as SGD or AdamW, or keep "
            f"the layer dense with layers={{'{name}': 'dense'}}."
        )
    if not value.is_floating_point() or not plain:
        what = str(value.dtype) if plain else type(value).__name__
        raise ValueError(
            f"`optimizer` {type(optimizer).__name__} keeps '{key}' for `{name}` as codes ({what}), in which zero may "
            "stand for another value, so it cannot be zeroed where weights are pruned. Use an "
            "optimizer with floating-point state."
        )


def _keeps_none(optimizers: Iterable[Any], weight: nn.Parameter) -> bool:
    """Whether an optimizer keeps nothing for a weight by its settings: gradient descent without momentum."""
    groups = (group for holder in optimizers for group in holder.param_groups)
    held = [group for group in groups if any(weight is parameter for parameter in group["params"])]
    return any("momentum" in group and not group["momentum"] for group in held)


def _parameters(optimizer: Any) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _kept_by(holder: Any, weight: nn.Parameter) -> Iterator[tuple[str, Any]]:
    """Find what one optimizer keeps for a weight: in its state, in tables of its own, or in lists beside its parameters."""
    state = getattr(holder, "state", None)
    if isinstance(state, Mapping):
        yield from _leaves("", _entry(state, weight))
    for name, value in vars(holder).items():
        if name in ("state", "param_groups", "defaults"):
            continue
        if isinstance(value, Mapping):
            yield from _leaves(name, _entry(value, weight))
        elif isinstance(value, list | tuple) and value:
            yield from ((name, found) for found in _beside(holder, weight, value))


def _entry(table: Mapping[Any, Any], weight: nn.Parameter) -> Any:
    """Look a weight up in a table whose keys are parameters, or their `id`s."""
    # `in` would not do: a parameter and its `id` have the same hash, and comparing them makes a tensor.
    first = next(iter(table), None)
    if isinstance(first, Tensor):
        return table.get(weight)
    return table.get(id(weight)) if isinstance(first, int) else None


def _beside(holder: Any, weight: nn.Parameter, values: Sequence[Any]) -> Iterator[Tensor]:
    """Find the entry of a weight in a list as long as the parameters, nested by groups or flat."""
    groups = [group["params"] for group in holder.param_groups]
    nested = all(isinstance(value, list | tuple) for value in values)
    parallel = zip(groups, values, strict=False) if nested else [([p for group in groups for p in group], values)]
    for parameters, found in parallel:
        alike = len(parameters) == len(found) and all(
            isinstance(value, Tensor) and value.shape == parameter.shape
            for parameter, value in zip(parameters, found, strict=True)
        )
        if alike:
            yield from (v for p, v in zip(parameters, found, strict=True) if p is weight and v is not weight)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield tensors and objects in nested containers, each with the path of keys that leads to it."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(f"{path}[{index}]", part)
    elif isinstance(value, Tensor) or hasattr(value, "__dict__"):
        yield path, value


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _sized(values: Iterable[Any]) -> bool:
    """Whether the state holds a tensor that is more than a counter, or an object that may hold one."""
    return any(not isinstance(value, Tensor) or value.dim() > 0 for value in values)


def _is_view(value: Any, weight: Tensor) -> bool:
    """Whether a value is the weight itself: another object with the same memory."""
    return isinstance(value, Tensor) and value.numel() > 0 and local(value).data_ptr() == local(weight).data_ptr()


def _square(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]


def _is_factor(value: Any, weight: Tensor) -> bool:
    """Whether a tensor beside a weight's state mixes weights.

    A projector does. So does a symmetric, orthogonal or triangular matrix, which mixes inputs or outputs; and a factor of
    low rank, which mixes all weights.
    """
    if not isinstance(value, Tensor):
        kept = getattr(value, "__dict__", {})
        return not callable(value) and (hasattr(value, "project") or any(isinstance(v, Tensor) for v in kept.values()))
    if value.shape[:-1] in (weight.shape, (weight.numel(),)) and value.is_floating_point():
        # A history of each weight would be zero, or still a constant, where gradients are masked; a factor moves weights there,
        # perhaps all of them, in a step that drops gradients.
        masked = weight if weight.grad is None else weight.grad
        rows = local(value.detach()).flatten(end_dim=-2)[local(masked.detach()).flatten() == 0]
        return not len(rows) or bool((rows != rows[:1]).any())
    if not _square(value) or len(value) < 2 or value.shape == weight.shape or not value.is_floating_point():
        return False
    matrix = local(value.detach()).double()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    # Not the row means of a factored second moment, which may be square where a convolution is.
    forms = ((matrix, matrix.T), (matrix @ matrix.T, eye), (matrix, matrix.triu()), (matrix, matrix.tril()))
    return any(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in forms)
