"""`python -m benchmarks.gpu` at toy size on a CPU; what it says of a GPU, only a GPU can tell."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu

ROOT = Path(__file__).parents[1]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_runs_at_toy_size_and_writes_a_table_of_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CYCLE", 2)
    found = gpu.measure(["layers", "language", "overhead"], gpu.TOY, torch.device("cpu"), tmp_path, minutes=20)
    assert [row["pattern"] for row in read(tmp_path / "gpu_layers.csv")] == ["2:4", "1:8", "1:16"]
    language = read(tmp_path / "gpu_language.csv")
    assert [(row["method"], row["pattern"], row["compute"]) for row in language] == [
        ("dense", "", "dense"),
        ("static", "2:4", "dense"),
        ("BAME", "2:4", "dense"),
        ("static", "2:4", "auto"),
        ("BAME", "2:4", "auto"),
        ("static", "1:8", "dense"),
        ("BAME", "1:8", "dense"),
        ("static", "1:8", "auto"),
        ("BAME", "1:8", "auto"),
    ]
    overhead = read(tmp_path / "gpu_overhead.csv")
    assert [row["method"] for row in overhead] == ["dense", "static", "SR-STE", "BAME"]
    for row in language + overhead:
        assert float(row["ms"]) > 0
        assert row["launches"] == row["peak_mib"] == ""  # a GPU has them
    assert overhead[0]["over_dense"] == "1.00"
    text = gpu.tables(found, torch.device("cpu"))
    assert text.startswith("On a CPU, torch ")
    assert text.count("\n| ") == 3 + 3 + 9 + 4
    assert "| two layers | 4 | BAME |" in text


@pytest.mark.filterwarnings("ignore:You passed .* AMP with fp16 is not supported on CPU")
def test_smoke_holds_on_a_cpu(tmp_path: Path) -> None:
    gpu.measure(["smoke"], gpu.TOY, torch.device("cpu"), tmp_path, minutes=20)
    rows = read(tmp_path / "gpu_smoke.csv")
    assert {row["outcome"] for row in rows} == {"holds"}
    assert len(rows) == 3 * 5 + 4


def test_what_fails_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **options: object) -> dict[str, torch.Tensor]:
        if options.get("compiled"):
            raise RuntimeError("no compiler\nat all")
        return {"weight": torch.rand(2)}

    monkeypatch.setattr(gpu, "_trained", fail)
    monkeypatch.setattr(gpu, "SMOKE", {"static": gpu.SMOKE["static"]})
    outcomes = {row["check"]: row["outcome"] for row in gpu.smoke(gpu.TOY, torch.device("cpu"))}
    assert outcomes == {
        "loss scaler": "holds",
        "compiled": "RuntimeError: no compiler",
        "sparse products": "holds",
        "resumed": "AssertionError: weight differ in their bits",
        "two runs": "AssertionError: weight differ in their bits",
    }


def test_no_row_is_begun_when_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.measure(["layers", "smoke"], gpu.TOY, torch.device("cpu"), tmp_path, minutes=0)
    assert {part: len(rows) for part, rows in found.items()} == {"layers": 1}
    assert "layers ends here: 0 minutes are over" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
@pytest.mark.parametrize(
    ("arguments", "message"), [([], "torch finds no GPU here; --toy runs"), (["lairs"], "no part is called lairs")]
)
def test_what_cannot_be_measured_ends_in_a_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ended.returncode == 2
    assert message in ended.stderr
