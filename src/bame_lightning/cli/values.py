"""Check that each value is of the same kind as its default; an error names the key. Needs no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from bame_lightning.cli.conf import conf_dir

_OTHER_KINDS = {
    "scheduler.warmup_steps",  # a whole number of steps, or a fraction of the run
    "trainer.devices",  # a number, a list of them, "auto"
    "trainer.deterministic",  # also "warn"
    "trainer.precision",  # also 16, 32 and 64
    "pattern",  # has its own messages
}
_NUMBERS = ("trainer.gradient_clip_val", "trainer.limit_train_batches")
"""Keys that are null or a number."""
_TEXTS = ("ckpt", "ckpt_path", "data.data_dir", "data.folder")
"""Keys that are null or text."""


def standard_values() -> DictConfig:
    """Compose the configuration of the chosen options of all groups, without overridden values.

    Returns:
        The configuration; empty if the options make none without a recipe.
    """
    cfg = HydraConfig.get()
    # Where none is chosen, none is the default: Hydra does not let a user choose null.
    options = [f"{group}={option}" for group, option in cfg.runtime.choices.items() if option and _is_ours(group)]
    several = [text for text in cfg.overrides.task if text.partition("=")[0] in SEVERAL and text.endswith("]")]
    places = [text for text in cfg.overrides.hydra if text.startswith("hydra.searchpath=")]
    known = GlobalHydra.instance().is_initialized()  # unknown in processes that a launcher started
    try:
        with nullcontext() if known else initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(cfg.job.config_name, [*options, *several, *places])
    except HydraException:
        return OmegaConf.create({})


SEVERAL = ("logger", "callbacks")
"""Groups of which several options may be chosen."""


def _is_ours(group: str) -> bool:
    return "/" not in group and group != "recipe"


def overridden() -> set[str]:
    """Name the keys that the command line sets.

    Returns:
        Dotted keys, such as "optimizer.lr"; chosen groups, too.
    """
    parsed = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {override.key_or_group for override in parsed}


def check_values(cfg: DictConfig) -> None:
    """Refuse values that are not of the kind of their defaults.

    Args:
        cfg: The composed configuration.

    Raises:
        ValueError: If there is such a value.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    defaults = OmegaConf.to_container(standard_values(), resolve=False)
    assert isinstance(values, dict)
    assert isinstance(defaults, dict)
    for key, default, value in _pairs(values, defaults):
        if wanted := _wanted(key, default, value):
            raise ValueError(f"`{key}` must be {wanted}; got {shown(value)}.")


def _pairs(values: Mapping[Any, Any], defaults: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, default and value of everything that has both."""
    if values.get("_target_") != defaults.get("_target_"):
        return  # another target says what its keys mean
    for name, default in defaults.items():
        if name not in values:
            continue
        key, value = f"{before}{name}", values[name]
        if isinstance(default, dict) and isinstance(value, dict):
            yield from _pairs(value, default, f"{key}.")
        elif not (isinstance(default, str) and "${" in default):
            yield key, default, value


def _wanted(key: str, default: Any, value: Any) -> str | None:
    """What a value must be, if it is something else."""
    if key in _OTHER_KINDS or (value is None and (default is None or key.startswith("trainer."))):
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if key in _NUMBERS:
        return None if type(value) in (int, float) else "a number, or null"
    if isinstance(default, int | float):
        whole = isinstance(default, int)
        fits = not isinstance(value, bool) and isinstance(value, int if whole else (int, float))
        return None if fits else f"a {'whole ' if whole else ''}number, such as {default}"
    if isinstance(default, dict) and default:
        return f"set by one of its values ({', '.join(f'{key}.{name}=' for name in default)})"
    if isinstance(default, list):
        return None if isinstance(value, list) else f"a list, such as {default or '[1, 2]'}".replace("'", "")
    if isinstance(default, str) or key in _TEXTS:
        return None if isinstance(value, str) else f"text, with quotes around a number ({key}='\"{value}\"')"
    return None


def shown(value: Any) -> str:
    """Write a value as a user would."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) or "nothing"


def close_keys(key: str, known: Iterable[str]) -> str:
    """Propose keys for one that does not exist, the closest first.

    Args:
        key: The dotted key.
        known: Names beside it, of which its last part must be one.

    Returns:
        A sentence.
    """
    parent, _, name = key.rpartition(".")
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 3, cutoff=0.5)
    if not names:
        return "It takes no values."
    others = [other for other in names if other not in close][: 12 - len(close)]
    more = ", ..." if len(names) > len(close) + len(others) else ""
    meant, there = (
        ", ".join(f"`{parent}.{other}`" if parent else f"`{other}`" for other in some) for some in (close, others)
    )
    sentences = [f"Did you mean {meant}?"] if close else []
    if others:
        sentences.append(f"There are {'also ' if close else ''}{there}{more or '.'}")
    return " ".join(sentences)
