"""`bame-bench`: measure what a training step costs with each method."""

from __future__ import annotations

from omegaconf import DictConfig

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.cli.command import loading
from bame_lightning.cli.composed import hydra_command
from bame_lightning.cli.errors import one_line_errors
from bame_lightning.cli.values import check_values, standard_values
from bame_lightning.cli.without_training import fill_counts, tell


@hydra_command("bame-bench", "bench")
def main(cfg: DictConfig) -> None:
    """Measure training steps as the configuration says, and print the result.

    Args:
        cfg: The composed configuration.
    """
    with one_line_errors("bame-bench"):
        NMPattern.parse(cfg.pattern)
        check_values(cfg, standard_values())
        fill_counts(cfg, batch_size=32, cycles=3)
        loading("bame-bench", "PyTorch and Lightning")
        from bame_lightning.cli.measuring import bench, show

        tell(cfg, bench(cfg), show)


if __name__ == "__main__":
    main()
