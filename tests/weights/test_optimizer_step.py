from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bame_lightning.weights.optimizer_step import UpdateRule, block_rates, update_rule
from bame_lightning.weights.weight_state import WeightState

Make = Callable[[list[nn.Parameter]], Optimizer]


class Lion(Optimizer):
    """An optimizer that nobody knows, with one value per weight, and with values that are something else."""

    def __init__(self, params: list[nn.Parameter], key: str = "lion_average") -> None:
        super().__init__(params, {"lr": 0.5})
        self.key = key

    def step(self, closure: Any = None) -> None:
        for weight in self.param_groups[0]["params"]:
            self.state[weight][self.key] = torch.ones_like(weight)
            self.state[weight]["per_output"] = torch.ones(len(weight), 1)
            self.state[weight]["flat"] = torch.ones(weight.numel())
            self.state[weight]["count"] = torch.ones(())
            self.state[weight]["name"] = "lion"


def stepped(make: Make, shape: tuple[int, ...] = (6, 4), gradient: float | None = None, steps: int = 3) -> Any:
    """An optimizer after real steps on one weight, and the weight; gradients are random unless given."""
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = make([weight])
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weight.grad = torch.randn(shape, generator=generator) if gradient is None else torch.full(shape, gradient)
        optimizer.step()
    return optimizer, weight


TORCH: dict[str, tuple[Make, set[str]]] = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), set()),
    "SGD momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "Adam": (torch.optim.Adam, {"exp_avg", "exp_avg_sq"}),
    "Adam amsgrad": (lambda p: torch.optim.Adam(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "AdamW amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "NAdam": (torch.optim.NAdam, {"exp_avg", "exp_avg_sq"}),
    "RAdam": (torch.optim.RAdam, {"exp_avg", "exp_avg_sq"}),
    "Adamax": (torch.optim.Adamax, {"exp_avg", "exp_inf"}),
    "RMSprop": (torch.optim.RMSprop, {"square_avg"}),
    "RMSprop momentum centered": (
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
    "Adagrad": (torch.optim.Adagrad, {"sum"}),
    "Adadelta": (torch.optim.Adadelta, {"square_avg", "acc_delta"}),
    "ASGD": (torch.optim.ASGD, {"ax"}),
    "Rprop": (torch.optim.Rprop, {"prev"}),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 4, 3, 3)])
def test_all_per_weight_state_of_torchs_optimizers_is_found(name: str, shape: tuple[int, ...]) -> None:
    make, expected = TORCH[name]
    optimizer, weight = stepped(make, shape)
    found = dict(WeightState(optimizer).elementwise(weight, "layer.weight"))
    assert set(found) == expected
    assert all(found[key] is optimizer.state[weight][key] for key in expected)
    # Nothing of the weight's shape was overlooked, but for step sizes that must not be zeroed.
    shaped = {key for key, value in optimizer.state[weight].items() if getattr(value, "shape", None) == shape}
    assert shaped - set(found) == ({"step_size"} if name == "Rprop" else set())


@pytest.mark.parametrize("name", TORCH)
def test_zeroed_state_lets_a_revived_weight_move_again(name: str) -> None:
    optimizer, weight = stepped(TORCH[name][0])
    for _, value in WeightState(optimizer).elementwise(weight, "layer.weight"):
        value.zero_()
    before = weight.detach().clone()
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.isfinite().all()
    assert (weight < before).all()


def test_no_state_before_the_first_step() -> None:
    weight = nn.Parameter(torch.zeros(2, 4))
    assert list(WeightState(torch.optim.Adam([weight])).elementwise(weight, "layer.weight")) == []


@pytest.mark.parametrize("shape", [(6, 4), (4, 4, 1), (4, 4, 3, 3)])
def test_an_unknown_optimizers_state_is_taken_by_its_shape_with_a_warning(shape: tuple[int, ...]) -> None:
    optimizer, weight = stepped(Lion, shape)
    with pytest.warns(UserWarning, match="Optimizer Lion is unknown; its state 'lion_average' .* is zeroed"):
        found = list(WeightState(optimizer).elementwise(weight, "layer.weight"))
    assert [key for key, _ in found] == ["lion_average"]


def test_an_unknown_key_of_a_square_weight_is_refused() -> None:
    optimizer, weight = stepped(Lion, (4, 4))
    says = r"`optimizer` Lion keeps 'lion_average' for `net.fc.weight`.*\(4, 4\).*layers=\{'net.fc.weight': 'dense'\}.*ELEMENTW"
    with pytest.raises(ValueError, match=says):
        list(WeightState(optimizer).elementwise(weight, "net.fc.weight"))


@pytest.mark.parametrize("shape", [(4, 4), (6, 4)])
def test_an_unknown_optimizer_may_use_the_names_of_torchs(shape: tuple[int, ...]) -> None:
    optimizer, weight = stepped(lambda p: Lion(p, key="exp_avg"), shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [key for key, _ in WeightState(optimizer).elementwise(weight, "layer.weight")] == ["exp_avg"]


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ({"lr": 0.5}, 0.5),
        ({"lr": 0.5, "momentum": 0.75}, 2.0),
        ({"lr": 0.5, "momentum": 0.75, "nesterov": True}, 2.0),
        ({"lr": 0.5, "momentum": 0.75, "dampening": 0.5}, 1.0),
        ({"lr": 0.5, "momentum": 0.0, "dampening": 0.5}, 0.5),
    ],
)
def test_sgd_moves_a_weight_by_its_rate_under_a_lasting_gradient(arguments: dict[str, Any], rate: float) -> None:
    optimizer, weight = stepped(lambda p: torch.optim.SGD(p, **arguments), gradient=3.0, steps=100)
    rule = update_rule(optimizer, weight)
    assert rule == UpdateRule(learning_rate=rate)
    assert rates_of(rule, None, torch.ones(6, 4, dtype=torch.bool), 4).tolist() == [[rate]] * 6
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - weight.detach(), torch.full((6, 4), 3.0 * rate), rtol=1e-4, atol=0)


def rates_of(rule: UpdateRule, moment: Tensor | None, mask: Tensor, n: int) -> Tensor:
    """Rates for a gradient too small to matter."""
    return block_rates(rule, moment, torch.zeros(mask.shape), mask, n)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop", "Adagrad"])
def test_adaptive_optimizers_move_a_weight_by_the_rate_of_its_block(optimizer: str, steps: int) -> None:
    # A lasting gradient: the first moment is the gradient itself, so the real step can be predicted.
    kwargs = {"weight_decay": 0.0} if optimizer == "AdamW" else {}
    make = getattr(torch.optim, optimizer)
    real, weight = stepped(lambda p: make(p, lr=0.125, **kwargs), (2, 4), gradient=-3.0, steps=steps)
    before = weight.detach().clone()
    real.step()
    rule = update_rule(real, weight)
    assert rule.learning_rate == 0.125
    rates = rates_of(rule, rule.second_moment, torch.tensor([[True] * 4] * 2), 4)
    torch.testing.assert_close(weight.detach() - before, 3.0 * rates.expand(2, 4), rtol=1e-4, atol=0)


def test_adams_rule_by_hand() -> None:
    optimizer, weight = stepped(
        lambda p: torch.optim.Adam(p, lr=0.25, betas=(0.5, 0.75), eps=1.0, weight_decay=0.1),
        (1, 4),
        gradient=0.0,
        steps=2,
    )
    optimizer.state[weight]["exp_avg_sq"] = torch.tensor([[7.0, 100.0, 0.0, 100.0]])
    rule = update_rule(optimizer, weight)
    assert (rule.learning_rate, rule.eps) == (0.25, 1.0)
    assert float(rule.correction) == 1 - 0.75**2
    # Kept are 7 and 0 (the pruned 100s do not count): mean 3.5, over 0.4375 it is 8; lr / (sqrt(8) + 1).
    rates = rates_of(rule, rule.second_moment, torch.tensor([[True, False, True, False]]), 2)
    torch.testing.assert_close(rates, torch.tensor([[0.25 / (8**0.5 + 1)]]))


def test_rmsprops_rule_by_hand() -> None:
    optimizer, weight = stepped(
        lambda p: torch.optim.RMSprop(p, lr=0.5, alpha=0.75, eps=2.0, momentum=0.5, weight_decay=0.25), (1, 4), 4.0, 1
    )
    rule = update_rule(optimizer, weight)
    # A quarter of 16; momentum doubles the lasting step; nothing corrects the bias.
    assert rule.second_moment is not None
    assert rule.second_moment.tolist() == [[4.0, 4.0, 4.0, 4.0]]
    assert (rule.learning_rate, rule.correction, rule.eps) == (1.0, 1.0, 2.0)
    assert rates_of(rule, rule.second_moment, torch.tensor([[True, True, True, False]]), 3).tolist() == [[0.25]]


def test_adagrads_rule_reads_the_sum() -> None:
    optimizer, weight = stepped(lambda p: torch.optim.Adagrad(p, lr=0.5, eps=0.0), (1, 4), gradient=2.0, steps=4)
    rule = update_rule(optimizer, weight)
    assert rates_of(rule, rule.second_moment, torch.ones(1, 4, dtype=torch.bool), 4).tolist() == [[0.125]]


def test_a_learning_rate_may_be_a_tensor() -> None:
    optimizer, weight = stepped(lambda p: torch.optim.Adam(p, lr=torch.tensor(0.5), eps=0.0), (1, 4), 2.0, 1)
    rule = update_rule(optimizer, weight)
    rates: Tensor = rates_of(rule, rule.second_moment, torch.ones(1, 4, dtype=torch.bool), 4)
    torch.testing.assert_close(rates, torch.tensor([[0.25]]))


def test_every_parameter_group_has_its_own_rule_and_schedulers_are_followed() -> None:
    first, second = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    groups = [{"params": [first], "lr": 0.5, "weight_decay": 0.125}, {"params": [second], "momentum": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.25)
    assert update_rule(optimizer, first) == UpdateRule(0.5)
    assert update_rule(optimizer, second) == UpdateRule(0.5)
    optimizer.param_groups[0]["lr"] = 0.0625
    assert update_rule(optimizer, first).learning_rate == 0.0625


def test_an_optimizer_that_maximizes_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"`maximize=True`\. Minimize the negated loss"):
        update_rule(torch.optim.SGD([weight], lr=0.1, maximize=True), weight)


def test_a_block_without_a_second_moment_moves_by_its_own_gradient_at_most() -> None:
    rule = UpdateRule(learning_rate=0.5, second_moment=torch.zeros(3, 4), eps=1e-8)
    moment = torch.tensor([[0.0] * 4, [0.0] * 4, [64.0] * 4])
    gradient = torch.tensor([[2.0] * 4, [0.0] * 4, [2.0] * 4])
    rates = block_rates(rule, moment, gradient, torch.tensor([[True, False, False, False]] * 3), 1)
    # lr / sqrt(mean of squares 4); nothing known, nothing moves; lr / sqrt(64)
    torch.testing.assert_close(rates, torch.tensor([[0.25], [0.0], [0.0625]]))


@pytest.mark.parametrize("name", ["Adadelta", "Adamax"])
def test_an_unknown_step_is_guessed_with_a_warning(name: str) -> None:
    optimizer, weight = stepped(lambda p: getattr(torch.optim, name)(p, lr=0.5), gradient=2.0)
    with pytest.warns(UserWarning, match=f"How far {name} moves a weight is not known"):
        rule = update_rule(optimizer, weight)
    assert (rule.learning_rate, rule.second_moment) == (0.5, None)


def test_state_that_is_not_floating_point_is_refused() -> None:
    optimizer, weight = stepped(lambda p: torch.optim.SGD(p, lr=0.5))
    optimizer.state[weight]["codes"] = torch.zeros(6, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"keeps 'codes' for `fc` as codes \(torch.uint8\)"):
        list(WeightState(optimizer).elementwise(weight, "fc"))
