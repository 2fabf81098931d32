"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from bame_lightning.checkpoints.replacing import replacing


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


def test_a_folder_that_does_not_exist_is_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "run" / "maps" / "a") as part:
        part.write_text("new")
    assert [path.read_text() for path in tmp_path.rglob("a")] == ["new"]
