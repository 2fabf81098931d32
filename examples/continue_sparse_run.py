"""Continue a sparse run in three ways: after an interruption, on new data, and under the same mask for good.

Run: `python examples/continue_sparse_run.py` (seconds).

For real: your module and data in place of `Net` and `data`; the checkpoint is the one that your Trainer writes anyway.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn

from bame_lightning import BAMECallback, StaticMask


class Net(L.LightningModule):
    """A classifier of digits."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


digits = load_digits()
pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def data(first, last):
    """Some of the digits, in batches."""
    some = torch.utils.data.TensorDataset(pixels[first:last], labels[first:last])
    return torch.utils.data.DataLoader(some, batch_size=64)


def trainer(callback, epochs):
    """A Trainer that writes nothing by itself."""
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback]
    )  # fmt: skip


def kept(net):
    """Where the weights of the second layer are not zero."""
    return net.net[2].weight != 0


L.seed_everything(0)
first = Net()
half = trainer(BAMECallback("1:4"), epochs=2)
half.fit(first, data(0, 1000))
half.save_checkpoint("half.ckpt")

# 1. It was interrupted: ckpt_path brings back weights, optimizer, masks and all that evolves.
resumed, method = Net(), BAMECallback("1:4")
trainer(method, epochs=4).fit(resumed, data(0, 1000), ckpt_path="half.ckpt")
print(f"resumed: {method.steps} steps in all, {method.adaptations} adaptations")

# 2. New data: a new run from the weights. init="nonzero" takes the first mask from their zeros; it evolves from there.
moved = Net()
moved.load_state_dict(resumed.state_dict())
trainer(BAMECallback("1:4", init="nonzero"), epochs=2).fit(moved, data(1000, 1437))
print(
    f"on new data: {(kept(moved) & kept(resumed)).sum() / kept(resumed).sum():.2f} of the kept weights are still kept"
)

# 3. The mask is final: only the weights train on.
final = Net()
final.load_state_dict(moved.state_dict())
trainer(StaticMask("1:4", init="nonzero"), epochs=2).fit(final, data(1000, 1437))
accuracy = (final.net(pixels[1437:]).argmax(-1) == labels[1437:]).float().mean()
print(f"under the same mask: {torch.equal(kept(final), kept(moved))}, test accuracy {accuracy:.3f}")
