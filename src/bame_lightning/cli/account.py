"""The account at Weights & Biases that this machine knows."""

from __future__ import annotations

import netrc
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

_PATIENCE = 5  # seconds within which a connection must be made


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


def check_reachable() -> None:
    """Check that W&B's server takes connections; behind a proxy nothing is checked.

    Raises:
        OSError: If it does not.
    """
    import wandb

    settings = wandb.setup().settings
    server = urlsplit(settings.base_url)
    if not (getproxies().get(server.scheme) or settings.http_proxy or settings.https_proxy):
        socket.create_connection((server.hostname, server.port or server.scheme), _PATIENCE).close()


def base_url() -> str:
    """The address of W&B."""
    import wandb

    return str(wandb.setup().settings.base_url)
