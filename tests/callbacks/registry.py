"""Every method, as the batteries run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bame_lightning import SRSTE, BAMECallback, Evidence, OneBatch, RigL, Schedule, StaticMask, TopKAST, TransposableSTE
from bame_lightning.compute.choice import Choice


def computed(**kwargs: Any) -> BAMECallback:
    """BAME whose layers are multiplied sparsely wherever that can be, however small they are."""
    callback = BAMECallback(
        "2:4",
        schedule=Schedule(every=3),
        evidence=Evidence(read_every=4, contenders=0.5, step_size=4.0),
        verify=True,
        compute="auto",
        **kwargs,
    )
    callback.training.execution.choose = kernels_always
    return callback


def kernels_always(*args: Any) -> Choice:
    """Find the kernels fastest in all phases."""
    return Choice("kernels", "kernels", "kernels", "of a test")


METHODS: dict[str, Callable[..., Any]] = {
    "bame": lambda **kwargs: BAMECallback(
        "2:4",
        schedule=Schedule(every=3),
        evidence=Evidence(read_every=4, contenders=0.5, step_size=4.0),
        verify=True,
        **kwargs,
    ),
    "bame_computed": lambda **kwargs: computed(**kwargs),
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
    "top_kast": lambda **kwargs: TopKAST("2:4", widen=2, verify=True, **kwargs),
    "transposable": lambda **kwargs: TransposableSTE("2:4", refresh_every=3, verify=True, **kwargs),
}
MOVING = sorted(METHODS.keys() - {"static"})
"""Those whose masks change."""
MASKED = sorted(METHODS.keys() - {"sr_ste", "top_kast", "transposable"})
"""Those whose gradients and optimizer state are sparse, too."""
COMPUTED = {"bame_computed"}
"""Those that multiply sparsely: the same numbers but for the order of sums."""
every_method = pytest.mark.parametrize("name", METHODS)
