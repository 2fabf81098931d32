"""Words of the command line, before Hydra reads them: values that it could not read get their quotes."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bame_lightning.cli.conf import conf_dir
from bame_lightning.cli.values import close_keys


def readable(words: Iterable[str]) -> list[str]:
    """Put quotes around values that Hydra's grammar has no place for: `=` inside them, umlauts.

    Args:
        words: What follows the name of the command.

    Returns:
        The words. Lists and values of a sweep are left as they are.

    Example:
        >>> readable(["ckpt=runs/lr=0.1/last.ckpt", "seed=1,2"])
        ["ckpt='runs/lr=0.1/last.ckpt'", 'seed=1,2']
    """
    return [word if word.startswith("-") or _parses(word) else _quoted(word) for word in words]


def _quoted(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or value[:1] in ("[", "{", "'", '"') or "," in value:
        return word
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    quoted = f"{key}='{escaped}'"
    return quoted if _parses(quoted) else word


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def check_dashes(command: str, words: Iterable[str]) -> None:
    """End with a hint where options were written as those of other commands.

    Args:
        command: Its name.
        words: What follows it.
    """
    flags = get_args_parser()._option_string_actions
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag.startswith("--") and not any(known.startswith(flag) for known in flags):
            if close := difflib.get_close_matches(flag, [*flags, "--version"], 1, cutoff=0.75):
                print(f"{command}: error: {flag} is no flag. Did you mean {close[0]}?", file=sys.stderr)
                sys.exit(2)
            example = word.lstrip("-") + ("" if equals else "=VALUE")
            print(
                f"{command}: error: {word}: values are set without dashes, {example}. In the `command` of a W&B sweep "
                "write ${args_no_hyphens} for ${args}.",
                file=sys.stderr,
            )
            sys.exit(2)


def unknown_key(config: str, key: str, words: Iterable[str]) -> str:
    """Tell that a key does not exist, and which do.

    Args:
        config: Name of the command's configuration.
        key: The dotted key.
        words: What follows the name of the command.

    Returns:
        A sentence or two.
    """
    parent, _, _ = key.rpartition(".")
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose(config, list(_choices(words)))
        there = OmegaConf.select(cfg, parent) if parent else cfg
        known = [str(name) for name in there if not str(name).startswith("_")] if OmegaConf.is_dict(there) else []
    except (HydraException, OmegaConfBaseException):
        known = []
    return f"`{key}` does not exist. {close_keys(key, known)} +{key}= adds a value that a part takes and its file leaves out."


def _choices(words: Iterable[str]) -> Iterator[str]:
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    for word in words:
        group, _, option = word.partition("=")
        if group in groups and "," not in option.strip("[]"):
            yield word
