"""Fine-tune a trained BERT of transformers to 2:4, and export it for inference.

Run: `python examples/finetune_bert.py` (half a minute on one core; needs transformers).

For real: start from `BertForSequenceClassification.from_pretrained(NAME)` instead of `pretrained()`, with your data; a
few epochs at a third of the usual learning rate. A vision transformer of timm or torchvision takes its place without
another change.
"""

from pathlib import Path

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

from bame_lightning import BAMECallback
from bame_lightning.checkpoints.export import read_packed
from bame_lightning.cli.export import main as bame_export


class Classifier(L.LightningModule):
    """A BERT that says which of two words a sentence has more of."""

    def __init__(self, bert, lr):
        super().__init__()
        self.model, self.lr = bert, lr

    def training_step(self, batch, _):
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def sentences(count, seed):
    """Made data: 24 words of a vocabulary of 50; the label says whether word 7 is more frequent than word 8."""
    words = torch.randint(0, 50, (count, 24), generator=torch.Generator().manual_seed(seed))
    words[:, ::3] = 7 + words[:, ::3] % 2
    return torch.utils.data.TensorDataset(words, ((words == 7).sum(1) > (words == 8).sum(1)).long())


def train(bert, *callbacks, lr, epochs):
    """Train a BERT, say how it does on other sentences, and return the trainer."""
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks)
    )  # fmt: skip
    bert.train()
    trainer.fit(Classifier(bert, lr), torch.utils.data.DataLoader(sentences(2048, 0), batch_size=64, shuffle=True))
    words, labels = sentences(512, 1).tensors
    with torch.no_grad():
        accuracy = (bert.eval()(input_ids=words).logits.argmax(-1) == labels).float().mean()
    print(f"test accuracy {accuracy:.3f}")
    return trainer


def pretrained():
    """Stand in for a download: a small BERT, trained dense."""
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert = BertForSequenceClassification(config)
    train(bert, lr=1e-3, epochs=4)
    return bert


L.seed_everything(0)
bert = pretrained()
# A trained network has the right scale already: rescale=False. Embeddings and the classifier stay dense.
trainer = train(bert, BAMECallback("2:4", rescale=False), lr=3e-4, epochs=2)
trainer.save_checkpoint("bert.ckpt")

# What the command `bame-export` does. Every block is checked first.
bame_export(["bert.ckpt", "--format", "packed", "--output", "packed.safetensors"])
# For GPUs whose tensor cores multiply 2:4: float16 or bfloat16.
bame_export(
    ["bert.ckpt", "--format", "semi_structured", "--dtype", "float16", "--output", "semi_structured.safetensors"]
)

# At the place of inference: a plain BERT, without Lightning and without the callback.
served = BertForSequenceClassification(bert.config).eval()
served.load_state_dict(read_packed(Path("packed.safetensors")))
words = sentences(8, 2).tensors[0]
with torch.no_grad():
    same = torch.equal(served(input_ids=words).logits, bert.eval()(input_ids=words).logits)
print(f"the served BERT gives the same answers: {same}")
