"""Does the evolution do what it is for? A short version of `benchmarks/accuracy/study.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bame_lightning.tasks.data import DEBIAN_FOLDER


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "bame_lightning.cli.train", "recipe=fashion_mnist_mlp"]
    options = ["trainer.max_epochs=3", "threads=1", "quiet=true", f"hydra.run.dir={folder}"]
    subprocess.run([*command, *options, *overrides], check=True, capture_output=True, timeout=500)
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
@pytest.mark.parametrize("seed", [0, 1])
def test_bame_beats_a_static_mask_at_a_quarter_of_the_flops_of_sr_ste(tmp_path: Path, seed: int) -> None:
    bame, static = (run(tmp_path / method, f"method={method}", f"seed={seed}") for method in ("bame", "static"))
    assert bame["compliant"]
    assert static["compliant"]
    assert bame["train_loss"] < static["train_loss"]
    assert bame["test_accuracy"] > static["test_accuracy"]
    assert bame["flops"]["flops/train_vs_sr_ste"] < 0.27
