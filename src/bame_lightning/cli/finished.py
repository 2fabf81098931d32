"""Find runs that need not be run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bame_lightning.cli.claims import TakenError
from bame_lightning.show.find_runs import SUMMARY, flatten, read_summary, strict_json

_NO_MATTER = ("logger", "quiet", "run_dir", "skip_finished")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Resolve a configuration to plain values.

    Args:
        cfg: The composed configuration.

    Returns:
        The values, and under "choices" the chosen option of each group.
    """
    choices = {name: option for name, option in HydraConfig.get().runtime.choices.items() if "/" not in name}
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {"choices": choices} | {str(key): value for key, value in values.items()}


def experiment(cfg: DictConfig) -> dict[str, Any]:
    """Reduce a configuration to the values on which results depend.

    The run folder is not among them, nor what is printed or logged, nor whether the run was interrupted.

    Args:
        cfg: The composed configuration.

    Returns:
        The values as JSON gives them back; paths in the run folder are relative to it.
    """
    merged = OmegaConf.merge(cfg, {"quiet": False, "run_dir": ".", "ckpt_path": _of_another_run(cfg)})
    assert isinstance(merged, DictConfig)
    values = plain(merged)
    values["choices"] = {name: option for name, option in values["choices"].items() if name != "logger"}
    reduced: dict[str, Any] = strict_json({key: value for key, value in values.items() if key not in _NO_MATTER})
    return reduced


def _of_another_run(cfg: DictConfig) -> str | None:
    """The checkpoint from which a run is resumed, unless it is the run's own: an interrupted run is the same experiment."""
    if cfg.ckpt_path is None or Path(cfg.ckpt_path).resolve().is_relative_to(Path(cfg.run_dir).resolve()):
        return None
    return str(cfg.ckpt_path)


def finished(run_dir: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Look for the results of an experiment in its run folder.

    Args:
        run_dir: The run folder.
        config: What `experiment` returned.

    Returns:
        The summary of the finished run; None if the folder holds none.

    Raises:
        TakenError: If the folder holds the results of another experiment, which a run would destroy.
    """
    summary = read_summary(run_dir)
    if summary is None:
        return None
    there, here = flatten(summary.get("config", {})), flatten(config)
    changed = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    if not changed:
        return summary
    shown = "; ".join(f"{key} was {there.get(key)!r}, is {here.get(key)!r}" for key in changed[:3])
    rest = f"; {len(changed) - 3} more" if len(changed) > 3 else ""
    raise TakenError(
        f"`skip_finished` found in {run_dir / SUMMARY} the results of another configuration ({shown}{rest}). Choose another "
        "folder, or drop `skip_finished` to run again and replace them."
    )
