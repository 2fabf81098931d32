"""`bame-train` from the command line to the files it leaves."""

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from bame_lightning.cli.metrics import ResumedCSVLogger
from bame_lightning.cli.progress import EpochBar, EpochLines
from bame_lightning.cli.wandb_runs import wandb_logger

Run = Callable[..., Path]


def failure(run: Run, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line on stderr of a run that must fail."""
    with pytest.raises(SystemExit) as caught:
        run(*overrides)
    assert caught.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bame-train: error: ")
    return lines[0]


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def test_a_run_leaves_checkpoint_metrics_and_summary(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("pattern=1:4", "method.schedule.every=2", "trainer.max_epochs=4")
    summary = read_summary(folder)
    checkpoint = torch.load(folder / summary["checkpoint"], weights_only=True)

    weight = checkpoint["state_dict"]["model.hidden1.weight"]
    assert ((weight.reshape(-1, 4) != 0).sum(1) <= 1).all()
    assert summary["layers"] == [{"name": "model.hidden1.weight", "pattern": "1:4", "blocks": 512, "violations": 0}]
    assert summary["compliant"]
    assert summary["steps"] == checkpoint["global_step"] == 4 * (1257 // 64)
    assert (summary["epochs"], summary["pattern"], summary["method"]) == (4, "1:4", "bame")
    assert 0.1 < summary["test_accuracy"] <= 1
    assert summary["sparse"]["flips"] > 0
    assert summary["warning"] is None

    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {key for row in rows for key, value in row.items() if value}
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "test/accuracy", "bame/flip_rate"} <= logged
    accuracies = [float(row["test/accuracy"]) for row in rows if row["test/accuracy"]]
    assert accuracies == [pytest.approx(summary["test_accuracy"])]

    out = capsys.readouterr().out
    assert out.count("epoch ") == 4
    assert "\x1b" not in out
    assert "\r" not in out
    assert "all 512 blocks obey" in out
    assert max(len(line) for line in out[out.index("╭") :].splitlines()) <= 80


def test_quiet_prints_the_summary_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("quiet=true", "method=static", "pattern=2:4")
    captured = capsys.readouterr()
    assert captured.out.startswith("╭─ static 2:4")
    assert captured.err == ""


def test_a_dense_run_has_no_sparse_part(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    summary = read_summary(run("method=dense"))
    assert summary["pattern"] is None
    assert not {"sparse", "compliant", "layers", "warning"} & set(summary)
    assert "╭─ dense ─" in capsys.readouterr().out


def test_magnitude_prunes_the_network_of_a_dense_run_and_books_it_apart(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("method=dense", "trainer.max_epochs=2")
    booked = read_summary(folder)["flops"]
    assert booked["flops/train_vs_dense"] == 1
    dense = (folder / "checkpoints/last.ckpt").rename(tmp_path / "dense.ckpt")
    summary = read_summary(run("method=magnitude", f"ckpt={dense}", "pattern=2:4", "optimizer.lr=0"))
    assert summary["flops"]["flops/dense_run/train_total"] == booked["flops/train_total"]
    assert summary["compliant"]
    before, after = (
        torch.load(path, weights_only=True)["state_dict"]["model.hidden1.weight"].view(-1, 4)
        for path in (dense, folder / "checkpoints/last.ckpt")
    )
    assert torch.equal(after, before.scatter(-1, before.abs().argsort(-1)[:, :2], 0))
    capsys.readouterr()
    assert "ckpt=PATH" in failure(run, capsys, "method=magnitude", "pattern=2:4")


def test_any_method_goes_on_from_the_weights_of_another_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def weight(path: Path) -> torch.Tensor:
        return torch.load(path, weights_only=True)["state_dict"]["model.hidden1.weight"]

    def keep(folder: Path, name: str) -> Path:
        return (folder / "checkpoints/last.ckpt").rename(tmp_path / name)

    def half(values: torch.Tensor) -> torch.Tensor:
        blocks = values.view(-1, 4)
        return blocks.scatter(-1, blocks.abs().argsort(-1)[:, :2], 0).view_as(values)

    dense = keep(run("method=dense"), "dense.ckpt")
    still = ("optimizer.lr=0", "method.schedule.start=0", "method.schedule.stop=2000", "method.schedule.every=1000")
    sparse = keep(run("method.rescale=false", f"ckpt={dense}", "pattern=2:4", *still), "sparse.ckpt")
    assert torch.equal(weight(sparse), half(weight(dense)))
    frozen = keep(run("method=static", "method.init=nonzero", f"ckpt={sparse}", "pattern=2:4"), "frozen.ckpt")
    assert torch.equal(weight(frozen) != 0, weight(sparse) != 0)
    assert not torch.equal(weight(frozen), weight(sparse))
    capsys.readouterr()
    assert "method.rescale=false" in failure(run, capsys, f"ckpt={dense}", "pattern=2:4")
    other = failure(run, capsys, f"ckpt={dense}", "method.rescale=false", "model.hidden=[16]")
    assert f"`ckpt` {dense} does not fit the model" in other


@pytest.mark.parametrize("method", ["sr_ste", "rigl", "transposable", "top_kast", "static", "bame_one_batch"])
def test_every_method_leaves_a_compliant_checkpoint_and_its_costs(run: Run, method: str) -> None:
    often = ["method.schedule.every=2"] if method in ("bame_one_batch", "rigl") else []
    summary = read_summary(run(f"method={method}", "pattern=2:4", *often))
    assert summary["compliant"]
    assert (summary["flops"]["flops/train_vs_sr_ste"] == 1) == (method == "sr_ste")
    assert 0 < summary["flops"]["flops/train_vs_dense"] < 1


def test_bame_that_never_flips_a_mask_says_so_loudly(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    summary = read_summary(run("method.evidence.margin=1e9"))
    assert summary["sparse"]["adaptations"] > 0
    assert summary["sparse"]["flips"] == 0
    assert "NO MASK EVER CHANGED" in summary["warning"]
    assert "NO MASK EVER CHANGED" in capsys.readouterr().out


def test_a_static_mask_is_no_reason_to_warn(run: Run) -> None:
    assert read_summary(run("method=static"))["warning"] is None


def test_the_same_seed_gives_the_same_network(run: Run) -> None:
    def weight(*overrides: str) -> torch.Tensor:
        checkpoint = torch.load(run(*overrides) / "checkpoints" / "last.ckpt", weights_only=True)
        return checkpoint["state_dict"]["model.hidden1.weight"]  # type: ignore[no-any-return]

    first, again, other = weight("seed=1", "threads=1"), weight("seed=1", "threads=1"), weight("seed=2", "threads=1")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_second_run_in_the_same_folder_replaces_the_checkpoint(run: Run) -> None:
    run("seed=1")
    folder = run("seed=1", "trainer.max_epochs=2")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


def test_resumes_and_leaves_the_old_checkpoint_alone(run: Run) -> None:
    old = run("pattern=2:4").rename("old") / "checkpoints" / "last.ckpt"
    content = old.read_bytes()
    summary = read_summary(run("pattern=2:4", f"ckpt_path={old}", "trainer.max_epochs=3"))
    assert summary["steps"] == summary["sparse"]["steps"] == 3 * (1257 // 64)
    assert old.read_bytes() == content


def steps_of(folder: Path, metric: str) -> list[int]:
    with (folder / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get(metric)]


def test_resuming_in_the_same_folder_keeps_what_was_logged_before(run: Run) -> None:
    steps = 1257 // 64  # of an epoch
    last = run("trainer.max_epochs=2") / "checkpoints/last.ckpt"
    csv_file = last.parents[1] / "metrics.csv"
    first = list(csv.DictReader(csv_file.read_text().splitlines()))
    with csv_file.open("a", newline="") as file:  # trained on after the checkpoint, and killed in the middle of a row
        csv.DictWriter(file, list(first[0])).writerow({"step": 2 * steps + 5, "train/loss": 9.0})
        file.write("0.3,4.9e-")
    folder = run(
        "trainer.max_epochs=3", f"ckpt_path={last}", "callbacks=[default,prediction]", "callbacks.prediction.every=1"
    )
    assert steps_of(folder, "train/loss") == steps_of(folder, "val/loss") == [steps - 1, 2 * steps - 1, 3 * steps - 1]
    assert steps_of(folder, "test/accuracy") == [3 * steps]
    assert steps_of(folder, "bame/flip_rate") == [9, 19, 29, 39, 49]
    again = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert "bame/realised_loss_reduction" in again[0], "a column that the first leg did not have"
    for row in first:
        if int(row["step"]) < 2 * steps:
            assert any(row.items() <= other.items() for other in again), row
    assert not list(folder.glob("*.part"))
    run("trainer.max_epochs=1")
    assert steps_of(folder, "train/loss") == [steps - 1], "a new run begins a new file"


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_kill_while_the_file_begins_anew_loses_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logger() -> ResumedCSVLogger:
        return ResumedCSVLogger(resumed_from="last.ckpt", save_dir=".", name="", version="")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    torch.save({"global_step": 2}, "last.ckpt")
    Path("metrics.csv").write_text("a,step\n0.5,0\n0.25,1\n0.125,2\n")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            _ = logger().experiment
    assert not Path("metrics.csv").exists()
    again = logger()
    again.log_metrics({"a": 1.0, "b": 2.0}, step=2)
    again.save()
    with Path("metrics.csv").open() as file:
        rows = [(row["step"], row["a"], row["b"]) for row in csv.DictReader(file)]
    assert rows == [("0", "0.5", ""), ("1", "0.25", ""), ("2", "1.0", "2.0")]


def test_a_checkpoint_that_cannot_be_resumed_from_is_told_and_nothing_is_lost(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("method=static")
    last = folder / "checkpoints/last.ckpt"
    kept = [(folder / name).read_bytes() for name in ("summary.json", "metrics.csv")]
    (tmp_path / "cut.ckpt").write_bytes(last.read_bytes()[:20_000])
    torch.save(torch.load(last, weights_only=True)["state_dict"], tmp_path / "weights.ckpt")
    capsys.readouterr()
    cut = failure(run, capsys, "method=static", "ckpt_path=cut.ckpt", "quiet=true")
    assert "`ckpt_path` cut.ckpt is damaged, or torch.save did not write it" in cut
    weights = failure(run, capsys, "method=static", "ckpt_path=weights.ckpt", "quiet=true")
    assert (
        "`ckpt_path` weights.ckpt holds weights alone, and no training to resume. Begin with them by ckpt=" in weights
    )
    other = failure(run, capsys, "method=static", f"ckpt_path={last}", "model.hidden=[16]", "quiet=true")
    assert f"`ckpt_path` {last} does not fit the model" in other
    assert kept == [(folder / name).read_bytes() for name in ("summary.json", "metrics.csv")]


def test_a_mistyped_command_leaves_the_results_of_a_finished_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run() / "summary.json"
    written = path.read_bytes()
    capsys.readouterr()
    for wrong in (
        "method.schedule.start=0.95",
        "method.evidence.contenders=2.0",
        "data.batch_size=0",
        "trainer.precision=odd",
    ):
        failure(run, capsys, wrong, "quiet=true")
        assert path.read_bytes() == written, wrong


def test_a_run_without_the_callback_saves_no_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("method=static")
    summary = read_summary(run("method=static", "~callbacks.checkpoint"))
    assert summary["checkpoint"] is None, "that of the earlier run is not this one's"
    assert "compliant" not in summary
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.ckpt")] == ["checkpoints/last.ckpt"]


def test_a_path_that_is_in_the_way_is_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    assert f"{tmp_path}/run/checkpoints: File exists. Move it away" in failure(run, capsys, "quiet=true")
    for name in ("checkpoints", "metrics.csv"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run/metrics.csv").mkdir()
    assert f"{tmp_path}/run/metrics.csv: Is a directory. Move it away" in failure(run, capsys, "quiet=true")


def test_a_folder_without_the_right_to_write_is_named(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "run/summary.json")

    monkeypatch.setattr("bame_lightning.cli.training.write_summary", refuse)
    assert "run/summary.json: Permission denied. Move it away, change its rights" in failure(run, capsys, "quiet=true")


@pytest.mark.parametrize("method", ["bame", "static"])
def test_a_pattern_that_prunes_nothing_is_told(run: Run, method: str) -> None:
    assert "N = M keeps every weight" in read_summary(run("pattern=2:2", f"method={method}"))["warning"]


def test_trains_without_a_validation_set(run: Run) -> None:
    summary = read_summary(run("data.val_size=0"))
    assert summary["val_accuracy"] is None
    assert summary["steps"] == 1437 // 64


def test_a_number_that_is_not_finite_is_null_in_strict_json(run: Run) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (run("optimizer.lr=1e30") / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["train_loss"] is None


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with enough Python for a few batches."""
    folder = tmp_path / "source"
    folder.mkdir()
    for index in range(20):
        (folder / f"module{index}.py").write_text(f"def f{index}(x):\n    return x + {index}\n\n\n" * 20)
    return folder


def test_a_language_model_is_judged_by_bits_per_byte(
    run: Run, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("data.context=16", "model.width=32", "method.schedule.every=2")
    choices = ("model=gpt", "data=python_source", "task=language_model", "optimizer=adamw")
    folder = run(*choices, *small, f"data.folder={source}", "pattern=2:4", "optimizer.lr=0.01")
    summary = read_summary(folder)
    parts = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    names = [f"model.blocks.{index}.{part}.weight" for index in range(2) for part in parts]
    assert [layer["name"] for layer in summary["layers"]] == names
    assert summary["compliant"]
    assert summary["sparse"]["flips"] > 0
    for stage in ("train", "val", "test"):
        assert summary[f"{stage}_bits_per_byte"] == pytest.approx(summary[f"{stage}_loss"] / math.log(2), rel=1e-5)
    assert summary["test_bits_per_byte"] < 8
    assert 0 < summary["flops"]["flops/train_vs_dense"] < 1
    out = capsys.readouterr().out
    assert f"test bits per byte  {summary['test_bits_per_byte']:.4f}" in out
    assert "train/bits_per_byte" in out[: out.index("╭")]


def test_a_classifier_has_no_bits_per_byte(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_summary(run("method=static"))["test_bits_per_byte"] is None
    assert "bits" not in capsys.readouterr().out


def test_skip_finished_takes_results_of_the_same_configuration_only(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run("method=static", "seed=3") / "summary.json"
    written = path.stat().st_mtime_ns
    run("method=static", "seed=3", "skip_finished=true", "logger=[]", "quiet=true")
    assert "run is finished; skipped" in capsys.readouterr().out
    line = failure(run, capsys, "method=static", "seed=4", "skip_finished=true", "quiet=true")
    assert "the results of another configuration (seed was 3, is 4). Choose another folder" in line
    assert path.stat().st_mtime_ns == written


def test_results_vanish_when_training_begins_that_replaces_them(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("in the middle")

    path = run("method=static") / "summary.json"
    config = path.parent / ".hydra/config.yaml"
    described = config.read_text()
    failure(run, capsys, "method=static", "pattern=1:7", "quiet=true")
    assert path.exists(), "nothing was trained"
    assert config.read_text() == described, "which bame-export builds the network from"
    monkeypatch.setattr("bame_lightning.tasks.Classifier.training_step", fail)
    assert "in the middle" in failure(run, capsys, "method=static", "seed=5", "quiet=true")
    assert not path.exists()
    assert "seed: 5" in config.read_text()


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "0" * 40}, "", None),
        ({}, "machine api.wandb.ai login user password " + "0" * 40, None),
        ({}, "machine elsewhere.example login user password " + "0" * 40, "offline"),
        ({"WANDB_MODE": "disabled"}, "", None),
    ],
)
@pytest.mark.usefixtures("logged_out")
def test_wandb_is_offline_unless_logged_in(
    environment: dict[str, str], netrc: str, mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("bame_lightning.cli.wandb_runs.check_reachable", lambda: None)
    assert wandb_logger(silent=True, save_dir=".")._wandb_init.get("mode") == mode


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pattern=16:1", "got 16:1. Did you mean '1:16'?"),
        ("pattern=16", "got the integer 16: YAML reads an unquoted"),
        ("pattern=half", "`pattern` must be a string 'N:M' such as '1:16'"),
        ("pattern=null", "`pattern` must be a string"),
        ("ckpt_path=nowhere.ckpt", "`ckpt_path` must be a checkpoint file to resume from; nowhere.ckpt does not exist"),
        ("threads=0", "`threads` must be a whole number of at least 1"),
        ("data.batch_size=0", "`batch_size` must be at least 1"),
        ("method.schedule.every=0", "`schedule.every` must be a whole number of optimizer steps, at least 1; got 0"),
        (
            "method.evidence.contenders=2.0",
            "`evidence.contenders` is a share of a row's pruned positions in (0, 1]; got 2.0",
        ),
        ("pattern=1:7", "No layer is eligible for `pattern` 1:7"),
        ("scheduler.warmup_steps=1000", "`warmup_steps` must lie in [0, 19)"),
        ("+method.nonsense=1", "nonsense"),
        ("+patern=2:4", "`patern` is no argument of bame-train. Did you mean `pattern`"),
        ("+xyzzy=1", "`xyzzy` is no argument of bame-train. There are `callbacks`, `ckpt`, "),
        ("seed=abc", "`seed` must be a whole number, such as 0; got abc"),
        ("seed=-1", "`seed` must be a whole number from 0 to 2**32 - 1; got -1"),
        ("trainer.max_epochs=abc", "`trainer.max_epochs` must be a whole number, such as 60; got abc"),
        ("model.hidden=512", "`model.hidden` must be a list, such as [512, 512]; got 512"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_a_wrong_value_ends_in_one_line(
    override: str, message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(run, capsys, override, "quiet=true")


def test_a_data_dir_without_the_files_says_so(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(root: str, *, download: bool) -> None:
        raise RuntimeError("Error downloading")

    monkeypatch.setattr("bame_lightning.tasks.data.TorchvisionFashionMNIST", refuse)
    line = failure(run, capsys, "data=fashion_mnist", "data.data_dir=nowhere", "quiet=true")
    assert "`data_dir` nowhere lacks train-images-idx3-ubyte" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data=python_source",
            "`model` must be made for sequences of tokens (128), as `data` has them; got one for images",
        ),
        ("model=gpt", "`model` must be made for images (1, 8, 8), as `data` has them; got one for sequences of tokens"),
    ],
)
def test_a_model_of_other_data_is_refused(
    override: str, message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failure(run, capsys, override, "quiet=true")


def test_an_unquoted_pattern_in_a_recipe_is_explained(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = tmp_path / "mine" / "recipe"
    recipes.mkdir(parents=True)
    (recipes / "unquoted.yaml").write_text("# @package _global_\npattern: 2:4\n")
    line = failure(run, capsys, "hydra.searchpath=[file://mine]", "recipe=unquoted")
    assert "got the integer 124: YAML reads an unquoted 2:4" in line


def test_an_unknown_choice_lists_the_known_ones(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("model=vgg")
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("bame-train: error: `model` must be one of cnn, ")
    assert "resnet20" in error
    assert "Traceback" not in error


def test_full_error_shows_where(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="16:1"):
        run("pattern=16:1")


def test_help_tells_what_there_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "fashion_mnist",
        "resnet20",
        "recipe=",
        "ckpt_path=",
        "quiet=true",
        "--cfg job",
        "-m pattern=1:4,1:16",
        "skip_finished=true",
        "hydra/launcher=joblib",
    ):
        assert part in text


@pytest.mark.parametrize("first", [True, False])
def test_epochs_are_told_by_the_first_rank_only(
    first: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False)
    capsys.readouterr()
    monkeypatch.setattr(Trainer, "is_global_zero", first)
    monkeypatch.setattr(Trainer, "progress_bar_metrics", {"val/loss": 0.5, "bame/flip_rate": 0.00012})
    EpochLines().on_train_epoch_end(trainer, LightningModule())
    assert capsys.readouterr().out == ("epoch 1/4  bame/flip_rate 0.012%  val/loss 0.5000\n" if first else "")


@pytest.mark.parametrize(("columns", "fit"), [(50, 0), (80, 1), (120, 2)])
def test_the_bar_shows_no_number_in_part(columns: int, fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(Trainer, "progress_bar_metrics", {"val/loss": 0.5, "bame/flip_rate": 0.00012})
    trainer = Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False)
    whole = [("bame/flip_rate", "0.012%"), ("val/loss", "0.5000")]
    assert list(EpochBar().get_metrics(trainer, LightningModule()).items()) == whole[:fit]


def test_the_bar_counts_epochs_from_1_and_shows_a_flip_rate_that_can_be_read(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run("pattern=1:4", "trainer.max_epochs=2")
    shown = capsys.readouterr()
    assert "epoch 1/2:" in shown.out
    assert "epoch 2/2:" in shown.out
    assert re.search(r"bame/flip_rate=\d+\.\d{3}%", shown.out)
    assert re.search(r"epoch 2/2  bame/flip_rate \d+\.\d{3}%.*  val/loss \d\.\d{4}\n", shown.out)
    assert not re.search(r"flops: 0|0 +total flops|epoch 0", shown.out + shown.err, re.IGNORECASE)


@pytest.mark.usefixtures("unchecked_types")
def test_a_pattern_as_a_mapping_is_summed_up_as_text(run: Run) -> None:
    assert read_summary(run("pattern={n:1,m:4}", "method=static", "quiet=true"))["pattern"] == "1:4"
