"""Weights & Biases, usable without an account."""

from __future__ import annotations

import netrc
import os
from typing import Any
from urllib.parse import urlsplit

import wandb
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import WandbLogger

from bame_lightning.cli.sweeps import in_sweep, sweep_name, unescaped


def wandb_logger(*, silent: bool, **kwargs: Any) -> WandbLogger:
    """Make a W&B logger that works offline where nobody is logged in; `WANDB_MODE` decides where it is set.

    In a sweep, the group is by default the sweep and the name what sets this job apart.

    Args:
        silent: Whether W&B prints nothing.
        **kwargs: Arguments of `WandbLogger` and `wandb.init`.

    Returns:
        The logger.
    """
    if "WANDB_MODE" not in os.environ and not _logged_in():
        kwargs["mode"] = "offline"
    if in_sweep():
        kwargs["group"] = kwargs.get("group") or sweep_name()
        kwargs["name"] = (
            kwargs.get("name") or unescaped(HydraConfig.get().job.override_dirname)[:128]
        )  # W&B takes no more
    return WandbLogger(settings=wandb.Settings(silent=silent), **kwargs)


def _logged_in() -> bool:
    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
    return urlsplit(settings.base_url).netloc in hosts or "api.wandb.ai" in hosts
