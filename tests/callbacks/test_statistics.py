"""What the callback tells loggers, against values counted from the masks by the test itself."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from bame_lightning import BAMECallback, Evidence, Schedule
from tests.callbacks.registry import METHODS, MOVING, every_method
from tests.training import Spy, Task, trainer


def urgencies(weight: Any) -> list[float]:
    """Largest pruned evidence over smallest kept weight of every block, in plain loops."""
    found = []
    kept = weight.sparse.kept.movedim(1, -1).reshape(-1, 4).tolist()
    values = weight.sparse.weight.detach().movedim(1, -1).reshape(-1, 4).tolist()
    for block, row, evidence in zip(kept, values, weight.evidence.tolist(), strict=True):
        strongest = max(abs(v) for v, k in zip(evidence, block, strict=True) if not k)
        found.append(strongest / min(abs(w) for w, k in zip(row, block, strict=True) if k))
    return found


def nearest_rank(values: list[float], percent: int) -> float:
    return sorted(values)[math.ceil(percent * len(values) / 100) - 1]


def test_metrics_in_a_csv_equal_what_happened_to_the_masks(tmp_path: Path) -> None:
    callback = BAMECallback(
        "2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=4, contenders=0.5), freeze_after=0
    )
    history: list[dict[str, Any]] = []

    def look(trainer: Any, module: Any) -> None:
        history.append(
            {
                "masks": [sparse.pruned.clone() for sparse in callback.weights],
                "frozen": [evolving.oscillations > 0 for evolving in callback.evolving],
                "oscillations": [evolving.oscillations.clone() for evolving in callback.evolving],
                "urgency": [urgencies(evolving) for evolving in callback.evolving],
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
    assert any(float(row["bame/oscillation_rate"]) > 0 for row in rows)
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
        frequencies = [int(o) / max(1, len(adaptations)) for counts in now["oscillations"] for o in counts]
        for percent in (50, 90, 99):
            logged = float(row[f"bame/oscillation_frequency_p{percent}"])
            assert logged == pytest.approx(nearest_rank(frequencies, percent), **close)
        for percent in (50, 90):
            ratios = [ratio for layer in now["urgency"] for ratio in layer]
            logged = float(row[f"bame/evidence_to_weight_p{percent}"])
            assert logged == pytest.approx(nearest_rank(ratios, percent), rel=1e-4)
        counts = [int(o) for layer in now["oscillations"] for o in layer]
        assert float(row["bame/oscillations_total"]) == sum(counts)
        assert float(row["bame/oscillating_blocks"]) == sum(count > 0 for count in counts)
        assert float(row["bame/adaptations"]) == len(adaptations)
        lately = oscillated(history, adaptations[-1:])
        assert float(row["bame/oscillation_rate"]) == pytest.approx(len(lately) / sum(blocks), **close)
        kept = sum(int((~a & ~b).sum()) for a, b in zip(now["masks"], history[0]["masks"], strict=True))
        assert float(row["bame/survival"]) == pytest.approx(kept / (positions / 2), **close)
        assert float(row["bame/density"]) == pytest.approx(now["nonzero"] / positions, **close)
    assert sum(float(row["bame/predicted_loss_reduction"]) != 0 for row in rows) > 3
    summary, tenth = callback.summary(), adaptations[-2:]  # of 11
    assert summary["blocks"] == sum(blocks)
    assert summary["oscillations"] == sum(counts) >= summary["oscillating_blocks"] == sum(c > 0 for c in counts)
    assert summary["oscillating_blocks_in_last_tenth"] == len(oscillated(history, tenth))
    assert summary["frozen_fraction"] == pytest.approx(float(rows[-1]["bame/frozen_fraction"]))


def oscillated(history: list[dict[str, Any]], adaptations: list[int]) -> set[tuple[int, int]]:
    """Layer and block of those whose count of oscillations some adaptation raised."""
    return {
        (layer, block)
        for step in adaptations
        for layer, counts in enumerate(history[step]["oscillations"])
        for block, count in enumerate(counts)
        if count > history[step - 1]["oscillations"][layer][block]
    }


@every_method
def test_survival_counts_from_the_first_mask_in_a_resumed_run_too(name: str, tmp_path: Path) -> None:
    first, method = list[Any](), METHODS[name]()

    class First(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            first[:] = first or [sparse.kept.clone() for sparse in method.weights]

    def survived(callback: Any) -> float:
        both = sum(int((a & s.kept).sum()) for a, s in zip(first, callback.weights, strict=True))
        return both / sum(int(mask.sum()) for mask in first)

    fit = trainer(method, First(), log_every_n_steps=1, max_epochs=1)
    fit.fit(Task())
    assert float(fit.callback_metrics["bame/survival"]) == pytest.approx(survived(method))
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed = METHODS[name]()
    fit = trainer(resumed, log_every_n_steps=1, max_epochs=2)
    fit.fit(Task(), ckpt_path=tmp_path / "half.ckpt")
    end = resumed.summary()["survival"]
    assert end == float(fit.callback_metrics["bame/survival"]) == pytest.approx(survived(resumed))
    assert (end < 1) == (name in MOVING)


def test_metrics_can_be_monitored_without_a_logger() -> None:
    fit = trainer(BAMECallback("2:4", schedule=Schedule(every=2)), log_every_n_steps=1)
    fit.fit(Task())
    assert isinstance(fit.callback_metrics["bame/flip_rate"], torch.Tensor)


def test_the_table_names_every_weight_and_why_it_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer(BAMECallback("2:4", layers={"*.4": "dense"})).fit(Task())
    table = next(record.getMessage() for record in caplog.records if "BAMECallback(2:4)" in record.getMessage())
    rows: list[list[str]] = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("│")][1:-1]
        if cells and not cells[0]:  # the cells above go on
            cells = [" ".join(filter(None, parts)) for parts in zip(rows.pop(), cells, strict=True)]
        if cells:
            rows.append(cells)
    lines = {row[0]: row[1:] for row in rows}
    assert lines["model.0"][3] == "dense: input dimension 3 is not divisible by 4"
    assert lines["model.2"] == ["Conv2d", "8 x 4 x 3 x 3", "72", "2:4"]
    assert lines["model.4"][3] == "dense: by the rule '*.4'"
    assert lines["model.6"][2:] == ["512", "2:4"]
    assert lines["model.8"][3] == "dense: classifier (last linear layer)"
