"""Tables of measured results: gains over rivals of the same seeds, and whether the seeds can tell."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from benchmarks.accuracy.publish import ablation, both_ways, equal, findings, headline, longer
from benchmarks.accuracy.study import AS_COSTLY, BOTH_WAYS, COLUMNS, Row, stretched


def rows(method: str, accuracies: Sequence[float], **rest: str) -> list[Row]:
    known = {"recipe": "digits_cnn", "pattern": "1:16", "method": method, "train_loss": "0.5", "flips_per_block": "1"}
    flops = {"train_vs_dense": "0.2", "train_vs_sr_ste": "0.25"}
    return [
        dict.fromkeys(COLUMNS, "") | known | flops | {"seed": str(seed), "test_accuracy": str(accuracy / 100)} | rest
        for seed, accuracy in enumerate(accuracies)
    ]


def cells(table: list[str]) -> list[list[str]]:
    """Of the rows below the head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


# Student's t of 2 degrees of freedom is 4.303 at 97.5 %. Gains of 1, 2, 3: 4.303 x 1 / sqrt(3) = 2.48.
# Gains of 1.9, 2, 2.1: 4.303 x 0.1 / sqrt(3) = 0.25.
@pytest.mark.parametrize(
    ("own", "text"),
    [
        ([91, 92, 93], "+2.00 ± 2.48"),
        ([91.9, 92, 92.1], "**+2.00 ± 0.25**"),
        ([88.1, 88, 87.9], "**-2.00 ± 0.25**"),
        ([91], "+1.00"),
    ],
)
def test_gain_is_bold_where_its_interval_leaves_out_zero(own: list[float], text: str) -> None:
    found = cells(headline(rows("bame", own) + rows("sr_ste", [90, 90, 90])))[0]
    assert (found[:4], found[5]) == (["digits_cnn", "1:16", "BAME", str(len(own))], text)


def test_gain_compares_the_same_seeds_only() -> None:
    # Seeds 0 and 1 gain 2 and 2; the rival's seeds 2 and 3 have no twin, whatever they reached.
    found = cells(headline(rows("bame", [92, 82]) + rows("sr_ste", [90, 80, 10, 20])))[0]
    assert found[5] == "**+2.00 ± 0.00**"


def test_fewer_bits_per_byte_are_ahead() -> None:
    own = rows("bame", [0], recipe="python_source_gpt", test_bits_per_byte="2.25")
    rival = rows("sr_ste", [0], recipe="python_source_gpt", test_bits_per_byte="2.5")
    assert cells(headline(own + rival))[0][5] == "+0.250"


def test_headline_sets_each_method_against_sr_ste() -> None:
    found = cells(headline(rows("bame", [91]) + rows("sr_ste", [90]) + rows("rigl", [89])))
    assert [(row[2], row[5]) for row in found] == [("BAME", "+1.00"), ("SR-STE", ""), ("RigL in blocks", "-1.00")]


def test_the_first_version_stands_in_where_the_default_was_not_measured() -> None:
    first, rival = rows("bame_blocks", [91]), rows("sr_ste", [90])
    assert [row[2] for row in cells(headline(first + rival))] == ["BAME, first version", "SR-STE"]
    assert [row[2] for row in cells(headline(first + rival + rows("bame", [91])))] == ["BAME", "SR-STE"]


def test_findings_say_what_the_seeds_can_tell() -> None:
    # Gains of 1, 2, 3 over SR-STE tell nothing; 1.9, 2, 2.1 over RigL do. As in the table.
    own = rows("bame", [91, 92, 93])
    [line] = findings(
        own + rows("sr_ste", [90, 90, 90]) + rows("rigl", [89.1, 90, 90.9]) + rows("static", [92.9, 94, 95.1])
    )
    assert "SR-STE 90.00 ± 0.00 at 4.00 times the training FLOPs" in line
    assert "ahead of RigL in blocks by 2.00 ± 0.25" in line
    assert "behind the static mask by 2.00 ± 0.25" in line
    assert "not told apart from SR-STE" in line


def test_ablation_sets_changes_against_what_they_change_the_costliest_first() -> None:
    mlp = {"recipe": "fashion_mnist_mlp"}
    first = rows("bame_blocks", [80, 80], **mlp) + rows("bame_blocks", [79, 78.9], variant="no margin", **mlp)
    default = rows("bame", [90, 90], **mlp) + rows("bame", [88], variant="not rescaled", **mlp)
    literal = rows("bame_one_batch", [85, 85], **mlp)
    other = rows("bame", [50], variant="unheard of", **mlp)
    found = cells(ablation(first + default + literal + other))
    assert [row[:2] for row in found] == [
        ["one batch, the criterion as the abstract reads", "default"],
        ["the first weights are not rescaled", "default"],
        ["the stronger weight swaps at once, without a margin", "first"],
    ]
    # Student's t of 1 degree of freedom is 12.706: 12.706 x 0.0707 / sqrt(2) = 0.635.
    assert [row[2] for row in found] == ["**-5.00 ± 0.00**", "-2.00", "**-1.05 ± 0.64**"]
    assert [row[3] for row in found] == ["", "", ""]  # nothing was measured on the CNN


def test_longer_runs_are_set_against_sr_ste_of_the_recipes_length_by_what_they_cost() -> None:
    # The recipe of the digits trains 30 epochs.
    twice = rows("bame", [92, 93], variant="twice the epochs", epochs="60")
    four_times = rows("static", [91, 91], variant="four times the epochs", train_vs_dense="0.07", epochs="120")
    other = rows("bame", [50], variant="no margin")
    base = rows("sr_ste", [90, 90], train_vs_dense="0.3")
    found = cells(longer(rows("bame", [89, 90]) + base + twice + four_times + other))
    # Of dense training for the recipe's epochs: 0.2, 4 x 0.07, 0.3, 2 x 0.2; of 0.3 these are 1 / 1.5, 1 / 1.07, 1, 1 / 0.75.
    assert [(row[2], row[3], *row[8:]) for row in found] == [
        ("BAME", "1x", "0.200", "1.50x"),
        ("static mask", "4x", "0.280", "1.07x"),
        ("SR-STE", "1x", "0.300", "1.00x"),
        ("BAME", "2x", "0.400", "0.75x"),
    ]
    # Student's t of 1 degree of freedom is 12.706: 12.706 x 0.707 / sqrt(2) = 6.35.
    assert [row[6] for row in found] == ["-0.50 ± 6.35", "**+1.00 ± 0.00**", "", "+2.50 ± 6.35"]


def test_tasks_without_longer_runs_are_left_out() -> None:
    assert cells(longer(rows("bame", [90]) + rows("sr_ste", [90]))) == []


def test_rivals_of_the_same_flops_are_set_beside_bame_by_their_steps() -> None:
    own = rows("bame", [90, 91], steps="1000", train_vs_dense="0.14")
    rivals = rows("rigl", [89, 91], variant=AS_COSTLY, steps="1400", train_vs_dense="0.1")
    shorter = rows("rigl", [80, 80], steps="1000", train_vs_dense="0.1")
    found = cells(equal(own + rivals + shorter))
    # Gains 1 and 0; Student's t of 1 degree of freedom is 12.706: 12.706 x 0.707 / sqrt(2) = 6.35.
    assert [(row[2], row[3], row[6], row[8]) for row in found] == [
        ("BAME", "1.00x", "", "0.140"),
        ("RigL in blocks", "1.40x", "+0.50 ± 6.35", "0.140"),
    ]


@pytest.mark.parametrize(
    ("recipe", "factor", "overrides"),
    [
        # 6 epochs of whole data; 8.4 epochs are 9 of 14/15 each.
        ("fashion_mnist_mlp", 1.4, ["trainer.max_epochs=9", 0.9333333]),
        # 6 epochs of 250 steps; 6.6 epochs are 7 of 235.7 steps.
        ("python_source_gpt", 1.1, ["trainer.max_epochs=7", 236]),
        ("python_source_gpt", 2.0, ["trainer.max_epochs=12", 250]),
    ],
)
def test_a_stretched_run_takes_whole_epochs_each_cut_short_alike(recipe: str, factor: float, overrides: list) -> None:
    epochs, limit = stretched(recipe, factor)
    name, value = limit.split("=")
    assert (epochs, name) == (overrides[0], "++trainer.limit_train_batches")
    assert float(value) == pytest.approx(overrides[1])
    assert ("." in value) == isinstance(overrides[1], float)


def test_both_ways_stands_beside_plain_and_transposable_masks_of_the_same_seeds() -> None:
    plain, both = rows("bame", [90, 90, 90]), rows("bame", [89, 88, 87], variant=BOTH_WAYS, flips_per_block="0.25")
    rival = rows("transposable", [91], flips_per_block="")
    found = cells(both_ways(plain + both + rival + rows("bame", [80], pattern="1:8")))
    # Gains of -1, -2, -3: 4.303 x 1 / sqrt(3) = 2.48.
    assert [(row[1], row[2], row[3], row[5], row[7]) for row in found] == [
        ("1:16", "BAME", "3", "", "1.00 ± 0.00"),
        ("1:16", "BAME, both ways", "3", "-2.00 ± 2.48", "0.25 ± 0.00"),
        ("1:16", "transposable", "1", "+1.00", ""),
    ]
    assert both_ways(plain + rival) == ["Not measured yet: `python -m benchmarks.accuracy.study both_ways`."]
