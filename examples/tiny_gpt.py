"""A tiny GPT on the source text of Python's standard library, 2:4 sparse from the first step.

Run: `python examples/tiny_gpt.py` (half a minute on one core); another number of steps: `tiny_gpt.py 1000`.

For real: your text in place of `PythonSource`, a wider and deeper `gpt` (or a GPT-2 of transformers), and more steps.
"""

import sys
from functools import partial

import lightning as L
import torch

from bame_lightning import BAMECallback
from bame_lightning.tasks.gpt import gpt
from bame_lightning.tasks.language_model import LanguageModel
from bame_lightning.tasks.python_source import PythonSource

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
CONTEXT = 64

L.seed_everything(0)
data = PythonSource(context=CONTEXT, batch_size=32)
network = gpt((CONTEXT,), 256, width=64, depth=2, heads=4)
task = LanguageModel(network, partial(torch.optim.AdamW, lr=3e-3))
trainer = L.Trainer(
    max_steps=STEPS, accelerator="cpu", logger=False, limit_val_batches=20, enable_checkpointing=False,
    callbacks=[BAMECallback("2:4")],
)  # fmt: skip
trainer.fit(task, data)
[validated] = trainer.validate(task, data, verbose=False)
print(f"{validated['val/bits_per_byte']:.2f} bits per byte after {STEPS} steps")

text = torch.tensor([list(b"def ")])
for _ in range(100):
    logits = network(text[:, -CONTEXT:])[:, -1]
    text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], dim=1)
print(bytes(text[0].tolist()).decode(errors="replace"))
