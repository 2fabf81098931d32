"""`bame-flops`: count what training a model costs with each method, without training."""

from __future__ import annotations

from omegaconf import DictConfig

from bame_lightning.cli.composed import hydra_command
from bame_lightning.cli.without_training import prepared, tell


@hydra_command("bame-flops", "flops")
def main(cfg: DictConfig) -> None:
    """Count training as the configuration describes it, and print the result.

    Args:
        cfg: The composed configuration.
    """
    with prepared(cfg, "bame-flops", "PyTorch", steps=100_000, batch_size=256):
        from bame_lightning.cli.costs import count, show

        tell(cfg, count(cfg), show)


if __name__ == "__main__":
    main()
