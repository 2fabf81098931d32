from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from bame_lightning import Evidence, Schedule
from bame_lightning.methods.bame import BAME
from bame_lightning.methods.training import SparseTraining
from bame_lightning.weights.positions import flat_memory
from bame_lightning.weights.views import Views


def test_a_view_is_made_once_and_shows_the_tensor() -> None:
    made = []

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        made.append(tensor.shape)
        return tensor.view(-1)

    views, tensor = Views(flat), torch.zeros(2, 3)
    views.of("a", tensor).fill_(1)
    assert views.of("a", tensor).tolist() == [1] * 6
    assert tensor.tolist() == [[1] * 3] * 2
    assert made == [(2, 3)]


@pytest.mark.parametrize(
    "other",
    [
        torch.full((2, 3), 7.0),  # elsewhere
        torch.full((3, 2), 7.0),
        torch.full((3, 2), 7.0).t(),
        torch.full((2, 3), 7.0, dtype=torch.float64),
    ],
)
def test_a_view_is_renewed_when_something_else_stands_under_its_name(other: torch.Tensor) -> None:
    views = Views(flat_memory)
    views.of("a", torch.zeros(2, 3))
    found = views.of("a", other)
    assert found.tolist() == [7] * 6
    assert found.dtype == other.dtype


def test_memory_under_another_shape_is_seen_anew() -> None:
    views, memory = Views(lambda tensor: tensor[0]), torch.arange(6.0)
    assert views.of("a", memory.view(2, 3)).tolist() == [0, 1, 2]
    assert views.of("a", memory.view(3, 2)).tolist() == [0, 1]
    assert views.of("a", memory.view(2, 3).as_strided((3, 2), (1, 3))).tolist() == [0, 3]


def watched(*shape: int) -> tuple[torch.Tensor, weakref.ref[np.ndarray]]:
    """Zeros, and what tells whether their memory is still there."""
    array = np.zeros(shape, dtype=np.float32)
    return torch.from_numpy(array), weakref.ref(array)


def test_forgetting_lets_the_memory_go() -> None:
    views = Views(flat_memory)
    tensor, memory = watched(4)
    views.of("a", tensor)
    del tensor
    gc.collect()
    assert memory() is not None
    views.forget()
    gc.collect()
    assert memory() is None


def started() -> tuple[nn.Linear, torch.optim.Optimizer, SparseTraining]:
    torch.manual_seed(0)
    model = nn.Linear(16, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    training = SparseTraining(BAME(Evidence(read_every=2, step_size=20.0), Schedule(0, 100, 1)))
    training.begin(model, [optimizer], "1:4", {"": "1:4"}, steps=100)
    return model, optimizer, training


def step(model: nn.Linear, optimizer: torch.optim.Optimizer, training: SparseTraining, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.weight.grad = torch.randn(model.weight.shape, generator=generator, dtype=torch.float64).to(model.weight)
    training.before_step(optimizer)
    optimizer.step()


def pruned_values(model: nn.Linear, optimizer: torch.optim.Optimizer, training: SparseTraining) -> int:
    """Values that are not zero where the weight is pruned, of the weight and of its momentum."""
    (sparse,) = training.run.weights
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    return sum(int(values[~sparse.kept].count_nonzero()) for values in (model.weight, momentum))


def test_masks_reach_weights_and_state_wherever_they_have_moved() -> None:
    model, optimizer, training = started()
    seeds = iter(range(100))

    def steps() -> None:
        before = int(training.method.groups[0].table.masks.flips)
        for _ in range(20):
            step(model, optimizer, training, next(seeds))
            assert pruned_values(model, optimizer, training) == 0
        assert int(training.method.groups[0].table.masks.flips) > before

    steps()
    # Other memory behind the parameter, as `.to()` puts it there, and other momenta.
    model.weight.data = model.weight.data.clone()
    optimizer.load_state_dict(optimizer.state_dict())
    steps()
    # Another optimizer, with state of its own.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    training.refollow([optimizer])
    steps()


def test_what_is_remembered_of_an_optimizer_is_forgotten_when_training_ends() -> None:
    model, optimizer, training = started()
    momentum, memory = watched(8, 16)
    optimizer.state[model.weight]["momentum_buffer"] = momentum
    for seed in range(4):
        step(model, optimizer, training, seed)
    training.detach()
    assert memory() is not None
    del momentum
    optimizer.state.clear()
    gc.collect()
    assert memory() is None
