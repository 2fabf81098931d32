"""Weights stored as (in, out), as in the `Conv1D` of transformers' GPT-2: each is the twin of a plain linear layer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers.pytorch_utils import Conv1D

from bame_lightning import BAMECallback, Schedule
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.layers import plan_layers
from bame_lightning.weights.sharding import Rows
from tests.callbacks.registry import METHODS, every_method
from tests.training import Task, trainer

SIZES = (48, 32, 16)


def network(linear: bool) -> nn.Sequential:
    """Two layers and a classifier; the same numbers whether its layers are (out, in) or (in, out)."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(SIZES):
        layer = nn.Linear(inputs, outputs) if linear else Conv1D(outputs, inputs)
        weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64) / inputs**0.5
        layer.weight = nn.Parameter(weight.t().clone() if linear else weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    head = nn.Linear(SIZES[-1], 5)
    head.weight = nn.Parameter(torch.randn(5, SIZES[-1], generator=generator, dtype=torch.float64))
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, head).double()


class Twin(Task):
    """Classifies in double precision, so that an order of summation flips no mask."""

    def __init__(self, linear: bool) -> None:
        super().__init__(network(linear), lambda p: torch.optim.AdamW(p, lr=1e-2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0].double(), batch[1]], batch_idx)


def fit(name: str, *others: L.Callback, linear: bool, **kwargs: Any) -> tuple[Any, Twin, L.Trainer]:
    method, task = METHODS[name](), Twin(linear)
    runs = trainer(method, *others, **kwargs)
    runs.fit(task)
    return method, task, runs


@every_method
def test_a_transposed_weight_trains_as_its_plain_twin_does(name: str) -> None:
    method, task, runs = fit(name, linear=False)
    twin, plain, other = fit(name, linear=True)
    for index in (1, 3):
        found, expected = task.model[index].weight, plain.model[index].weight
        torch.testing.assert_close(found.t(), expected)
        assert torch.equal(found.t() == 0, expected == 0)
        assert float((found == 0).double().mean()) == pytest.approx(1 - method.pattern.density, abs=0.1)
        states = runs.optimizers[0].state[found], other.optimizers[0].state[expected]
        torch.testing.assert_close(states[0]["exp_avg_sq"].t(), states[1]["exp_avg_sq"])
    assert [sparse.name for sparse in method.weights] == ["model.1.weight", "model.3.weight"]
    assert method.summary() == twin.summary()
    assert method.summary()["flops"]["flops/train_vs_dense"] < 1


def test_blocks_run_along_the_first_dimension() -> None:
    method, task, _ = fit("bame", linear=False)
    weight = task.model[1].weight.detach()
    # Counted one by one: 4 consecutive inputs of an output.
    for output in range(weight.shape[1]):
        for first in range(0, weight.shape[0], 4):
            assert sum(float(weight[first + i, output]) != 0 for i in range(4)) <= 2
    across = (weight.view(weight.shape[0], -1, 4) != 0).sum(-1)
    assert across.max() > 2
    assert method.weights[0].weight.shape == (48, 32)
    assert method.weights[0].kept.shape == (32, 48)
    assert method.weights[0].kept.stride() == method.weights[0].values.stride()


@every_method
def test_resuming_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_epoch_end(self, run: L.Trainer, module: L.LightningModule) -> None:
            if run.current_epoch == 1:
                run.save_checkpoint(tmp_path / "half.ckpt")

    _, whole, _ = fit(name, Save(), linear=False, max_epochs=4)
    method, task = METHODS[name](), Twin(linear=False)
    trainer(method, max_epochs=4).fit(task, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert method.steps == 32
    for key, value in whole.state_dict().items():
        assert torch.equal(value, task.state_dict()[key]), key


def test_a_state_of_the_plain_twin_is_refused(tmp_path: Path) -> None:
    square = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Linear(48, 5))
    run = trainer(METHODS["static"](), max_epochs=1)
    run.fit(Task(square))
    run.save_checkpoint(tmp_path / "linear.ckpt")
    square[1] = Conv1D(48, 48)
    with pytest.raises(
        ValueError, match=r"is 2:4 of shape \(48, 48\) in the checkpoint and 2:4 of shape \(48, 48\) \(in"
    ):
        trainer(METHODS["static"]()).fit(Task(square), ckpt_path=tmp_path / "linear.ckpt", weights_only=True)


def test_m_must_divide_the_first_dimension() -> None:
    model = nn.Sequential(Conv1D(16, 6), Conv1D(6, 16))
    found = {plan.name: plan.reason for plan in plan_layers(model, NMPattern(2, 4))}
    assert found == {"0.weight": "input dimension 6 is not divisible by 4", "1.weight": ""}


def test_shards_are_judged_by_the_output_dimension(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        cut = {dim: DTensor.from_local(torch.zeros(8, 16), mesh, [Shard(dim)]) for dim in (0, 1)}
        assert Rows.of(cut[1], "fc", dim=1).parts == 1
        with pytest.raises(ValueError, match="along their output dimension only, here 1"):
            Rows.of(cut[0], "fc", dim=1)
        with pytest.raises(ValueError, match="along their output dimension only, here 0"):
            Rows.of(cut[1], "fc")
    finally:
        torch.distributed.destroy_process_group()


def test_averages_follow() -> None:
    average = L.pytorch.callbacks.EMAWeightAveraging(decay=0.9)
    method, task = BAMECallback("2:4", schedule=Schedule(every=1)), Twin(linear=False)
    trainer(method, average, max_epochs=2).fit(task)
    assert method.summary()["flips"] > 0
    for sparse in method.weights:
        counts = (sparse.weight.detach().t().reshape(-1, 4) != 0).sum(-1)
        assert counts.max() <= 2
