"""Defects of other tools that no other test looks for; `tests/README.md` lists all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.callbacks.test_methods import METHODS, assert_sparse, every_method
from tests.training import Task, tiny_model, trainer


class Synchronisations(TorchDispatchMode):
    """Count operations by which the host would wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["bame", "bame_one_batch", "static", "sr_ste"])
def test_the_host_waits_for_the_device_in_no_step(name: str) -> None:
    callback, counts = METHODS[name](), []
    callback.verify = False
    method = callback.method
    before, after = method.before_update, method.after_update

    def watched(call: Any) -> Any:
        def run(*args: Any, **how: Any) -> None:
            with Synchronisations() as mode:
                call(*args, **how)
            counts.append(mode.counts)

        return run

    method.before_update, method.after_update = watched(before), watched(after)
    trainer(callback, max_epochs=3).fit(Task())
    # The first gradient decides about the scale of each layer, which the host has to know.
    assert len(counts) == 48
    assert not sum(counts[2:], Counter())


def test_the_watch_sees_a_host_that_waits() -> None:
    with Synchronisations() as mode:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert mode.counts == {"_local_scalar_dense": 1, "nonzero": 1}


@every_method
def test_a_buffer_of_the_user_may_be_called_a_mask(name: str, tmp_path: Path) -> None:
    def make() -> Task:
        model = tiny_model()
        model[6].register_buffer("weight_mask", torch.full((16, 128), 0.5))
        model[6].register_parameter("weight_orig", nn.Parameter(torch.ones(2)))
        return Task(model)

    task = make()
    fit = trainer(METHODS[name](), max_epochs=1)
    fit.fit(task)
    assert_sparse(task)
    assert (task.model[6].weight_mask == 0.5).all()
    fit.save_checkpoint(tmp_path / "mask.ckpt")
    make().load_state_dict(torch.load(tmp_path / "mask.ckpt", weights_only=True)["state_dict"])


@every_method
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_batch_has_one_forward_and_one_backward_pass(name: str, accumulate: int) -> None:
    task, passes = Task(), Counter()
    task.model.register_forward_hook(lambda *_: passes.update(["forward"]))
    task.model[6].weight.register_hook(lambda _: passes.update(["backward"]))
    trainer(METHODS[name](), accumulate_grad_batches=accumulate).fit(task)
    assert passes == {"forward": 16, "backward": 16}
