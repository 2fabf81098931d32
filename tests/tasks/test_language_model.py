import math
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from bame_lightning.tasks import LanguageModel, PythonSource
from bame_lightning.tasks.gpt import gpt
from bame_lightning.tasks.schedulers import cosine

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]


@pytest.fixture
def data(tmp_path: Path) -> PythonSource:
    for index in range(20):
        (tmp_path / f"module{index}.py").write_text(f"def f{index}(x):\n    return x + {index}\n\n\n" * 10)
    return PythonSource(str(tmp_path), context=16, batch_size=8, val_share=0.1)


def test_bits_per_byte_by_hand() -> None:
    # One byte is given half the probability, another an eighth: (1 + 3) / 2 bits.
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125]])
    model = nn.Embedding.from_pretrained(probabilities.log())
    task, logged = LanguageModel(model, partial(SGD, lr=0.1)), {}
    task.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    loss = task.training_step((torch.tensor([[0, 1]]), torch.tensor([[0, 2]])), 0)
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert logged["train/bits_per_byte"].item() == pytest.approx(2.0)
    assert not logged["train/bits_per_byte"].requires_grad
    assert logged["train/accuracy"].compute().item() == 0.5


def test_learns_and_logs_what_a_count_by_hand_gives(data: PythonSource, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = LanguageModel(gpt(data.input_shape, width=32, heads=2), partial(AdamW, lr=1e-2), cosine)
    fitting = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fitting.fit(task, data)
    logged = {**fitting.callback_metrics}
    assert {"train/bits_per_byte", "val/bits_per_byte"} <= set(fitting.progress_bar_metrics)
    fitting.test(task, data, verbose=False)
    logged |= fitting.callback_metrics
    names = ("loss", "accuracy", "bits_per_byte")
    assert set(logged) == {f"{stage}/{name}" for stage in ("train", "val", "test") for name in names}

    task.eval()
    with torch.no_grad():
        right, bits = [], []
        for inputs, targets in data.test_dataloader():
            probabilities = task.model(inputs).softmax(-1)
            right += (probabilities.argmax(-1) == targets).flatten().tolist()
            bits += (-probabilities.gather(-1, targets[..., None]).log2()).flatten().tolist()
    assert logged["test/bits_per_byte"].item() == pytest.approx(sum(bits) / len(bits), rel=1e-4)
    assert logged["test/loss"].item() == pytest.approx(sum(bits) / len(bits) * math.log(2), rel=1e-4)
    assert logged["test/accuracy"].item() == pytest.approx(sum(right) / len(right), rel=1e-4)
    assert logged["test/bits_per_byte"] < 4  # 8 at first


def test_checkpoints_load_into_the_bare_model() -> None:
    task = LanguageModel(gpt(width=32, heads=2), partial(SGD, lr=0.1))
    bare = gpt(width=32, heads=2)
    bare.load_state_dict({key.removeprefix("model."): value for key, value in task.state_dict().items()})
    assert all(key.startswith("model.") for key in task.state_dict())
