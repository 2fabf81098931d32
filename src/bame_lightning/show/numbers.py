"""Write numbers as people say them."""

from __future__ import annotations

import re

_PREFIXES = ("", "K", "M", "G", "T", "P", "E", "Z", "Y")


def flops(value: float) -> str:
    """Say a number of FLOPs in three digits.

    Args:
        value: Floating-point operations, not negative.

    Returns:
        The number with the prefix of its thousands.

    Example:
        >>> flops(23.7e9), flops(999_600.0), flops(4.1e18), flops(0.0)
        ('23.7 GFLOPs', '1 MFLOPs', '4.1 EFLOPs', '0 FLOPs')
    """
    place = 0
    while value >= 999.5 and place < len(_PREFIXES) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {_PREFIXES[place]}FLOPs"


def in_order(name: str) -> list[tuple[int, str]]:
    """Make a key that sorts numbers inside names by their value.

    Example:
        >>> sorted(["layer10", "layer2", "head"], key=in_order)
        ['head', 'layer2', 'layer10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def amount(count: int, noun: str) -> str:
    """Say how many there are of something.

    Example:
        >>> amount(1, "epoch"), amount(1234, "step")
        ('1 epoch', '1,234 steps')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def times(count: int) -> str:
    """Say how often.

    Example:
        >>> times(1), times(2), times(1234)
        ('once', 'twice', '1,234 times')
    """
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")
