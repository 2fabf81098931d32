"""Where commands start: from the first moment on, also during imports, Ctrl-C ends a command with a line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any


def _command(name: str) -> Callable[..., Any]:
    def command(*words: Sequence[str]) -> Any:
        try:
            module = importlib.import_module(f"bame_lightning.cli.{name}")
        except KeyboardInterrupt:
            print(f"bame-{name}: stopped by Ctrl-C.", file=sys.stderr)
            return 130
        return module.main(*words)

    return command


audit, bench, compare, dashboard = map(_command, ("audit", "bench", "compare", "dashboard"))
export, flops, report, train = map(_command, ("export", "flops", "report", "train"))
