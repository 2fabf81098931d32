"""The account at Weights & Biases that this machine knows."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlsplit


def logged_in() -> bool:
    """Whether W&B knows an account: from the environment, or from `wandb login`."""
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlsplit(settings.base_url).netloc in hosts or "api.wandb.ai" in hosts


def base_url() -> str:
    """Where W&B is."""
    import wandb

    return str(wandb.setup().settings.base_url)
