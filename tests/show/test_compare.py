import csv
import io
import json
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from bame_lightning.show.compare.rows import Difference, compare_runs
from bame_lightning.show.compare.runs import CompareError, Run, find_runs
from bame_lightning.show.compare.tables import to_csv, to_markdown


def run(method: str, seed: int, accuracy: float, pattern: str | None = "1:4", **rest: Any) -> Run:
    folder = rest.pop("folder", f"{method}{pattern}{seed}")
    task = {"data": "digits", "model": "mlp", "recipe": None} | {k: rest.pop(k) for k in ("data",) if k in rest}
    return Run(folder=folder, **task, pattern=pattern, method=method, seed=seed, accuracy=accuracy, **rest)


def write(folder: Path, **summary: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    known = {"data": "digits", "model": "mlp", "recipe": None, "pattern": "1:4", "method": "bame", "seed": 0}
    (folder / "summary.json").write_text(json.dumps({**known, "test_accuracy": 0.5, "train_loss": 1.0, **summary}))


def test_the_interval_is_students_over_paired_differences() -> None:
    # Differences 0.01, 0.02, 0.06: mean 0.03, sample standard deviation sqrt(0.0014 / 2); t(0.975, 2) = 4.302653.
    found = Difference.between({0: 0.51, 1: 0.62, 2: 0.76}, {0: 0.5, 1: 0.6, 2: 0.7})
    assert found is not None
    assert found.mean == pytest.approx(0.03)
    assert found.half_width == pytest.approx(4.302653 * sqrt(0.0007) / sqrt(3), rel=1e-6)
    assert found.seeds == (0, 1, 2)


def test_two_pairs_have_a_wide_interval_and_one_has_none() -> None:
    two = Difference.between({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.4})  # 0.1 and 0.3; t(0.975, 1) = 12.706205
    assert two is not None
    assert two.half_width == pytest.approx(12.706205 * sqrt(0.02) / sqrt(2), rel=1e-6)
    one = Difference.between({0: 0.5}, {0: 0.4, 1: 0.9})
    assert one is not None
    assert (one.mean, one.half_width, one.seeds) == (pytest.approx(0.1), None, (0,))
    assert Difference.between({0: 0.5}, {1: 0.5}) is None


def test_rows_hold_mean_and_spread_over_seeds() -> None:
    runs = [run("bame", seed, acc, loss=loss) for seed, acc, loss in ((2, 0.7, 3.0), (0, 0.5, 1.0), (1, 0.6, 2.0))]
    row = compare_runs(runs).rows[0]
    assert row.accuracy == (pytest.approx(0.6), pytest.approx(0.1))
    assert row.loss == pytest.approx(2.0)
    assert [item.seed for item in row.runs] == [0, 1, 2]
    assert compare_runs(runs[:1]).rows[0].accuracy == (0.7, None)


def test_pairs_within_pattern_and_data_only() -> None:
    runs = [
        *(run("static", 0, 0.4), run("bame", 0, 0.5)),
        *(run("static", 0, 0.1, "1:16"), run("bame", 0, 0.4, "1:16")),
        *(run("static", 0, 0.9, data="fashion_mnist"), run("bame", 0, 0.85, data="fashion_mnist")),
    ]
    found = {
        (row.task[0], row.pattern): row.difference.mean
        for row in compare_runs(runs, "static").rows
        if row.difference is not None
    }
    assert found == {
        ("digits", "1:4"): pytest.approx(0.1),
        ("digits", "1:16"): pytest.approx(0.3),
        ("fashion_mnist", "1:4"): pytest.approx(-0.05),
    }


def test_a_dense_baseline_goes_with_every_pattern() -> None:
    runs = [run("dense", 0, 0.9, None), run("bame", 0, 0.8), run("bame", 0, 0.6, "1:16")]
    rows = compare_runs(runs, "dense").rows
    assert [row.pattern for row in rows] == [None, "1:4", "1:16"]
    assert [row.difference and row.difference.mean for row in rows] == [None, pytest.approx(-0.1), pytest.approx(-0.3)]
    assert compare_runs(runs, "bame").rows[0].difference is None


def test_lonely_seeds_are_named() -> None:
    runs = [*(run("bame", seed, 0.5) for seed in (0, 1, 2)), *(run("static", seed, 0.4) for seed in (1, 2, 3))]
    comparison = compare_runs(runs, "static")
    assert comparison.notes == (
        "unpaired: seed 0 of bame 1:4 has no run of static 1:4",
        "unpaired: seed 3 of static 1:4 has no run of bame 1:4",
    )
    difference = comparison.rows[0].difference
    assert difference is not None
    assert difference.seeds == (1, 2)


def test_what_a_sweep_varies_beside_seeds_makes_rows_of_its_own() -> None:
    runs = [
        run(method, seed, lr, config={"optimizer.lr": lr, "method.pattern": "1:4"}, folder=f"{method}{seed}{lr}")
        for method in ("bame", "static")
        for seed in (0, 1)
        for lr in (0.1, 0.2)
    ]
    comparison = compare_runs(runs, "static")
    assert [row.label for row in comparison.rows] == [
        "bame 1:4 optimizer.lr=0.1",
        "bame 1:4 optimizer.lr=0.2",
        "static 1:4 optimizer.lr=0.1",
        "static 1:4 optimizer.lr=0.2",
    ]
    assert [row.difference.mean for row in comparison.rows if row.difference] == [0.0, 0.0]
    assert comparison.notes == ()


def test_a_value_that_goes_with_the_seed_is_no_setting() -> None:
    runs = [run("magnitude", seed, 0.5, config={"method.ckpt": f"dense/{seed}.ckpt"}) for seed in (0, 1)]
    assert [len(row.runs) for row in compare_runs(runs).rows] == [2]


def test_a_choice_is_named_without_the_values_that_it_brings() -> None:
    sgd = {"choices.optimizer": "sgd", "optimizer._target_": "SGD", "optimizer.lr": 0.1}
    adamw = {"choices.optimizer": "adamw", "optimizer._target_": "AdamW", "optimizer.lr": 0.001}
    runs = [run("bame", 0, 0.5, config=config, folder=config["choices.optimizer"]) for config in (sgd, adamw)]
    assert [row.settings_text for row in compare_runs(runs).rows] == ["optimizer=adamw", "optimizer=sgd"]


def test_a_repeated_seed_counts_once() -> None:
    comparison = compare_runs([run("bame", 0, 0.5, folder="a"), run("bame", 0, 0.7, folder="b")])
    assert comparison.rows[0].accuracy == (0.5, None)
    assert comparison.notes == ("left out: b: bame 1:4 with a seed that another run already has",)


def test_an_unknown_baseline_lists_the_methods() -> None:
    with pytest.raises(CompareError, match=r"a method of these runs \(bame, static\); got 'sr_ste'"):
        compare_runs([run("static", 0, 0.5), run("bame", 0, 0.5)], "sr_ste")


def test_finds_nested_runs_and_names_the_others(tmp_path: Path) -> None:
    write(tmp_path / "10", seed=3)
    write(tmp_path / "9" / "deep", flops={"flops/train_total": 8e9}, config={"pattern": "1:4", "x": {"y": "1:4"}})
    write(tmp_path / "2", test_accuracy=None)
    write(tmp_path / "3", method=None)
    for job, files in (("4", ()), ("5", ("error.txt",)), ("6", ("summary.json",))):
        (tmp_path / job / ".hydra").mkdir(parents=True)
        (tmp_path / job / ".hydra" / "overrides.yaml").write_text("- pattern=1:4\n- seed=1\n")
        for file in files:
            (tmp_path / job / file).write_text("pattern=1:4 seed=1: no memory\n\nTraceback")
    runs, notes = find_runs(tmp_path)
    assert [(item.folder, item.seed) for item in runs] == [("9/deep", 0), ("10", 3)]
    assert runs[0].flops == {"flops/train_total": 8e9}
    assert runs[0].config == {"x.y": "${pattern}"}
    assert notes == [
        "left out: 2: it has no test accuracy",
        "left out: 3: its summary.json is not one of bame-train",
        "unfinished: 4: pattern=1:4 seed=1",
        "failed: 5: pattern=1:4 seed=1: no memory",
        "unfinished: 6: pattern=1:4 seed=1",
    ]


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"holds no summary\.json of a finished run\."):
        find_runs(tmp_path)


def test_tables_say_the_same_in_csv_and_markdown() -> None:
    flops = {"flops/train_total": 2e12, "flops/train_vs_dense": 0.25, "flops/train_vs_sr_ste": 0.5}
    runs = [run("bame", seed, accuracy, loss=0.25, flops=flops) for seed, accuracy in ((0, 0.5), (1, 0.7))]
    comparison = compare_runs([*runs, run("static", 0, 0.4), run("static", 1, 0.4)], "static")
    bame, static = csv.DictReader(io.StringIO(to_csv(comparison)))
    assert {key: bame[key] for key in ("pattern", "method", "seeds", "flops_train_total", "paired_seeds")} == {
        "pattern": "1:4",
        "method": "bame",
        "seeds": "0 1",
        "flops_train_total": "2000000000000.0",
        "paired_seeds": "0 1",
    }
    half = 12.706205 * 0.2 / sqrt(2) / sqrt(2)
    assert float(bame["test_accuracy_mean"]) == pytest.approx(0.6)
    assert float(bame["difference_low"]) == pytest.approx(0.2 - half, rel=1e-5)
    assert float(bame["difference_high"]) == pytest.approx(0.2 + half, rel=1e-5)
    assert static["difference_mean"] == static["flops_train_total"] == static["train_loss"] == ""
    text = to_markdown(comparison)
    assert "| 1:4 | bame | 2 | 60.00 ± 14.14 | 0.2500 | 2 TFLOPs | 0.250 | 0.500 | +20.00 [-107.06, +147.06] |" in text
    assert "| 1:4 | static | 2 | 40.00 ± 0.00 |  |  |  |  | baseline |" in text


def test_runs_that_empty_a_column_are_named() -> None:
    runs = [run("bame", seed, 0.5, loss=0.25, flops={"flops/train_total": 2e12}) for seed in (0, 1)]
    without = run("bame", 2, 0.5, folder="resumed")
    comparison = compare_runs([*runs, without, run("static", 0, 0.4)])
    assert comparison.notes == (
        "no training loss of bame 1:4: resumed has none, as after a divergence or without a step",
        "no FLOPs of bame 1:4: resumed has none, as after a divergence or without a step",
    )
    assert (comparison.rows[0].loss, comparison.rows[0].flops("flops/train_total")) == (None, None)


def test_language_models_are_compared_by_bits_per_byte() -> None:
    language = {"data": "python_source", "loss": 1.5}
    runs = [
        *(run("bame", 0, 0.6, bits_per_byte=2.0, **language), run("bame", 1, 0.6, bits_per_byte=2.2, **language)),
        *(run("static", 0, 0.5, bits_per_byte=2.5, **language), run("static", 1, 0.5, bits_per_byte=2.5, **language)),
        run("static", 2, 0.1, bits_per_byte=None, **language),
    ]
    comparison = compare_runs(runs, "static")
    half = 12.706205 * 0.2 / sqrt(2) / sqrt(2)
    assert comparison.notes == ("left out: static1:42: no test bits per byte, as after a divergence",)
    text = to_markdown(comparison)
    assert "| pattern | method | seeds | bits per byte | loss | difference to static |" in text
    assert f"| 1:4 | bame | 2 | 2.1000 ± 0.1414 | 1.5000 | -0.4000 [{-0.4 - half:+.4f}, {-0.4 + half:+.4f}] |" in text
    assert "Test bits per byte (fewer are better): mean" in text
    assert "Difference: to static in bits per byte, paired" in text
    bame, _ = csv.DictReader(io.StringIO(to_csv(comparison)))
    assert float(bame["test_bits_per_byte_mean"]) == pytest.approx(2.1)
    assert float(bame["test_bits_per_byte_std"]) == pytest.approx(0.02**0.5)
    assert float(bame["test_accuracy_mean"]) == pytest.approx(0.6)
    assert float(bame["difference_mean"]) == pytest.approx(-0.4)


def test_tasks_of_either_kind_stand_side_by_side() -> None:
    runs = [run("bame", 0, 0.6, data="python_source", bits_per_byte=2.0), run("bame", 0, 0.5)]
    comparison = compare_runs(runs)
    text = to_markdown(comparison)
    assert "| 1:4 | bame | 1 | 50.00 |" in text
    assert "| 1:4 | bame | 1 | 2.0000 |" in text
    assert "Test accuracy in percent or bits per byte (fewer are better): mean" in text
    assert [row["test_bits_per_byte_mean"] for row in csv.DictReader(io.StringIO(to_csv(comparison)))] == ["", "2.0"]
