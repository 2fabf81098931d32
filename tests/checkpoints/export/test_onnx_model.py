import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from bame_lightning.checkpoints.export import ExportError
from bame_lightning.checkpoints.export.onnx_model import Inputs, load_weights, write_onnx
from tests.checkpoints.export.models import mask, weight


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    model[0].weight.data = weight(mask((8, 4, 3, 3), 1, 4))
    return model


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embed(tokens))


class Noise(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.rand_like(values)


def test_the_file_computes_what_torch_does_with_zeros_inside(tmp_path: Path) -> None:
    model = network()
    assert write_onnx(model, [Inputs((4, 4, 4))], tmp_path / "a.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    images = np.random.default_rng(0).standard_normal((7, 4, 4, 4), dtype=np.float32)
    (computed,) = session.run(None, {"input": images})
    np.testing.assert_allclose(computed, model(torch.from_numpy(images)).detach().numpy(), atol=1e-5)
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer]
    (kernel,) = [array for array in arrays if array.shape == (8, 4, 3, 3)]
    assert (kernel != 0).sum() == kernel.size / 4


def test_tokens_are_whole_numbers(tmp_path: Path) -> None:
    write_onnx(Tokens().eval(), [Inputs((5,), vocabulary=9)], tmp_path / "a.onnx")
    (given,) = onnxruntime.InferenceSession(tmp_path / "a.onnx").get_inputs()
    assert (given.type, given.shape[1:]) == ("tensor(int64)", [5])
    with pytest.raises(ExportError, match=r"cannot process a batch of numbers of shape \(5\).*`--tokens`"):
        write_onnx(Tokens().eval(), [Inputs((5,))], tmp_path / "b.onnx")


class Pair(nn.Module):
    """Takes an image and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(6, 4)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(image.flatten(1)) * self.embed(tokens).sum(1)


def test_a_network_may_take_several_inputs(tmp_path: Path) -> None:
    model = Pair().eval()
    assert write_onnx(model, [Inputs((2, 3)), Inputs((5,), 9)], tmp_path / "a.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert [(one.name, one.shape[1:]) for one in session.get_inputs()] == [("image", [2, 3]), ("tokens", [5])]
    image, tokens = np.ones((3, 2, 3), np.float32), np.arange(15).reshape(3, 5) % 9
    (computed,) = session.run(None, {"image": image, "tokens": tokens})
    expected = model(torch.from_numpy(image), torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_allclose(computed, expected, atol=1e-5)


@pytest.mark.parametrize("more", [[], [Inputs((5,), 9), Inputs((1,))]], ids=["one", "three"])
def test_other_than_the_inputs_of_a_network_is_one_line(tmp_path: Path, more: list[Inputs]) -> None:
    with pytest.raises(ExportError, match=r"numbers of shape \(2, 3\).*once for each input") as caught:
        write_onnx(Pair().eval(), [Inputs((2, 3)), *more], tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)


def test_outputs_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"differ from torch's by .*, where 0\.0001 is allowed"):
        write_onnx(Noise(), [Inputs((3,))], tmp_path / "a.onnx")


def test_weights_must_fit_the_network() -> None:
    with pytest.raises(ExportError, match=r"does not fit the network Linear: Missing key.*`--model`.*`--prefix`"):
        load_weights(nn.Linear(4, 2), {"fc.weight": torch.ones(2, 4)})


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=r"without onnxruntime, onnxscript.*pip install 'bame-lightning\[export\]'"):
        write_onnx(network(), [Inputs((4, 4, 4))], tmp_path / "a.onnx")
