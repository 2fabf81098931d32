"""The work of `bame-export`: audit, write, read back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from bame_lightning.checkpoints.audit import AuditError, count_not_finite
from bame_lightning.checkpoints.export import (
    ExportError,
    Trained,
    load_trained,
    packed_tensors,
    semi_structured_tensors,
)
from bame_lightning.checkpoints.export.files import same_bits, same_values, write_safetensors
from bame_lightning.checkpoints.export.onnx_model import Inputs, load_weights, write_onnx
from bame_lightning.checkpoints.export.trained import layers_of
from bame_lightning.checkpoints.files.exported import LAYERS, expanded
from bame_lightning.checkpoints.files.read import read_safetensors
from bame_lightning.checkpoints.replacing import replacing
from bame_lightning.cli.export import shape_of
from bame_lightning.cli.networks import network_of_function, network_of_run
from bame_lightning.show.numbers import amount


def export(args: argparse.Namespace) -> list[str]:
    """Write the file that the arguments of `bame-export` ask for.

    Args:
        args: The arguments, checked.

    Returns:
        Lines to print.

    Raises:
        ExportError: If the checkpoint cannot be audited or exported.
    """
    checkpoint: Path = args.checkpoint
    try:
        trained = load_trained(
            checkpoint,
            args.pattern,
            dense=args.dense,
            transposed=args.transposed,
            prefix=args.prefix,
            key=args.key,
        )
    except AuditError as error:
        raise ExportError(str(error)) from error
    if args.dtype is not None:
        trained = trained.to(getattr(torch, args.dtype))
    try:
        with replacing(args.output) as part:
            told = _write(trained, args, part)
    except ExportError as error:
        raise ExportError(f"`{checkpoint}` {error}") from error
    size = args.output.stat().st_size
    dense = sum(tensor.numel() * tensor.element_size() for tensor in trained.tensors.values())
    written = f"Written: {args.output} ({_bytes(size)}; the dense tensors take {_bytes(dense)})"
    return [*_contents(trained), *told, written]


def _write(trained: Trained, args: argparse.Namespace, part: Path) -> list[str]:
    """Write the file and read it back; return further lines to print."""
    state = trained.state_dict()
    if args.format == "onnx":
        network, inputs = _network(args)
        load_weights(network, state)
        difference = write_onnx(network, inputs, part)
        return [f"onnxruntime computes what torch does: outputs differ by {difference:.1g} at most"]
    told, same = list[str](), same_bits
    if args.format == "dense":
        tensors, metadata = state, {"format": "pt", LAYERS: json.dumps(layers_of(trained))}
    elif args.format == "packed":
        tensors, metadata = packed_tensors(trained)
    else:
        tensors, metadata, dense = semi_structured_tensors(trained)
        told, same = [f"{name} stays dense: {reason}" for name, reason in dense.items()], same_values
    write_safetensors(part, tensors, metadata)
    if not same(expanded(*read_safetensors(part)), state):
        raise ExportError("gave a file that reads back differently, so it was not kept. Report this.")
    return told


def _network(args: argparse.Namespace) -> tuple[nn.Module, list[Inputs]]:
    """Build the network that becomes ONNX, with new weights; return it and its inputs."""
    inputs = [Inputs(shape, below or args.tokens) for shape, below in map(shape_of, args.input_shape or ())]
    if args.model is not None:
        return network_of_function(args.model), inputs
    network, first = network_of_run(args.checkpoint, inputs[0].shape if inputs else None)
    if not inputs or inputs[0].vocabulary is None:
        inputs[:1] = [Inputs(first.shape, args.tokens or first.vocabulary)]
    return network, inputs


def _contents(trained: Trained) -> list[str]:
    patterns = sorted({str(pattern) for pattern in trained.patterns.values()})
    lines = [f"OK: every block obeys, in {amount(len(trained.patterns), 'weight')} at {', '.join(patterns)}"]
    if trained.prefix:
        lines.append(f"Names are those below '{trained.prefix}' (--prefix '' keeps them whole)")
    if trained.left_out:
        lines.append(f"Left out, not below '{trained.prefix}': {', '.join(trained.left_out)}")
    else:
        lines += _beginnings(trained)
    if broken := [name for name, tensor in trained.tensors.items() if count_not_finite(tensor)]:
        lines.append(f"Values that are not finite are in {', '.join(broken)}")
    if trained.dropped:
        lines.append(f"Dropped from names: {', '.join(trained.dropped)}")
    if trained.unread:
        lines.append(f"Not read: {'; '.join(trained.unread)}")
    return lines


def _beginnings(trained: Trained) -> list[str]:
    """Say which names fit a plain model only without their beginning."""
    first = {name.partition(".")[0] for name in trained.state_dict()}
    if len(first) > 1 or not all("." in name for name in trained.state_dict()):
        return []
    prefix = f"{first.pop()}."
    return [f"All names begin with '{prefix}'; --prefix {prefix} drops it, where the plain model has no such part"]


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"
