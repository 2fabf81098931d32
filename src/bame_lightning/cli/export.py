"""`bame-export`: hand a trained N:M model on, as one file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bame_lightning.audit import AuditError
from bame_lightning.cli.checkpoints import add_arguments, printable
from bame_lightning.cli.networks import network_of_function, network_of_run
from bame_lightning.export import (
    ExportError,
    Trained,
    load_trained,
    packed_tensors,
    read_packed,
    semi_structured_tensors,
)
from bame_lightning.export.files import replacing, same_bits, same_values, write_safetensors
from bame_lightning.export.onnx_model import Inputs, load_weights, write_onnx
from bame_lightning.export.semi_structured import read_dense

_FORMATS = ("dense", "packed", "semi_structured", "onnx")
_DTYPES = ("float32", "float16", "bfloat16")

_DESCRIPTION = """\
Write the model of a checkpoint to a file that needs neither Lightning nor this
package. The checkpoint is audited first, and refused if a block violates its
N:M pattern. The file appears whole or not at all."""

_EPILOG = """\
formats (docs/export.md has the layouts and a reader of a few lines for each):
  dense            state dict with zeros inside, as safetensors
  packed           N values of every block and their positions, as safetensors
  semi_structured  weights that fit 2:4 as torch's sparse tensors hold them for
                   a GPU, the others dense, as safetensors
  onnx             the network, checked: onnxruntime must compute what torch
                   does. Needs pip install 'bame-lightning[export]', and the
                   network: by itself where the checkpoint lies in a run folder
                   of bame-train, else --model and --input-shape. Building it
                   runs the code that they name.

exit status:
  0  the file was written
  1  the model is not N:M sparse, or cannot be exported as asked
  2  the command line cannot be parsed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-export`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if the file was written, else 1.
    """
    args = _parser().parse_args(argv)
    checkpoint: Path = args.checkpoint
    try:
        _check(args)
        trained = load_trained(
            checkpoint, args.pattern, dense=args.dense, transposed=args.transposed, prefix=args.prefix
        )
        if args.dtype is not None:
            trained = trained.to(getattr(torch, args.dtype))
        try:
            with replacing(args.output) as part:
                lines = _write(trained, args, part)
        except ExportError as error:
            raise ExportError(f"`{checkpoint}` {error}") from error
    except (ExportError, AuditError, OSError) as error:
        print(f"bame-export: error: {printable(str(error))}", file=sys.stderr)
        return 1
    for line in (*_contents(trained), *lines):
        print(printable(line))
    size = args.output.stat().st_size
    dense = sum(tensor.numel() * tensor.element_size() for tensor in trained.tensors.values())
    print(f"Written: {args.output} ({_bytes(size)}; the dense tensors take {_bytes(dense)})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bame-export",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--format", required=True, choices=_FORMATS, help="see below")
    parser.add_argument("--output", required=True, metavar="FILE", type=Path, help="replaced if it exists")
    parser.add_argument(
        "--prefix",
        help="export only names that begin with it, without it; '' keeps all names. By default 'model.' if all names of a "
        "Lightning checkpoint begin with it",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="round floating-point tensors to it (not for onnx)")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="onnx: a function that builds the network")
    parser.add_argument(
        "--input-shape", metavar="SHAPE", help="onnx: shape of one input without the batch, e.g. 3,32,32"
    )
    parser.add_argument("--tokens", metavar="N", type=int, help="onnx: inputs are whole numbers below N")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Find out about wrong arguments before anything is read."""
    output: Path = args.output
    if output.is_dir():
        raise ExportError(f"`--output` must be a file; {output} is a folder.")
    if not output.absolute().parent.is_dir():
        raise ExportError(f"`--output` must lie in a folder that exists; {output.parent} does not. Make it first.")
    if output.exists() and args.checkpoint.exists() and output.samefile(args.checkpoint):
        raise ExportError(f"`--output` must not be the checkpoint itself; got {output} for both. Choose another name.")
    if args.format == "onnx":
        if args.dtype is not None:
            raise ExportError(f"`--dtype` is for the other formats; got {args.dtype} with onnx. Leave it out.")
        if args.model is not None and args.input_shape is None:
            raise ExportError(
                "`--model` needs `--input-shape`, the shape of one input without the batch, e.g. 3,32,32."
            )
        if args.tokens is not None and args.tokens < 1:
            raise ExportError(f"`--tokens` must be at least 1; got {args.tokens}.")
        if args.input_shape is not None:
            _shape(args.input_shape)
    else:
        options = {"--model": args.model, "--input-shape": args.input_shape, "--tokens": args.tokens}
        if given := [option for option, value in options.items() if value is not None]:
            raise ExportError(f"`{given[0]}` is for `--format onnx`; got it with {args.format}. Leave it out.")


def _write(trained: Trained, args: argparse.Namespace, part: Path) -> list[str]:
    """Write the file, and read it back; returns what to tell beside its contents."""
    if args.format == "dense":
        write_safetensors(part, trained.state_dict(), {"format": "pt"})
        return []
    if args.format == "packed":
        tensors, metadata = packed_tensors(trained)
        write_safetensors(part, tensors, metadata)
        if not same_bits(read_packed(part), trained.state_dict()):
            raise ExportError("gave a packed file that reads back differently, so it was not kept. Report this.")
        return []
    if args.format == "semi_structured":
        tensors, metadata, dense = semi_structured_tensors(trained)
        write_safetensors(part, tensors, metadata)
        if not same_values(read_dense(part), trained.state_dict()):
            raise ExportError(
                "gave a semi-structured file that reads back differently, so it was not kept. Report this."
            )
        return [f"{name} stays dense: {reason}" for name, reason in dense.items()]
    shape = None if args.input_shape is None else _shape(args.input_shape)
    if args.model is None:
        network, inputs = network_of_run(args.checkpoint, shape)
    else:
        assert shape is not None
        network, inputs = network_of_function(args.model), Inputs(shape)
    if args.tokens is not None:
        inputs = Inputs(inputs.shape, args.tokens)
    load_weights(network, trained.state_dict())
    difference = write_onnx(network, inputs, part)
    return [f"onnxruntime computes what torch does: outputs differ by {difference:.1g} at most"]


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ExportError(
            f"`--input-shape` must be whole numbers with commas, the shape of one input such as 3,32,32; got {text!r}."
        )
    return tuple(map(int, text.split(",")))


def _contents(trained: Trained) -> list[str]:
    patterns = sorted({str(pattern) for pattern in trained.patterns.values()})
    weights = len(trained.patterns)
    lines = [f"OK: every block obeys, in {weights} weight{'s' * (weights != 1)} at {', '.join(patterns)}"]
    if trained.prefix:
        lines.append(f"Names are those below '{trained.prefix}' (--prefix '' keeps them whole)")
    if trained.left_out:
        lines.append(f"Left out, not below '{trained.prefix}': {', '.join(trained.left_out)}")
    return lines


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"


if __name__ == "__main__":
    sys.exit(main())
