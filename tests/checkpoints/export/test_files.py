from pathlib import Path

import pytest
import torch

from bame_lightning.checkpoints.export import ExportError
from bame_lightning.checkpoints.export.files import replacing, same_bits, same_values, write_safetensors


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", ["old", None])
def test_a_failing_write_leaves_what_was_there(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "a"
    if old is not None:
        path.write_text(old)

    def write() -> None:
        with replacing(path) as part:
            part.write_text("ne")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write()
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if old is None else [old])


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
