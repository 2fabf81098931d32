"""Weights & Biases, usable without an account."""

from __future__ import annotations

import netrc
import os
from typing import Any
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.loggers import WandbLogger


def wandb_logger(*, silent: bool, **kwargs: Any) -> WandbLogger:
    """Make a W&B logger that works offline where nobody is logged in; `WANDB_MODE` decides where it is set.

    Args:
        silent: Whether W&B prints nothing.
        **kwargs: Arguments of `WandbLogger` and `wandb.init`.

    Returns:
        The logger.
    """
    if "WANDB_MODE" not in os.environ and not _logged_in():
        kwargs["mode"] = "offline"
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
