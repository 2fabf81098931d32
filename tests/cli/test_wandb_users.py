"""Weights & Biases as its users know it: environment, sweeps by agents, resumed runs, no network."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from bame_lightning.cli.wandb_runs import wandb_logger
from tests.cli.processes import TINY, train
from tests.test_docs import ROOT

SAME = (*TINY, "method=static", "trainer.max_epochs=1", "logger=wandb", "quiet=true")


@pytest.mark.parametrize(
    ("environment", "configured", "expected"),
    [
        ({}, {}, ("bame-lightning", None, None, None)),
        (
            {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_ENTITY": "e", "WANDB_RUN_GROUP": "g"},
            {},
            ("p", "n", "e", "g"),
        ),
        (
            {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_ENTITY": "e", "WANDB_RUN_GROUP": "g"},
            {"project": "P", "name": "N", "entity": "E", "group": "G"},
            ("P", "N", "E", "G"),
        ),
    ],
)
@pytest.mark.usefixtures("logged_out")
def test_the_environment_wins_over_our_defaults_and_the_command_line_over_it(
    environment: dict[str, str], configured: dict[str, str], expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    nothing = dict.fromkeys(("project", "name", "entity", "group"))
    made = wandb_logger(silent=True, save_dir=".", **{**nothing, **configured})._wandb_init
    assert tuple(made.get(name) for name in ("project", "name", "entity", "group")) == expected


@pytest.mark.parametrize(("configured", "expected"), [([], ("a", "b")), (["c"], ("c",))])
@pytest.mark.usefixtures("logged_out")
def test_tags_of_the_environment_count_where_none_are_configured(
    configured: list[str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = wandb_logger(silent=True, save_dir=str(tmp_path), tags=configured)
    assert logger.experiment.tags == expected
    logger.experiment.finish()


def test_names_of_the_environment_win_in_a_sweep_too(tmp_path: Path) -> None:
    environment = {"WANDB_RUN_GROUP": "mine", "WANDB_MODE": "offline", "WANDB_NAME": "called"}
    (tmp_path / "spy.py").write_text(
        "from lightning import Callback\n\nclass Spy(Callback):\n    def on_train_start(self, trainer, module):\n"
        "        made = trainer.logger._wandb_init\n        print('seen', made['group'], made['name'])\n"
    )
    spy = ("+callbacks.spy._target_=spy.Spy", "hydra.sweep.dir=s", "seed=0,1")
    done = train(tmp_path, "-m", *SAME, *spy, environment=environment)
    assert (done.status, done.out.count("seen mine called")) == (0, 2)


def test_a_resumed_run_goes_on_with_its_wandb_run(tmp_path: Path) -> None:
    offline = {"WANDB_MODE": "offline"}
    assert train(tmp_path, *SAME, "hydra.run.dir=run", environment=offline).status == 0
    last = "run/checkpoints/last.ckpt"
    longer = ("trainer.max_epochs=2", f"ckpt_path={last}")
    assert train(tmp_path, *SAME, *longer, "hydra.run.dir=elsewhere", environment=offline).status == 0
    numbers = [
        path.name.rpartition("-")[2]
        for folder in ("run", "elsewhere")
        for path in (tmp_path / folder).glob("wandb/offline-run-*")
    ]
    assert len(numbers) == 2
    assert len(set(numbers)) == 1
    assert torch.load(tmp_path / last, weights_only=True)["wandb_run_id"] == numbers[0]
    branches = ("-m", *SAME, *longer, "hydra.sweep.dir=s", "trainer.max_epochs=2,3")
    assert train(tmp_path, *branches, environment=offline).status == 0
    apart = {path.name.rpartition("-")[2] for path in tmp_path.glob("s/*/wandb/offline-run-*")}
    assert len(apart - {numbers[0]}) == 2, "jobs that begin with one checkpoint are runs of their own"


class _Refuses(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors":[{"message":"user is not logged in"}]}')

    do_GET = do_POST  # noqa: N815 the library's name

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    """Address of a service to which the key is unknown."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("reason", ["no network", "an expired key"])
def test_wandb_that_cannot_be_reached_is_one_line_before_training(reason: str, refusing: str, tmp_path: Path) -> None:
    address = refusing if reason == "an expired key" else "http://127.0.0.1:9"
    there = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}
    if reason == "an expired key":
        there["WANDB_INIT_TIMEOUT"] = "3"
    done = train(tmp_path, *SAME, "hydra.run.dir=run", environment=there)
    assert done.status == 1
    (line,) = [line for line in done.err.splitlines() if not line.startswith("wandb: ")]
    assert line.startswith("bame-train: error: W&B cannot be reached, or refuses the account: ")
    assert "WANDB_MODE=offline trains without it" in line
    assert (tmp_path / "run/wandb").exists() == (reason == "an expired key"), "W&B is asked only if it can be reached"
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_agent_runs_the_trials_of_the_shipped_sweep(tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "examples/wandb_sweep.yaml").read_text())
    values = {name: {"value": choices["values"][-1]} for name, choices in sweep["parameters"].items()}
    macros = create_sweep_command_args({"args": values})
    words: list[str] = []
    for chunk in create_sweep_command(list(sweep["command"])):  # as wandb.wandb_agent fills it in
        words += macros[chunk[2:-1]] if chunk.startswith("${") else [chunk]
    assert words[0] == sweep["program"] == "bame-train"
    assert not [word for word in words if word.startswith("--")]
    done = train(
        tmp_path,
        *words[1:],
        *TINY,
        "trainer.max_epochs=1",
        environment={"WANDB_MODE": "offline", "WANDB_RUN_ID": "trial7"},
    )
    assert done.status == 0, done.err
    config = yaml.safe_load((tmp_path / "outputs/sweep/trial7/.hydra/config.yaml").read_text())
    assert (config["pattern"], config["seed"]) == ("1:16", 1)
    assert list((tmp_path / "outputs/sweep/trial7/wandb").glob("offline-run-*-trial7"))
