"""`bame-flops`: count what training a model costs with each method, without training."""

from __future__ import annotations

from omegaconf import DictConfig

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.cli.command import loading
from bame_lightning.cli.composed import hydra_command
from bame_lightning.cli.errors import one_line_errors
from bame_lightning.cli.values import check_values, standard_values
from bame_lightning.cli.without_training import fill_counts, tell


@hydra_command("bame-flops", "flops")
def main(cfg: DictConfig) -> None:
    """Count training as the configuration describes it, and print the result.

    Args:
        cfg: The composed configuration.
    """
    with one_line_errors("bame-flops"):
        NMPattern.parse(cfg.pattern)
        check_values(cfg, standard_values())
        fill_counts(cfg, steps=100_000, batch_size=256)
        loading("bame-flops", "PyTorch")
        from bame_lightning.cli.costs import count, show

        tell(cfg, count(cfg), show)


if __name__ == "__main__":
    main()
