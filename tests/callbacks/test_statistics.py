"""What the callback tells loggers, against values counted from the masks by the test itself."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from bame_lightning import BAMECallback, Evidence, Schedule
from tests.training import Spy, Task, trainer


def test_metrics_in_a_csv_equal_what_happened_to_the_masks(tmp_path: Path) -> None:
    callback = BAMECallback(
        "2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=4, share=0.5), freeze_after=0
    )
    history: list[dict[str, Any]] = []

    def look(trainer: Any, module: Any) -> None:
        history.append(
            {
                "masks": [sparse.pruned.clone() for sparse in callback.weights],
                "frozen": [evolving.history.oscillations > 0 for evolving in callback.evolving],
                "oscillations": [evolving.history.oscillations.clone() for evolving in callback.evolving],
                "nonzero": sum(int((module.model[i].weight != 0).sum()) for i in (2, 4, 6)),
            }
        )

    fit = trainer(Spy(look), callback, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1, max_epochs=3)
    fit.fit(Task())
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["bame/flip_rate"]]
    assert len(rows) == 24
    positions = 8 * 4 * 9 + 8 * 8 + 16 * 128
    assert any(float(row["bame/frozen_fraction"]) > 0 for row in rows)
    for step, row in enumerate(rows):
        # After steps 1, 3, 5, ... (from 0) up to 90 % of the run's 24 steps.
        adaptations = [s for s in range(step + 1) if s % 2 and s < 22]
        now, last = history[step], adaptations[-1] if adaptations else None
        flips = [
            int((a != b).sum()) if last is not None else 0
            for a, b in zip(history[last or 0]["masks"], history[(last or 1) - 1]["masks"], strict=True)
        ]
        blocks = [len(frozen) for frozen in now["frozen"]]
        close = {"rel": 1e-5, "abs": 1e-9}
        assert float(row["bame/flip_rate"]) == pytest.approx(sum(flips) / positions, **close)
        assert float(row["bame/layer/model.6/flip_rate"]) == pytest.approx(flips[2] / (16 * 128), **close)
        frozen = sum(int(f.sum()) for f in now["frozen"])
        assert float(row["bame/frozen_fraction"]) == pytest.approx(frozen / sum(blocks), **close)
        oscillations = sum(int(o.sum()) for o in now["oscillations"])
        expected = oscillations / sum(blocks) / max(1, len(adaptations))
        assert float(row["bame/oscillation_frequency"]) == pytest.approx(expected, **close)
        layer = float(row["bame/layer/model.2/oscillation_frequency"])
        assert layer == pytest.approx(now["oscillations"][0].float().mean().item() / max(1, len(adaptations)), **close)
        assert float(row["bame/density"]) == pytest.approx(now["nonzero"] / positions, **close)
    assert sum(float(row["bame/predicted_loss_reduction"]) != 0 for row in rows) > 3
    assert callback.summary()["frozen_fraction"] == pytest.approx(float(rows[-1]["bame/frozen_fraction"]))


def test_metrics_can_be_monitored_without_a_logger() -> None:
    fit = trainer(BAMECallback("2:4", schedule=Schedule(every=2)), log_every_n_steps=1)
    fit.fit(Task())
    assert isinstance(fit.callback_metrics["bame/flip_rate"], torch.Tensor)


def test_the_table_names_every_weight_and_why_it_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(BAMECallback("2:4", layers={"*.4": "dense"})).fit(Task())
    table = next(record.getMessage() for record in caplog.records if "BAMECallback(2:4)" in record.getMessage())
    lines = {cells[1]: cells for line in table.splitlines() if len(cells := [c.strip() for c in line.split("│")]) > 5}
    assert lines["model.0"][4:7] == ["dense", "", "input dimension 3 is not divisible by 4"]
    assert lines["model.2"][2:7] == ["Conv2d", "8 x 4 x 3 x 3", "2:4", "72", ""]
    assert lines["model.4"][4:7] == ["dense", "", "dense by the rule '*.4'"]
    assert lines["model.6"][4:6] == ["2:4", "512"]
    assert lines["model.8"][6] == "classifier (last linear layer)"
