"""`bame-flops` on the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bame_lightning.cli import flops
from tests.cli.conftest import Answer


@pytest.fixture
def run(answer: Callable[[Callable[[], None]], Answer]) -> Answer:
    return answer(flops.main)


@pytest.fixture
def report(run: Answer) -> Callable[..., dict[str, Any]]:
    return lambda *overrides: json.loads(run("json=true", *overrides))


def mlp_without_defaults(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return nn.Linear(input_shape[0], num_classes)


def mlp_of_seven(input_shape: tuple[int, int, int] = (1, 1, 8), num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 16), nn.Linear(16, num_classes))


def test_a_recipe_says_model_data_batch_and_where_it_can_the_length(report: Any) -> None:
    found = report("recipe=python_source_gpt")
    assert (found["model"], found["input_shape"], found["batch_size"]) == ("gpt", [128], 16)
    assert found["steps"] == 6 * 250
    found = report("recipe=fashion_mnist_mlp")
    assert (found["model"], found["input_shape"]) == ("mlp", [1, 28, 28])
    # 784-512-512-10, the two hidden layers at 1:16, counted by hand
    dense, sparse = 784 * 512 + 512 * 512 + 512 * 10, (784 * 512 + 512 * 512) / 16 + 512 * 10
    assert (found["dense_forward_macs"], found["f"]) == (dense, pytest.approx(sparse / dense))
    assert (found["batch_size"], found["steps"]) == (128, 100_000)  # how many batches an epoch has, data would say
    found = report("recipe=fashion_mnist_mlp", "steps=7", "trainer.accumulate_grad_batches=2", "model.hidden=[32]")
    assert (found["batch_size"], found["steps"]) == (256, 7)
    assert found["dense_forward_macs"] == 784 * 32 + 32 * 10


def test_the_cost_of_a_run_is_told_in_words(run: Answer) -> None:
    # 784-512-512-10: 3 passes of 2 x 668,672 FLOPs for each of 128 samples in each of 100,000 steps
    assert "100,000 steps of 128 samples takes 51.4 TFLOPs." in " ".join(run("recipe=fashion_mnist_mlp").split())


def test_resnet50_at_1_16_is_what_is_published(report: Any) -> None:
    found = report("model=resnet50", "pattern=1:16")
    assert (found["input_shape"], found["num_classes"]) == ([3, 224, 224], 1000)
    assert found["dense_forward_macs"] == 4_089_184_256
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["model.conv1.weight"]["forward_macs"] == 118_013_952
    assert layers["model.fc.weight"]["forward_macs"] == 2_048_000
    assert {name for name, layer in layers.items() if layer["pattern"] is None} == {
        "model.conv1.weight",
        "model.fc.weight",
    }
    assert found["f"] == pytest.approx(0.090, abs=5e-4)

    methods = found["methods"]
    for name, counted, hardware in (
        ("dense", 1.0, 1.0),
        ("sr_ste", 0.697, 0.697),
        ("bi_mask", 0.393, 0.393),
        ("static", 0.090, 0.393),
        ("static_transposable", 0.090, 0.090),
    ):
        assert methods[name]["algorithmic"]["vs_dense"] == pytest.approx(counted, abs=5e-4)
        assert methods[name]["hardware"]["vs_dense"] == pytest.approx(hardware, abs=5e-4)
    assert found["static_mask_bound"]["vs_dense"] == pytest.approx(0.090, abs=5e-4)
    assert 1 / found["static_mask_bound"]["vs_sr_ste"] == pytest.approx(7.74, abs=0.005)
    assert found["label"] == "counted, not executed"
    assert "first layer" in found["convention"]


def test_bame_and_the_run_are_counted_as_by_hand(report: Any) -> None:
    # hidden layers 784 x 16 and 16 x 16 at 1:4, classifier 16 x 10
    small = ("model=mlp", "model.hidden=[16,16]", "pattern=1:4", "steps=40", "batch_size=5")
    found = report(*small, "schedule.stop=20", "evidence.contenders=0.5", "rigl_schedule.every=10")
    sparse, dense = 784 * 16 + 16 * 16, 160
    forward = sparse + dense
    f = (sparse / 4 + dense) / forward
    assert found["dense_forward_macs"] == forward
    assert found["f"] == pytest.approx(f)
    read = (1 + 19 * 0.5) / 40
    assert found["read_share"] == {"bame": pytest.approx(read), "rigl": pytest.approx(3 / 40), "top_kast": 1.0}
    bame = found["methods"]["bame"]
    assert bame["algorithmic"]["step_in_dense_forwards"] == pytest.approx(3 * f + read * (1 - f))
    assert bame["hardware"]["step_in_dense_forwards"] == pytest.approx(2 * f + 1 + read * (1 - f))
    assert bame["algorithmic"]["run_flops"] == pytest.approx(2 * forward * 40 * 5 * (3 * f + read * (1 - f)))
    assert bame["algorithmic"]["vs_sr_ste"] == pytest.approx((3 * f + read * (1 - f)) / (f + 2))


@pytest.mark.parametrize(
    ("overrides", "shape", "classes"),
    [
        (["model=mlp"], [1, 28, 28], 10),
        (["model=cnn"], [1, 28, 28], 10),
        (["model=resnet20"], [3, 32, 32], 10),
        (["model=resnet18"], [3, 224, 224], 1000),
        (["model=resnet20", "data=digits"], [1, 8, 8], 10),
        (["model=mobilenet_v2", "data=cifar10"], [3, 32, 32], 10),
        (["model=mlp", "data=imagenet"], [3, 224, 224], 1000),
        (["model=gpt"], [128], 256),
        (["model=gpt", "data=python_source", "data.context=32"], [32], 256),
    ],
)
def test_models_are_counted_at_their_native_input_or_that_of_data(
    overrides: list[str], shape: list[int], classes: int, report: Any
) -> None:
    found = report(*overrides)
    assert (found["input_shape"], found["num_classes"]) == (shape, classes)
    assert found["dense_forward_macs"] > 0


def test_rules_of_a_sparsity_are_obeyed(report: Any) -> None:
    layers = report("model=resnet20", "sparsity=mixed", "pattern=1:16")["layers"]
    patterns = {layer["name"]: layer["pattern"] for layer in layers}
    assert patterns["model.fc.weight"] == "2:4"
    assert patterns["model.layer1.0.conv1.weight"] == "1:16"


def test_attention_has_products_without_a_weight(report: Any) -> None:
    found = report("model=vit", "pattern=2:4")
    # 4 layers of 49 + 1 tokens of width 128: scores and their product with the values
    assert found["products_without_weight_macs"] == 4 * 2 * 50 * 50 * 128


def test_a_language_model_is_counted_at_all_positions(report: Any) -> None:
    found = report("model=gpt", "pattern=1:16")
    # 128 tokens of width 128 in 2 blocks of 12 widths squared, and the head
    blocks, head = 2 * 128 * 12 * 128**2, 128 * 128 * 256
    attention = 2 * 2 * 128 * 128 * 128
    assert found["products_without_weight_macs"] == attention
    assert found["dense_forward_macs"] == blocks + head + attention
    assert found["f"] == pytest.approx((blocks / 16 + head + attention) / (blocks + head + attention))


@pytest.mark.parametrize("model", ["resnet50", "mobilenet_v2", "vit", "gpt"])
def test_the_tables_fit_80_columns_and_say_what_they_are(model: str, run: Answer) -> None:
    out = run(f"model={model}", "pattern=1:4")
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    flat = " ".join(out.split())
    for words in ("counted, not executed", "static one", "/SR-STE", "hardware", "transposable", "first layer's too"):
        assert words in flat


def test_json_is_printed_alone(run: Answer) -> None:
    out = run("json=true", "model=mlp")
    assert json.loads(out)["model"] == "mlp"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pattern=16:1"], "`pattern`"),
        (["pattern=x"], "`pattern`"),
        (["model=resnet20", "pattern=1:7"], "No layer is eligible"),
        (["steps=0"], "`steps`"),
        (["batch_size=1.5"], "`batch_size`"),
        (["schedule.every=0"], "`schedule.every`"),
        (["model=mlp", "model._target_=tests.cli.test_flops.mlp_without_defaults", "~model.hidden"], "data=..."),
        (["model=gpt", "data=digits"], "made for images (1, 8, 8)"),
        (["model=mlp", "model._target_=tests.cli.test_flops.mlp_of_seven", "~model.hidden"], "shape (1, 1, 8)"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_wrong_values_end_in_one_line(
    overrides: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bame-flops", *overrides])
    with pytest.raises(SystemExit) as caught:
        flops.main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("bame-flops: error: ")
    assert words in err


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bame_lightning.cli.flops", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    assert "bame-flops model=resnet50 pattern=1:16 json=true" in done.stdout
    assert not list(tmp_path.iterdir())
