"""Every YAML under conf/ and recipes/ composes, and what it names can be made."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from bame_lightning import BAMECallback, Evidence, OneBatch, Schedule, StaticMask
from bame_lightning.cli import conf
from bame_lightning.cli.conf import conf_dir

CONF = conf_dir()
RECIPES = Path(__file__).parents[2] / "recipes"


def choice(path: Path) -> str:
    """The override that makes Hydra read a file."""
    name = path.relative_to(CONF).with_suffix("")
    return "" if name.name == "config" else f"{name.parent.as_posix()}={name.name}"


# rglob does not follow the link conf/recipe, so no file is listed twice.
CHOICES = sorted(choice(path) for path in CONF.rglob("*.yaml"))
RECIPE_FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Any]:
    def make(*overrides: str) -> DictConfig:
        cfg = compose("config", [f"run_dir={tmp_path}", *filter(None, overrides)], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        OmegaConf.resolve(cfg)
        return cfg

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield make
    HydraConfig.instance().cfg = None


def make_everything(cfg: DictConfig) -> tuple[L.Trainer, L.LightningModule]:
    data = instantiate(cfg.data)
    model = instantiate(cfg.model)(data.input_shape, data.num_classes)
    images = torch.randn(2, *data.input_shape)
    assert model(images).shape == (2, data.num_classes)
    optimizer = instantiate(cfg.optimizer)
    instantiate(cfg.scheduler)(optimizer(model.parameters()), 100)
    task = instantiate(cfg.task)(model, optimizer, instantiate(cfg.scheduler))
    callbacks = [instantiate(node) for node in (cfg.method, *cfg.callbacks.values()) if node]
    loggers = [instantiate(node) for node in cfg.logger.values()]
    trainer = instantiate(cfg.trainer)(callbacks=callbacks, logger=loggers, accelerator="cpu")
    return trainer, task


def test_every_group_is_covered() -> None:
    groups = {name.partition("=")[0] for name in CHOICES if name}
    assert {"data", "model", "sparsity", "method", "optimizer", "scheduler", "trainer", "logger", "callbacks"} <= groups
    assert RECIPE_FILES


@pytest.mark.parametrize("override", CHOICES)
def test_a_choice_composes_and_instantiates(override: str, config: Any) -> None:
    make_everything(config(override))


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_a_recipe_composes_and_instantiates(path: Path, config: Any) -> None:
    make_everything(config(f"recipe={path.stem}"))
    header = path.read_text().splitlines()
    assert header[0] == "# @package _global_"
    assert f"# Run: bame-train recipe={path.stem}" in header
    assert "# Measured: see recipes/README.md" in header


def test_sweeping_over_patterns_reaches_the_method(config: Any) -> None:
    for pattern in ("1:4", "2:4", "1:16"):
        assert str(instantiate(config(f"pattern={pattern}").method).pattern) == pattern


def test_the_methods_are_what_their_names_say(config: Any) -> None:
    assert not config("method=dense").method
    assert type(instantiate(config("method=static").method)) is StaticMask
    literal = instantiate(config("method=bame_one_batch").method)
    assert isinstance(literal.evidence, OneBatch)


def test_bame_is_configured_as_in_python_but_scaled(config: Any) -> None:
    callback, default = instantiate(config().method), BAMECallback("1:16")
    assert callback.schedule == default.schedule == Schedule()
    assert callback.evidence == default.evidence == Evidence()
    assert (callback.freeze_after, callback.init, callback.verify) == (
        default.freeze_after,
        default.init,
        default.verify,
    )
    assert callback.rescale
    assert not default.rescale


def test_values_that_users_sweep_need_no_plus(config: Any) -> None:
    callback = instantiate(
        config("method.schedule.every=20", "method.schedule.stop=500", "method.evidence.share=0.1").method
    )
    assert callback.schedule == Schedule(stop=500, every=20)
    assert callback.evidence == Evidence(share=0.1)


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet20", "resnet18"])
def test_layer_rules_hold_for_every_model(model: str, config: Any) -> None:
    def patterns(sparsity: str) -> dict[str, str]:
        cfg = config(f"model={model}", f"sparsity={sparsity}", "method=static", "pattern=2:8", "data=fashion_mnist")
        callback = instantiate(cfg.method)
        network = instantiate(cfg.model)((1, 28, 28), 10)
        module = L.LightningModule()
        module.model = network
        module.configure_optimizers = lambda: torch.optim.SGD(network.parameters(), lr=0.1)  # type: ignore[method-assign]
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(module)
        trainer.strategy.optimizers = [module.configure_optimizers()]  # type: ignore[list-item]
        callback.on_fit_start(trainer, module)
        return callback.summary()["layers"]  # type: ignore[no-any-return]

    uniform, everywhere, mixed = (patterns(name) for name in ("uniform", "everywhere", "mixed"))
    assert "model.fc" not in uniform
    assert set(uniform.values()) == {"2:8"}
    assert everywhere == uniform | {"model.fc": "2:8"}
    assert mixed == uniform | {"model.fc": "2:4"}


def test_resnet20_grows_into_resnet32(config: Any) -> None:
    cfg = config("model=resnet20", "model.width=32", "model.blocks_per_stage=5")
    network: nn.Module = instantiate(cfg.model)((3, 32, 32), 10)
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 31


@pytest.mark.parametrize("place", ["package", "repository"])
def test_the_groups_are_found_in_a_wheel_and_in_a_repository(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "bame_lightning"
    monkeypatch.setattr(conf, "__file__", str(package / "cli" / "conf.py"))
    with pytest.raises(FileNotFoundError, match=r"configuration groups of bame_lightning are in neither"):
        conf_dir()
    folder = (package if place == "package" else tmp_path) / "conf"
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert conf_dir() == folder.resolve()
