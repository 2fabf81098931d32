"""A pattern for each kind of layer of a vision transformer.

Run: `python examples/per_layer_patterns.py` (seconds).

For real: your model and data, and rules for the names that the table of layers shows when fit starts.
"""

import lightning as L
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn

from bame_lightning import BAMECallback


class ViT(L.LightningModule):
    """torchvision's vision transformer, small, on digits of 8x8 pixels."""

    def __init__(self):
        super().__init__()
        self.vit = torchvision.models.VisionTransformer(
            image_size=8, patch_size=2, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10
        )

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.vit(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
data = torch.utils.data.TensorDataset(images[:1437], torch.tensor(digits.target[:1437]))

# A name or a glob over names of modules and parameters -> a pattern or "dense". The last match wins.
rules = {
    "*.self_attention.*": "2:4",  # the packed projections in_proj_weight, and out_proj
    "*.mlp.3": "2:8",  # the second linear layer of each MLP
    "vit.encoder.layers.encoder_layer_0.*": "dense",
}
callback = BAMECallback("1:4", layers=rules)  # 1:4 for all others that can be sparse
trainer = L.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback]
)  # fmt: skip
trainer.fit(ViT(), torch.utils.data.DataLoader(data, batch_size=64, shuffle=True))
for layer, pattern in callback.summary()["layers"].items():
    print(pattern, layer)
