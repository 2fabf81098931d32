"""Sweeps with `bame-train -m`: folders, failures, going on, launchers, W&B."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from bame_lightning.cli.sweeps import ReportFailures, share_of_cores, sweep_name, threads_per_job
from bame_lightning.cli.wandb_runs import wandb_logger

Run = Callable[..., Path]
SWEEP = ("-m", "hydra.sweep.dir=sweep", "quiet=true", "threads=1")


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def exits_with_1(run: Run, *overrides: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*SWEEP, *overrides)
    assert caught.value.code == 1


def test_a_sweep_runs_every_combination(run: Run, tmp_path: Path) -> None:
    run(*SWEEP, "pattern=1:4,1:16", "method=static,dense")
    found = {(s["pattern"], s["method"]) for s in (read_summary(tmp_path / "sweep" / str(job)) for job in range(4))}
    assert found == {("1:4", "static"), ("1:16", "static"), (None, "dense")}


def test_failed_jobs_spare_the_others_and_are_named_at_the_end(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits_with_1(run, "pattern=16:1,1:16,1:7", "method=static")
    report = capsys.readouterr().err.split("\n\n")[-1].splitlines()
    assert report[0] == "bame-train: error: 2 of the jobs failed, the others are finished:"
    assert report[1].startswith("  sweep/0: ")
    assert " pattern=16:1 method=static: " in report[1]
    assert "N <= M; got 16:1" in report[1]
    assert report[2].startswith("  sweep/2: ")
    assert " pattern=1:7 method=static: " in report[2]
    assert "hydra.sweep.dir=sweep skip_finished=true" in report[3]
    assert read_summary(tmp_path / "sweep" / "1")["pattern"] == "1:16"
    assert "Traceback" in (tmp_path / "sweep" / "2" / "error.txt").read_text()


def test_any_error_of_a_job_spares_the_others(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("bame_lightning.cli.training.summarize", broken)
    exits_with_1(run, "seed=0,1", "method=static")
    report = capsys.readouterr().err.split("\n\n")[-1].splitlines()
    assert "seed=0 method=static: RuntimeError: out of memory" in report[1]
    assert "seed=1 method=static: RuntimeError: out of memory" in report[2]


def test_an_interrupted_sweep_goes_on(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ("method=static", "seed=0,1,2")
    run(*SWEEP, *same)
    paths = [tmp_path / "sweep" / str(job) / "summary.json" for job in range(3)]
    before = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()  # stopped before the end
    paths[1].with_name("error.txt").write_text("an older attempt\n")
    capsys.readouterr()
    run(*SWEEP, *same, "skip_finished=true")
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, before, strict=True)] == [False, True, True]
    assert not paths[1].with_name("error.txt").exists()
    out, err = capsys.readouterr()
    assert (out.count("is finished; skipped"), err) == (2, "")


def test_another_configuration_in_the_same_folder_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*SWEEP, "method=static", "seed=0")
    exits_with_1(run, "method=static", "seed=1,0", "skip_finished=true")
    report = capsys.readouterr().err.split("\n\n")[-1]
    assert "(seed was 0, is 1)" in report
    assert "skip_finished=true runs these again" not in report, "it would refuse again"
    assert read_summary(tmp_path / "sweep" / "0")["seed"] == 0
    assert read_summary(tmp_path / "sweep" / "1")["seed"] == 0


@pytest.mark.usefixtures("logged_out")
def test_wandb_has_a_run_for_each_job(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def spy(**kwargs: Any) -> Any:
        made.append(wandb_logger(**kwargs))
        return made[-1]

    monkeypatch.setattr("bame_lightning.cli.wandb_runs.wandb_logger", spy)
    run(*SWEEP, "pattern=1:4,2:4", "logger=csv_wandb", "method=static")
    files = [list((tmp_path / "sweep" / job / "wandb").glob("offline-run-*/run-*.wandb")) for job in ("0", "1")]
    assert [len(found) for found in files] == [1, 1]
    assert files[0][0].name != files[1][0].name
    assert {logger._wandb_init["group"] for logger in made} == {"sweep"}
    names = [logger._wandb_init["name"] for logger in made]
    assert all(f"pattern={pattern}" in name.split() for pattern, name in zip(("1:4", "2:4"), names, strict=True))
    assert "method=static" in names[0].split()
    assert not [name for name in names if "quiet" in name or "threads" in name or "csv_wandb" in name]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("sweeps/patterns", "patterns"), ("multirun/2026-11-22/08-30-00", "2026-11-22_08-30-00"), ("s-2", "s-2")],
)
def test_a_sweep_is_named_after_its_folder(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = OmegaConf.create({"hydra": {"mode": "MULTIRUN", "sweep": {"dir": folder}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    monkeypatch.setattr("bame_lightning.cli.sweeps.in_sweep", lambda: True)
    assert sweep_name() == name


def test_a_single_run_is_no_sweep() -> None:
    assert sweep_name() is None
    assert threads_per_job() is None


LOCAL = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"


@pytest.mark.parametrize(
    ("launcher", "sweeper", "threads"),
    [
        ({}, {}, None),  # one job after another
        ({"n_jobs": 2}, {}, 4),
        ({"n_jobs": 3}, {}, 2),
        ({"n_jobs": 16}, {}, 1),
        ({"n_jobs": -1}, {}, 1),
        ({"n_jobs": -6}, {}, 2),  # 8 + 1 - 6 = 3 jobs
        ({"n_jobs": -1}, {"max_batch_size": 4}, 2),
        ({"n_jobs": -1}, {"n_jobs": 2}, 4),  # optuna asks for two trials at a time
        ({"cpus_per_task": None, "_target_": LOCAL}, {"max_batch_size": None}, 1),
        ({"cpus_per_task": None, "_target_": LOCAL}, {"max_batch_size": 2}, 4),
        ({"cpus_per_task": 3, "_target_": LOCAL}, {}, 3),
        ({"cpus_per_task": None, "_target_": "SlurmLauncher"}, {}, None),
    ],
)
def test_cores_are_divided_among_jobs(launcher: dict[str, Any], sweeper: dict[str, Any], threads: int | None) -> None:
    assert share_of_cores(launcher, sweeper, cores=8) == threads


def test_launchers_can_pickle_what_hydra_calls_back(tmp_path: Path) -> None:
    cloudpickle = pytest.importorskip("cloudpickle")  # of joblib and submitit
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None}
    overrides = {"task": ["seed=0,1"], "hydra": []}
    hydra = {"mode": RunMode.MULTIRUN, "sweep": {"dir": str(tmp_path)}, "sweeper": sweeper, "overrides": overrides}
    callback = ReportFailures()
    callback.on_multirun_start(OmegaConf.create({"hydra": hydra}))
    assert cloudpickle.dumps(callback)


def command(folder: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    """Run in a process of its own, as launchers start further ones."""
    tiny = ("model.hidden=[32]", "trainer.max_epochs=1", "trainer.accelerator=cpu", "quiet=true", "hydra.sweep.dir=s")
    call = [sys.executable, "-c", "from bame_lightning.cli.train import main; main()", "-m", *tiny, *overrides]
    return subprocess.run(call, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "overrides"),
    [
        ("hydra_joblib_launcher", ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")),
        ("hydra_submitit_launcher", ("hydra/launcher=submitit_local", "hydra.sweeper.max_batch_size=3")),
    ],
)
def test_launchers_run_jobs_side_by_side(plugin: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    if find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"{plugin} is not installed")
    done = command(tmp_path, "pattern=16:1,1:4,2:4", "method=static", *overrides)
    assert done.returncode == 1
    assert "1 of the jobs failed" in done.stderr
    assert "pattern=16:1 method=static: `pattern`" in done.stderr.split("\n\n")[-1]
    assert [read_summary(tmp_path / "s" / job)["pattern"] for job in ("1", "2")] == ["1:4", "2:4"]


@pytest.mark.slow
def test_optuna_searches_evolution_parameters_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = ("hydra/sweeper=optuna_evolution", "pattern=1:4")
    assert command(tmp_path, *search, "hydra.sweeper.n_trials=2").returncode == 0
    done = command(tmp_path, *search, "hydra.sweeper.n_trials=3", "skip_finished=true")
    assert done.returncode == 0
    assert done.stdout.count("is finished; skipped") == 2
    values = [read_summary(tmp_path / "s" / job)["val_accuracy"] for job in ("0", "1", "2")]
    best = OmegaConf.load(tmp_path / "s" / "optimization_results.yaml")
    assert best["best_value"] == max(values)
    assert "method.evidence.share" in best["best_params"]
