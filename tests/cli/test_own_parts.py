"""The reader's own model, data, optimizer and schedule, as docs/training.md has them."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.cli.processes import TINY, train
from tests.test_docs import ROOT, blocks

DOCUMENT = ROOT / "docs/training.md"
FILES = {
    match[1]: text
    for language, text in blocks(DOCUMENT)
    if language == "python" and (match := re.match(r"# (\w+\.py)\n", text))
}
COMMANDS = [
    command
    for language, text in blocks(DOCUMENT)
    for command in (re.split(r"\s+#", line)[0] for line in text.splitlines())
    if language == "" and command.startswith("bame-train") and ("_target_" in command or "callbacks=" in command)
]
SHORT = (
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "threads=1",
    "trainer.log_every_n_steps=2",
    "hydra.run.dir=run",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_document_has_an_example_of_each() -> None:
    assert FILES.keys() == {"my_models.py", "my_data.py"}
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_document_trains(command: str, folder: Path) -> None:
    done = train(folder, *shlex.split(command)[1:], *SHORT)
    assert done.status == 0, done.err
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["compliant"]
    assert (folder / "run/checkpoints/best.ckpt").exists() == ("best" in command)
    weights = {layer["name"]: layer["blocks"] for layer in summary["layers"]}
    if "my_models.net" in command:
        width = 128 if "width=128" in command else 64
        assert weights == {"model.1.weight": width * 64 // (4 if "2:4" in command else 16)}
        assert "`model` my_models.net takes no hidden: left out" in done.err
    if "Adagrad" in command:
        assert "`optimizer` torch.optim.Adagrad takes no momentum, nesterov: left out" in done.err


def test_stopping_early_stops(tmp_path: Path) -> None:
    early = ("callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=1", "optimizer.lr=0.0")
    assert train(tmp_path, *TINY, "trainer.max_epochs=9", "hydra.run.dir=run", "method=static", *early).status == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["epochs"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model._target_=my_models.nett"], "my_models has no nett. Did you mean my_models.net"),
        (["model._target_=mine.net"], "there is no module mine, neither installed nor in the current folder"),
        (
            ["model._target_=my_models.net", "+model.widht=3"],
            "`model.widht` is no argument of my_models.net. Did you mean `model.width`?",
        ),
        (["model._target_=my_models.net", "model.hidden=[3]"], "`model.hidden` is no argument of my_models.net"),
        (["data._target_=torch.utils.data.Dataset"], "Dataset has no input_shape and no num_classes"),
        (["optimizer._target_=torch.optim.AdamWW"], "torch.optim has no AdamWW. Did you mean torch.optim.AdamW"),
        (
            ["+trainer.max_epoch=2"],
            "`trainer.max_epoch` is no argument of lightning.Trainer. Did you mean `trainer.max_epochs`",
        ),
        (["+optimizer.lrr=2"], "`optimizer.lrr` is no argument of torch.optim.SGD. Did you mean `optimizer.lr`"),
        (["scheduler._target_=torch.optim.lr_scheduler.StepLR"], "missing a required argument: 'step_size'"),
        (["optimizer.lr=abc"], "`optimizer.lr` must be a number, such as 0.05; got abc"),
        (["optimizer.lr=true"], "`optimizer.lr` must be a number, such as 0.05; got true"),
        (["skip_finished=no"], "`skip_finished` must be true or false; got no"),
        (["optimizer.nesterov=1"], "`optimizer.nesterov` must be true or false; got 1"),
        (["method.rescale=no"], "`method.rescale` must be true or false; got no"),
        (["data.batch_size=6.5"], "`data.batch_size` must be a whole number, such as 64; got 6.5"),
        (["optimizer.lrr=2"], "`optimizer.lrr` does not exist. Did you mean `optimizer.lr`"),
        (["trainer.gradient_clip_val=abc"], "`trainer.gradient_clip_val` must be a number, or null; got abc"),
        (["trainer.limit_train_batches=yes"], "`trainer.limit_train_batches` must be a number, or null; got yes"),
        (["trainer.accumulate_grad_batches=0"], "`trainer.accumulate_grad_batches` must be at least 1; got 0"),
        (["trainer.devices=abc"], "`trainer` cannot be made of its values: `devices` selected with"),
        (["task.label_smoothing=7"], "`label_smoothing` is a share in [0, 1]; got 7"),
        (["scheduler.warmup_steps=abc"], "`warmup_steps` must be a number of steps, or a fraction of them; got abc"),
        (
            ["callbacks=[default,early_stopping]", "data.val_size=0"],
            "`callbacks.early_stopping.monitor` val/loss needs samples",
        ),
        (
            ["callbacks=[default,early_stopping]", "callbacks.early_stopping.monitor=val/acc"],
            "`callbacks.early_stopping.monitor`: Early stopping conditioned on metric `val/acc` which is not available",
        ),
        (["ckpt_path=epoch=3 für alle.ckpt"], "epoch=3 für alle.ckpt does not exist"),
        (["task._target_=my_models.net"], "`task` cannot be made of its values: too many values to unpack"),
        (["data._target_=my_models.net"], "`data` cannot be made of its values: net() missing 2 required"),
        (["method._target_=my_models.net"], "`method` cannot be made of its values: net() missing 2 required"),
        (["model._target_="], "`model._target_` must name something that can be imported; got nothing."),
        (["trainer.precision=77"], "`trainer` cannot be made of its values: Precision 77 is invalid"),
        (["optimizer.lr=-1"], "`optimizer` cannot be made of its values: Invalid learning rate: -1."),
        (["optimizer.lr="], "`optimizer.lr` must be a number, such as 0.05; got nothing."),
        (["trainer.gradient_clip_val=-1"], "`trainer.gradient_clip_val` must not be negative; got -1."),
        (["ckpt_path=."], "`ckpt_path` must be a checkpoint file to resume from; . is a folder."),
        (["method.schedule=5"], "`method.schedule` must be set by one of its values (method.schedule._target_=, "),
    ],
)
def test_what_is_wrong_ends_in_one_line_that_names_the_key(words: list[str], message: str, folder: Path) -> None:
    done = train(folder, *words, *SHORT, "quiet=true")
    assert done.status == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not (folder / "run/summary.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed"], "`seed` sets nothing. Values are set as KEY=VALUE"),
        (["sweep.yaml"], "`sweep.yaml` sets nothing. Values are set as KEY=VALUE"),
        (["=3"], "`=3` sets nothing. Values are set as KEY=VALUE"),
        (["+sparsity.layers.*fc*=2:4"], "`+sparsity.layers.*fc*` cannot be read as a key. Other signs than letters"),
        (["trainer="], "`trainer` must be one of default; got nothing."),
        (["optimizer=adam"], "`optimizer` must be one of adamw, sgd; got adam. Did you mean adamw?"),
        (["trainer=null"], "`trainer` must be one of default; got null."),
        (
            ["logger=null"],
            "`logger` must be one of csv, csv_wandb, tensorboard, wandb; got null. logger=[] chooses none.",
        ),
        (["callbacks=[default,bset]"], "got bset. Did you mean best?"),
        (["hydra/launcher=jobib"], "`hydra/launcher` must be one of basic, joblib, "),
        (["hydra/lancher=joblib"], "`hydra/lancher` is no group. Did you mean `hydra/launcher`"),
        (["hydra.run.dri=x"], "`hydra.run.dri` does not exist. Did you mean `hydra.run.dir`?"),
        (["optimizer.lr.x=3"], "`optimizer.lr` is a value; it has no `x`."),
        (["method.schedul.every=3"], "`method.schedul` does not exist. Did you mean `method.schedule`?"),
        (["callbacks.best.mode=max"], "`callbacks.best` does not exist, unless callbacks=[default,best] chooses it."),
        (["logger=[]", "logger.csv.name=x"], "`logger.csv` does not exist, unless logger=[csv] chooses it."),
        (["logger.wandb.project=x"], "`logger.wandb` does not exist, unless logger=[csv,wandb] chooses it."),
        (["pattern=1:4,2:4"], "pattern=1:4,2:4 has several values. -m runs each of them"),
        (["seed=range(1,3)"], "seed=range(1,3) has several values. -m runs each of them"),
    ],
)
def test_what_cannot_be_composed_ends_in_one_line_that_says_what_can(
    words: list[str], message: str, tmp_path: Path
) -> None:
    done = train(tmp_path, *words)
    assert done.status == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == set(), "a mistyped command leaves nothing"


@pytest.mark.parametrize(
    ("words", "example"), [(["--optimizer.lr=0.1"], "optimizer.lr=0.1"), (["--pattern", "2:4"], "pattern=VALUE")]
)
def test_values_with_dashes_get_a_hint(words: list[str], example: str, tmp_path: Path) -> None:
    done = train(tmp_path, *words)
    assert done.status == 2
    assert len(done.err.splitlines()) == 1
    assert f"values are set without dashes, {example}." in done.err
    assert "${args_no_hyphens}" in done.err


def test_a_folder_with_any_name_works(tmp_path: Path) -> None:
    name = "läufe, lr=0.1 (2)"
    done = train(
        tmp_path, *TINY, "method=static", "trainer.max_epochs=1", "quiet=true", f"hydra.run.dir={name.replace(',', '')}"
    )
    assert done.status == 0, done.err
    assert (tmp_path / name.replace(",", "") / "summary.json").exists()


@pytest.mark.parametrize("command", ["flops", "bench"])
def test_commands_that_answer_find_models_of_the_current_folder(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])
    main = importlib.import_module(f"bame_lightning.cli.{command}").main
    small = {"flops": ["steps=10"], "bench": ["cycles=1", "batch_size=2", "threads=1"]}[command]
    monkeypatch.setattr("sys.argv", [command, "model._target_=my_models.net", "data=digits", "json=true", *small])
    main()
    assert json.loads(capsys.readouterr().out)["input_shape"] == [1, 8, 8]
    monkeypatch.setattr("sys.argv", [command, "json=no"])
    with pytest.raises(SystemExit):
        main()
    assert "`json` must be true or false; got no" in capsys.readouterr().err
