"""Words of the command line before Hydra reads them: values that Hydra could not read get quotes."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bame_lightning.cli.conf import conf_dir
from bame_lightning.cli.values import SEVERAL, close_keys, shown

_WITH_SIGNS = """'sparsity.layers={"*.stem": dense}'"""


def readable(words: Iterable[str]) -> list[str]:
    """Put quotes around values that Hydra's grammar does not allow: with `=` inside, or umlauts.

    Args:
        words: The words after the name of the command.

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
    """End with a hint if options were written with dashes, as in other commands.

    Args:
        command: Its name.
        words: The words after it.
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


def unreadable(word: str) -> str:
    """Say what is wrong with a word that Hydra cannot read.

    Args:
        word: The word.

    Returns:
        A sentence or two.
    """
    key, equals, value = word.partition("=")
    if not key or not equals:
        return f"`{word}` sets nothing. Values are set as KEY=VALUE; --help lists them."
    if not _parses(f"{key}=0"):
        return (
            f"`{key}` cannot be read as a key. Other signs than letters, digits, - and _ go into a value: {_WITH_SIGNS}"
        )
    return f"{word} cannot be read. Put quotes around the value, and others around them: {key}='\"{value}\"'"


def unknown_option(group: str, option: Any, known: Iterable[str] = ()) -> str:
    """Say that a group has no such option, and which options it has.

    Args:
        group: The group.
        option: What was chosen.
        known: Its options if Hydra lists them; else they are looked up.

    Returns:
        A sentence or two.
    """
    there = list(known) or _options(group)
    close = difflib.get_close_matches(str(option), there, 3, cutoff=0.5)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    none = f" {group}=[] chooses none." if option is None and group in SEVERAL else ""
    return f"`{group}` must be one of {', '.join(there)}; got {shown(option)}.{hint}{none}"


def no_option(words: Iterable[str]) -> str:
    """Say which word chooses null or a number instead of the name of an option.

    Args:
        words: The words after the name of the command.

    Returns:
        A sentence or two.
    """
    for override in OverridesParser.create().parse_overrides(list(words)):
        group, option = override.key_or_group, override.value()
        if not group:
            return unreadable(str(override.input_line))
        if _options(group) and not isinstance(option, str | list):
            return unknown_option(group, option)
    return "A group must be set to the name of one of its options; --help lists them."


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def unknown_key(config: str, key: str, words: Iterable[str]) -> str:
    """Say that a key does not exist, and which do.

    Args:
        config: Name of the command's configuration.
        key: The dotted key.
        words: The words after the name of the command.

    Returns:
        A sentence or two.
    """
    words = list(words)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            there: Any = compose(config, list(_choices(words)), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):
        return f"`{key}` does not exist; --help lists what does."
    if "/" in key:
        return f"`{key}` is no group. {close_keys(key, map(str, there.hydra.runtime.choices))}"
    before, names = "", key.split(".")
    if names[0] in SEVERAL and names[1:2] in [[option] for option in _options(names[0])]:
        group, option = names[:2]
        both = ",".join(filter(None, (_chosen(config, group, words), option)))
        return f"`{group}.{option}` does not exist, unless {group}=[{both}] chooses it."
    while OmegaConf.is_dict(there.get(names[0])):
        there, before = there[names[0]], f"{before}{names.pop(0)}."
    missing = f"{before}{names[0]}"
    if names[0] in there:
        return f"`{missing}` is a value; it has no `{'.'.join(names[1:])}`."
    known = [name for name in map(str, there) if not name.startswith("_") and name != "hydra"]
    more = f"+{key}= adds a value that a part takes and its file leaves out."
    return f"`{missing}` does not exist. {close_keys(missing, known)} {more}"


def _choices(words: Iterable[str]) -> Iterator[str]:
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    for word in words:
        group, _, option = word.partition("=")
        if group in groups and "," not in option.strip("[]"):
            yield word


def _chosen(config: str, group: str, words: Iterable[str]) -> str:
    """The options of a group that a command line chooses, separated by commas; else the default."""
    chosen = [option.strip("[]") for key, _, option in (word.partition("=") for word in words) if key == group]
    (default,) = (entry[group] for entry in OmegaConf.load(conf_dir() / f"{config}.yaml").defaults if group in entry)
    return chosen[-1] if chosen else default or ""
