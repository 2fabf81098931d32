"""Add BAME to a Trainer that exists: one import, one callback. Run: `python examples/existing_trainer.py` (seconds)."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn

from bame_lightning import BAMECallback


class Net(L.LightningModule):
    """A classifier as you may have it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


digits = load_digits()
pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
data = torch.utils.data.TensorDataset(pixels[:1437], labels[:1437])
model = Net()
trainer = L.Trainer(max_epochs=5, accelerator="cpu", callbacks=[BAMECallback("1:16")])
trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=64, shuffle=True))
accuracy = (model.net(pixels[1437:]).argmax(-1) == labels[1437:]).float().mean()
print(f"test accuracy {accuracy:.3f} with {(model.net[2].weight != 0).float().mean():.4f} of a layer's weights")
