"""How a layer is computed: plain data that can be saved and sent to other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Implementation = Literal["dense", "kernels", "embedding_bag", "semi_structured"]
Phase = Literal["forward", "input_gradient", "weight_gradient"]
PHASES: tuple[Phase, ...] = ("forward", "input_gradient", "weight_gradient")


@dataclass(frozen=True)
class Choice:
    """How a layer is computed, phase by phase.

    Args:
        forward: What computes the output.
        input_gradient: What computes the gradient of the input.
        weight_gradient: What computes the gradient of the weight.
        reason: Why, in a few words.
        milliseconds: Phase -> implementation -> its time, if it was measured.

    Raises:
        ValueError: If a name is not that of an implementation.
    """

    forward: Implementation = "dense"
    input_gradient: Implementation = "dense"
    weight_gradient: Implementation = "dense"
    reason: str = ""
    milliseconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for phase in PHASES:
            if (name := getattr(self, phase)) not in get_args(Implementation):
                raise ValueError(f"`{phase}` must be one of {', '.join(get_args(Implementation))}; got {name!r}.")

    @property
    def used(self) -> set[str]:
        """The implementations in use, without the dense one."""
        return {getattr(self, phase) for phase in PHASES} - {"dense"}

    @property
    def dense(self) -> bool:
        """Whether all phases are computed densely."""
        return not self.used

    @property
    def words(self) -> str:
        """Say what computes the three phases, and why.

        Example:
            >>> Choice("kernels", "kernels", "dense", "asked for").words
            'kernels (weight gradient dense): asked for'
        """
        names = [getattr(self, phase) for phase in PHASES]
        first = next((name for name in names if name != "dense"), "dense")
        other = [
            f"{phase.replace('_', ' ')} {name}" for phase, name in zip(PHASES, names, strict=True) if name != first
        ]
        words = f"{first} ({', '.join(other)})" if other else first
        return f"{words}: {self.reason}" if self.reason else words

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint or a broadcast."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Choice:
        """Undo `to_dict`.

        Example:
            >>> choice = Choice(forward="kernels", reason="faster")
            >>> Choice.from_dict(choice.to_dict()) == choice
            True
        """
        return cls(**saved)
