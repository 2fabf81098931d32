"""Prune a trained dense network to 2:4 and fine-tune it; then hold the mask fixed, then go on to 1:4.

Run: `python examples/finetune_dense.py` (seconds). Weights are loaded into the plain model; masks are found again where they
are needed, so no step needs the callback of the step before.

For real: your module in place of `Net`, and the state dict of your trained network in place of `dense`.
"""

import copy

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn

from bame_lightning import BAMECallback, StaticMask


class Net(L.LightningModule):
    """A classifier of digits."""

    def __init__(self, lr):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.lr = lr

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


digits = load_digits()
pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
data = torch.utils.data.TensorDataset(pixels[:1437], labels[:1437])


def train(name, state, *callbacks, lr=3e-4, epochs=2):
    """Start from a state dict, train, and say what came out."""
    model = Net(lr)
    if state is not None:
        model.load_state_dict(state)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks)
    )
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=64, shuffle=True))
    accuracy = (model.net(pixels[1437:]).argmax(-1) == labels[1437:]).float().mean()
    print(f"{name}: test accuracy {accuracy:.3f}, {(model.net[2].weight != 0).float().mean():.2f} of a layer's weights")
    return copy.deepcopy(model.state_dict())


L.seed_everything(0)
dense = train("dense", None, lr=3e-3, epochs=4)
# A trained network has the right scale already: rescale=False.
sparse = train("dense to 2:4", dense, BAMECallback("2:4", rescale=False))
# init="nonzero" takes the mask from the zeros of the weights; it stays as it is.
frozen = train("2:4 under its own mask", sparse, StaticMask("2:4", init="nonzero"))
# The larger of the two weights of each block is kept, and masks evolve from there.
train("2:4 to 1:4", frozen, BAMECallback("1:4", rescale=False))
