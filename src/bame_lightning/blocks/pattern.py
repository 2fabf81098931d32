"""N:M patterns. This imports no torch, so that a wrong pattern is reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


@dataclass(frozen=True)
class NMPattern:
    """At most `n` non-zeros in every `m` consecutive weights of the input dimension.

    Args:
        n: Weights kept per block.
        m: Weights in a block.

    Raises:
        ValueError: If not 1 <= n <= m.

    Example:
        >>> NMPattern(1, 16).density
        0.0625
        >>> str(NMPattern.parse("2:4"))
        '2:4'
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.m < 1:
            raise ValueError(f"`pattern` N:M needs N >= 1 and M >= 1, a block keeps something; got {self}.")
        if self.n > self.m:
            raise ValueError(
                f"`pattern` N:M keeps at most N of M weights, so N <= M; got {self}. Did you mean '{self.m}:{self.n}'?"
            )

    @classmethod
    def parse(cls, value: object) -> NMPattern:
        """Read a pattern from "N:M", from `{n, m}`, or hand an `NMPattern` through.

        Args:
            value: What a user or a configuration file wrote.

        Returns:
            The pattern.

        Raises:
            ValueError: If `value` is anything else. Integers get a message of their own: YAML 1.1 reads an
                unquoted `2:4` as the sexagesimal number 124.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and (match := _PATTERN.fullmatch(value)):
            return cls(int(match[1]), int(match[2]))
        if isinstance(value, Mapping) and set(value) == {"n", "m"} and all(_is_int(v) for v in value.values()):
            return cls(value["n"], value["m"])
        if _is_int(value):
            raise ValueError(
                f"`pattern` must be a string such as '2:4', got the integer {value}: YAML reads an unquoted 2:4 as a "
                "number to base 60. Write it in quotes."
            )
        raise ValueError(f"`pattern` must be a string 'N:M' such as '1:16', or a mapping {{n, m}}; got {value!r}.")

    @property
    def density(self) -> float:
        """Share of the weights that are kept: N / M."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
