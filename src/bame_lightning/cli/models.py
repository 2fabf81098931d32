"""Build models for the inputs of a data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from bame_lightning.cli.parts import made

Build = Callable[[Any, int], nn.Module]
"""Makes a model from the shape of an input (an image has three numbers, a sequence of tokens one) and the classes."""


def native_input(build: Build) -> tuple[tuple[int, ...], int] | None:
    """The inputs for which a model is made by default.

    Args:
        build: Makes the model.

    Returns:
        Shape of an input, and classes; None if the arguments have no defaults or other names.
    """
    parameters = inspect.signature(build).parameters
    values = [parameters[name].default for name in ("input_shape", "num_classes") if name in parameters]
    return (tuple(values[0]), values[1]) if len(values) == 2 and inspect.Parameter.empty not in values else None


def input_of(build: Build, data: DictConfig | None) -> tuple[tuple[int, ...], int]:
    """Shape of an input and classes: those of a data set, or the defaults of a model.

    Args:
        build: Makes the model.
        data: Configuration of a data set, whose samples are not read; None for the model's native input.

    Returns:
        Shape of an input, and classes.

    Raises:
        ValueError: If there are neither data nor a native input.
    """
    if data:
        return data_shape(instantiate(data))
    native = native_input(build)
    if native is None:
        raise ValueError(
            "`model` has no default `input_shape` and `num_classes`, so it has no native input. Choose one with data=..."
        )
    return native


def data_shape(data: Any) -> tuple[tuple[int, ...], int]:
    """Shape of an input and classes of a data module.

    Args:
        data: The module.

    Returns:
        Shape of an input, and classes.

    Raises:
        ValueError: If the module lacks them.
    """
    missing = [name for name in ("input_shape", "num_classes") if not hasattr(data, name)]
    if missing:
        raise ValueError(
            f"`data` must be a LightningDataModule that says what it holds: input_shape, such as (3, 32, 32), and num_classes; "
            f"{type(data).__name__} has no {' and no '.join(missing)}."
        )
    return tuple(data.input_shape), data.num_classes


def build_model(build: Build, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build a model for inputs of some shape.

    Args:
        build: Makes the model.
        input_shape: Shape of an input.
        num_classes: Outputs.

    Returns:
        The model, with convolutions in the channels-last format.

    Raises:
        ValueError: If the model is made for another kind of input.
    """
    native = native_input(build)
    if native is not None and len(native[0]) != len(input_shape):
        raise ValueError(
            f"`model` must be made for {_kind(input_shape)}, as `data` has them; got one for {_kind(native[0])}. Choose "
            "another `model`, or other `data`."
        )
    # Convolutions are faster in this format, and the weights of a block (consecutive input channels) lie side by side.
    model: nn.Module = made("model", build, input_shape, num_classes, what="input_shape, num_classes")
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must make a torch.nn.Module; got {type(model).__name__}.")
    return model.to(memory_format=torch.channels_last)


def _kind(shape: tuple[int, ...]) -> str:
    kind = {1: "sequences of tokens", 3: "images"}.get(len(shape), "inputs")
    return f"{kind} ({', '.join(map(str, shape))})"
