"""`bame-export`: write a trained N:M model to one file."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bame_lightning.cli.checkpoints import add_arguments, check_given
from bame_lightning.cli.command import answers, command_parser, loading, printable

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
                   network: a run folder of bame-train tells it, else give
                   --model and --input-shape. Building it runs the code that
                   these name.

exit status:
  0  the file was written
  1  the model is not N:M sparse, or cannot be exported as asked
  2  the command line cannot be parsed"""


@answers("bame-export", "Name another path with --output.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-export`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if the file was written, else 1.
    """
    args = _parser().parse_args(argv)
    _check(args)
    check_given(args.checkpoint, args.pattern)
    loading("bame-export", "PyTorch")
    from bame_lightning.cli.exporting import export

    for line in export(args):
        print(printable(line))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("bame-export", _DESCRIPTION, _EPILOG)
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
        "--input-shape",
        metavar="SHAPE",
        action="append",
        help="onnx: shape of one input without the batch, e.g. 3,32,32; 128:1000 are 128 whole numbers below 1000. "
        "Repeated for a network with several inputs, in the order of its arguments",
    )
    parser.add_argument("--tokens", metavar="N", type=int, help="onnx: inputs are whole numbers below N")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuse wrong arguments before anything is read."""
    output: Path = args.output
    if output.exists() and not output.is_file():
        what = "a folder" if output.is_dir() else "none, and would be replaced"
        raise ValueError(f"`--output` must be a file; {output} is {what}.")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"`--output` must lie in a folder that exists; {output.parent} does not. Make it first.")
    if output.exists() and args.checkpoint.exists() and output.samefile(args.checkpoint):
        raise ValueError(f"`--output` must not be the checkpoint itself; got {output} for both. Choose another name.")
    if args.format == "onnx":
        if args.dtype is not None:
            raise ValueError(f"`--dtype` is for the other formats; got {args.dtype} with onnx. Leave it out.")
        if args.model is not None and args.input_shape is None:
            raise ValueError("`--model` needs `--input-shape`, the shape of one input without the batch, e.g. 3,32,32.")
        if args.tokens is not None and args.tokens < 1:
            raise ValueError(f"`--tokens` must be at least 1; got {args.tokens}.")
        for text in args.input_shape or ():
            shape_of(text)
    else:
        options = {"--model": args.model, "--input-shape": args.input_shape, "--tokens": args.tokens}
        if given := [option for option, value in options.items() if value is not None]:
            raise ValueError(f"`{given[0]}` is for `--format onnx`; got it with {args.format}. Leave it out.")


def shape_of(text: str) -> tuple[tuple[int, ...], int | None]:
    """Read an input, "3,32,32" or "128:1000".

    Args:
        text: The value of `--input-shape`.

    Returns:
        The sizes; the bound of whole numbers, None for other numbers.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> shape_of("3,32,32"), shape_of("128:1000")
        (((3, 32, 32), None), ((128,), 1000))
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*(:[1-9]\d*)?", text):
        raise ValueError(
            f"`--input-shape` must be whole numbers with commas, the shape of one input such as 3,32,32; got {text!r}."
        )
    sizes, _, below = text.partition(":")
    return tuple(map(int, sizes.split(","))), int(below) if below else None


if __name__ == "__main__":
    sys.exit(main())
