"""Tables of measured results: gains over rivals of the same seeds, and whether the seeds can tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks.accuracy.groups import ahead
from benchmarks.accuracy.publish import ablation, both_ways, equal, findings, headline, longer, predictor, tasks
from benchmarks.accuracy.study import AS_COSTLY, BOTH_WAYS, COLUMNS, Row, stretched


def rows(method: str, accuracies: Sequence[float], **rest: str) -> list[Row]:
    known = {"recipe": "digits_cnn", "pattern": "1:16", "method": method, "train_loss": "0.5"}
    flops = {"train_vs_dense": "0.2", "train_vs_sr_ste": "0.25"}
    return [
        dict.fromkeys(COLUMNS, "") | known | flops | {"seed": str(seed), "test_accuracy": str(accuracy / 100)} | rest
        for seed, accuracy in enumerate(accuracies)
    ]


def cells(table: list[str], head: int = 2) -> list[list[str]]:
    """Of the rows below the head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[head:]]


# Student's t of 2 degrees of freedom is 4.303 at 97.5 %. Gains of 1, 2, 3: 4.303 x 1 / sqrt(3) = 2.48.
# Gains of 1.9, 2, 2.1: 4.303 x 0.1 / sqrt(3) = 0.25.
@pytest.mark.parametrize(
    ("own", "text"),
    [
        ([91, 92, 93], "+2.00 ± 2.48"),
        ([91.9, 92, 92.1], "**+2.00 ± 0.25**"),
        ([88.1, 88, 87.9], "**-2.00 ± 0.25**"),
        ([91], "+1.00"),
        # Seeds 0 and 1 gain 1 and 1; the rival's seed 2 has no twin, whatever it reached.
        ([91, 91], "**+1.00 ± 0.00**"),
    ],
)
def test_gain_is_bold_where_its_interval_leaves_out_zero(own: list[float], text: str) -> None:
    assert ahead(rows("bame", own), rows("sr_ste", [90, 90, 90])) == text


def test_fewer_bits_per_byte_are_ahead() -> None:
    own = rows("bame", [0], recipe="python_source_gpt", test_bits_per_byte="2.25")
    rival = rows("sr_ste", [0], recipe="python_source_gpt", test_bits_per_byte="2.5")
    assert ahead(own, rival) == "+0.250"


def test_headline_has_a_row_for_each_task_and_pattern_of_bame_and_a_rival() -> None:
    digits = rows("bame", [91, 92]) + rows("sr_ste", [90], train_vs_dense="0.7") + rows("rigl", [89, 88])
    digits += rows("sr_ste", [93], pattern="2:4") + rows("dense", [95], pattern="")
    mlp = rows("bame", [80], pattern="1:8", recipe="fashion_mnist_mlp", train_vs_dense="0.157")
    mlp += rows("static", [79], pattern="1:8", recipe="fashion_mnist_mlp", train_vs_dense="0.13")
    alone = rows("bame", [80], pattern="1:4", recipe="fashion_mnist_mlp")
    assert cells(headline(digits + mlp + alone)) == [
        ["MLP 1:8", "1", "80.00", "", "79.00", "", "", "16/-/13/-"],
        ["Digits 1:16", "1-2", "91.50 ± 0.71", "90.00", "", "88.50 ± 0.71", "+1.00", "20/70/-/20"],
    ]


def test_tasks_say_what_dense_training_reaches() -> None:
    lines = tasks(rows("dense", [94, 96], pattern=""))
    assert lines[0] == "- **MLP**: 784-512-512-10 on Fashion-MNIST, 6 epochs."
    assert lines[-1] == (
        "- **Digits**: a small CNN on scikit-learn's digits, 30 epochs; dense training reaches 95.00 ± 1.41."
    )


def test_findings_say_what_the_seeds_can_tell() -> None:
    # Gains of 1, 2, 3 over SR-STE tell nothing; 1.9, 2, 2.1 over RigL do. As in the table.
    own = rows("bame", [91, 92, 93])
    [line] = findings(
        own + rows("sr_ste", [90, 90, 90]) + rows("rigl", [89.1, 90, 90.9]) + rows("static", [92.9, 94, 95.1])
    )
    assert "SR-STE 90.00 ± 0.00 at 4.00 times the training FLOPs" in line
    assert "ahead of RigL by 2.00 ± 0.25" in line
    assert "behind the static mask by 2.00 ± 0.25" in line
    assert "not told apart from SR-STE" in line


def test_ablation_sets_changes_against_what_they_change_the_costliest_first() -> None:
    mlp = {"recipe": "fashion_mnist_mlp"}
    first = rows("bame_blocks", [80, 80], **mlp) + rows("bame_blocks", [79, 78.9], variant="no margin", **mlp)
    default = rows("bame", [90, 90], **mlp) + rows("bame", [88], variant="not rescaled", **mlp)
    literal = rows("bame_one_batch", [85, 85], **mlp)
    other = rows("bame", [50], variant="unheard of", **mlp)
    found = cells(ablation(first + default + literal + other))
    # Student's t of 1 degree of freedom is 12.706: 12.706 x 0.0707 / sqrt(2) = 0.635. Nothing was measured on the CNN.
    assert found == [
        ["one batch, the criterion as the abstract reads", "**-5.00 ± 0.00**", ""],
        ["the first weights are not rescaled", "-2.00", ""],
        ["the stronger weight swaps at once, without a margin†", "**-1.05 ± 0.64**", ""],
    ]


def test_the_longest_runs_stand_beside_sr_ste_with_what_they_cost() -> None:
    # The recipe of the digits trains 30 epochs. Of dense training for these: 4 x 0.07, 2 x 0.2, 0.3.
    runs = rows("static", [91, 91], variant="four times the epochs", train_vs_dense="0.07", epochs="120")
    runs += rows("static", [80], variant="twice the epochs", epochs="60") + rows("static", [70])
    runs += rows("rigl", [92, 93], variant="twice the epochs", epochs="60") + rows("rigl", [70])
    [line] = longer(runs + rows("sr_ste", [90, 90], train_vs_dense="0.3") + rows("rigl", [99], variant="no margin"))
    assert line.endswith("Digits: static mask 91.00 (4x, 0.28), RigL 92.50 (2x, 0.40), SR-STE 90.00 (1x, 0.30).")


def test_tasks_without_longer_runs_are_left_out() -> None:
    assert longer(rows("static", [90]) + rows("rigl", [90]) + rows("sr_ste", [90])) == []


def test_rivals_of_the_same_flops_are_set_beside_bame_by_their_steps() -> None:
    own = rows("bame", [90, 91], steps="1000")
    rivals = rows("rigl", [89, 91], variant=AS_COSTLY, steps="1400")
    shorter = rows("rigl", [80, 80], steps="1000")
    # Gains 1 and 0; Student's t of 1 degree of freedom is 12.706: 12.706 x 0.707 / sqrt(2) = 6.35.
    assert cells(equal(own + rivals + shorter)) == [
        ["Digits", "90.50 ± 0.71", "", "", "", "90.00 ± 1.41", "1.40x", "+0.50 ± 6.35"]
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
    plain, both = rows("bame", [90, 90, 90]), rows("bame", [89, 88, 87], variant=BOTH_WAYS)
    rival = rows("transposable", [91])
    # Gains of -1, -2, -3: 4.303 x 1 / sqrt(3) = 2.48.
    assert cells(both_ways(plain + both + rival + rows("bame", [80], pattern="1:8"))) == [
        ["Digits 1:16", "3", "90.00 ± 0.00", "88.00 ± 1.00", "-2.00 ± 2.48", "91.00", "+1.00"]
    ]
    assert both_ways(plain + rival) == ["Not measured yet: `python -m benchmarks.accuracy.study both_ways`."]


def test_findings_say_what_masks_for_sparse_tensor_cores_lose() -> None:
    found: list[Row] = []
    for pattern in ("1:16", "1:8", "1:4", "2:4"):
        mlp = {"recipe": "fashion_mnist_mlp", "pattern": pattern}
        # Gains of -1, -2, -3 tell nothing; -1.9, -2, -2.1 do. As in the tables above.
        transposable = [88.1, 88, 87.9] if pattern == "1:8" else [89, 88, 87]
        found += rows("bame", [90, 90, 90], **mlp) + rows("bame", [91, 92, 93], variant=BOTH_WAYS, **mlp)
        found += rows("transposable", transposable, **mlp)
    [line] = [line for line in findings(found) if "tensor cores" in line]
    assert line.endswith(
        "masks 2:4 [both ways](#both-ways) lose nothing that the seeds tell; transposable masks lose 2.00 points at 1:8."
    )


def test_the_prediction_is_ranked_by_batch_and_half_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("every", "one_per_row", "half_of_run", "realised_on", "predicted", "adaptations", "rank_correlation")
    runs = [(half, batch) for half in ("first", "second") for batch in ("same_batch", "next_batch")]
    lines = [f"2,True,{half},{batch},logged,41,0.{place}" for place, (half, batch) in enumerate(runs, start=1)]
    others = ["2,True,first,same_batch,squares,41,0.8", "2,False,first,same_batch,logged,41,0.9"]
    monkeypatch.setattr("benchmarks.accuracy.publish.PREDICTOR", tmp_path / "predictor.csv")
    (tmp_path / "predictor.csv").write_text("\n".join([",".join(names), *lines, *others]))
    assert cells(predictor()) == [["2 steps", "0.1 (41)", "0.3 (41)", "0.2 (41)", "0.4 (41)"]]
