from pathlib import Path

import pytest
import torch

from bame_lightning.checkpoints.export import ExportError
from bame_lightning.checkpoints.export.files import same_bits, same_values, write_safetensors
from bame_lightning.checkpoints.replacing import replacing


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    with replacing(tmp_path / "a") as part:
        write_safetensors(part, {"a": torch.ones(2)}, {})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_types_that_safetensors_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written as safetensors"):
        write_safetensors(tmp_path / "a", {"a": torch.zeros(2, dtype=torch.complex128)}, {})


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (torch.tensor([0.0, float("nan")]), True),
        (torch.tensor([-0.0, float("nan")]), False),
        (torch.tensor([0.0, float("nan")], dtype=torch.float64), False),
        (torch.tensor([[0.0, float("nan")]]), False),
    ],
)
def test_bits_are_compared(other: torch.Tensor, same: bool) -> None:
    assert same_bits({"a": torch.tensor([0.0, float("nan")])}, {"a": other}) is same
    assert not same_bits({"a": other}, {"b": other})


def test_values_are_compared() -> None:
    values = {"a": torch.tensor([0.0, float("nan"), 1.0]), "b": torch.tensor([True])}
    assert same_values(values, {"a": torch.tensor([-0.0, float("nan"), 1.0]), "b": torch.tensor([True])})
    assert not same_values(values, {"a": torch.tensor([0.0, float("nan"), 1.1]), "b": torch.tensor([True])})
    assert not same_values(values, {"a": values["a"]})
