"""Which weights become sparse, and why others stay dense."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, NoReturn

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from bame_lightning.blocks.layout import from_blocks, oriented, to_blocks
from bame_lightning.blocks.masks import pack_mask, unpack_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.reasons import (
    ADAPTER,
    ADAPTER_NAME,
    CLASSIFIER,
    COMPUTED,
    FROZEN,
    FUSED,
    INDIVISIBLE,
    NO_VIEW,
    UNHELD,
    UNREACHED,
    UNTRAINED,
    advice,
)
from bame_lightning.weights.sharding import ALL_ROWS, Rows, local

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class LayerPlan:
    """Whether one weight becomes sparse, and why not.

    Args:
        name: Its key in the model's state dict.
        kind: Class of the module that holds it.
        weight: The parameter.
        pattern: Its pattern; None if it stays dense.
        reason: Why it stays dense; empty if it becomes sparse.
        transposed: Whether its shape is (in, out).
    """

    name: str
    kind: str
    weight: nn.Parameter
    pattern: NMPattern | None
    reason: str = ""
    transposed: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of M weights; 0 if the weight stays dense."""
        return self.weight.numel() // self.pattern.m if self.pattern else 0

    @property
    def untrained(self) -> bool:
        """Whether the weight is dense only because it is not trained."""
        return self.reason in UNTRAINED

    @property
    def rows(self) -> Rows:
        """The rows (of the output dimension) that this process holds."""
        return Rows.of(self.weight, self.name, dim=int(self.transposed))

    @property
    def values(self) -> Float[Tensor, "out inp *kernel"]:
        """The part of the weight that this process holds, without autograd, in the parameter's memory."""
        return oriented(local(self.weight.detach()), self.transposed)


@dataclass(eq=False)
class SparseWeight:
    """A weight under an N:M mask, seen as (out, in, *kernel) even if the parameter is (in, out).

    Args:
        name: Its key in the model's state dict.
        weight: The parameter.
        pattern: Its pattern.
        kept: True where the weight may differ from zero; shaped like `values`. Always updated in place.
        rows: Which rows of the weight this process holds.
        transposed: Whether the parameter's shape is (in, out).

    Attributes:
        packed_initial: The mask that training started with, one bit for each weight; shaped like `values` when unpacked.
    """

    name: str
    weight: nn.Parameter
    pattern: NMPattern
    kept: Bool[Tensor, "out inp *kernel"]
    rows: Rows = ALL_ROWS
    transposed: bool = False
    packed_initial: UInt8[Tensor, " bytes"] = field(init=False)

    def __post_init__(self) -> None:
        self.set_initial(self.kept)

    @classmethod
    def of(cls, plan: LayerPlan, mask: Bool[Tensor, "blocks m"]) -> SparseWeight:
        """Put a planned weight under a mask. The mask is given in blocks of all rows, true where kept."""
        assert plan.pattern is not None
        rows = plan.rows
        # Laid out like the weight (it may be channels-last), so that zeroing runs over both in one order.
        kept = torch.empty_like(plan.values, dtype=torch.bool)
        kept.copy_(from_blocks(rows.own(mask), kept.shape))
        return cls(plan.name, plan.weight, plan.pattern, kept, rows, plan.transposed)

    @property
    def values(self) -> Float[Tensor, "out inp *kernel"]:
        """The weights that this process holds, without autograd, in the parameter's memory."""
        return self.oriented(local(self.weight.detach()))

    @property
    def gradient(self) -> Float[Tensor, "out inp *kernel"] | None:
        """The gradient of `values`, in the memory of the parameter's gradient; None if there is none."""
        return None if self.weight.grad is None else self.oriented(local(self.weight.grad.detach()))

    @property
    def has_graph(self) -> bool:
        """Whether the gradient may be differentiated, because `backward(create_graph=True)` made it."""
        return self.weight.grad is not None and self.weight.grad.requires_grad

    @property
    def pruned(self) -> Bool[Tensor, "out inp *kernel"]:
        """A copy: true where the weight must be zero; shaped like `values`."""
        return ~self.kept

    @property
    def obeys(self) -> bool:
        """Whether the weight is zero wherever it is pruned, in all rows."""
        return not int(self.rows.total(self.values[self.pruned].count_nonzero()))

    def oriented(self, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*oriented"]:
        """View a tensor shaped like the parameter, such as optimizer state, in the way of `values`."""
        return oriented(values, self.transposed)

    def mask(self) -> Bool[Tensor, "blocks m"]:
        """The mask in blocks, true where kept; shape (blocks, m)."""
        return to_blocks(self.kept, self.pattern.m)

    @property
    def initial(self) -> Bool[Tensor, "out inp *kernel"]:
        """A copy of the mask that training started with; shaped like `values`."""
        return unpack_mask(self.packed_initial, self.kept.shape)

    def set_initial(self, mask: Bool[Tensor, "out inp *kernel"]) -> None:
        """Remember the mask that training starts with."""
        self.packed_initial = pack_mask(mask)

    def state_dict(self) -> dict[str, Any]:
        """Pattern, shape, whether that is (in, out), and the current and first masks as bits in row-major order."""
        masks = {"mask": self.kept, "initial": self.initial}
        packed = {name: pack_mask(self.oriented(self.rows.gather(mask))).cpu() for name, mask in masks.items()}
        shape = list(self.weight.shape)
        return {"pattern": str(self.pattern), "shape": shape, "transposed": self.transposed, **packed}

    @property
    def label(self) -> str:
        """Name of the layer: that of its module, unless the parameter has a name of its own."""
        return self.name.removesuffix(".weight")


def plan_layers(
    model: nn.Module,
    pattern: NMPattern,
    rules: Mapping[str, str | NMPattern] | None = None,
    trained: Container[int] | None = None,
    *,
    found: Mapping[str, str] | None = None,
    masked: Container[int] = (),
) -> list[LayerPlan]:
    """Decide for every weight matrix of a model whether it becomes sparse.

    By default the weights of `nn.Linear`, `nn.Conv1d/2d/3d`, transformers' `Conv1D` and their subclasses become sparse, and the
    input projections of `nn.MultiheadAttention`. There are three exceptions: M does not divide the input dimension (the stem);
    the weight belongs to an adapter (LoRA); or to the last `nn.Linear` in `named_modules()` order that is trained (the
    classifier). A rule with a pattern overrides the last two. A tied weight is planned once, under its first name; a rule may
    use any of its names.

    Args:
        model: The model.
        pattern: Default pattern.
        rules: Module or parameter name, or a glob over such names -> a pattern or "dense". The last match wins.
        trained: `id`s of the parameters that an optimizer holds; None if all do.
        found: What training has shown: name of a weight -> why it must stay dense.
        masked: `id`s of weights that are under masks already, and stay so unless a rule says otherwise.

    Returns:
        One plan per weight of two or more dimensions, in `named_modules()` order.

    Raises:
        ValueError: If a rule matches nothing, or asks for a pattern that a weight cannot have; or if no weight becomes
            sparse, and training has shown nothing yet.
    """
    parsed = parse_rules(rules or {})
    candidates = list(_weights(model))
    _check_rules(parsed, candidates)
    shown = {id(held.weight): (found or {}).get(held.name, "") for held in reversed(candidates)}
    untrained = {
        id(held.weight): ""
        if id(held.weight) in masked
        else _why_untrained(held.weight, trained, shown[id(held.weight)])
        for held in candidates
    }
    # Modules that are not trained, such as a teacher or an average, do not hold the classifier of this network.
    linears = [
        h.weight for h in candidates if isinstance(h.module, nn.Linear) and not (h.adapter or untrained[id(h.weight)])
    ]
    known = CLASSIFIER in (found or {}).values()
    classifier = linears[-1] if linears and not known else None
    plans: dict[int, LayerPlan] = {}
    ties: list[LayerPlan] = []
    for held in candidates:
        weight, kind = held.weight, type(held.module).__name__
        if id(weight) in plans:
            ties.append(LayerPlan(held.name, kind, weight, None, f"tied to {plans[id(weight)].name}"))
            continue
        same = [other for other in candidates if other.weight is weight]
        glob = next((glob for glob in reversed(parsed) if any(other.matches(glob) for other in same)), None)
        wanted = pattern if glob is None else parsed[glob]
        why = _why_dense(held, wanted) or untrained[id(weight)] or shown[id(weight)]
        if wanted is not None and why and any(glob in other.names for other in same):
            _refuse_rule(glob, wanted, why)
        if wanted is None:
            why = f"dense by the rule {glob!r}"
        elif glob is None and not why and id(weight) not in masked:
            why = CLASSIFIER if weight is classifier else ADAPTER if held.adapter else ""
        plans[id(weight)] = LayerPlan(
            held.name, kind, weight, None if why else wanted, why, _is_transposed(held.module)
        )
    result = [*plans.values(), *ties]
    if not found and not any(plan.pattern for plan in result):
        _refuse(pattern, result)
    return result


def parse_rules(rules: Mapping[str, str | NMPattern]) -> dict[str, NMPattern | None]:
    """Read layer rules, None standing for "dense".

    Raises:
        ValueError: If a rule is neither a pattern nor "dense".
    """
    if not isinstance(rules, Mapping):
        raise ValueError(
            f"`layers` must map names of layers to 'N:M' or 'dense', as in {{'*.stem': 'dense'}}; got {rules!r}."
        )
    parsed = {}
    for glob, rule in rules.items():
        try:
            parsed[glob] = None if rule == "dense" else NMPattern.parse(rule)
        except ValueError as error:
            raise ValueError(f"`layers` has a wrong rule for {glob!r}: {error} Or write 'dense'.") from None
    return parsed


class _Held(NamedTuple):
    """A weight matrix where a module holds it.

    Args:
        name: Its key in the state dict.
        module: The module that multiplies with it, as far as the structure of the model shows.
        weight: The parameter.
        modules: Names of modules by which rules may mean it.
        adapter: Whether it is added to another weight, as LoRA's factors are.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    modules: tuple[str, ...]
    adapter: bool

    @property
    def names(self) -> tuple[str, str]:
        """Names by which a rule means this weight alone."""
        return self.name, self.name.removesuffix(".weight")

    def matches(self, glob: str) -> bool:
        """Whether a rule means this weight."""
        return any(fnmatchcase(name, glob) for name in (*self.names, *self.modules))


def _weights(model: nn.Module) -> Iterator[_Held]:
    modules = dict(model.named_modules(remove_duplicate=False))
    # PEFT's layers say so; layers that users write themselves have the names of the paper.
    told = [f"{prefix}.{name}." for prefix, m in modules.items() for name in getattr(m, "adapter_layer_names", ())]
    for prefix, module in model.named_modules():
        parent = prefix.rpartition(".")[0]
        # The output projection of attention is a module of its own, but users do not know its name.
        above = (parent,) if isinstance(modules.get(parent), nn.MultiheadAttention) else ()
        owner = (
            modules[prefix.rpartition(".parametrizations.")[0]] if isinstance(module, ParametrizationList) else module
        )
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"`{name}` has no shape yet (a lazy module), so it has no blocks. Run one batch through the model "
                    "before `fit`."
                )
            if parameter.dim() >= 2:
                adapter = bool(ADAPTER_NAME.search(name)) or name.startswith(tuple(told))
                yield _Held(name, owner, parameter, (prefix, *above), adapter)


def _check_rules(rules: Mapping[str, NMPattern | None], candidates: list[_Held]) -> None:
    for glob in rules:
        if not any(held.matches(glob) for held in candidates):
            named = (name for held in candidates for name in (held.name.removesuffix(".weight"), *held.modules))
            labels = [*dict.fromkeys(name for name in named if name)]
            close = difflib.get_close_matches(glob, labels, n=3, cutoff=0.3) or labels[:5]
            raise ValueError(
                f"`layers` has a rule for {glob!r}, which matches no weight matrix of the model. Similar names: "
                f"{', '.join(close) or 'none'}."
            )


def _refuse_rule(glob: str | None, wanted: NMPattern, why: str) -> None:
    if why != UNREACHED:  # the loss may reach it later
        raise ValueError(
            f"`layers` asks for {wanted} in `{glob}`, which cannot be: {why}. Drop the rule, or choose a pattern that fits."
        )


def _refuse(pattern: NMPattern, plans: list[LayerPlan]) -> NoReturn:
    reasons = "; ".join(f"{plan.name}: {plan.reason}" for plan in plans) or "the model has no weight matrices"
    raise ValueError(
        f"No layer is eligible for `pattern` {pattern}, so training would stay dense ({reasons}). "
        f"{advice(plan.reason for plan in plans)}".rstrip()
    )


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is (in, out), as in GPT-2."""
    # A model can only hold one if the class has been imported.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def _why_dense(held: _Held, wanted: NMPattern | None) -> str:
    """Why a weight cannot be sparse, trained or not; empty if it can."""
    module, weight, short = held.module, held.weight, held.name.rpartition(".")[2]
    transposed = _is_transposed(module)
    linear = transposed or isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    attention = isinstance(module, nn.MultiheadAttention) and short in _ATTENTION
    if linear and module._parameters.get("weight") is None:
        return COMPUTED
    if not ((linear and short == "weight") or attention):
        # Experts of a mixture, for example; torch's own modules have no such weights.
        several = weight.dim() == 3 and min(weight.shape) > 1 and not type(module).__module__.startswith("torch.")
        fused = f" ({FUSED})" if several else ""
        return f"{NO_VIEW} {type(module).__name__}.{short}{fused}"
    if not weight.is_floating_point():
        return f"not real floating point but {str(weight.dtype).removeprefix('torch.')}"
    inputs = weight.shape[0 if transposed else 1]
    if not weight.numel():
        return "empty"
    if wanted is not None and inputs % wanted.m:
        return f"input dimension {inputs} {INDIVISIBLE} {wanted.m}"
    return ""


def _why_untrained(weight: nn.Parameter, trained: Container[int] | None, shown: str) -> str:
    """Why a weight is not trained; empty if it is trained as far as known."""
    if not weight.requires_grad:
        return FROZEN
    if trained is not None and id(weight) not in trained:
        return UNHELD
    return UNREACHED if shown == UNREACHED else ""
