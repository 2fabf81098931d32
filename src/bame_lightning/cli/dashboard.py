"""`bame-dashboard`: build a workspace at W&B that shows how masks evolve."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bame_lightning.cli.account import base_url, logged_in
from bame_lightning.cli.command import answers, command_parser, loading

_DESCRIPTION = """\
Build a workspace in a W&B project, with sections Oscillation, Masks, FLOPs,
Quality and Sweep (accuracy against training FLOPs and N:M). Once is enough: it
shows all runs of the project, future ones too. Each call makes another
workspace and changes no other."""

_EPILOG = """\
needs:
  pip install 'bame-lightning[dashboard]', and a W&B account: `wandb login`, or
  WANDB_API_KEY. Without an account, bame-report and `wandb leet` show runs.

exit status:
  0  the workspace was built
  1  nobody is logged in, W&B refused, or wandb-workspaces is missing
  2  the command line cannot be parsed"""


@answers("bame-dashboard", "Check its rights.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-dashboard`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if the workspace was built, else 1.
    """
    parser = command_parser("bame-dashboard", _DESCRIPTION, _EPILOG)
    parser.add_argument("--entity", required=True, help="user or team at W&B")
    parser.add_argument("--project", required=True, help="project whose runs are shown; bame-train's is bame-lightning")
    parser.add_argument("--layers", nargs="+", default=(), metavar="NAME", help="layers whose maps are shown")
    args = parser.parse_args(argv)
    loading("bame-dashboard", "Weights & Biases")
    print(f"Built: {build(args.entity, args.project, args.layers)}")
    return 0


def build(entity: str, project: str, layers: Sequence[str] = ()) -> str:
    """Build the workspace at W&B.

    Args:
        entity: User or team at W&B.
        project: Project whose runs are shown.
        layers: Layers whose maps are shown.

    Returns:
        Address of the workspace.

    Raises:
        ValueError: If it cannot be built.
    """
    if not logged_in():
        raise ValueError(
            f"nobody is logged in to W&B at {base_url()}. Run `wandb login`, or set WANDB_API_KEY; without an account, look at "
            "runs with `bame-report RUN_DIR` or `wandb leet RUN_DIR/wandb`."
        )
    try:
        from bame_lightning.show.dashboard import workspace
    except ImportError as error:
        raise ValueError(f"{error}. Install it with: pip install 'bame-lightning[dashboard]'") from None
    try:
        return str(workspace(entity, project, layers).save().url)
    except Exception as error:  # W&B raises classes of its own internals, too
        reason = " ".join(str(error).split())
        raise ValueError(
            f"W&B at {base_url()} did not build a workspace for `--entity` {entity} and `--project` {project}: {reason}. "
            "The project must exist, and the account must be allowed to write to it."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
