"""Which sets of weights a checkpoint holds, and the plain names in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from bame_lightning.checkpoints.untrusted import EXPECTED, StandIn, UnreadableError
from bame_lightning.weights.reasons import ADAPTER_NAME

TOP = ""
"""Key of the set whose tensors are at the top of the file."""

_FIRST = ("state_dict", "model")  # where Lightning and most others keep the model, whatever else the file holds
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|callbacks|loops|rng_|hyper_|generator_state")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_DDP = "module."


def weight_sets(checkpoint: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """Find the sets of weights of a checkpoint: at the top, under a key, or under a key of a key ("ema.state_dict").

    Args:
        checkpoint: What was read from a file.

    Returns:
        Key -> tensors by name. A set holds matrices; if nothing does, any tensors make a set.

    Example:
        >>> import torch
        >>> list(weight_sets({"epoch": 3, "params": {"w": torch.ones(2, 2)}, "ema": {"w": torch.ones(2, 2)}}))
        ['params', 'ema']
    """
    found = {key: tensors for key, values in _mappings(checkpoint).items() if (tensors := _tensors(values))}
    matrices = {key: tensors for key, tensors in found.items() if any(one.dim() >= 2 for one in tensors.values())}
    return matrices or found


def choose(checkpoint: Mapping[Any, Any], key: str | None) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """Choose one of the sets of weights of a checkpoint.

    Args:
        checkpoint: What was read from a file.
        key: Key of the set; None takes "state_dict", else "model", else the only one.

    Returns:
        Key of the chosen set; all sets.

    Raises:
        UnreadableError: If there is no set, or several and no key, or none under the key.
    """
    sets = weight_sets(checkpoint)
    if not sets:
        for name in _FIRST:
            if isinstance(checkpoint.get(name), Mapping):
                _check(checkpoint[name], {})
        raise UnreadableError(f"holds no tensors that could be weights{_keys(checkpoint)}. {EXPECTED}")
    there = ", ".join(f"'{name}' ({len(tensors)} tensors)" for name, tensors in sets.items())
    if key is not None and key not in sets:
        raise UnreadableError(f"has no weights under `key` {key!r} (`--key`). It holds {there}.")
    chosen = key if key is not None else next((name for name in _FIRST if name in sets), None)
    if chosen is None and len(sets) > 1:
        raise UnreadableError(
            f"holds several sets of weights: {there}. Choose one by `key` (on the command line --key '{list(sets)[-1]}')."
        )
    chosen = next(iter(sets)) if chosen is None else chosen
    _check(_mappings(checkpoint)[chosen], sets[chosen])
    return chosen, sets


def _check(values: Mapping[Any, Any], tensors: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if isinstance(name, str) and name.endswith("weight") and not isinstance(value, Tensor):
            kind = value.told if isinstance(value, StandIn) else type(value).__name__
            raise UnreadableError(f"has a `{name}` that is not a tensor but {kind}. {EXPECTED}")
    if adapter := next((name for name in tensors if ADAPTER_NAME.search(name)), None):
        raise UnreadableError(
            f"holds an adapter (`{adapter}`), whose product is added to the weights of a base model: its blocks tell nothing. "
            "Merge it into the base model (in peft `merge_and_unload`), and save that."
        )


def plain_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Drop what `torch.compile`, FSDP, activation checkpointing, DDP and `AveragedModel` put into names.

    Args:
        names: Names of a state dict.

    Returns:
        Name -> plain name, without names of the wrappers' own tensors; and the wrappers that were dropped.

    Example:
        >>> plain_names(["module._orig_mod.fc.weight", "n_averaged"])
        ({'module._orig_mod.fc.weight': 'fc.weight'}, ('_orig_mod.', 'module.'))
    """
    whole = list(names)
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in whole}
    dropped = [f"{wrapper}." for wrapper in _WRAPPERS if any(wrapper in name.split(".") for name in whole)]
    dotted = {name: short for name, short in plain.items() if "." in short}
    if dotted and all(short.startswith(_DDP) for short in dotted.values()):
        plain = {name: short.removeprefix(_DDP) for name, short in dotted.items()}
        dropped.append(_DDP)
    if len(set(plain.values())) < len(plain):  # two would have the same plain name
        return {name: name for name in whole}, ()
    return plain, tuple(dropped)


def _mappings(checkpoint: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Where sets of weights may stand, by key."""
    found = {TOP: checkpoint}
    for key, value in checkpoint.items():
        if isinstance(key, str) and isinstance(value, Mapping) and not _NO_WEIGHTS.search(key):
            found[key] = value
            if not _tensors(value):
                found |= {f"{key}.{name}": below for name, below in value.items() if isinstance(below, Mapping)}
    return found


def _tensors(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _keys(checkpoint: Mapping[Any, Any]) -> str:
    told = [
        f"{key!r:.40}" + (f", {value.told}" if isinstance(value, StandIn) else "") for key, value in checkpoint.items()
    ]
    return f"; its keys are {'; '.join(told[:8])}{'; ...' if len(told) > 8 else ''}" if told else ""
