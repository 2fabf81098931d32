"""Build the plain network of a checkpoint: from the configuration of its run, or by a user's function."""

from __future__ import annotations

import importlib
from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from bame_lightning.checkpoints.export.onnx_model import Inputs
from bame_lightning.checkpoints.export.trained import ExportError
from bame_lightning.cli.models import build_model
from bame_lightning.cli.parts import find_here

_CONFIG = Path(".hydra") / "config.yaml"


def network_of_run(checkpoint: Path, shape: tuple[int, ...] | None = None) -> tuple[nn.Module, Inputs]:
    """Build the network that `bame-train` trained, as the configuration in the checkpoint's run folder describes it.

    The configuration names Python objects, and building calls them.

    Args:
        checkpoint: The file, in its run folder or in a folder of it.
        shape: Shape of an input; None is that of the run's data.

    Returns:
        The network with new weights, and its inputs.

    Raises:
        ExportError: If there is no configuration, or it cannot be built.
    """
    folders = checkpoint.absolute().parents[:3]
    config = next((folder / _CONFIG for folder in folders if (folder / _CONFIG).is_file()), None)
    if config is None:
        raise ExportError(
            f"lies in no run folder of bame-train (there is no {_CONFIG} in {folders[0]} or above), so its network is not "
            "known. Give `--model module:function` and `--input-shape`."
        )
    try:
        cfg = OmegaConf.load(config)
        if not isinstance(cfg, DictConfig) or "model" not in cfg or "data" not in cfg:
            raise ExportError(
                f"has a configuration {config} without `model` and `data`. Give `--model module:function`."
            )
        find_here()
        data = instantiate(cfg.data)
        shape = tuple(data.input_shape) if shape is None else shape
        network = build_model(instantiate(cfg.model), shape, data.num_classes)
    except (InstantiationException, OmegaConfBaseException, OSError) as error:
        cause = error.__cause__ or error
        raise ExportError(
            f"has a configuration {config} whose network cannot be built ({' '.join(str(cause).split())[:300]}). Give "
            "`--model module:function` and `--input-shape`."
        ) from error
    # A shape of one number means a sequence of tokens, as everywhere in the configurations.
    return network, Inputs(shape, data.num_classes if len(shape) == 1 else None)


def network_of_function(name: str) -> nn.Module:
    """Call a user's function that builds the network.

    Args:
        name: "module:function"; the module may lie in the current folder.

    Returns:
        What the function returned.

    Raises:
        ExportError: If there is no such function, it wants arguments, or it returns no module.
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise ExportError(f"needs `--model` as module:function, such as 'my_models:small_net'; got {name!r}.")
    find_here()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ExportError(f"needs a `--model` whose module can be imported; got {name!r} ({error}).") from None
    build = getattr(module, function, None)
    if not callable(build):
        raise ExportError(f"needs a function as `--model`; {module_name} has no function {function!r}.")
    try:
        network = build()
    except TypeError as error:
        raise ExportError(
            f"needs a `--model` that can be called without arguments; {name} raised TypeError: {error}. Wrap it in a "
            "function that passes them."
        ) from error
    if not isinstance(network, nn.Module):
        raise ExportError(
            f"needs a `--model` that returns a torch.nn.Module; {name} returned {type(network).__name__}."
        )
    return network
