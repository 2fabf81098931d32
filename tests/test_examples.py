"""Every example runs as its first lines say, and does what it says."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bame_lightning import BAMECallback
from tests.training import trainer

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def run(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, *argv: str) -> dict[str, Any]:
    """Run an example as a command does, in an empty folder; returns its names."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 under jsonargparse 4.53
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    for option in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        monkeypatch.setenv(f"PL_TRAINER_{option.upper()}", "0")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def nonzeros(weight: torch.Tensor, m: int) -> int:
    """Most non-zeros in any m consecutive inputs."""
    return max(sum(x != 0 for x in row[i : i + m]) for row in weight.tolist() for i in range(0, len(row), m))


def test_an_existing_trainer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("existing_trainer", monkeypatch, tmp_path)
    assert "with 0.0625 of a layer's weights" in capsys.readouterr().out
    assert names["accuracy"] > 0.7
    assert [nonzeros(names["model"].net[index].weight, 16) for index in (0, 2, 4)] == [1, 1, 16]


def test_fine_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("finetune_dense", monkeypatch, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "test accuracy" in line]
    shares = [re.search(r"(\S+) of a layer", line)[1] for line in lines]
    assert shares == ["1.00", "0.50", "0.50", "0.25"]
    sparse, frozen = names["sparse"]["net.2.weight"], names["frozen"]["net.2.weight"]
    assert (nonzeros(sparse, 4), nonzeros(frozen, 4)) == (2, 2)
    assert torch.equal(sparse != 0, frozen != 0)
    assert not torch.equal(sparse, frozen)


def test_a_bert_is_fine_tuned_and_served(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    names = run("finetune_bert", monkeypatch, tmp_path)
    out = capsys.readouterr().out
    dense, sparse = (float(accuracy) for accuracy in re.findall(r"test accuracy (\S+)", out))
    assert min(dense, sparse) > 0.8
    assert "the served BERT gives the same answers: True" in out
    state = names["served"].state_dict()
    assert nonzeros(state["bert.encoder.layer.1.intermediate.dense.weight"], 4) == 2
    assert nonzeros(state["classifier.weight"], 4) == 4
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        "packed.safetensors",
        "semi_structured.safetensors",
    }


def test_a_sparse_run_is_continued(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("continue_sparse_run", monkeypatch, tmp_path)
    out = capsys.readouterr().out
    # 16 batches an epoch. The first 32 steps adapt up to 90 % of 32: 2, 4, ..., 28; the others up to 90 % of 64: 34, ..., 58.
    assert "resumed: 64 steps in all, 27 adaptations" in out
    assert "under the same mask: True" in out
    moved = float(re.search(r"on new data: (\S+) of", out)[1])
    assert 0.5 < moved < 1
    assert nonzeros(names["final"].net[2].weight, 4) == 1


def test_a_tiny_gpt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bame_lightning.tasks.python_source as source

    for name in "abcdefgh":
        (tmp_path / f"{name}.py").write_text("".join(f"value_{i} = {i}\n" for i in range(900)))
    monkeypatch.setattr(source.sysconfig, "get_path", lambda _: str(tmp_path))
    names = run("tiny_gpt", monkeypatch, tmp_path, "12")
    out = capsys.readouterr().out
    assert "bits per byte after 12 steps" in out
    assert "\ndef " in out
    assert nonzeros(names["network"].blocks[0].mlp.fc1.weight, 4) == 2


def test_patterns_by_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run("per_layer_patterns", monkeypatch, tmp_path)["callback"].summary()["layers"]
    layer = "vit.encoder.layers.encoder_layer_1"
    assert found == {
        f"{layer}.self_attention.in_proj_weight": "2:4",
        f"{layer}.self_attention.out_proj": "2:4",
        f"{layer}.mlp.0": "1:4",
        f"{layer}.mlp.3": "2:8",
    }


def test_lightning_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[L.Trainer] = []
    fit = L.Trainer.fit
    monkeypatch.setattr(L.Trainer, "fit", lambda self, *args, **kwargs: made.append(self) or fit(self, *args, **kwargs))
    config = str(EXAMPLES / "lightning_cli.yaml")
    run("lightning_cli", monkeypatch, tmp_path, "fit", "--config", config, "--trainer.max_epochs=1")
    [callback] = [found for found in made[0].callbacks if isinstance(found, BAMECallback)]
    assert callback.summary()["layers"] == {"net.0": "1:16", "net.2": "2:4"}
    assert (callback.schedule.every, callback.schedule.stop) == (4, 0.8)


class Batches(L.LightningModule):
    """The user's batches, under the callback."""

    def __init__(self, model: nn.Module, batches: list[Any]) -> None:
        super().__init__()
        self.model, self.batches = model, batches

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


def test_a_loop_without_lightning_is_the_callback_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("without_lightning", monkeypatch, tmp_path)
    assert capsys.readouterr().out.count("at most 1 non-zero in each of") == 2

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    torch.manual_seed(1)
    batches = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(40)]
    mine = network()
    names["train"](mine, batches, torch.optim.AdamW(mine.parameters(), lr=3e-3), "1:4")
    callback, task = BAMECallback("1:4", rescale=False), Batches(network(), batches)
    trainer(callback, max_epochs=1).fit(task)
    assert callback.summary()["flips"] > 4
    for key, value in mine.state_dict().items():
        assert torch.equal(value, task.model.state_dict()[key]), key


def test_an_export_is_read_without_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]])
    tensors = {"fc.weight.nm_values": torch.tensor([[3.0], [-1.0]]), "fc.bias": torch.ones(2)}
    # Positions 1 and 3, two bits each, the lowest first.
    tensors["fc.weight.nm_indices"] = torch.tensor([0b1101], dtype=torch.uint8)
    layers = {"fc.weight": {"pattern": "1:4", "shape": [2, 4]}}
    metadata = {"format": "bame_lightning.packed", "layers": json.dumps(layers), "same_as": "{}"}
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    state = run("read_exports", monkeypatch, tmp_path, "model.safetensors")["state"]
    assert torch.equal(state["fc.weight"], weight)
    assert "fc.weight (2, 4) torch.float32" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_says_how_it_is_run_and_the_gallery_names_it(name: str) -> None:
    text = " ".join((EXAMPLES / f"{name}.py").read_text().split('"""')[1].split())
    [command] = re.findall(r"Run: `(python .*?)`", text)
    words = shlex.split(command)
    assert words[1] == f"examples/{name}.py"
    assert all((EXAMPLES.parent / word).exists() for word in words if word.startswith("examples/"))
    assert f"(../examples/{name}.py)" in (EXAMPLES.parent / "recipes" / "README.md").read_text()
