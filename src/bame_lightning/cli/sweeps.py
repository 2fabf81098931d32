"""The jobs of a sweep: their share of the cores, and a report of those that failed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from typing_extensions import override

from bame_lightning.cli import jobs
from bame_lightning.cli.command import words_of
from bame_lightning.show.find_runs import ERROR


class ReportFailures(Callback):
    """At the end of a sweep, name the jobs that failed and exit with status 1.

    It has no state: launchers pickle it and call it in the processes of jobs.
    """

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check_folder(config.hydra)
            jobs.begin(config)
        except (ValueError, OSError) as error:  # Hydra would only warn, and go on
            line = words_of(error, "Choose another folder (hydra.sweep.dir=).")
            print(f"bame-train: error: {line}", file=sys.stderr)
            sys.exit(1)

    @override
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        # In the process of the job.
        if config.hydra.mode == RunMode.MULTIRUN:
            jobs.record(config.hydra, None)

    @override
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        # Jobs may run in other processes and on other machines: only their files tell about them.
        ended, planned = jobs.current().ended(), jobs.current().planned
        failed = [job for job in ended.values() if job.error is not None]
        lost = [words for number, words in enumerate(planned) if number not in ended]
        if not failed and not lost:
            return
        count = len(failed) + len(lost)
        print(f"\nbame-train: error: {count} of the jobs failed, the others are finished:", file=sys.stderr)
        lines = [f"{job.folder}: {job.error}" for job in failed] + [f"{words}: ended without a word" for words in lost]
        for line in lines:
            print(f"  {line}", file=sys.stderr)
        if lost or any(Path(job.folder, ERROR).is_file() for job in failed):  # otherwise each line says what helps
            again = (
                f"the same command with hydra.sweep.dir={config.hydra.sweep.dir} skip_finished=true runs these again"
            )
            print(f"{ERROR} there has the traceback; {again}.", file=sys.stderr)
        sys.exit(1)


def check_folder(hydra: Any) -> None:
    """Refuse the folder of a sweep for a single run, and that of a single run for a sweep: Hydra would pass it over.

    Args:
        hydra: Hydra's configuration.

    Raises:
        ValueError: If the command line names it.
    """
    sweep = hydra.mode == RunMode.MULTIRUN
    what, others, own = (
        ("a sweep", "hydra.run.", "hydra.sweep.dir") if sweep else ("a run", "hydra.sweep.", "hydra.run.dir")
    )
    for word in jobs.as_written(hydra.overrides.hydra):
        key, _, value = word.lstrip("+").partition("=")
        if key.startswith(others):
            raise ValueError(f"`{key}` does nothing in {what}. Name its folder by {own}={value}, or leave it out.")


def sweep_name() -> str | None:
    """Name the sweep that this job belongs to.

    Returns:
        Name of the sweep's folder, with the date if the name is only a time of day; None outside a sweep.
    """
    if not in_sweep():
        return None
    folder = Path(HydraConfig.get().sweep.dir)
    return f"{folder.parent.name}_{folder.name}" if folder.name.replace("-", "").isdigit() else folder.name


def in_sweep() -> bool:
    """Tell whether this is a job of a sweep."""
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def unescaped(overrides: str) -> str:
    r"""Write overrides as the user did.

    Example:
        >>> print(unescaped(r"pattern=1\:4 seed=0"))
        pattern=1:4 seed=0
    """
    return overrides.replace(r"\:", ":")


def threads_per_job() -> int | None:
    """Divide the cores of this machine among the jobs of a sweep that run at the same time.

    Returns:
        Threads for this job; None if it has the machine for itself, or a scheduler divides the cores.
    """
    if not in_sweep():
        return None
    import joblib  # type: ignore[import-untyped]  # comes with scikit-learn

    cfg = HydraConfig.get()
    return share_of_cores(cfg.launcher, cfg.sweeper, joblib.cpu_count())


def share_of_cores(launcher: Mapping[str, Any], sweeper: Mapping[str, Any], cores: int) -> int | None:
    """Divide cores among the jobs that a launcher runs at the same time.

    Args:
        launcher: Configuration of Hydra's launcher.
        sweeper: Configuration of Hydra's sweeper, which may hand over its jobs in batches.
        cores: Cores of this machine.

    Returns:
        Threads for a job; None if something else divides the cores.

    Example:
        >>> share_of_cores({"n_jobs": 2}, {"max_batch_size": None}, cores=16)
        8
    """
    batch = sweeper.get("max_batch_size") or sweeper.get("n_jobs")
    if wanted := launcher.get("n_jobs"):  # joblib; -1 is one for each core, -2 leaves one core
        jobs: int = wanted if wanted > 0 else cores + 1 + wanted
        return max(1, cores // max(1, min(jobs, batch or jobs)))
    if launcher.get("cpus_per_task"):  # submitit, here or on a cluster
        return int(launcher["cpus_per_task"])
    if str(launcher.get("_target_")).endswith("LocalLauncher"):  # submitit starts a whole batch at once
        return max(1, cores // (batch or cores))
    return None
