"""Optimizer state wherever it is kept, and of which kind it is; optimizers are stand-ins for what people write and install."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bame_lightning.weights.weight_state import WeightState, restart_


class Kept(Optimizer):
    """Keeps what a test says, for each parameter, under `state`."""

    def __init__(self, parameters: Any, keep: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        for weight in self.param_groups[0]["params"]:
            self.state[weight] = keep(weight)

    def step(self, closure: Any = None) -> None: ...


class Around(Optimizer):
    """Never calls `Optimizer.__init__`, as wrappers do; the optimizer inside is in a dictionary of a list."""

    def __init__(self, inner: Optimizer) -> None:
        self.parts = {"fast": inner}
        self.param_groups, self.defaults, self.state = inner.param_groups, {}, {}


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])))


def found(optimizer: Any, weight: nn.Parameter) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(WeightState(optimizer).elementwise(weight, "fc.weight"))


class TestPlaces:
    def test_in_optimizers_that_are_chained_and_wrapped(self) -> None:
        first, second = matrix(6, 4), matrix(8, 4)
        inner = [Kept([w], lambda w: {"exp_avg": torch.ones_like(w)}) for w in (first, second)]

        class Chained(Optimizer):
            def __init__(self) -> None:
                super().__init__([first, second], {})
                self.links = tuple(inner)

        for outer in (Chained(), Around(Chained()), Around(Around(Chained()))):
            for weight, part in zip((first, second), inner, strict=True):
                assert [*found(outer, weight)] == ["exp_avg"]
                assert found(outer, weight)["exp_avg"] is part.state[weight]["exp_avg"]

    def test_in_containers_inside_of_state(self) -> None:
        weight = matrix(6, 4)
        ones = [torch.ones(6, 4) for _ in range(3)]
        optimizer = Kept([weight], lambda w: {"a": {"exp_avg": ones[0]}, "b": [ones[1], {"c": (ones[2],)}], "step": 3})
        assert {id(value) for value in found(optimizer, weight).values()} == {id(value) for value in ones}

    def test_in_tables_and_lists_of_its_own(self) -> None:
        weights = [matrix(6, 4), matrix(8, 4)]
        optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.1)
        optimizer.velocity = {weight: torch.ones_like(weight) for weight in weights}
        optimizer.by_id = {id(weight): {"steady": torch.ones_like(weight)} for weight in weights}
        optimizer.slow = [[torch.zeros_like(weight)] for weight in weights]
        optimizer.flat = [torch.ones_like(weight) for weight in weights]
        for index, weight in enumerate(weights):
            values = found(optimizer, weight)
            assert values["velocity"] is optimizer.velocity[weight]
            assert values["by_id.steady"] is optimizer.by_id[id(weight)]["steady"]
            assert values["slow"] is optimizer.slow[index][0]
            assert values["flat"] is optimizer.flat[index]

    def test_weights_in_a_list_are_no_state(self) -> None:
        weight = matrix(6, 4)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        optimizer.held = [weight]
        assert found(optimizer, weight) == {}

    def test_what_is_reached_twice_is_found_once(self) -> None:
        weight = matrix(6, 4)
        inner = Kept([weight], lambda w: {"exp_avg": torch.ones_like(w)})
        outer = Around(inner)
        outer.state = inner.state
        assert len(found(outer, weight)) == 1


class TestKinds:
    @pytest.mark.parametrize("key", ["slow_buffer", "anchor", "z"])
    def test_a_copy_is_known_by_its_values_whatever_its_name(self, key: str) -> None:
        weights = [matrix(6, 4), matrix(8, 4, 3)]
        optimizer = Kept(weights, lambda w: {key: w.detach() * 1.01, "moment": torch.randn_like(w)})
        state = WeightState(optimizer)
        for weight in weights:
            with pytest.warns(UserWarning, match="Optimizer Kept is unknown; its state 'moment'"):
                copies = WeightState(optimizer).copies(weight, "fc.weight")
            assert len(copies) == 1
            assert copies[0] is optimizer.state[weight][key]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert {key for key, _ in state.elementwise(weight, "fc.weight")} == {key, "moment"}

    def test_a_copy_made_before_pruning_is_known_by_what_was_kept(self) -> None:
        weight = matrix(6, 4)
        optimizer = Kept([weight], lambda w: {"anchor": w.detach().clone()})
        weight.data[:, ::2] = 0
        assert len(WeightState(optimizer).copies(weight, "fc.weight")) == 1

    def test_a_copy_starts_anew_only_where_the_weight_was_revived(self) -> None:
        copy, weight = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[5.0, 6.0, 7.0]])
        restart_(copy, weight, torch.tensor([[False, True, False]]))
        assert copy.tolist() == [[1.0, 6.0, 3.0]]

    @pytest.mark.parametrize("beside", ["list", "matrix", "orthogonal", "projector"])
    @pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
    def test_another_basis_is_left_alone_whatever_it_is_called(self, beside: str, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(6, 9, generator=generator)

        class Projector:
            def project(self, gradient: Tensor) -> Tensor:
                return gradient

        factor: Any = {
            "list": [rows @ rows.T, torch.eye(4)],
            "matrix": rows @ rows.T,
            "orthogonal": torch.linalg.qr(torch.randn(6, 6, generator=generator))[0],
            "projector": Projector(),
        }[beside]
        weight = matrix(*shape)
        optimizer = Kept([weight], lambda w: {"exp_avg_sq": torch.ones_like(w), "other": factor})
        with pytest.warns(UserWarning, match=r"Kept keeps state of `fc.weight` in another basis.*left alone"):
            assert list(WeightState(optimizer).elementwise(weight, "fc.weight")) == []

    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("moved", [False, True])
    @pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
    def test_a_factor_of_low_rank_mixes_all_weights_and_a_history_of_each_mixes_none(
        self, shape: tuple[int, ...], moved: bool, flat: bool
    ) -> None:
        """The step that has just been taken may have moved the weights whose gradients are masked."""
        weight = matrix(*shape)
        masked = weight.detach().clone()
        masked[:, ::2] = 0
        if moved:
            weight.grad = masked
        else:
            weight.data = masked
        beside = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))
        history = beside * (masked != 0).unsqueeze(-1)
        for factor, expected in ((beside, []), (history, ["scales"])):
            kept = {"scales": torch.ones(shape), "factor": factor.reshape(-1, 2) if flat else factor}
            assert [*found(Kept([weight], lambda _, kept=kept: kept), weight)] == expected

    def test_a_view_of_the_weight_is_no_state(self) -> None:
        weight = matrix(6, 4)
        optimizer = Kept([weight], lambda w: {"views": [w.data.view(24), w.data], "moment": torch.ones_like(w)})
        assert [*WeightState(optimizer).found(weight)] == ["moment"]

    def test_row_means_of_a_factored_second_moment_are_no_factor(self) -> None:
        # Adafactor's of a convolution with as many inputs as outputs: square, but neither symmetric nor orthogonal.
        weight = matrix(4, 4, 3)
        optimizer = Kept(
            [weight],
            lambda w: {"exp_avg": torch.ones_like(w), "row": w.detach().square().mean(-1), "col": torch.ones(3)},
        )
        assert [*found(optimizer, weight)] == ["exp_avg"]

    def test_a_square_weight_is_like_the_others(self) -> None:
        square, other = matrix(4, 4), matrix(6, 4)
        value = Kept([square, other], lambda w: {"unknown": torch.ones_like(w)})
        assert [*found(value, square)] == ["unknown"]
        factor = Kept([square, other], lambda w: {"unknown": torch.eye(len(w)), "exp_avg": torch.ones_like(w)})
        assert found(factor, square) == found(factor, other) == {}

    def test_what_starts_at_a_constant_rests_there_and_later_steps_do_not_hide_it(self) -> None:
        # As DAdaptAdaGrad's accumulators, by whose root it divides.
        weight = matrix(6, 4)
        weight.data[:, ::2] = 0
        optimizer = Kept([weight], lambda w: {"alphak": w.detach().square() + 1e-6, "moment": w.detach() * 3})
        state = WeightState(optimizer)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert {key for key, _ in state.elementwise(weight, "fc.weight")} == {"alphak", "moment"}
        messages = {str(warning.message).partition("it is ")[2] for warning in told}
        assert messages == {"put to 1e-06 where weights are pruned.", "zeroed where weights are pruned."}
        assert state.rest("alphak") == float(torch.tensor(1e-6))
        assert state.rest("moment") == 0
        # A mask has moved since: values are no longer alike where the weight is zero.
        weight.data = weight.data.roll(1, dims=1)
        resumed, other = WeightState(optimizer), WeightState(torch.optim.SGD([weight], lr=0.1))
        for later in (resumed, other):
            later.take_over(state.state_dict())
            found(optimizer, weight)
        assert [resumed.rest("alphak"), resumed.rest("moment")] == [float(torch.tensor(1e-6)), 0]
        assert other.rest("alphak") == 0

    def test_views_that_an_optimizer_has_written_to_can_be_read(self) -> None:
        # A view made without gradients whose base is written to with gradients on, as heavyball's states.
        weight = matrix(6, 4)

        def keep(held: nn.Parameter) -> dict[str, Tensor]:
            base = torch.zeros(24)
            with torch.no_grad():
                view = base.view(6, 4)
            base.add_(held.view(24))
            return {"moment": view}

        assert [*found(Kept([weight], keep), weight)] == ["moment"]

    def test_a_mask_of_the_optimizers_own_is_refused_by_name(self) -> None:
        weight = matrix(6, 4)
        optimizer = Kept([weight], lambda w: {"mask": w.detach() > 0})
        with pytest.raises(
            ValueError, match=r"Kept chooses by a mask of its own, 'mask', which weights of `fc.weight`"
        ):
            list(WeightState(optimizer).elementwise(weight, "fc.weight"))

    def test_tensor_subclasses_are_refused_by_name(self) -> None:
        class Codes(Tensor):
            pass

        weight = matrix(6, 4)
        optimizer = Kept([weight], lambda w: {"exp_avg": torch.ones(6, 4).as_subclass(Codes)})
        with pytest.raises(
            ValueError, match=r"Kept keeps 'exp_avg' for `fc.weight` as codes \(Codes\).*floating-point state"
        ):
            list(WeightState(optimizer).elementwise(weight, "fc.weight"))


class TestMissing:
    @staticmethod
    def optimizer(weight: nn.Parameter, bias: nn.Parameter, **group: Any) -> Optimizer:
        made = torch.optim.SGD([{"params": [weight], **group}, {"params": [bias]}], lr=0.1, momentum=0.9)
        made.state[bias]["momentum_buffer"] = torch.ones_like(bias)
        weight.grad = torch.ones_like(weight)
        return made

    def test_state_that_is_not_shown_is_an_error_that_names_both(self) -> None:
        weight, bias = matrix(6, 4), nn.Parameter(torch.ones(6))
        says = r"returns SGD.*shows none for the sparse weight `fc.weight`.*layers=\{'fc.weight': 'dense'\}"
        with pytest.raises(ValueError, match=says):
            WeightState(self.optimizer(weight, bias)).check_shown([("fc.weight", weight)])

    def test_a_nested_optimizer_that_holds_other_tensors_is_named(self) -> None:
        weight, master = matrix(6, 4), matrix(6, 4)
        inner = Kept([master], lambda w: {"exp_avg": torch.ones_like(w)})  # of a copy in higher precision
        outer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        outer.inner = inner
        weight.grad = torch.ones_like(weight)
        with pytest.raises(ValueError, match=r"returns SGD around Kept.*`fc.weight`"):
            WeightState(outer).check_shown([("fc.weight", weight)])

    def test_no_error_where_none_is_kept(self) -> None:
        weight, bias = matrix(6, 4), nn.Parameter(torch.ones(6))
        WeightState(self.optimizer(weight, bias, momentum=0.0)).check_shown([("fc.weight", weight)])
        plain = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9)
        WeightState(plain).check_shown([("fc.weight", weight)])
        weight.grad = None
        WeightState(self.optimizer(weight, bias)).check_shown([])
        optimizer = self.optimizer(weight, bias)
        weight.grad = None
        WeightState(optimizer).check_shown([("fc.weight", weight)])
