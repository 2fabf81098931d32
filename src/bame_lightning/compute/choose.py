"""Measure briefly which implementation multiplies a layer fastest at its real shapes, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.choice import PHASES, Choice
from bame_lightning.compute.layer import DTYPES, IMPLEMENTATIONS, Products, computing_type
from bame_lightning.compute.native.build import UnavailableError
from bame_lightning.compute.native.products import KernelProducts
from bame_lightning.compute.operation import Operation

MARGIN = 0.95
"""A sparse product must take less than this share of the dense one's time: clocks are not exact, and dense is the default."""
_ROUNDS = 2
_PHASES = dict(zip(PHASES, ("forward", "input gradient", "weight gradient"), strict=True))


@dataclass(frozen=True)
class Call:
    """What a layer is called with.

    Args:
        shape: Of its input.
        channels_last: Whether the input lies channels last in memory.
        input_gradient: Whether the backward pass needs the input's gradient; the first layer's does not.
        contenders: Number of pruned positions whose gradients a step reads beside those of kept weights.
        dtype: Type in which autocast computes; None where it is off.
    """

    shape: tuple[int, ...]
    channels_last: bool = False
    input_gradient: bool = True
    contenders: int = 0
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, x: Tensor, contenders: int = 0) -> Call:
        """The call with this input.

        Example:
            >>> Call.of(torch.zeros(8, 4))
            Call(shape=(8, 4), channels_last=False, input_gradient=False, contenders=0, dtype=None)
        """
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        kind = computing_type(x)
        return cls(tuple(x.shape), last, x.requires_grad, contenders, kind if kind != x.dtype else None)


def choose(
    operation: Operation,
    weight: Float[Tensor, "out inp *kernel"],
    mask: Bool[Tensor, "out inp *kernel"],
    pattern: NMPattern,
    call: Call,
    *,
    implementations: Iterable[str] | None = None,
    margin: float = MARGIN,
    rounds: int = _ROUNDS,
    clock: Callable[[], float] | None = None,
) -> Choice:
    """Choose the fastest implementation of each phase, by the shortest of some rounds in which all take turns.

    Args:
        operation: What the layer computes.
        weight: The weight; values where it is pruned do not matter.
        mask: True where kept.
        pattern: N:M.
        call: What the layer is called with.
        implementations: What may be chosen beside "dense". By default the first of `IMPLEMENTATIONS` that is available: the
            kernels were faster than `embedding_bag` wherever both were measured.
        margin: Share of the dense time that a sparse product must stay below.
        rounds: How often each is measured, after one round to warm up.
        clock: Returns seconds; the default first waits until the device has finished.

    Returns:
        The choice with its reason and what was measured. All dense where nothing else is possible.
    """
    reasons: list[str] = []
    found: dict[str, Products] = {}
    device, kind = weight.device.type, call.dtype or weight.dtype
    possible = kind in DTYPES.get(device, ())
    for name in implementations or _on(device) if possible else ():
        if implementations is None and found:
            break
        try:
            found[name] = IMPLEMENTATIONS[name](operation, mask, pattern, kind)
        except (UnavailableError, TypeError, ValueError) as error:
            reasons.append(f"{name}: {error}")
    if not found:
        return Choice(reason="; ".join(reasons) or _no_product(kind, device))
    times = _measure(operation, weight.detach().to(kind) * mask, found, call, rounds, clock or _clock_of(weight.device))
    best = {phase: _fastest(took, margin) for phase, took in times.items()}
    if best.get("input_gradient", "dense") not in ("dense", best["forward"]):
        # It must gather the kept weights itself then.
        name = best["input_gradient"]
        times["input_gradient"][name] += times["gather"][name]
        best["input_gradient"] = _fastest(times["input_gradient"], margin)
    del times["gather"], best["gather"]
    return Choice(**best, reason=_reason(best, times), milliseconds=times)  # type: ignore[arg-type]


def without_dense(
    operation: Operation, mask: Bool[Tensor, "out inp *kernel"], pattern: NMPattern, dtype: torch.dtype
) -> Choice:
    """Choose what computes as much as possible sparsely, without measuring.

    Args:
        operation: What the layer computes.
        mask: True where kept.
        pattern: N:M.
        dtype: Of the weight.

    Raises:
        UnavailableError: If only dense products are available; the message says why.
    """
    reasons = []
    for name in _on(mask.device.type):
        try:
            made = IMPLEMENTATIONS[name](operation, mask, pattern, dtype)
        except (UnavailableError, TypeError, ValueError) as error:
            reasons.append(f"{name}: {error}")
            continue
        weight_gradient = "kernels" if isinstance(made, KernelProducts) else "dense"
        return Choice(name, name, weight_gradient, reason="asked for")  # type: ignore[arg-type]
    raise UnavailableError("; ".join(reasons))


def _no_product(kind: torch.dtype, device: str) -> str:
    types = [str(known).removeprefix("torch.") for known in DTYPES.get(device, ())]
    known = f"multiply {' and '.join(types)}" if types else "do not exist"
    return f"sparse products on {device} {known}; this one is of {str(kind).removeprefix('torch.')}"


def _on(device: str) -> list[str]:
    """The implementations for a kind of device."""
    return [name for name, kind in IMPLEMENTATIONS.items() if kind.device == device]


def _clock_of(device: torch.device) -> Callable[[], float]:
    def finished() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return finished if device.type == "cuda" else time.perf_counter


def _measure(
    operation: Operation,
    weight: Tensor,
    found: dict[str, Products],
    call: Call,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, dict[str, float]]:
    """Phase -> implementation -> milliseconds; beside the phases, what it takes to gather the kept weights."""
    generator = torch.Generator().manual_seed(0)  # the global one is the user's
    x = torch.randn(call.shape, generator=generator, dtype=weight.dtype).to(weight.device)
    x = x.to(memory_format=torch.channels_last) if call.channels_last else x
    output = operation.forward(x, weight, None)
    gradient = torch.randn_like(output.cpu(), generator=generator).to(output.device)
    also = torch.randperm(weight.numel(), generator=generator)[: call.contenders].sort().values.to(weight.device)
    values = {name: products.values(weight) for name, products in found.items()}
    work: dict[str, dict[str, Callable[[], object]]] = {
        "gather": {},
        "forward": {"dense": lambda: operation.forward(x, weight, None)},
    }
    if call.input_gradient:
        work["input_gradient"] = {"dense": lambda: operation.backward(gradient, x, weight, (True, False))}
    work["weight_gradient"] = {"dense": lambda: operation.backward(gradient, x, weight, (False, True))}
    for name, products in found.items():
        kept = values[name]
        if kept is None:  # weights that are not finite: nothing can be measured
            continue
        work["gather"][name] = lambda p=products: p.values(weight)  # type: ignore[misc]
        work["forward"][name] = lambda p=products: p.forward(x, p.values(weight), None)  # type: ignore[misc]
        if call.input_gradient and products.input_gradient(gradient, kept, x) is not None:
            work["input_gradient"][name] = lambda p=products, v=kept: p.input_gradient(gradient, v, x)  # type: ignore[misc]
        if products.weight_gradient(gradient, x, weight, also) is not None:
            work["weight_gradient"][name] = lambda p=products: p.weight_gradient(gradient, x, weight, also)  # type: ignore[misc]
    with torch.no_grad():
        return {phase: _take_turns(kinds, rounds, clock) for phase, kinds in work.items()}


def _take_turns(work: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """The shortest time of each, in milliseconds."""
    shortest = dict.fromkeys(work, float("inf"))
    for turn in range(rounds + 1):
        for name, run in work.items():
            start = clock()
            run()
            took = 1e3 * (clock() - start)
            shortest[name] = min(shortest[name], took) if turn else shortest[name]
    return shortest


def _fastest(took: dict[str, float], margin: float) -> str:
    if "dense" not in took:
        return "dense"
    return min(took, key=lambda name: took[name] / (1 if name == "dense" else margin))


def _reason(best: dict[str, str], times: dict[str, dict[str, float]]) -> str:
    gains = [
        f"{_PHASES[phase]} {times[phase]['dense'] / times[phase][name]:.1f}x"  # type: ignore[index]
        for phase, name in sorted(best.items())
        if name != "dense"
    ]
    return f"faster than dense as measured: {', '.join(gains)}" if gains else "dense is the fastest as measured"
