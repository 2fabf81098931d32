"""`bame-export` from the command line to the files it leaves."""

import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from bame_lightning.checkpoints.export.onnx_model import Inputs
from bame_lightning.cli import exporting as command
from bame_lightning.cli.export import main
from bame_lightning.tasks.models import mlp
from tests.checkpoints.export import reader
from tests.checkpoints.export.models import entry, mask, save, weight

Run = Callable[..., Path]

MODULE = """
import torch
def net():
    return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
def wants(width):
    return torch.nn.Linear(8, width)
def nothing():
    return None
"""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    kept = mask((4, 8), 1, 4)
    state = {"model.0.weight": weight(kept), "model.0.bias": torch.ones(4)}
    return save(tmp_path / "last.ckpt", state, {"model.0.weight": entry(kept, "1:4")})


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr of a command that must fail."""
    assert main([str(word) for word in argv]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("bame-export: error: ")
    return err


def test_a_trained_checkpoint_in_every_format(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("recipe=digits_mlp", "model.hidden=[128,128]", "quiet=true")
    file = folder / "checkpoints" / "last.ckpt"
    saved = torch.load(file, weights_only=True)["state_dict"]
    state = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
    capsys.readouterr()
    for kind in ("dense", "packed", "semi_structured", "onnx"):
        half = ["--dtype", "bfloat16"] if kind == "semi_structured" else []
        assert main([str(file), "--format", kind, "--output", str(folder / kind), *half]) == 0
        out, err = capsys.readouterr()
        assert (err, "OK: every block obeys, in 2 weights at 1:16" in out) == ("", True)
        assert f"Written: {folder / kind} (" in out

    network = mlp((1, 8, 8), 10, (128, 128))
    network.load_state_dict(load_file(folder / "dense"), strict=True)
    assert reader.raw_state(network.state_dict()) == reader.raw_state(state)
    assert reader.read_packed(folder / "packed") == reader.raw_state(state)
    sparse, other = 64 * 128 + 128 * 128, 128 + 128 + 128 * 10 + 10
    bound = sparse / 16 * (4 + 4 / 8) + 4 * other
    assert (folder / "packed").stat().st_size < 1.1 * bound
    assert {"hidden1.weight.packed", "hidden2.weight.meta"} <= load_file(folder / "semi_structured").keys()
    images = torch.randn(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(folder / "onnx")
    (computed,) = session.run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(computed), network(images).detach())


def test_a_language_model_becomes_onnx(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for name in "abcd":
        (tmp_path / "code" / f"{name}.py").write_text("".join(f"value_{i} = {i}\n" for i in range(100)))
    folder = run(
        *("task=language_model", "data=python_source", f"data.folder={tmp_path / 'code'}", "data.context=16"),
        *("data.val_share=0.3", "data.batch_size=4", "model=gpt", "model.width=32", "model.depth=1", "model.heads=2"),
        *("trainer.max_steps=1", "quiet=true", "method=static"),
    )
    capsys.readouterr()
    file = folder / "checkpoints" / "last.ckpt"
    assert main([str(file), "--format", "onnx", "--output", str(tmp_path / "a.onnx")]) == 0
    (given,) = onnxruntime.InferenceSession(tmp_path / "a.onnx").get_inputs()
    assert (given.type, given.shape[1:]) == ("tensor(int64)", [16])


def test_a_function_of_the_user_becomes_onnx(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("export_models_of_mine.py").write_text(MODULE)
    words = [checkpoint, "--format", "onnx", "--output", "a.onnx", "--input-shape", "8", "--model"]
    assert main([str(word) for word in [*words, "export_models_of_mine:net"]]) == 0
    assert "onnxruntime computes what torch does" in capsys.readouterr().out
    assert Path("a.onnx").is_file()
    for name, message in {
        "net": "`--model` as module:function",
        "no_such_module_of_mine:net": "module can be imported",
        "export_models_of_mine:other": "no function 'other'",
        "export_models_of_mine:wants": "called without arguments",
        "export_models_of_mine:nothing": "returned NoneType",
    }.items():
        assert message in error_of(capsys, *words, name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--format", "dense", "--output", "."], "`--output` must be a file; . is a folder"),
        (["--format", "dense", "--output", "no/a"], "`--output` must lie in a folder that exists"),
        (["--format", "dense", "--output", "last.ckpt"], "`--output` must not be the checkpoint itself"),
        (["--format", "dense", "--output", "a", "--model", "a:b"], "`--model` is for `--format onnx`"),
        (["--format", "dense", "--output", "a", "--dense", "no"], "`dense` 'no'"),
        (["--format", "dense", "--output", "a", "--pattern", "x"], "`pattern` must be"),
        (["--format", "onnx", "--output", "a", "--dtype", "float16"], "`--dtype` is for the other formats"),
        (["--format", "onnx", "--output", "a", "--model", "a:b"], "`--model` needs `--input-shape`"),
        (["--format", "onnx", "--output", "a", "--input-shape", "3x4"], "whole numbers with commas"),
        (["--format", "onnx", "--output", "a", "--tokens", "0"], "`--tokens` must be at least 1"),
        (["--format", "onnx", "--output", "a"], "lies in no run folder of bame-train"),
        (["--format", "semi_structured", "--output", "a"], "2:4 in half precision, not float32"),
        (["--format", "semi_structured", "--output", "a", "--dtype", "float16"], "is no multiple of"),
    ],
)
def test_wrong_arguments_get_one_line_and_leave_nothing(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in error_of(capsys, checkpoint, *argv)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_what_is_no_file_is_not_replaced(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    assert "`--output` must be a file; pipe is none" in error_of(
        capsys, checkpoint, "--format", "dense", "--output", "pipe"
    )
    assert Path("pipe").is_fifo()


@pytest.mark.parametrize("kind", ["dense", "packed", "semi_structured", "onnx"])
def test_a_model_that_is_not_sparse_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    torch.save({"fc.weight": torch.ones(32, 64)}, tmp_path / "last.ckpt")
    (tmp_path / "old").write_text("old")
    argv = (tmp_path / "last.ckpt", "--format", kind, "--output", tmp_path / "old", "--pattern", "2:4")
    assert "is not N:M sparse: fc.weight violates 2:4, block 0 (filter 0)" in error_of(capsys, *argv)
    assert (tmp_path / "old").read_text() == "old"


def test_values_that_are_not_finite_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = torch.diag(torch.tensor([1.0, float("nan"), 1.0, 1.0]))
    torch.save({"a.weight": torch.eye(4), "b.weight": broken}, tmp_path / "last.ckpt")
    argv = (tmp_path / "last.ckpt", "--format", "dense", "--output", tmp_path / "out", "--pattern", "1:4")
    assert main([str(word) for word in argv]) == 0
    assert "Values that are not finite are in b.weight\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dense", "packed", "onnx"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    Path("export_models_for_a_full_disk.py").write_text(MODULE)
    Path("old").write_text("old")
    words = ["--model", "export_models_for_a_full_disk:net", "--input-shape", "8"] if kind == "onnx" else []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        told = error_of(capsys, checkpoint, "--format", kind, "--output", "old", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told == "bame-export: error: old: File too large. Make room.\n"
    assert Path("old").read_text() == "old"
    assert not list(checkpoint.parent.glob(".*.part"))


def test_a_packed_file_that_reads_back_differently_is_not_kept(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = command.expanded
    monkeypatch.setattr(command, "expanded", lambda *found: {k: v + 1 for k, v in read(*found).items()})
    assert "reads back differently" in error_of(capsys, checkpoint, "--format", "packed", "--output", "a")
    assert not Path("a").exists()


def test_two_of_four_is_rounded_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = mask((32, 64), 2, 4)
    file = save(tmp_path / "last.ckpt", {"fc.weight": weight(kept)}, {"fc.weight": entry(kept, "2:4")})
    argv = [str(file), "--format", "semi_structured", "--output", str(tmp_path / "a")]
    assert "`--dtype float16` or bfloat16 rounds" in error_of(capsys, *argv)
    assert main([*argv, "--dtype", "bfloat16"]) == 0
    assert load_file(tmp_path / "a")["fc.weight.packed"].dtype == torch.bfloat16


def test_tokens_and_shape_reach_the_exporter(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Inputs] = []
    Path("export_models_for_tokens.py").write_text(MODULE)

    def write(network: torch.nn.Module, inputs: Sequence[Inputs], path: Path) -> float:
        seen.extend(inputs)
        path.write_text("onnx")
        return 0.0

    monkeypatch.setattr(command, "write_onnx", write)
    words = ["--format", "onnx", "--output", "a", "--model", "export_models_for_tokens:net"]
    assert main([str(checkpoint), *words, "--input-shape", "5,8", "--tokens", "9"]) == 0
    assert seen == [Inputs((5, 8), 9)]


def test_several_inputs_reach_the_exporter(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Inputs] = []
    Path("export_models_for_inputs.py").write_text(MODULE)

    def write(network: torch.nn.Module, inputs: Sequence[Inputs], path: Path) -> float:
        seen.extend(inputs)
        path.write_text("onnx")
        return 0.0

    monkeypatch.setattr(command, "write_onnx", write)
    words = ["--format", "onnx", "--output", "a", "--model", "export_models_for_inputs:net"]
    assert main([str(checkpoint), *words, "--input-shape", "5,8", "--input-shape", "7:100"]) == 0
    assert seen == [Inputs((5, 8)), Inputs((7,), 100)]


def test_names_from_the_file_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"\x1b[2J.weight": torch.ones(4, 4)}, tmp_path / "last.ckpt")
    argv = (tmp_path / "last.ckpt", "--format", "dense", "--output", tmp_path / "a", "--pattern", "1:4")
    assert "\x1b" not in error_of(capsys, *argv)
