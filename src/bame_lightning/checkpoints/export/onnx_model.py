"""ONNX: export a network by tracing it, and compare the outputs of onnxruntime with those of torch."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bame_lightning.checkpoints.export.trained import ExportError
from bame_lightning.checkpoints.untrusted import first_sentence

_NEEDED = ("onnx", "onnxruntime", "onnxscript")
# The traced batch must not be 1, because tracing takes 1 for a constant.
_TRACED, _CHECKED = 2, (1, 2, 5)
_TOLERANCE = 1e-4
# protobuf's limit for one file; larger weights would need files beside it.
_LARGEST = 2**31 - 2**20


@dataclass(frozen=True)
class Inputs:
    """One input of a network: a tensor whose first dimension is the batch.

    Args:
        shape: Shape of one sample.
        vocabulary: Inputs are whole numbers below it; None if they are floating-point numbers.
    """

    shape: tuple[int, ...]
    vocabulary: int | None = None

    def sample(self, batch: int, seed: int) -> Tensor:
        """Draw a random batch: standard normal, or uniform over the vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary is None:
            return torch.randn(batch, *self.shape, generator=generator)
        return torch.randint(self.vocabulary, (batch, *self.shape), generator=generator)


def load_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network the exported weights, and put it into evaluation mode.

    Args:
        network: The plain model.
        state: Its whole state dict.

    Raises:
        ExportError: If names or shapes differ.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ExportError(
            f"does not fit the network {type(network).__name__}: {' '.join(lines)[:300]}. Give the network that was "
            "trained (`--model`), and the `--prefix` under which the checkpoint names its tensors."
        ) from None
    network.eval()


def write_onnx(network: nn.Module, inputs: Sequence[Inputs], path: Path) -> float:
    """Export a network with a free batch size, and compare onnxruntime's outputs with torch's on random inputs.

    Args:
        network: In evaluation mode, on the CPU.
        inputs: Its inputs, in the order of the arguments of `forward`; all have the same batch size.
        path: The file.

    Returns:
        Largest difference between outputs, relative to the largest absolute output or 1, whichever is greater.

    Raises:
        ExportError: If packages are missing, the network cannot be exported, or outputs differ by more than 1e-4.
        OSError: If the system refuses to write.
    """
    onnx, onnxruntime = _packages()
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > _LARGEST:
        raise ExportError(
            f"takes {size / 1e9:.1f} GB, where an ONNX file holds 2 GB at most. Use `--format packed` or dense."
        )
    names = _names(network, len(inputs))
    # Without warnings: they are about operators and constants of the trace, and a user need not act.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        _check_takes(network, inputs)
        try:
            program = torch.onnx.export(
                network,
                _samples(inputs, _TRACED, 0),
                input_names=names,
                dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(path, external_data=False)
            onnx.checker.check_model(path)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        # Tracing runs any network through torch's compiler and three packages, each with errors of its own.
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the system, such as a full disk
                raise
            raise ExportError(
                f"is a network that torch.onnx cannot export ({first_sentence(error)}). `--format dense` needs no tracing."
            ) from error
        return max(
            _difference(network, session, _samples(inputs, batch, seed)) for seed, batch in enumerate(_CHECKED, 1)
        )


def _check_takes(network: nn.Module, inputs: Sequence[Inputs]) -> None:
    try:
        network(*_samples(inputs, _TRACED, 0))
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        told = ", and of ".join(map(_told, inputs))
        raise ExportError(
            f"is a network that cannot process a batch of {told} ({first_sentence(error)}). Give the shape of one sample "
            "without the batch as `--input-shape`, once for each input, and `--tokens` for whole numbers."
        ) from None


def _samples(inputs: Sequence[Inputs], batch: int, seed: int) -> tuple[Tensor, ...]:
    return tuple(one.sample(batch, seed + 100 * place) for place, one in enumerate(inputs))


def _names(network: nn.Module, count: int) -> list[str]:
    """Names of the inputs in the file: "input", or where there are several those of the arguments."""
    if count == 1:
        return ["input"]
    names = list(inspect.signature(network.forward).parameters)
    return names[:count] if len(names) >= count else [f"input_{place}" for place in range(count)]


def _difference(network: nn.Module, session: Any, batch: tuple[Tensor, ...]) -> float:
    expected = [leaf for leaf in pytree.tree_leaves(network(*batch)) if isinstance(leaf, Tensor)]
    given = session.get_inputs()
    if len(given) != len(batch):
        raise ExportError(
            f"takes {len(batch)} inputs in torch but {len(given)} in onnxruntime: leave out what does not matter."
        )
    try:
        computed = session.run(None, {one.name: values.numpy() for one, values in zip(given, batch, strict=True)})
    except Exception as error:  # onnxruntime's errors share no class
        raise ExportError(f"became an ONNX file that onnxruntime cannot run ({first_sentence(error)}).") from error
    if len(expected) != len(computed):
        raise ExportError(f"gives {len(expected)} outputs in torch but {len(computed)} in onnxruntime.")
    worst = 0.0
    for want, got in zip(expected, computed, strict=True):
        have = torch.from_numpy(got)
        if have.shape != want.shape:
            raise ExportError(
                f"gives outputs of shape {tuple(want.shape)} in torch but {tuple(have.shape)} in onnxruntime."
            )
        if want.numel() == 0:
            continue
        want, have = want.double(), have.double()
        difference = float((have - want).abs().max() / want.abs().max().clamp(min=1))
        if not difference <= _TOLERANCE:  # a NaN differs, too
            raise ExportError(
                f"gives outputs in onnxruntime that differ from torch's by {difference:.2g}, where {_TOLERANCE:g} is allowed. "
                "Look for what depends on the inputs' values or on randomness in the network."
            )
        worst = max(worst, difference)
    return worst


def _packages() -> tuple[Any, Any]:
    found: dict[str, Any] = {}
    missing = []
    for name in _NEEDED:
        try:
            found[name] = importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ExportError(
            f"cannot become ONNX without {', '.join(missing)}. Install them: pip install 'bame-lightning[export]'."
        )
    return found["onnx"], found["onnxruntime"]


def _told(inputs: Inputs) -> str:
    kind = "numbers" if inputs.vocabulary is None else f"whole numbers below {inputs.vocabulary}"
    return f"{kind} of shape ({', '.join(map(str, inputs.shape))})"
