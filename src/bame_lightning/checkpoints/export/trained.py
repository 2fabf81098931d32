"""A trained N:M model from a checkpoint: audited, with the names of the plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from bame_lightning.blocks.layout import from_blocks, oriented, to_blocks
from bame_lightning.blocks.masks import top_n_mask, unpack_mask, zeroed
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.checkpoints.audit import AuditReport, audit_weights, read
from bame_lightning.checkpoints.saved import layers_in

_NETWORK = "model."


class ExportError(ValueError):
    """The model cannot be exported as asked; one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class Trained:
    """The model to export.

    Args:
        tensors: Parameters and buffers by name, each tensor once; contiguous, and +0 where weights are pruned.
        patterns: Name of a sparse weight -> its pattern.
        kept: Name of a sparse weight -> its mask, shaped like the weight; exactly N true in every block.
        same_as: Further names of tensors (tied weights) -> their name in `tensors`.
        prefix: The beginning of every name, which was dropped.
        left_out: Names of the checkpoint's tensors that do not begin with `prefix`.
        transposed: Names of sparse weights whose input dimension is the first one.
        unread: In words, what the file holds beside these weights.
        dropped: Wrappers that were dropped from names, such as `torch.compile`'s "_orig_mod.".
    """

    tensors: Mapping[str, Tensor]
    patterns: Mapping[str, NMPattern]
    kept: Mapping[str, Tensor]
    same_as: Mapping[str, str]
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Tensor]:
        """All names with their tensors, for `load_state_dict` of the plain model."""
        return {**self.tensors, **{alias: self.tensors[name] for alias, name in self.same_as.items()}}

    def to(self, dtype: torch.dtype) -> Trained:
        """Round every floating-point tensor to another type.

        Args:
            dtype: The type.

        Returns:
            The model in that type, under the same masks.

        Raises:
            ExportError: If a finite number becomes infinite.
        """
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in self.tensors.items()
        }
        for name, tensor in tensors.items():
            if (tensor.isinf() & self.tensors[name].isfinite()).any():
                raise ExportError(
                    f"holds in `{name}` values beyond {str(dtype).removeprefix('torch.')}'s largest, "
                    f"{torch.finfo(dtype).max:g}. Choose another `--dtype`, such as bfloat16."
                )
        return replace(self, tensors=tensors)


def layers_of(trained: Trained) -> dict[str, dict[str, Any]]:
    """Describe the sparse layers of an exported file, so that an audit needs no option.

    Args:
        trained: The model.

    Returns:
        Name -> "pattern", "shape" and, if the weight is, "transposed".
    """
    return {
        name: {"pattern": str(pattern), "shape": list(trained.tensors[name].shape)}
        | ({"transposed": True} if name in trained.transposed else {})
        for name, pattern in trained.patterns.items()
    }


def load_trained(
    path: str | Path,
    pattern: NMPattern | str | None = None,
    *,
    dense: Sequence[str] = (),
    transposed: Sequence[str] = (),
    prefix: str | None = None,
    key: str | None = None,
) -> Trained:
    """Audit a checkpoint and take the model out of it; code inside the file is never run.

    Masks are those of the callback's saved state. Without it they are read off the weights: a block with fewer than N
    non-zeros then keeps its first zeros as well.

    Args:
        path: A Lightning checkpoint or a state dict, as `audit_checkpoint` reads it.
        pattern: Required unless the checkpoint holds the state of a sparsity callback.
        dense: Globs of the weights or modules that are dense on purpose.
        transposed: Globs of the weights or modules whose input dimension is the first one, as `audit_checkpoint` takes them.
        prefix: Export the tensors whose names begin with it, and drop it from the names. None drops "model.", under
            which most LightningModules keep their network, if every name of a Lightning checkpoint begins with it.
        key: Which set of weights, where a file holds several, as `audit_checkpoint` takes it.

    Returns:
        The model.

    Raises:
        AuditError: If the file or an argument is unusable.
        ExportError: If a block violates its pattern, no sparse weight is found, or a tensor cannot be written.
    """
    path = Path(path)
    weights = read(path, key)
    report = audit_weights(path, weights, pattern, dense=dense, transposed=transposed)
    _check_compliant(path, report)
    state, saved = weights.tensors, layers_in(weights) or {}
    if prefix is None:
        prefix = _NETWORK if weights.lightning and all(name.startswith(_NETWORK) for name in state) else ""
    names = [name for name in state if name.startswith(prefix) and name != prefix]
    # Of a weight that is judged twice the verdict by its own pattern comes first.
    patterns: dict[str, NMPattern] = {}
    for layer in report.layers:
        if layer.name in names:
            patterns.setdefault(layer.name, layer.pattern)
    turned = {layer.name for layer in report.layers if layer.transposed}
    if not patterns:
        _refuse_names(path, list(state), prefix)
    for name in names:
        _check_plain(path, name, state[name])
    short = {name: name.removeprefix(prefix) for name in names}
    # Sparse weights first, so that a tied weight is stored under the name that has the mask.
    same_as = _ties({name: state[name] for name in sorted(names, key=lambda name: name not in patterns)})
    tensors = {name: state[name].detach().contiguous() for name in names if name not in same_as}
    kept = {
        name: _mask(tensor, patterns[name], name in turned, saved.get(name))
        for name, tensor in tensors.items()
        if name in patterns
    }
    for name, mask in kept.items():
        tensors[name] = zeroed(tensors[name], mask)  # a pruned -0 becomes +0, as readers of every format make it
    return Trained(
        tensors={short[name]: tensor for name, tensor in tensors.items()},
        patterns={short[name]: own for name, own in patterns.items() if name not in same_as},
        kept={short[name]: mask for name, mask in kept.items()},
        same_as={short[alias]: short[name] for alias, name in same_as.items()},
        prefix=prefix,
        left_out=tuple(name for name in state if name not in short),
        unread=weights.unread,
        dropped=weights.dropped,
        transposed=frozenset(short[name] for name in turned.intersection(patterns) - same_as.keys()),
    )


def _check_compliant(path: Path, report: AuditReport) -> None:
    bad = [layer for layer in report.layers if not layer.compliant]
    if bad:
        raise ExportError(
            f"`{path}` is not N:M sparse: {bad[0].name} violates {bad[0].pattern}, {bad[0].reason}"
            f"{f'; {len(bad) - 1} more weights do' if len(bad) > 1 else ''}. Export what a sparsity callback trained, or "
            f"name what is dense on purpose: --dense '{bad[0].name}'. `bame-audit` lists every weight."
        )


def _refuse_names(path: Path, names: list[str], prefix: str) -> NoReturn:
    first = ", ".join(f"`{name}`" for name in names[:3])
    where = f" below the `--prefix` {prefix!r}" if prefix else ""
    raise ExportError(
        f"`{path}` holds no N:M sparse weight{where}; its names begin with {first}. Choose a `--pattern` whose M divides "
        "input dimensions, or another `--prefix`."
    )


def _mask(weight: Tensor, pattern: NMPattern, transposed: bool, saved: Mapping[str, Any] | None) -> Tensor:
    if saved is not None and "mask" in saved:
        return unpack_mask(saved["mask"], weight.shape)
    weight = oriented(weight, transposed)
    nonzero = (to_blocks(weight, pattern.m) != 0).to(torch.uint8)
    return oriented(from_blocks(top_n_mask(nonzero, pattern.n), weight.shape), transposed).contiguous()


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    wrong = ""
    if tensor.is_quantized:
        wrong = "is quantized"
    elif tensor.is_nested or tensor.layout != torch.strided:
        wrong = f"has the layout {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')}"
    elif tensor.is_meta:
        wrong = "holds no values (a meta tensor)"
    if wrong:
        raise ExportError(f"`{path}` holds `{name}`, which {wrong}. Save the model with plain dense tensors.")


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of a tensor -> an earlier name of the same view of the same memory."""
    first: dict[tuple[object, ...], str] = {}
    ties = {}
    for name, tensor in tensors.items():
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in first:
            ties[name] = first[view]
        first.setdefault(view, name)
    return ties
