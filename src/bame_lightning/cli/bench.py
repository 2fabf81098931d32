"""`bame-bench`: measure what a training step costs with each method."""

from __future__ import annotations

from omegaconf import DictConfig

from bame_lightning.cli.composed import hydra_command
from bame_lightning.cli.without_training import prepared, tell


@hydra_command("bame-bench", "bench")
def main(cfg: DictConfig) -> None:
    """Measure training steps as the configuration says, and print the result.

    Args:
        cfg: The composed configuration.
    """
    with prepared(cfg, "bame-bench", "PyTorch and Lightning", batch_size=32, cycles=3):
        from bame_lightning.cli.measuring import bench, show

        tell(cfg, bench(cfg), show)


if __name__ == "__main__":
    main()
