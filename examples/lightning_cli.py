"""BAME from LightningCLI: the callback and its arguments come from a file.

Run: `python examples/lightning_cli.py fit --config examples/lightning_cli.yaml` (seconds).
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn


class Net(L.LightningModule):
    """A classifier of digits.

    Args:
        width: Neurons of the hidden layers.
        lr: Learning rate.
    """

    def __init__(self, width: int = 128, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.lr = lr

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        digits = load_digits()
        pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels, labels), batch_size=64, shuffle=True)


if __name__ == "__main__":
    LightningCLI(Net, save_config_callback=None)
