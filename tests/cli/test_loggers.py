"""One run with several loggers: what each of them holds, read back, against the others and the documented keys."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bame_lightning.show.dashboard import workspace
from bame_lightning.show.map_pictures import mask_picture
from bame_lightning.show.mask_file import read_snapshots

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| (`(?:bame|flops)/[^|]*) \|", (ROOT / "docs/dashboards.md").read_text(), re.MULTILINE)
DOCUMENTED = [key for row in ROWS for key in re.findall(r"`([^`]*)`", row)]
PICTURES = [
    key for key in DOCUMENTED if key.startswith("bame/maps/") or key in ("bame/oscillations", "bame/restless_blocks")
]
SCALARS = [key for key in DOCUMENTED if key not in (*PICTURES, "bame/refused_swaps")]  # which only `both_ways` has
LAYERS = ("model.hidden1", "model.hidden2")
OVERRIDES = (
    "logger=[csv,wandb,tensorboard]",
    "callbacks=[default,prediction]",
    "callbacks.prediction.every=2",
    "callbacks.images.at_most=2",
    "pattern=1:4",
    "model.hidden=[32,32]",
    "method.freeze_after=0",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "hydra.run.dir=run",
    "quiet=true",
)


def train(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bame_lightning.cli.train", *overrides]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        command, cwd=folder, env=clean | environment, timeout=240, capture_output=True, text=True, check=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("loggers")
    return folder / "run", train(folder, *OVERRIDES, WANDB_MODE="offline")


@pytest.fixture(scope="module")
def folder(finished: tuple[Path, Any]) -> Path:
    return finished[0]


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict[str, Any]]:
    """What the offline run holds, as `wandb leet inspect` reads it."""
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    out = subprocess.run(command, timeout=120, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def columns(folder: Path) -> dict[str, dict[int, float]]:
    """Value by step of every metric of the CSV logger."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for key, text in row.items():
                if text and key not in ("step", "epoch"):
                    found[key][int(row["step"])] = float(text)
    return found


def history(records: list[dict[str, Any]]) -> dict[str, dict[int, Any]]:
    """Value by `trainer/global_step` of everything that W&B holds."""
    found: dict[str, dict[int, Any]] = defaultdict(dict)
    for record in records:
        row = record.get("history", {}).get("item", {})
        for key, value in row.items():
            if not key.startswith(("_", "trainer/")):
                found[key][row["trainer/global_step"]] = value
    return found


def expand(keys: list[str]) -> set[str]:
    return {key.replace("<name>", layer) for key in keys for layer in LAYERS}


def test_documented_scalars_are_in_every_logger_and_the_same(folder: Path, records: list[dict[str, Any]]) -> None:
    logged, seen = columns(folder), history(records)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert len(SCALARS) > 20
    assert {key for key in logged if key.startswith(("bame/", "flops/"))} == expand(SCALARS)
    for key in expand(SCALARS):
        assert len(logged[key]) >= (5 if "realised" in key or "correlation" in key else 38), key
        assert seen[key] == pytest.approx(logged[key], nan_ok=True), key
        scalars = {event.step: event.value for event in board.Scalars(key)}
        assert scalars == pytest.approx(logged[key], nan_ok=True), key
    assert max(logged["bame/frozen_fraction"].values()) > 0


def test_the_axis_at_wandb_is_the_step_of_training(records: list[dict[str, Any]]) -> None:
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    axes = {metric.get("glob_name") or metric.get("name"): metric.get("step_metric") for metric in metrics}
    assert axes["*"] == "trainer/global_step"
    assert {axis for name, axis in axes.items() if name not in ("*", "trainer/global_step")} <= {"trainer/global_step"}


def test_pictures_and_histograms_are_in_wandb_and_tensorboard(folder: Path, records: list[dict[str, Any]]) -> None:
    seen, snapshots = history(records), read_snapshots(folder)
    assert snapshots is not None
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    board.Reload()
    assert sorted(board.Tags()["images"]) == sorted(key for key in expand(PICTURES) if key != "bame/oscillations")
    # 38 steps, of which 34 adapt after every second: at the start, and after 8 and 17 adaptations; snapshots are of each.
    for key in expand(PICTURES):
        # What there is nothing of is not drawn: frozen and restless blocks.
        later = key.endswith("/frozen") or key == "bame/restless_blocks"
        steps = list(seen[f"{key}._type"])
        assert steps in ([[15, 33], [33]] if later else [[0, 15, 33]])
    for index, layer in enumerate(LAYERS):
        key = f"bame/maps/{layer}/mask"
        events = board.Images(key)
        assert [event.step for event in events] == [0, 15, 33]
        for event, adaptation in zip(events, (0, 8, 17), strict=True):
            assert snapshots.adaptations[adaptation] == adaptation
            first, now = (snapshots.maps[at][index].mask for at in (0, adaptation))
            assert now.sum(1).tolist() == [now.shape[1] // 4] * len(now)
            expected = mask_picture(
                (first.to(torch.uint8) + 2 * now.to(torch.uint8)),
                4,
                f"{layer}, 1:4: 32 filters x {now.shape[1]} input positions",
            )
            path = folder / "wandb" / "latest-run" / "files" / seen[f"{key}.path"][event.step]
            for picture in (Image.open(path), Image.open(BytesIO(event.encoded_image_string))):
                assert np.array_equal(np.array(picture.convert("RGB")), expected.numpy())
    assert [event.step for event in board.Histograms("bame/oscillations")] == [0, 15, 33]
    last = board.Histograms("bame/oscillations")[-1].histogram_value
    counts = [one.oscillations for one in snapshots.maps[17]]
    assert last.num == sum(values.numel() for values in counts if values is not None) == 32 * 16 + 32 * 8
    assert last.sum == sum(float(values.sum()) for values in counts if values is not None) > 0
    assert sum(seen["bame/oscillations.values"][33]) == last.num
    assert seen["bame/oscillations.bins"][33][:2] == [-0.5, 0.5]


def test_configuration_and_summary_at_wandb(folder: Path, records: list[dict[str, Any]]) -> None:
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in records:
        config |= record.get("config", {}).get("update", {})
        summary |= record.get("summary", {}).get("update", {})
    sparse = config["nm_sparsity"]
    assert (sparse["method"], sparse["pattern"], config["pattern"]) == ("BAMECallback", "1:4", "1:4")
    assert sparse["layers"]["model.hidden1.weight"] == {
        "kind": "Linear",
        "shape": [32, 64],
        "pattern": "1:4",
        "blocks": 512,
        "reason": "",
    }
    assert sparse["layers"]["model.fc.weight"]["reason"] == "classifier (last linear layer)"
    results = json.loads((folder / "summary.json").read_text())
    assert summary["test_accuracy"] == results["test_accuracy"] == summary["test/accuracy"]
    assert summary["compliant"] is True
    for key, value in results["flops"].items():
        assert summary[key] == value
    assert summary["survival"] == results["sparse"]["survival"]


def test_the_dashboard_shows_what_is_logged(folder: Path) -> None:
    logged = columns(folder)
    for section in workspace("me", "project", LAYERS).sections:
        for panel in section.panels:
            for key in getattr(panel, "y", None) or () if isinstance(getattr(panel, "y", None), list) else ():
                assert key in logged, key
            if getattr(panel, "metric_regex", None):
                assert sum(bool(re.fullmatch(panel.metric_regex, key)) for key in logged) == len(LAYERS)
            for key in getattr(panel, "media_keys", ()):
                assert key in expand(PICTURES)


def test_a_quiet_run_prints_the_summary_alone(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = finished
    lines = done.stdout.splitlines()
    assert lines[0].startswith("╭─ bame 1:4 ─")
    assert lines[-1].startswith("└─")
    assert max(map(len, lines)) <= 80
    assert done.stderr == ""


@pytest.mark.parametrize("loggers", ["wandb", "[]"])
def test_neither_wandb_switched_off_nor_no_logger_breaks_training(loggers: str, tmp_path: Path) -> None:
    short = ["model.hidden=[32]", "trainer.max_epochs=1", "trainer.accelerator=cpu", "hydra.run.dir=run"]
    done = train(tmp_path, f"logger={loggers}", *short, WANDB_MODE="disabled")
    assert "all 128 blocks obey" in done.stdout
    assert not (tmp_path / "run" / "metrics.csv").exists()
