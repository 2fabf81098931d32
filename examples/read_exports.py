"""Read the files of `bame-export` with torch and safetensors alone: copy what you need.

Run: `python examples/read_exports.py model.safetensors`
"""

import json
import sys

import torch
from safetensors import safe_open
from torch.sparse import SparseSemiStructuredTensorCUTLASS


def read_packed(path):
    """Weights of a packed file, by name, with zeros inside."""
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, layer in json.loads(metadata["layers"]).items():
        values, packed = state.pop(name + ".nm_values"), state.pop(name + ".nm_indices")
        m, transposed = int(layer["pattern"].split(":")[1]), layer.get("transposed", False)
        shape = layer["shape"][::-1] if transposed else layer["shape"]
        width = (m - 1).bit_length()
        bits = (packed[:, None] >> torch.arange(8) & 1).flatten()[: values.numel() * width]
        index = (bits.view(*values.shape, width).long() << torch.arange(width)).sum(-1)
        blocks = torch.zeros(len(values), m, dtype=values.dtype)
        blocks[torch.arange(len(values))[:, None], index] = values
        weight = blocks.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        state[name] = (weight.t() if transposed else weight).contiguous()
    return state | {alias: state[name] for alias, name in json.loads(metadata["same_as"]).items()}


def load_semi_structured(path, device="cuda"):
    """Weights of a semi-structured file, by name; those that fit as torch's sparse tensors."""
    with safe_open(path, "pt", device=device) as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, layer in json.loads(metadata["layers"]).items():
        packed, meta = state.pop(name + ".packed"), state.pop(name + ".meta")
        shape = torch.Size(layer["shape"])
        state[name] = SparseSemiStructuredTensorCUTLASS(shape, packed, meta, None, None, None)
    return state | {alias: state[name] for alias, name in json.loads(metadata["same_as"]).items()}


if __name__ == "__main__":
    path = sys.argv[1]
    with safe_open(path, "pt") as file:
        packed = file.metadata()["format"] == "bame_lightning.packed"
    state = read_packed(path) if packed else load_semi_structured(path, "cpu")
    for name, tensor in state.items():
        print(name, tuple(tensor.shape), tensor.dtype)
