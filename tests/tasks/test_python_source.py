import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bame_lightning.tasks import PythonSource
from bame_lightning.tasks.python_source import Windows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files of 50 bytes, each of one letter of its own, at two depths."""
    for index in range(20):
        path = tmp_path / ("package" if index % 2 else ".") / f"module{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([ord("a") + index]) * 50)
    return tmp_path


def letters(module: PythonSource) -> dict[str, set[str]]:
    """The letters that occur in the inputs of each split."""
    found = {}
    for part in ("train", "val", "test"):
        batches = getattr(module, f"{part}_dataloader")()
        found[part] = set(bytes(byte for inputs, _ in batches for byte in inputs.flatten().tolist()).decode())
    return found


def everything(module: PythonSource) -> Tensor:
    return torch.cat([inputs for inputs, _ in module.train_dataloader()])


def test_windows_follow_one_another_and_targets_are_the_next_bytes() -> None:
    windows = Windows(torch.tensor(list(b"def f(): pass"), dtype=torch.uint8), context=4)
    inputs, targets = windows.__getitems__(range(len(windows)))
    assert [bytes(row.tolist()) for row in inputs] == [b"def ", b"f():", b" pas"]
    assert [bytes(row.tolist()) for row in targets] == [b"ef f", b"(): ", b"pass"]
    assert inputs.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize(("size", "windows"), [(0, 0), (5, 1), (8, 1), (9, 2)])
def test_a_window_needs_a_byte_after_it(size: int, windows: int) -> None:
    assert len(Windows(torch.zeros(size, dtype=torch.uint8), context=4)) == windows


def test_files_are_split_as_a_whole_and_without_overlap(folder: Path) -> None:
    parts = letters(PythonSource(str(folder), context=7, batch_size=1, val_share=0.2))
    assert {name: len(found) for name, found in parts.items()} == {"train": 14, "val": 4, "test": 2}
    assert len(set.union(*parts.values())) == 20


def test_the_split_is_fixed_and_knows_no_absolute_paths(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = letters(PythonSource(str(folder), context=7, batch_size=1))
    moved = folder.rename(tmp_path_factory.mktemp("other") / "test")  # excluded below the folder, not above
    assert letters(PythonSource(str(moved), context=7, batch_size=1)) == first
    torch.manual_seed(1)
    module = PythonSource(str(moved), context=7, batch_size=1)
    assert torch.equal(*(next(iter(module.test_dataloader()))[0] for _ in range(2)))


def test_another_file_moves_few_others(folder: Path) -> None:
    first = letters(PythonSource(str(folder), context=7, batch_size=1))["train"]
    (folder / "new.py").write_bytes(b"z" * 50)
    second = letters(PythonSource(str(folder), context=7, batch_size=1))["train"]
    assert len(first ^ second) <= 3


def test_installed_generated_and_testing_code_is_left_out(folder: Path) -> None:
    for name in (
        "site-packages/installed.py",
        "json/tests/test_json.py",
        "test/test_os.py",
        "encodings/cp1252.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "README.txt",
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"!" * 50)
    parts = letters(PythonSource(str(folder), context=7, batch_size=1))
    assert "!" not in set.union(*parts.values())
    (folder / "testing.py").write_bytes(b"+" * 50)  # only looks alike
    assert "+" in set.union(*letters(PythonSource(str(folder), context=7, batch_size=1)).values())


def test_without_a_folder_the_standard_library_serves() -> None:
    module = PythonSource(val_share=0.0)
    assert (module.input_shape, module.num_classes) == ((128,), 256)
    assert module.val_dataloader() == []
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    inputs, targets = next(iter(module.test_dataloader()))
    assert inputs.shape == targets.shape == (100, 128)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    # Most windows lie within a file, and some of these files are at the top of the library.
    assert any(bytes(row.tolist()) in text for row in inputs)
    assert len(module.train_dataloader()) * 32 * 128 > 5_000_000


def test_training_windows_are_shuffled_by_the_seed_and_each_comes_once(folder: Path) -> None:
    def served(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return everything(PythonSource(str(folder), context=7, batch_size=1, val_share=0.0))

    first, again, other = served(0), served(0), served(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(*(rows.flatten().sort().values for rows in (first, other)))
    assert len(first) == (18 * 50 - 1) // 7


def test_workers_serve_the_same_batches(folder: Path) -> None:
    alone, helped = (
        next(iter(PythonSource(str(folder), context=7, num_workers=workers).test_dataloader())) for workers in (0, 1)
    )
    assert torch.equal(alone[0], helped[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"context": 0}, "`context` must be at least 1 byte; got 0"),
        ({"val_share": -0.1}, r"`val_share` must lie in \[0, 0.9\), as a share of the files; got -0.1"),
        ({"val_share": 0.95}, "`val_share` must lie in"),
        ({"context": 200}, r"holds too little Python source: \d+ bytes are for training, .* 32 x `context` 200"),
        ({"context": 100, "batch_size": 1}, "100 bytes are for testing, which needs more than 1 x `context` 100"),
        ({"context": 50, "batch_size": 1}, "50 bytes are for validation"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        PythonSource(str(folder), **arguments).setup("fit")


def test_a_folder_without_python_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 bytes are for training"):
        PythonSource(str(tmp_path)).setup("fit")
    with pytest.raises(
        FileNotFoundError, match=r"`folder` must be a folder of Python files; there is no folder .*nowhere.*data\.f"
    ):
        PythonSource(str(tmp_path / "nowhere")).setup("fit")
