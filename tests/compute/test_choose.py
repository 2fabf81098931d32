"""What is chosen, and what is told of it."""

import itertools
import pickle

import pytest
import torch

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute import choose as room
from bame_lightning.compute.choice import Choice
from bame_lightning.compute.choose import Call, choose
from bame_lightning.compute.native.build import UnavailableError
from bame_lightning.compute.operation import Conv2d, Linear
from tests.compute.layers import random_mask

FOUR = NMPattern(1, 4)


class Clock:
    """Seconds as a list has them: how long each call takes, one after the other."""

    def __init__(self, lengths: list[float]) -> None:
        self.times = itertools.accumulate(itertools.chain.from_iterable((0.0, length) for length in lengths))

    def __call__(self) -> float:
        return next(self.times)


def turns(*rounds: list[float]) -> list[float]:
    """A round to warm up, and two with these lengths for each of the phases."""
    return [length for lengths in rounds for length in [*[9.0] * len(lengths), *lengths, *[2 * one for one in lengths]]]


def chosen(clock: Clock, **kwargs) -> Choice:
    mask = random_mask((8, 16), FOUR)
    weight = torch.randn(8, 16)
    return choose(Linear(), weight, mask, FOUR, Call((5, 16)), rounds=2, clock=clock, **kwargs)


def test_the_shortest_time_wins_phase_by_phase() -> None:
    clock = Clock(turns([0.001, 0.001], [0.010, 0.004, 0.003], [0.010, 0.002, 0.003], [0.010, 0.011]))
    choice = chosen(clock, implementations=["kernels", "embedding_bag"])
    # The gradient of the input must gather the weights itself, for the output is another implementation's: 3 ms and 3 ms.
    assert (choice.forward, choice.input_gradient, choice.weight_gradient) == ("embedding_bag", "kernels", "dense")
    assert choice.reason == "faster than dense as measured: forward 3.3x, input gradient 3.3x"
    assert choice.milliseconds["forward"] == pytest.approx({"dense": 10.0, "kernels": 4.0, "embedding_bag": 3.0})
    assert choice.milliseconds["input_gradient"]["kernels"] == pytest.approx(3.0)


def test_a_small_gain_is_none() -> None:
    choice = chosen(
        Clock(turns([0.001], [0.100, 0.096], [0.100, 0.096], [0.100, 0.094])),
    )
    assert (choice.forward, choice.input_gradient, choice.weight_gradient) == ("dense", "dense", "kernels")
    choice = chosen(Clock(turns([0.001], [0.1, 0.2], [0.1, 0.2], [0.1, 0.2])))
    assert choice.dense
    assert choice.reason == "dense is the fastest as measured"


def test_without_a_compiler_others_are_chosen_among(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UnavailableError("no C++ compiler")

    monkeypatch.setattr("bame_lightning.compute.native.products.kernels", missing)
    choice = chosen(Clock(turns([0.001], [0.1, 0.05], [0.1, 0.05], [0.1])))
    assert (choice.forward, choice.input_gradient, choice.weight_gradient) == (
        "embedding_bag",
        "embedding_bag",
        "dense",
    )
    mask = random_mask((8, 16, 3, 3), FOUR)
    choice = choose(Conv2d(), torch.randn(mask.shape), mask, FOUR, Call((2, 16, 5, 5)))
    assert choice.dense
    assert choice.reason == "kernels: no C++ compiler; embedding_bag: embedding_bag multiplies linear layers only"


def test_what_nobody_multiplies_stays_dense_with_the_reason() -> None:
    mask = random_mask((8, 16), FOUR)
    choice = choose(Linear(), torch.randn(8, 16).bfloat16(), mask, FOUR, Call((5, 16)))
    assert (choice.dense, choice.reason) == (
        True,
        "sparse products on cpu multiply float32 and float64; this one is of bfloat16",
    )
    mask[3] = False
    assert "in output row 3 it does not" in choose(Linear(), torch.randn(8, 16), mask, FOUR, Call((5, 16))).reason


def test_a_real_measurement_leaves_the_random_state_alone_and_travels() -> None:
    mask = random_mask((8, 16, 3, 3), FOUR)
    before = torch.get_rng_state()
    call = Call.of(torch.zeros(2, 16, 5, 5).to(memory_format=torch.channels_last))
    assert call == Call((2, 16, 5, 5), channels_last=True, input_gradient=False)
    choice = choose(Conv2d(), torch.randn(mask.shape, generator=torch.Generator()), mask, FOUR, call)
    assert torch.equal(before, torch.get_rng_state())
    assert set(choice.milliseconds) == {"forward", "weight_gradient"}
    assert choice.input_gradient == "dense"
    assert pickle.loads(pickle.dumps(choice)) == choice == Choice.from_dict(choice.to_dict())


@pytest.mark.usefixtures("unchecked_types")
def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`forward` must be one of dense, kernels, embedding_bag, semi_structured; got 'fast'"
    ):
        Choice(forward="fast")
    assert room.MARGIN < 1
