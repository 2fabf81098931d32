"""Formulas of methods, as `docs/flops.md` has them."""

import pytest

from bame_lightning.ledger.cost import FORWARD, INPUT_GRADIENT, PRODUCTS, SR_STE, Cost, Shares


@pytest.mark.parametrize(
    ("cost", "formula", "shares"),
    [
        (Cost("dense"), "3", Shares(1.0, 1.0, 1.0)),
        (SR_STE, "f + 2", Shares(0.25, 1.0, 1.0)),
        (Cost("Bi-Mask", (FORWARD, INPUT_GRADIENT)), "2f + 1", Shares(0.25, 0.25, 1.0)),
        (Cost("static", PRODUCTS), "3f", Shares(0.25, 0.25, 0.25)),
        (Cost("BAME", PRODUCTS, reads=True), "3f + r(1-f)", Shares(0.25, 0.25, 0.25)),
    ],
)
def test_a_formula_says_which_products_are_sparse(cost: Cost, formula: str, shares: Shares) -> None:
    assert (cost.formula, cost.shares(0.25)) == (formula, shares)


def test_what_is_read_of_the_pruned_positions_costs_as_much_as_what_is_kept() -> None:
    # A quarter is kept, and a third of the other three: half of all weight gradients.
    assert Cost("BAME", PRODUCTS, reads=True).shares(0.25, read=1 / 3).weight_gradient == pytest.approx(0.5)
