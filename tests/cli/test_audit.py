import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bame_lightning.cli.audit import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


def save(path: Path, **weights: torch.Tensor) -> str:
    torch.save({f"{name}.weight": weight for name, weight in weights.items()}, path)
    return str(path)


def test_a_compliant_checkpoint_exits_0(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([save(path, fc1=torch.eye(16), stem=torch.ones(4, 3)), "--pattern", "1:16"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    row = next(line.split() for line in out.splitlines() if "fc1.weight" in line)
    assert row == ["fc1.weight", "1:16", "16", "6.25%", "0", "obeys"]
    assert "16 does not divide its input dimension 3" in out
    assert "OK: all 16 blocks obey." in out


def test_a_violating_layer_is_named_and_exits_1(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.eye(32)
    weight[7, 20] = 0.1  # the second, empty block of filter 7: still obeys
    weight[9, 3] = 0.1
    assert main([save(path, good=torch.eye(32), bad=weight), "--pattern", "1:16"]) == 1
    out = capsys.readouterr().out
    assert "bad.weight violates 1:16: block 18 (filter 9) holds more than 1 non-zero\n" in out
    assert "good.weight violates" not in out
    assert "FAILED: 1 of 2 checked weights violate the pattern." in out
    assert "--dense 'bad.weight'" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_said(
    dtype: torch.dtype, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = torch.eye(16)
    weight[3, 3] = weight[5, 5] = float("nan")
    file = save(path, good=torch.eye(16).to(dtype), bad=weight.to(dtype))
    assert main([file, "--pattern", "1:16"]) == 0, "of the pattern, nothing is wrong"
    out = capsys.readouterr().out
    assert "bad.weight holds values that are not finite: 2\n" in out
    assert "good.weight holds" not in out


def test_dense_may_be_repeated(path: Path) -> None:
    file = save(path, fc=torch.eye(16), head=torch.ones(4, 16), embed=torch.ones(4, 16))
    assert main([file, "--pattern", "1:16"]) == 1
    assert main([file, "--pattern", "1:16", "--dense", "head"]) == 1
    assert main([file, "--pattern", "1:16", "--dense", "head", "--dense", "embed*"]) == 0


def test_checking_nothing_fails(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([save(path, stem=torch.ones(4, 3)), "--pattern", "1:4"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: no weight was checked" in out
    assert "stem.weight" in out


def test_output_fits_80_columns(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "network.encoder.layers.11.attention.output.projection.with_a_very_long_name.inner"
    main([save(path, **{name: torch.eye(64)}), "--pattern", "1:16"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for cell in ("1:16", "256", "1.56%", "obeys"):
        assert cell in out


@pytest.mark.parametrize("content", [None, b"", b"text\n", b"PK\x03\x04 torn"])
def test_unusable_files_get_one_line_and_exit_1(
    path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is not None:
        path.write_bytes(content)
    assert main([str(path), "--pattern", "1:4"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"bame-audit: error: `{path}` ")


@pytest.mark.parametrize("argv", [["--pattern", "4:1"], ["--pattern", "x"], [], ["--pattern", "1:4", "--dense", "no"]])
def test_unusable_arguments_get_one_line_and_exit_1(
    path: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert main([save(path, fc=torch.eye(4)), *argv]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "`pattern`" in err or "`dense`" in err


def test_a_flag_that_is_given_twice_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([save(path, fc=torch.eye(4)), "--pattern", "1:4", "--pattern", "2:4"])
    assert stopped.value.code == 2
    assert "argument --pattern: is given twice: 1:4 and 2:4" in capsys.readouterr().err


def test_names_from_the_file_cannot_steer_the_terminal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil: dict[str, Any] = {"\x1b[2J[red]\ud800.weight": torch.ones(4, 4), "b\n.weight": torch.ones(4, 3)}
    torch.save(evil, path)
    assert main([str(path), "--pattern", "1:4"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2J[red]\ud800.weight violates 1:4" in out


def test_the_module_runs_as_a_command(path: Path) -> None:
    file = save(path, fc=torch.ones(4, 4))
    command = [sys.executable, "-m", "bame_lightning.cli.audit", file, "--pattern", "1:4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "fc.weight violates 1:4: block 0 (filter 0)" in done.stdout
