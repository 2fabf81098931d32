"""Compute the products of sparse layers while training runs: densely, or by sparse products that follow the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, get_args

from torch import Tensor, nn

from bame_lightning.compute.binding import BoundForward, bind, operation_of, watch, why_not
from bame_lightning.compute.choice import PHASES, Choice
from bame_lightning.compute.choose import choose, without_dense
from bame_lightning.compute.native.build import UnavailableError
from bame_lightning.ledger.cost import Shares
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.method import Method
from bame_lightning.weights.layers import SparseWeight

Compute = Literal["dense", "auto", "sparse"]


@dataclass(eq=False)
class Computed:
    """A module that multiplies with a sparse weight.

    Args:
        name: Of the module.
        module: The module.
        sparse: Its weight.
        choice: What computes its products; None if not chosen yet.
        bound: What replaces its forward pass; None if nothing does.
    """

    name: str
    module: nn.Module
    sparse: SparseWeight
    choice: Choice | None = None
    bound: BoundForward | None = None
    patience: int = 10
    """Optimizer steps that may pass without a call before the module is left dense."""
    mask: tuple[int, int] = (0, 0)
    """A value that changes when the mask does."""

    def put(self, choice: Choice) -> None:
        """Compute as a choice says."""
        self.unbind()
        self.choice = choice
        if not choice.dense:
            self.bound = bind(self.module, self.sparse.kept, self.sparse.pattern, choice)
            self.mask = _version(self.sparse.kept)
            self.follow(whole=True, contenders=None)  # until somebody knows better

    def watch(self) -> None:
        """Compute densely, and remember how the module is called."""
        self.bound = watch(self.module)

    def unbind(self) -> None:
        """Give the module back its own forward pass."""
        if self.bound is not None:
            self.bound.unbind()
        self.bound = None

    def follow(self, whole: bool, contenders: Tensor | None) -> None:
        """Prepare for the next step: follow the mask, and note which part of the weight's gradient will be read."""
        layer = self.bound.layer if self.bound is not None else None
        if layer is None:
            return
        layer.ran.clear()
        layer.fell.clear()
        layer.whole_gradient, layer.contenders = whole, contenders
        if self.mask != _version(self.sparse.kept):
            layer.update(self.sparse.kept)
            self.mask = _version(self.sparse.kept)

    def least(self, phase: str) -> float:
        """Least share of the dense cost of a phase: sparse tensor cores multiply two of four even if fewer are kept."""
        return 0.5 if getattr(self.choice, phase, "dense") == "semi_structured" else 0.0

    @property
    def executed(self) -> set[str]:
        """Phases that the latest step has computed sparsely."""
        layer = self.bound.layer if self.bound is not None else None
        if layer is None:
            return set()
        ran = set(layer.ran)
        if "forward" in ran and layer.choice.input_gradient != "dense":
            # If the gradient of the input is not needed, as in the first layer, it was not computed densely either.
            ran.add("input_gradient")
        return ran - layer.fell


class Execution:
    """Choose how the layers of a network compute their products while training or evaluation runs, and see to it.

    "auto" watches how each layer is called in the first optimizer step. Then it measures briefly what multiplies the layer
    fastest, phase by phase; layers that are called alike are measured once. "sparse" multiplies sparsely from the first step on
    and measures nothing. In both cases layers follow the masks and compute the part of the weight's gradient that a step reads.

    Args:
        compute: "dense" leaves every layer as it is, "auto" chooses, "sparse" computes nothing densely that is sparse.

    Attributes:
        choices: What was chosen, by name of the module; those of a checkpoint are used again.
        on_the_first: Calls a function in the first process, and returns its result in all processes.
        choose: Measures and chooses: `compute.choose`.

    Raises:
        ValueError: If `compute` is none of these.
    """

    def __init__(self, compute: Compute = "dense") -> None:
        if compute not in get_args(Compute):
            raise ValueError(f"`compute` must be 'dense', 'auto' or 'sparse'; got {compute!r}.")
        self.compute = compute
        self.choices: dict[str, Choice] = {}
        self.on_the_first: Callable[[Callable[[], Any]], Any] = _call
        self.choose: Callable[..., Choice] = choose
        self.layers: list[Computed] = []
        self._news = False

    def bind(self, model: nn.Module, weights: Iterable[SparseWeight], *, watching: bool = True) -> None:
        """From now on until `release`, let the modules that hold some sparse weights compute as was chosen.

        Args:
            model: The network.
            weights: Its sparse weights.
            watching: Whether calls of those without a choice are watched, to choose after the next step.

        Raises:
            ValueError: If `compute` is "sparse" and a layer cannot be computed sparsely.
        """
        if self.compute == "dense":
            return
        of = {id(sparse.weight): sparse for sparse in weights}
        known = {(id(layer.module), layer.sparse): layer for layer in self.layers}
        holding = [(name, m, of.get(id(m._parameters.get("weight")))) for name, m in model.named_modules()]
        before, self.layers = self.layers, []
        fresh = []
        for name, module, sparse in holding:
            if sparse is not None:
                layer = known.pop((id(module), sparse), None) or Computed(name, module, sparse)
                fresh += [layer] if layer not in before else []
                self.layers.append(layer)
        for layer in known.values():
            layer.unbind()
        for layer in fresh:
            self._begin(layer, model, watching)
        held = {id(layer.sparse) for layer in self.layers}
        # Packed projections of attention, or a weight of a module of the user's own.
        for sparse in (sparse for sparse in of.values() if id(sparse) not in held):
            layer = Computed(sparse.label, nn.Identity(), sparse)
            self._leave_dense(layer, "no layer multiplies with it by itself")
            self.layers.append(layer)

    def _begin(self, layer: Computed, model: nn.Module, watching: bool) -> None:
        chosen = self.choices.get(layer.name)
        if why := why_not(layer.module, model):
            self._leave_dense(layer, why)
        elif chosen is not None and (self.compute == "auto" or not chosen.dense):
            self._put(layer, chosen)
        elif self.compute == "sparse":
            self._put(layer, self._forced(layer))
        elif watching:
            layer.watch()

    def _put(self, layer: Computed, choice: Choice) -> None:
        try:
            layer.put(choice)
        except (UnavailableError, ValueError, TypeError) as error:
            self._leave_dense(layer, str(error))
            return
        self.choices[layer.name], self._news = choice, True

    def _forced(self, layer: Computed) -> Choice:
        operation, kept = operation_of(layer.module), layer.sparse.kept
        assert operation is not None
        try:
            return without_dense(operation, kept, layer.sparse.pattern, layer.sparse.values.dtype)
        except UnavailableError as error:
            self._refuse(layer, str(error))

    def _leave_dense(self, layer: Computed, why: str) -> None:
        if self.compute == "sparse":
            self._refuse(layer, why)
        layer.unbind()
        layer.choice = self.choices[layer.name] = Choice(reason=why)
        self._news = True

    def _refuse(self, layer: Computed, why: str) -> NoReturn:
        self.release()
        raise ValueError(
            f"`compute` is 'sparse', but `{layer.name}` can only be computed densely: {why}. Say compute='auto', which leaves "
            f"such layers as they are, or keep it dense: layers={{'{layer.sparse.label}': 'dense'}}."
        )

    def follow(self, holder: Holder, method: Method) -> None:
        """Call after each optimizer step, once masks have changed: choose, and prepare for what the next step reads.

        Args:
            holder: The optimizer.
            method: Knows what the next step reads.

        Raises:
            ValueError: If `compute` is "sparse" and a layer could not be computed sparsely.
        """
        layers = _held_by(holder, self.layers)
        for layer in layers:
            if self.compute == "sparse" and layer.bound is not None and layer.bound.why_dense:
                self._refuse(layer, layer.bound.why_dense)
        if undecided := [layer for layer in layers if layer.choice is None]:
            self._choose(undecided, method.next_read(holder).contenders)
        self.prepare(holder, method)

    def prepare(self, holder: Holder, method: Method) -> None:
        """Follow masks that have changed, and prepare for what the next step of an optimizer reads."""
        layers = _held_by(holder, self.layers)
        if any(layer.bound is not None for layer in layers):
            read = method.next_read(holder)
            for layer in layers:
                layer.follow(read.everything, read.contenders.get(layer.sparse.name))

    def _choose(self, layers: Sequence[Computed], contenders: Mapping[str, Tensor]) -> None:
        """Measure the watched layers in the first process; layers that are called alike are measured once."""

        def measure() -> dict[str, dict[str, Any] | None]:
            measured: dict[Any, Choice] = {}
            found = [_measure(self.choose, layer, contenders.get(layer.sparse.name), measured) for layer in layers]
            return {x.name: None if c is None else c.to_dict() for x, c in zip(layers, found, strict=True)}

        told = self.on_the_first(measure)
        for layer in layers:
            layer.patience -= 1
            if told[layer.name] is not None:
                self._put(layer, Choice.from_dict(told[layer.name]))
            elif not layer.patience:
                self._leave_dense(layer, "the first training steps have not called it")

    def shares(self, costs: Mapping[str, Shares]) -> dict[str, Shares]:
        """Share of the dense cost of each weight that the latest step has really computed.

        Args:
            costs: Share that the method needed of each weight, by name.
        """
        found = {}
        for name, cost in costs.items():
            layers = [layer for layer in self.layers if layer.sparse.name == name]
            sparse = set.intersection(*(layer.executed for layer in layers)) if layers else set()
            found[name] = Shares(
                *(
                    max(getattr(cost, phase), *(layer.least(phase) for layer in layers)) if phase in sparse else 1.0
                    for phase in PHASES
                )
            )
        return found

    def news(self) -> list[Computed]:
        """Return all layers with their choices if any was made since the last call."""
        told, self._news = self._news, False
        return self.layers if told else []

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the choices in plain types."""
        return {name: choice.to_dict() for name, choice in self.choices.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Use again what `state` returned."""
        self.choices = {name: Choice.from_dict(choice) for name, choice in state.items()}

    def release(self) -> None:
        """Give all modules back their own forward passes, and forget who drives the training."""
        for layer in self.layers:
            layer.unbind()
        self.layers, self.on_the_first = [], _call


def _held_by(holder: Holder, layers: Sequence[Computed]) -> list[Computed]:
    """The layers whose weights an optimizer holds."""
    mine = {id(sparse) for sparse in holder.weights} if layers else set()
    return [layer for layer in layers if id(layer.sparse) in mine]


def _measure(
    choose: Callable[..., Choice], layer: Computed, contenders: Tensor | None, measured: dict[Any, Choice]
) -> Choice | None:
    """Measure what multiplies a layer fastest; None if it has not been called yet."""
    bound, operation, sparse = layer.bound, operation_of(layer.module), layer.sparse
    assert bound is not None
    assert operation is not None
    if bound.call is None or bound.why_dense:
        return Choice(reason=bound.why_dense) if bound.call is not None else None
    call = replace(bound.call, contenders=0 if contenders is None else contenders.numel())
    kind = (operation, sparse.values.shape, sparse.values.stride(), sparse.values.dtype, sparse.pattern, call)
    if kind not in measured:
        measured[kind] = choose(operation, sparse.values, sparse.kept, sparse.pattern, call)
    return measured[kind]


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _version(mask: Tensor) -> tuple[int, int]:
    # What inference mode has made does not change.
    return mask.data_ptr(), 0 if mask.is_inference() else mask._version
