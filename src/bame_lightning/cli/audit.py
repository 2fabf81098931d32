"""`bame-audit`: does every block of a checkpoint obey its N:M pattern?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bame_lightning.cli.checkpoints import add_arguments, check_given
from bame_lightning.cli.command import answers, command_parser, loading

_DESCRIPTION = """\
Check that every block of a checkpoint's weights obeys its N:M pattern: at most
N non-zeros in every M consecutive weights of the input dimension. Never runs
code from the file, and says what it did not read."""

_EPILOG = """\
what is read:
  Lightning checkpoints, state dicts of torch.save, safetensors, exports of
  bame-export; shards by their index or folder, folders of
  torch.distributed.checkpoint. If a file holds several sets of weights, it is
  "state_dict" or "model", unless --key names another. What torch.compile, DDP
  and FSDP put into names is dropped. Adapters must be merged first.

which weights are checked:
  A checkpoint may hold the state of a sparsity callback. Then the layers that
  it names are checked, each by its saved pattern and mask: a block also
  violates if a weight outside the mask is not zero, or if the mask does not
  keep exactly N. Of an export the layers are checked that its metadata name.
  With --pattern, a weight saved under another pattern is checked by --pattern
  as well, if its M divides the input dimension.

  Otherwise --pattern is required. Every floating weight named *weight with two
  or more dimensions is checked if M divides its input dimension: the second,
  or the first for weights that --transposed names. So a dense classifier or
  embedding fails until --dense names it.

exit status:
  0  at least one weight was checked, and every one obeys
  1  a block violates, no weight was checked, or the input is unusable
  2  the command line cannot be parsed"""


@answers("bame-audit", "Check the path, or its rights.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-audit`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if everything obeys, else 1.
    """
    parser = command_parser("bame-audit", _DESCRIPTION, _EPILOG)
    add_arguments(parser)
    args = parser.parse_args(argv)
    check_given(args.checkpoint, args.pattern)
    loading("bame-audit", "PyTorch")
    from bame_lightning.checkpoints.audit import audit_checkpoint
    from bame_lightning.cli.verdict import show

    report = audit_checkpoint(args.checkpoint, args.pattern, dense=args.dense, transposed=args.transposed, key=args.key)
    show(report)
    return 0 if report.compliant else 1


if __name__ == "__main__":
    sys.exit(main())
