from collections.abc import Iterator

import jaxtyping
import pytest
import torch
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
