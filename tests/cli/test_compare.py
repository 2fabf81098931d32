import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from bame_lightning.cli.compare import main


def sweep(folder: Path, *, flops: bool = True, **rest: Any) -> str:
    cells = [(p, m, s) for p in ("1:4", "1:16") for m in ("bame", "sr_ste") for s in (0, 1)]
    for index, (pattern, method, seed) in enumerate(cells):
        (folder / str(index)).mkdir(parents=True)
        accuracy = 0.8 + 0.01 * seed + (0.05 if method == "bame" else 0) - (0.1 if pattern == "1:16" else 0)
        summary = {"data": "digits", "model": "mlp", "recipe": None, "pattern": pattern, "method": method, "seed": seed}
        summary |= {"test_accuracy": accuracy, "train_loss": 0.1, **rest}
        if flops:
            summary["flops"] = {"flops/train_total": 1e9 if method == "bame" else 4e9, "flops/train_vs_dense": 0.25}
        (folder / str(index) / "summary.json").write_text(json.dumps(summary))
    return str(folder)


@pytest.mark.parametrize("flops", [True, False])
def test_writes_and_prints(
    flops: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "error.txt").write_text("pattern=9:4: too many\n")
    assert main([sweep(tmp_path, flops=flops), "--baseline", "sr_ste"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 80
    names = [line.split()[1] for line in out.splitlines() if line.startswith((" 1:4 ", " 1:16 "))]
    assert sorted(names) == ["bame", "bame", "sr_ste", "sr_ste"]
    assert "digits, mlp" in out
    assert "85.50 ± 0.71" in out
    assert "+5.00 [+5.00, +5.00]" in out
    assert "- failed: 9: pattern=9:4: too many" in out
    assert ("FLOPs" in out) is flops
    assert (tmp_path / "compare.csv").read_text().count("\n") == 1 + 4
    assert "failed: 9" in (tmp_path / "compare.md").read_text()
    height, width, _ = imread(tmp_path / "compare.png").shape
    assert width > 600 < height + 100
    assert imread(tmp_path / "compare.png")[..., :3].std() > 0.05


def test_language_models_are_shown_by_bits_per_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([sweep(tmp_path, data="python_source", test_bits_per_byte=2.25), "--baseline", "sr_ste"]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 80
    assert "2.2500 ± 0.0000" in out
    assert "+0.0000 [+0.0000, +0.0000]" in out
    assert (tmp_path / "compare.png").is_file()


def test_several_tasks_have_a_table_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in ("digits", "fashion_mnist"):
        sweep(tmp_path / data, data=data)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "digits, mlp" in out
    assert "fashion_mnist, mlp" in out
    assert "difference" not in out


def test_unusable_input_gets_one_line_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    folder = sweep(tmp_path / "sweep")
    for argv, message in (
        ([str(tmp_path / "nowhere")], "must be a folder with runs"),
        ([str(tmp_path / "empty")], "holds no summary.json of a finished run"),
        ([folder, "--baseline", "rigl"], "(bame, sr_ste); got 'rigl'"),
    ):
        assert main(argv) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("bame-compare: error: ")
        assert message in err
    assert not list((tmp_path / "sweep").glob("compare.*"))


def test_a_folder_that_takes_no_results_is_told_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compare.csv").mkdir()
    assert main([sweep(tmp_path)]) == 1
    line = f"{tmp_path / 'compare.csv'}: Is a directory. The command writes into the folder: copy it to where you may write."
    assert capsys.readouterr().err == f"bame-compare: error: {line}\n"


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bame_lightning.cli.compare", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
