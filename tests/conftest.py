import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
import wandb
from hypothesis import settings

# The same examples in every run, on any machine: a failure in CI is a failure at home.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("repeatable")
torch.set_num_threads(1)


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Run as users do, without a type checker that would meet a wrong argument before our own message does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B without account or settings; it reads the environment once per process, hence the teardown.

    Before the variables are set aside: among them is the address of the service that a teardown ends, and putting that back
    would send whoever comes next to a service that is gone.
    """
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()
