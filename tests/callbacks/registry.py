"""Every method, as the batteries run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bame_lightning import SRSTE, BAMECallback, Evidence, OneBatch, RigL, Schedule, StaticMask, TransposableSTE

METHODS: dict[str, Callable[..., Any]] = {
    "bame": lambda **kwargs: BAMECallback(
        "2:4",
        schedule=Schedule(every=3),
        evidence=Evidence(read_every=4, contenders=0.5, step_size=4.0),
        verify=True,
        **kwargs,
    ),
    "bame_one_batch": lambda **kwargs: BAMECallback(
        "2:4", schedule=Schedule(every=3), evidence=OneBatch(), verify=True, **kwargs
    ),
    "both_ways": lambda **kwargs: BAMECallback(
        "1:4",
        schedule=Schedule(every=3),
        evidence=Evidence(read_every=4, contenders=0.5, step_size=4.0),
        both_ways=True,
        verify=True,
        **kwargs,
    ),
    "rigl": lambda **kwargs: RigL("2:4", schedule=Schedule(every=3), verify=True, **kwargs),
    "sr_ste": lambda **kwargs: SRSTE("2:4", verify=True, **kwargs),
    "static": lambda **kwargs: StaticMask("2:4", verify=True, **kwargs),
    "transposable": lambda **kwargs: TransposableSTE("2:4", refresh_every=3, verify=True, **kwargs),
}
MOVING = sorted(METHODS.keys() - {"static"})
"""Those whose masks change."""
MASKED = sorted(METHODS.keys() - {"sr_ste", "transposable"})
"""Those whose gradients and optimizer state are sparse, too."""
every_method = pytest.mark.parametrize("name", METHODS)
