"""What commands print in a terminal of 50 and of 80 columns."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.table import layer_table
from bame_lightning.cli import audit, flops
from bame_lightning.weights.layers import plan_layers
from tests.cli.conftest import Answer, Run
from tests.show.test_narrow import by_columns

LONG = "network.encoder.layers.11.attention.output.dense"


@pytest.mark.parametrize("columns", [50, 80])
def test_an_audit_tells_every_layer_and_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    state = {f"{LONG}.weight": torch.eye(64), "head.weight": torch.ones(4, 64), "stem.weight": torch.ones(4, 3)}
    torch.save(state, tmp_path / "a.pt")
    assert audit.main([str(tmp_path / "a.pt"), "--pattern", "1:16"]) == 1
    out = capsys.readouterr().out
    assert "…" not in out
    # A folded name lies below its beginning.
    assert f"{LONG}.weight" in "".join(line.split()[0] for line in out.splitlines() if line.split())
    for words in ("1:16", "256", "1.56%", "obeys", "100.00%", "VIOLATES", "stem.weight", "head.weight violates 1:16"):
        assert words in out


@pytest.mark.parametrize("columns", [50, 80])
def test_the_costs_of_every_method_are_told(
    answer: Callable[[Callable[[], None]], Answer], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = answer(flops.main)("model=mlp")
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= columns
    first = [line.split()[0] for line in out.splitlines() if line.split()]
    assert {"dense", "SR-STE", "Bi-Mask", "BAME", "RigL", "static", "transposable"} <= set(first)
    assert "3f + r(1-f)" in out


@pytest.mark.parametrize("columns", [50, 80])
def test_a_run_tells_its_results(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    run("model.hidden=[32,32,32,32,32,32,32,32,32,32]", "trainer.limit_train_batches=2", "method=static")
    out = capsys.readouterr().out
    assert "…" not in out
    for words in ("model.hidden1.weight", "model.hidden10.weight", "violations", "checkpoints/last.ckpt"):
        assert words in out


WHY = ("inputdimension3isnotdivisibleby16", "stem_of_the_feature_pyramid_network")


class Deep(nn.Module):
    """Names as long, and shapes as wide, as those of large networks."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.layers = nn.ModuleList(nn.Conv2d(256, 256, 3) for _ in range(11))
        self.backbone.stem_of_the_feature_pyramid_network = nn.Conv3d(3, 512, (3, 7, 7))
        self.classifier = nn.Linear(256, 1000)


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_the_table_of_layers_fits(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    plans = plan_layers(Deep(), NMPattern(1, 16))
    *table, _ = layer_table(plans).splitlines()
    assert max(map(len, table)) <= min(columns, 100)
    text = by_columns("\n".join(table))
    assert "…" not in text
    for words in ("backbone.layers.10", "256x256x3x3", "36,864", "1:16", "dense:classifier(lastlinearlayer)", *WHY):
        assert words in text
