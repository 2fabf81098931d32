"""Trainers, modules, callbacks and strategies of `pytorch_lightning`: the same classes under another name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.callbacks.processes import ROOT


def test_the_other_package_of_lightning_is_known() -> None:
    pytest.importorskip("pytorch_lightning")
    # In a process of its own: here types are checked at runtime, and a Trainer of the other package is not of ours.
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.other_package"]
    done = subprocess.run(command, timeout=600, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
