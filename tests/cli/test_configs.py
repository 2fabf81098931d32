"""Every YAML under conf/ and recipes/ composes, and what it names can be made."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from bame_lightning import (
    SRSTE,
    BAMECallback,
    Dense,
    Evidence,
    OneBatch,
    OneShotMagnitude,
    RigL,
    Schedule,
    StaticMask,
    TransposableSTE,
)
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.cli import conf
from bame_lightning.cli.conf import conf_dir
from bame_lightning.cli.models import build_model
from bame_lightning.weights.layers import plan_layers
from tests.tasks.fake_data import write_cifar, write_imagenet

CONF = conf_dir()
RECIPES = Path(__file__).parents[2] / "recipes"


def choice(path: Path) -> str:
    """The override that makes Hydra read a file of a group."""
    name = path.relative_to(CONF).with_suffix("")
    return f"{name.parent.as_posix()}={name.name}"


# rglob does not follow the link conf/recipe, so no file is listed twice.
CHOICES = sorted(choice(path) for path in CONF.rglob("*.yaml") if path.parent != CONF)
ROOTS = sorted(path.stem for path in CONF.glob("*.yaml"))
RECIPE_FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Any]:
    def make(*overrides: str, root: str = "config") -> DictConfig:
        folder = [f"run_dir={tmp_path}"] if root == "config" else []
        cfg = compose(root, [*folder, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        OmegaConf.resolve(cfg)
        return cfg

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield make
    HydraConfig.instance().cfg = None


def make_everything(cfg: DictConfig) -> tuple[L.Trainer, L.LightningModule, L.LightningDataModule]:
    data = instantiate(cfg.data)
    model = instantiate(cfg.model)(data.input_shape, data.num_classes)
    tokens = len(data.input_shape) == 1
    inputs = torch.zeros(2, *data.input_shape, dtype=torch.int64) if tokens else torch.randn(2, *data.input_shape)
    positions = data.input_shape if tokens else ()
    assert model(inputs).shape == (2, *positions, data.num_classes)
    optimizer = instantiate(cfg.optimizer)
    instantiate(cfg.scheduler)(optimizer(model.parameters()), 100)
    task = instantiate(cfg.task)(model, optimizer, instantiate(cfg.scheduler))
    callbacks = [instantiate(node) for node in (cfg.method, *cfg.callbacks.values()) if node]
    loggers = [instantiate(node) for node in cfg.logger.values()]
    trainer = instantiate(cfg.trainer)(
        callbacks=callbacks, logger=loggers, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    return trainer, task, data


def test_every_group_is_covered() -> None:
    groups = {name.partition("=")[0] for name in CHOICES}
    assert {"data", "model", "task", "sparsity", "method", "optimizer", "scheduler", "trainer", "logger"} <= groups
    assert "callbacks" in groups
    assert RECIPE_FILES


@pytest.mark.parametrize("root", ROOTS)
def test_the_defaults_of_a_command_compose_and_instantiate(root: str, config: Any) -> None:
    cfg = config(root=root)
    made = {name: instantiate(node) for name, node in cfg.items() if isinstance(node, DictConfig)}
    assert callable(made["model"])


@pytest.mark.parametrize("root", ["flops", "bench"])
@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_command_takes_the_model_and_the_data_of_a_recipe(root: str, path: Path, config: Any) -> None:
    recipe, cfg = f"recipe={path.stem}", config(f"recipe={path.stem}", root=root)
    trained = config(recipe)
    for group in ("model", "data", "optimizer", "sparsity"):
        assert cfg[group] == trained[group]


def test_a_recipe_may_choose_in_any_group(tmp_path: Path) -> None:
    groups = {
        "task": "language_model",
        "method": "rigl",
        "logger": "csv",
        "callbacks": "prediction",
        "sparsity": "mixed",
    }
    lines = ["# @package _global_", "defaults:", *(f"  - override /{key}: {value}" for key, value in groups.items())]
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_text("\n".join(lines) + "\nseed: 3\n")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for root in ROOTS:
            search = f"hydra.searchpath=[file://{tmp_path}]"
            cfg = compose(root, ["recipe=own", search], return_hydra_config=True)
            assert groups.items() <= dict(cfg.hydra.runtime.choices).items()


NEEDS = {"method=magnitude": "ckpt=dense.ckpt", "model=gpt": "data=python_source", "data=python_source": "model=gpt"}


@pytest.mark.parametrize("override", CHOICES)
def test_a_choice_composes_and_instantiates(override: str, config: Any) -> None:
    make_everything(config(override, *([NEEDS[override]] if override in NEEDS else [])))


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_a_recipe_composes_and_instantiates(path: Path, config: Any) -> None:
    make_everything(config(f"recipe={path.stem}"))
    header = path.read_text().splitlines()
    assert header[0] == "# @package _global_"
    assert f"# Run: bame-train recipe={path.stem}" in header
    assert any(line.startswith("# Measured: ") for line in header)


def test_sweeping_over_patterns_reaches_the_method(config: Any) -> None:
    for pattern in ("1:4", "2:4", "1:16"):
        assert str(instantiate(config(f"pattern={pattern}").method).pattern) == pattern


def test_the_methods_are_what_their_names_say(config: Any) -> None:
    assert type(instantiate(config("method=dense").method)) is Dense
    assert type(instantiate(config("method=sr_ste").method)) is SRSTE
    assert type(instantiate(config("method=rigl").method)) is RigL
    assert type(instantiate(config("method=transposable").method)) is TransposableSTE
    magnitude = instantiate(config("method=magnitude", "ckpt=dense.ckpt").method)
    assert type(magnitude) is OneShotMagnitude
    assert str(magnitude.checkpoint) == "dense.ckpt"
    with pytest.raises(InstantiationException, match="ckpt=PATH"):
        instantiate(config("method=magnitude").method)
    assert type(instantiate(config("method=static").method)) is StaticMask
    literal = instantiate(config("method=bame_one_batch").method)
    assert isinstance(literal.evidence, OneBatch)


def test_bame_is_configured_as_in_python(config: Any) -> None:
    callback, default = instantiate(config().method), BAMECallback("1:16")
    assert callback.schedule == default.schedule == Schedule()
    assert callback.evidence == default.evidence == Evidence()
    for name in ("freeze_after", "init", "rescale", "verify"):
        assert getattr(callback, name) == getattr(default, name)


def test_values_that_users_sweep_need_no_plus(config: Any) -> None:
    callback = instantiate(
        config("method.schedule.every=20", "method.schedule.stop=500", "method.evidence.contenders=0.1").method
    )
    assert callback.schedule == Schedule(stop=500, every=20)
    assert callback.evidence == Evidence(contenders=0.1)


def planned(cfg: DictConfig) -> dict[str, str]:
    """The pattern of each sparse layer of the model that `cfg` names."""
    module = L.LightningModule()
    with torch.device("meta"):  # shapes are all that counts
        module.model = instantiate(cfg.model)((128,) if cfg.model._target_.endswith("gpt") else (1, 28, 28), 10)
    rules = cfg.sparsity.layers and OmegaConf.to_container(cfg.sparsity.layers)
    plans = plan_layers(module, NMPattern.parse(cfg.pattern), rules)
    return {plan.name.removesuffix(".weight"): str(plan.pattern) for plan in plans if plan.pattern}


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet20", "resnet32", "resnet18", "resnet50"])
def test_layer_rules_hold_for_every_model(model: str, config: Any) -> None:
    uniform, everywhere, mixed = (
        planned(config(f"model={model}", f"sparsity={name}", "pattern=2:8"))
        for name in ("uniform", "everywhere", "mixed")
    )
    assert "model.fc" not in uniform
    assert set(uniform.values()) == {"2:8"}
    assert everywhere == uniform | {"model.fc": "2:8"}
    assert mixed == uniform | {"model.fc": "2:4"}


VIT_BLOCKS = [f"model.encoder.layers.encoder_layer_{index}." for index in range(4)]
DEIT_BLOCKS = [f"model.blocks.{index}." for index in range(12)]
GPT_BLOCKS = [f"model.blocks.{index}." for index in range(2)]


@pytest.mark.parametrize(
    ("model", "blocks", "attention", "mlp"),
    [
        (
            "vit",
            VIT_BLOCKS,
            ["self_attention.in_proj_weight", "self_attention.out_proj"],
            ["mlp.0", "mlp.3"],
        ),
        ("deit_small", DEIT_BLOCKS, ["attn.qkv", "attn.proj"], ["mlp.fc1", "mlp.fc2"]),
        ("gpt", GPT_BLOCKS, ["attention.qkv", "attention.proj"], ["mlp.fc1", "mlp.fc2"]),
    ],
)
def test_layer_rules_of_transformers(
    model: str, blocks: list[str], attention: list[str], mlp: list[str], config: Any
) -> None:
    def names(parts: list[str]) -> dict[str, str]:
        return {block + part: "1:16" for block in blocks for part in parts}

    for sparsity, parts in (("attention_only", attention), ("mlp_only", mlp), ("uniform", attention + mlp)):
        assert planned(config(f"model={model}", f"sparsity={sparsity}")) == names(parts)


def test_mobilenet_is_sparse_where_channels_mix(config: Any) -> None:
    layers = planned(config("model=mobilenet_v2"))
    network = instantiate(config("model=mobilenet_v2").model)((1, 28, 28), 10)
    mixing = {
        f"model.{name}"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.weight.shape[1] > 1 and module.weight.shape[1] % 16 == 0
    }
    assert set(layers) == mixing
    assert len(layers) == 32  # of 34 pointwise convolutions; two have 24 input channels


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_knows_its_native_input_and_classes(path: Path, config: Any) -> None:
    arguments = inspect.signature(instantiate(config(f"model={path.stem}").model)).parameters
    assert arguments["input_shape"].default in {(3, 224, 224), (3, 32, 32), (1, 28, 28), (128,)}
    assert arguments["num_classes"].default in {10, 1000, 256}


@pytest.mark.parametrize("model", ["cnn", "resnet20", "mobilenet_v2"])
def test_convolutions_lie_channels_last_and_compute_the_same(model: str, config: Any) -> None:
    build, images = instantiate(config(f"model={model}").model), torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    plain = build((3, 32, 32), 10)
    torch.manual_seed(0)
    made = build_model(build, (3, 32, 32), 10)
    convolutions = [module.weight for module in made.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) >= 3
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    torch.testing.assert_close(made.eval()(images), plain.eval()(images), rtol=1e-3, atol=1e-4)


@pytest.fixture
def made_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """For each data set that cannot be had here the folder of made images in its files and shapes."""
    roots = {name: tmp_path / name for name in ("cifar10", "imagenet")}
    write_cifar(roots["cifar10"], 10, monkeypatch, images=4)
    write_imagenet(roots["imagenet"])
    return {name: str(root) for name, root in roots.items()}


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero", "ignore:.*is not empty")
@pytest.mark.parametrize(
    ("recipe", "sparse_layers"),
    [
        ("cifar10_resnet32", 30),
        ("cifar10_mobilenet_v2", 32),
        ("imagenet_resnet18", 19),
        pytest.param("imagenet_resnet50", 52, marks=pytest.mark.slow),
        pytest.param("imagenet_deit_small", 48, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_of_the_literature_trains(
    recipe: str, sparse_layers: int, made_images: dict[str, str], config: Any
) -> None:
    """Two steps on batches of two images, masks evolving in both, then a count of the weights in each block."""
    torch.manual_seed(0)
    cfg = config(
        f"recipe={recipe}",
        f"data.root={made_images[recipe.partition('_')[0]]}",
        "data.batch_size=2",
        "data.num_workers=0",
        "method.schedule.every=1",
        "method.schedule.stop=1.0",
        "trainer.max_steps=2",
    )
    trainer, task, data = make_everything(cfg)
    before = {name: weight.detach().clone() for name, weight in task.named_parameters()}
    trainer.fit(task, data)
    assert trainer.global_step == 2
    after = dict(task.named_parameters())
    [callback] = [callback for callback in trainer.callbacks if isinstance(callback, BAMECallback)]
    layers = callback.summary()["layers"]
    assert len(layers) == sparse_layers
    for name in layers:
        weight = after[f"{name}.weight"]
        kept = weight.movedim(1, -1).reshape(-1, 16).count_nonzero(1)
        assert kept.max() == 1
        assert not torch.equal(weight, before[f"{name}.weight"])
    [result] = trainer.test(task, data, verbose=False)
    assert 0 <= result["test/accuracy"] <= 1


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
