"""Check that a checkpoint obeys its N:M pattern, without trusting its author."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bame_lightning.blocks.layout import oriented, to_blocks
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.checkpoints.files import Weights, read_weights
from bame_lightning.checkpoints.saved import indivisible, layers_in, read_entry
from bame_lightning.checkpoints.untrusted import UnreadableError, first_sentence


class AuditError(ValueError):
    """The input cannot be audited; one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class LayerAudit:
    """The verdict on one weight by one pattern.

    Args:
        name: Key of the weight in the state dict.
        pattern: The pattern by which it was judged.
        blocks: Blocks of the weight.
        weights: Elements of the weight.
        nonzeros: Elements that are not zero; a NaN is not zero.
        violations: Blocks that break the pattern, or the mask that the checkpoint holds for them.
        reason: The first violating block and what is wrong with it; empty if there is none.
        transposed: Whether its input dimension is the first one.
        not_finite: Elements that are NaN or infinite, which make a network useless even if all blocks obey.
    """

    name: str
    pattern: NMPattern
    blocks: int
    weights: int
    nonzeros: int
    violations: int
    reason: str = ""
    transposed: bool = False
    not_finite: int = 0

    @property
    def compliant(self) -> bool:
        """Whether every block obeys."""
        return self.violations == 0

    @property
    def density(self) -> float:
        """Share of the weights that are not zero."""
        return self.nonzeros / self.weights


@dataclass(frozen=True)
class AuditReport:
    """What was checked, and what was not.

    Args:
        layers: The judged weights, in the order of the state dict or of the saved state. A weight that is judged by
            its saved pattern and by another one appears twice.
        skipped: Weights of two or more dimensions that were not judged: name -> reason.
        from_state: Whether the file itself named the layers: a callback's saved state with masks, or an export's metadata.
        key: Key of the weights in the file; empty if they are at its top.
        unread: In words, what else the file holds.
        dropped: Wrappers that were dropped from names, such as `torch.compile`'s "_orig_mod.".
    """

    layers: tuple[LayerAudit, ...]
    skipped: Mapping[str, str]
    from_state: bool
    key: str = ""
    unread: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def compliant(self) -> bool:
        """Whether every judged weight obeys; False if none was judged."""
        return bool(self.layers) and all(layer.compliant for layer in self.layers)


def audit_checkpoint(
    path: str | Path,
    pattern: NMPattern | str | None = None,
    *,
    dense: Sequence[str] = (),
    transposed: Sequence[str] = (),
    key: str | None = None,
) -> AuditReport:
    """Audit a Lightning checkpoint, a state dict or an export; code inside a file is never run.

    A file may say which layers are sparse, in a sparsity callback's state or an export's metadata. Then `audit_saved_layers`
    judges it, else `audit_state_dict`.

    Args:
        path: The file or folder, as `bame_lightning.checkpoints.files.read_weights` reads it.
        pattern: Required unless the file says which layers are sparse.
        dense: Globs of the weights or modules that are dense on purpose.
        transposed: Globs of the weights or modules whose input dimension is the first one; not needed where a callback's
            state says it.
        key: Which set of weights, if a file holds several; None takes "state_dict", else "model", else the only one.

    Returns:
        The verdict on every layer, and what was not read.

    Raises:
        AuditError: If the file, the state in it, or an argument is unusable. The message names the file.
    """
    return audit_weights(path, read(path, key), pattern, dense=dense, transposed=transposed)


def read(path: str | Path, key: str | None = None) -> Weights:
    """Read weights to be audited.

    Args:
        path: The file or folder.
        key: Which set of weights.

    Returns:
        The weights.

    Raises:
        AuditError: If they cannot be read. The message names the file.
    """
    try:
        return read_weights(Path(path), key)
    except UnreadableError as error:
        raise AuditError(f"`{path}` {error}") from None


def audit_weights(
    path: str | Path,
    weights: Weights,
    pattern: NMPattern | str | None = None,
    *,
    dense: Sequence[str] = (),
    transposed: Sequence[str] = (),
) -> AuditReport:
    """Audit weights that were read.

    Args:
        path: Where they come from, for messages.
        weights: The weights.
        pattern: As for `audit_checkpoint`.
        dense: As for `audit_checkpoint`.
        transposed: As for `audit_checkpoint`.

    Returns:
        The verdict on every layer, and what was not read.

    Raises:
        AuditError: If the file's description of its layers, or an argument, is unusable. The message names the file.
    """
    try:
        asked = None if pattern is None else NMPattern.parse(pattern)
    except ValueError as error:
        raise AuditError(str(error)) from None
    try:
        saved = layers_in(weights)
        if saved is not None:
            masks = weights.declared is None
            report = audit_saved_layers(weights.tensors, saved, asked, dense=dense, masks=masks)
        elif asked is None:
            raise AuditError(
                "holds no state of a sparsity callback, which would say which layers are sparse. Give `pattern` "
                "(on the command line `--pattern 1:16`)."
            )
        else:
            report = audit_state_dict(weights.tensors, asked, dense=dense, transposed=transposed)
    except (AuditError, UnreadableError) as error:
        raise AuditError(f"`{path}` {error}") from None
    return replace(report, key=weights.key, unread=weights.unread, dropped=weights.dropped)


def audit_state_dict(
    state: Mapping[str, Tensor], pattern: NMPattern, *, dense: Sequence[str] = (), transposed: Sequence[str] = ()
) -> AuditReport:
    """Judge every eligible weight: named `*weight`, floating, of two or more dimensions, M dividing the input dimension.

    The input dimension is the second one, except for weights in `transposed`. Names and shapes do not show which layer is a
    classifier or an embedding: name those in `dense`.

    Args:
        state: A model's state dict.
        pattern: The pattern that the weights must obey.
        dense: Globs of the weights or modules that are dense on purpose.
        transposed: Globs of the weights or modules whose input dimension is the first one, as in GPT-2's `Conv1D`.

    Returns:
        The verdict on every eligible weight, and why the others were not judged.

    Raises:
        AuditError: If a glob matches nothing, or a weight holds no values.

    Example:
        >>> report = audit_state_dict({"fc.weight": torch.eye(4)}, NMPattern(1, 4))
        >>> report.compliant, report.layers[0].blocks
        (True, 4)
    """
    excused, turned = _matching(state, "dense", dense), _matching(state, "transposed", transposed)
    layers, skipped = [], {}
    for name, weight in _matrices(state).items():
        if reason := _ineligible(name, weight, pattern, excused, name in turned):
            skipped[name] = reason
        else:
            layers.append(_judge(name, weight, pattern, transposed=name in turned))
    return AuditReport(tuple(layers), skipped, from_state=False)


def audit_saved_layers(
    state: Mapping[str, Tensor],
    saved: Mapping[str, Any],
    pattern: NMPattern | None = None,
    *,
    dense: Sequence[str] = (),
    masks: bool = True,
) -> AuditReport:
    """Judge the layers that a callback's saved state or an export names, each by its saved pattern and mask.

    A block violates if it holds more than N non-zeros, holds one where the mask is False, or has a mask that does not
    keep exactly N. With `pattern`, a weight saved under another pattern is judged a second time, by `pattern`, if its M divides
    the weight's input dimension.

    Args:
        state: A model's state dict.
        saved: For every layer its "pattern", "shape" and packed "mask", as the callback saves them; "transposed" if the
            weight is.
        pattern: A pattern that all layers must obey beside their own.
        dense: Globs of the weights or modules not to judge.
        masks: Whether `saved` must hold masks; an export holds none.

    Returns:
        The verdict on every layer of `saved`, and why the other weights were not judged.

    Raises:
        AuditError: If `saved` is malformed or does not fit `state`, or a glob matches nothing.
    """
    excused = _matching(state, "dense", dense)
    layers = []
    skipped = {
        name: "matches `dense`"
        if name in excused
        else f"dense in {'the callback' if masks else 'the export'}'s saved state"
        for name in _matrices(state)
        if name in excused or (name not in saved and name.endswith("weight"))
    }
    for name, entry in saved.items():
        own, mask, transposed = read_entry(name, entry, state, masks=masks)
        if name in excused:
            continue
        layers.append(_judge(name, state[name], own, mask, transposed=transposed))
        if pattern is None or pattern == own:
            continue
        if reason := indivisible(state[name], pattern, transposed):
            skipped[name] = f"for {pattern}: {reason}"
        else:
            layers.append(_judge(name, state[name], pattern, transposed=transposed))
    return AuditReport(tuple(layers), skipped, from_state=True)


def _judge(
    name: str, weight: Tensor, pattern: NMPattern, mask: Tensor | None = None, *, transposed: bool
) -> LayerAudit:
    try:
        values = _strided(name, weight)
        nonzero = to_blocks(oriented(values, transposed), pattern.m) != 0
    except RuntimeError as error:  # a small file can describe a tensor that no memory holds
        raise AuditError(
            f"holds a weight `{name}` of shape {tuple(weight.shape)} that cannot be examined "
            f"({first_sentence(error)}). Save it as a plain tensor."
        ) from None
    counts = nonzero.sum(-1)
    checks = [(counts > pattern.n, f"holds more than {pattern.n} non-zero{'s' * (pattern.n > 1)}")]
    if mask is not None:
        kept = to_blocks(oriented(mask, transposed), pattern.m)
        checks.append(((nonzero & ~kept).any(-1), "holds a non-zero outside its mask"))
        checks.append((kept.sum(-1) != pattern.n, f"has a mask that does not keep exactly {pattern.n}"))
    violating = torch.stack([bad for bad, _ in checks]).any(0)
    reason = ""
    if violating.any():
        first = int(violating.nonzero()[0, 0])
        wrong = " and ".join(text for bad, text in checks if bad[first])
        filters = weight.shape[1 if transposed else 0]
        reason = f"block {first} (filter {first // (len(counts) // filters)}) {wrong}"
    return LayerAudit(
        name=name,
        pattern=pattern,
        blocks=len(counts),
        weights=weight.numel(),
        nonzeros=int(counts.sum()),
        violations=int(violating.sum()),
        reason=reason,
        transposed=transposed,
        not_finite=count_not_finite(values),
    )


def count_not_finite(values: Tensor) -> int:
    """Count elements that are NaN or infinite, of any type."""
    if values.is_floating_point() and values.dtype.itemsize == 1:  # torch has no such test for numbers of eight bits
        values = values.float()
    return int((~torch.isfinite(values)).sum())


def _strided(name: str, weight: Tensor) -> Tensor:
    if weight.is_meta:
        raise AuditError(f"holds `{name}` as a meta tensor, without values. Save the model materialised.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse layouts announce that they are in beta
        weight = weight.detach()
        if weight.is_quantized:
            weight = weight.dequantize()
        return weight if weight.layout == torch.strided else weight.to_dense()


def _matrices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if tensor.dim() >= 2 and not tensor.is_nested}


def _matching(state: Mapping[str, Tensor], argument: str, globs: Sequence[str]) -> set[str]:
    names = list(_matrices(state))
    found: set[str] = set()
    for glob in globs:
        hits = {name for name in names if fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)}
        if not hits:
            raise AuditError(
                f"has no weight of two or more dimensions, nor a module with one, that `{argument}` {glob!r} matches. The "
                f"names are {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; '*' matches dots too."
            )
        found |= hits
    return found


def _ineligible(name: str, weight: Tensor, pattern: NMPattern, excused: set[str], transposed: bool) -> str:
    if name in excused:
        return "matches `dense`"
    if not name.endswith("weight"):
        return "not named *weight"
    if not (weight.is_floating_point() or weight.is_quantized):
        return f"not floating point but {str(weight.dtype).removeprefix('torch.')}"
    if weight.numel() == 0:
        return f"empty, of shape {tuple(weight.shape)}"
    if transposed and weight.dim() != 2:
        return f"`transposed` is for matrices, not for the shape {tuple(weight.shape)}"
    return indivisible(weight, pattern, transposed)
