"""Check that a checkpoint obeys its N:M pattern, without trusting whoever wrote it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bame_lightning.blocks import oriented, to_blocks
from bame_lightning.layers import AUDITABLE, VERSION_KEY
from bame_lightning.masks import unpack_mask
from bame_lightning.pattern import NMPattern
from bame_lightning.untrusted import UnreadableError, first_sentence, load_untrusted, state_dict_of


class AuditError(ValueError):
    """The input cannot be audited; one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class LayerAudit:
    """One weight, judged by one pattern.

    Args:
        name: Key of the weight in the state dict.
        pattern: What it was judged by.
        blocks: Blocks of the weight.
        weights: Elements of the weight.
        nonzeros: Elements that are not zero; a NaN is not zero.
        violations: Blocks that break the pattern, or the mask that the checkpoint holds for them.
        reason: The first violating block and what is wrong with it; empty if there is none.
        transposed: Whether its input dimension is the first one.
    """

    name: str
    pattern: NMPattern
    blocks: int
    weights: int
    nonzeros: int
    violations: int
    reason: str = ""
    transposed: bool = False

    @property
    def compliant(self) -> bool:
        """Whether every block obeys."""
        return self.violations == 0

    @property
    def density(self) -> float:
        """Share of the weights that is not zero."""
        return self.nonzeros / self.weights


@dataclass(frozen=True)
class AuditReport:
    """What was checked, and what was not.

    Args:
        layers: The judged weights, in the order of the state dict or of the saved state. A weight that is judged by
            its saved pattern and by another one appears twice.
        skipped: Weights of two or more dimensions that were not judged: name -> reason.
        from_state: Whether a callback's saved state in the checkpoint named the layers and their masks.
    """

    layers: tuple[LayerAudit, ...]
    skipped: Mapping[str, str]
    from_state: bool

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
) -> AuditReport:
    """Audit a Lightning checkpoint or a state dict; code inside the file is never run.

    If the checkpoint holds the state of a sparsity callback, see `audit_saved_layers`, else `audit_state_dict`.

    Args:
        path: The file. A state dict may stand alone or under "state_dict" or "model".
        pattern: Required unless the checkpoint holds the callback's state.
        dense: Globs of the weights or modules that are dense on purpose.
        transposed: Globs of the weights or modules whose input dimension is the first one; the callback's state says it itself.

    Returns:
        The verdict on every layer.

    Raises:
        AuditError: If the file, the state in it, or an argument is unusable. The message names the file.
    """
    try:
        asked = None if pattern is None else NMPattern.parse(pattern)
    except ValueError as error:
        raise AuditError(str(error)) from None
    try:
        checkpoint = load_untrusted(Path(path))
        state = state_dict_of(checkpoint)
        saved = saved_layers(checkpoint)
        if saved is not None:
            return audit_saved_layers(state, saved, asked, dense=dense)
        if asked is None:
            raise AuditError(
                "holds no state of a sparsity callback, which would say which layers are sparse. Give `pattern` "
                "(on the command line `--pattern 1:16`)."
            )
        return audit_state_dict(state, asked, dense=dense, transposed=transposed)
    except (AuditError, UnreadableError) as error:
        raise AuditError(f"`{path}` {error}") from None


def audit_state_dict(
    state: Mapping[str, Tensor], pattern: NMPattern, *, dense: Sequence[str] = (), transposed: Sequence[str] = ()
) -> AuditReport:
    """Judge every eligible weight: named `*weight`, floating, of two or more dimensions, M dividing the input dimension.

    That is the second one, but for the weights in `transposed`. Names and shapes do not tell a classifier or an embedding from
    other layers: name those in `dense`.

    Args:
        state: A model's state dict.
        pattern: What the weights must obey.
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
) -> AuditReport:
    """Judge the layers that a callback's saved state names, by the pattern and the mask it saved for each.

    A block violates if it holds more than N non-zeros, holds one where the mask is False, or has a mask that does not
    keep exactly N. With `pattern`, a weight saved under another pattern is judged a second time, by `pattern`, if the
    latter's M divides its input dimension.

    Args:
        state: A model's state dict.
        saved: For every layer its "pattern", "shape" and packed "mask", as the callback saves them; "transposed" if that is so.
        pattern: Asked of all layers on top of their own.
        dense: Globs of the weights or modules not to judge.

    Returns:
        The verdict on every layer of `saved`, and why the other weights were not judged.

    Raises:
        AuditError: If `saved` is malformed or does not fit `state`, or a glob matches nothing.
    """
    excused = _matching(state, "dense", dense)
    layers = []
    skipped = {
        name: "matches `dense`" if name in excused else "dense in the callback's saved state"
        for name in _matrices(state)
        if name in excused or (name not in saved and name.endswith("weight"))
    }
    for name, entry in saved.items():
        own, mask, transposed = _read_entry(name, entry, state)
        if name in excused:
            continue
        layers.append(_judge(name, state[name], own, mask, transposed=transposed))
        if pattern is None or pattern == own:
            continue
        if reason := _indivisible(state[name], pattern, transposed):
            skipped[name] = f"for {pattern}: {reason}"
        else:
            layers.append(_judge(name, state[name], pattern, transposed=transposed))
    return AuditReport(tuple(layers), skipped, from_state=True)


def _judge(
    name: str, weight: Tensor, pattern: NMPattern, mask: Tensor | None = None, *, transposed: bool
) -> LayerAudit:
    try:
        nonzero = to_blocks(oriented(_strided(name, weight), transposed), pattern.m) != 0
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
    )


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
    return _indivisible(weight, pattern, transposed)


def _indivisible(weight: Tensor, pattern: NMPattern, transposed: bool) -> str:
    inputs = weight.shape[0 if transposed else 1]
    return f"{pattern.m} does not divide its input dimension {inputs}" if inputs % pattern.m else ""


def _read_entry(name: str, entry: Any, state: Mapping[str, Tensor]) -> tuple[NMPattern, Tensor, bool]:
    try:
        return _parse_entry(entry, state.get(name))
    except ValueError as error:
        raise AuditError(
            f"has a callback state whose layer `{name}` is malformed: {str(error).rstrip('.')}. Use a checkpoint as "
            "training wrote it."
        ) from None


def _parse_entry(entry: Any, weight: Tensor | None) -> tuple[NMPattern, Tensor, bool]:
    if not isinstance(entry, Mapping) or not {"pattern", "shape", "mask"} <= set(entry):
        raise ValueError("it lacks `pattern`, `shape` or `mask`")
    if weight is None:
        raise ValueError("the state dict has no such weight")
    shape, packed, pattern = entry["shape"], entry["mask"], NMPattern.parse(entry["pattern"])
    # By repr, since what a hostile file holds here may not compare.
    if not isinstance(shape, list | tuple) or repr(list(shape)) != repr(list(weight.shape)):
        raise ValueError(f"its `shape` is {shape!r:.60}, where the weight has {list(weight.shape)}")
    # States of earlier releases do not know transposed weights.
    transposed = entry.get("transposed", False)
    if not isinstance(transposed, bool) or (transposed and len(shape) != 2):
        raise ValueError(f"its `transposed` is {transposed!r:.20} for the shape {list(shape)}")
    if len(shape) < 2 or 0 in shape or _indivisible(weight, pattern, transposed):
        raise ValueError(f"its shape {list(shape)} does not divide into blocks of the pattern {pattern}")
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1 or not _is_plain(packed):
        raise ValueError("its `mask` is not a vector of uint8")
    return pattern, unpack_mask(packed, weight.shape), transposed


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def saved_layers(checkpoint: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Find what sparsity callbacks saved of their layers.

    Args:
        checkpoint: From `load_untrusted`.

    Returns:
        Name of a weight -> its saved entry, not yet checked; None if no sparsity callback saved anything.

    Raises:
        AuditError: If the state is of another version, names no layers, or names one twice.
    """
    callbacks = checkpoint.get("callbacks")
    values = callbacks.values() if isinstance(callbacks, Mapping) else ()
    states = [value for value in values if isinstance(value, Mapping) and VERSION_KEY in value]
    found: dict[str, Any] = {}
    for state in states:
        version, layers = state[VERSION_KEY], state.get("layers")
        # Anything may stand there: a tensor compares to no number.
        if repr(version) not in map(str, AUDITABLE):
            raise AuditError(
                f"has a callback state of `{VERSION_KEY}` {version!r:.20}, where this release reads {AUDITABLE[0]} to "
                f"{AUDITABLE[-1]}. "
                "Install the release of bame_lightning that wrote it."
            )
        if not isinstance(layers, Mapping) or not layers or not all(isinstance(name, str) for name in layers):
            raise AuditError("has a callback state that names no `layers`. Use a checkpoint as training wrote it.")
        if twice := found.keys() & layers.keys():
            raise AuditError(f"has two callback states that name `{min(twice)}`. Train with one sparsity callback.")
        found.update(layers)
    return found if states else None
