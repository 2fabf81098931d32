from pathlib import Path

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from bame_lightning.checkpoints.export import ExportError, load_trained, semi_structured_tensors
from bame_lightning.checkpoints.export.files import write_safetensors
from bame_lightning.checkpoints.export.semi_structured import compress, why_not
from bame_lightning.checkpoints.files import read_weights
from tests.checkpoints.export import reader
from tests.checkpoints.export.models import entry, mask, save, weight

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        ("2:4", torch.float16),
        ("2:4", torch.bfloat16),
        ("1:4", torch.float16),
        ("1:16", torch.bfloat16),
        ("2:8", torch.bfloat16),
    ],
)
def test_the_loader_of_the_example_gives_the_very_weights(tmp_path: Path, pattern: str, dtype: torch.dtype) -> None:
    n, m = map(int, pattern.split(":"))
    kept, odd = mask((64, 128), n, m), mask((8, 16), n, m)
    state = {"0.weight": weight(kept, dtype), "0.bias": torch.randn(64, dtype=dtype), "1.weight": weight(odd, dtype)}
    state["0.weight"][0, :m] = 0.0  # a block of kept zeros
    save(tmp_path / "a.ckpt", state, {"0.weight": entry(kept, pattern), "1.weight": entry(odd, pattern)})
    tensors, metadata, dense = semi_structured_tensors(load_trained(tmp_path / "a.ckpt"))
    assert list(dense) == ["1.weight"]
    assert "(8, 16) is no multiple of (32, " in dense["1.weight"]
    assert tensors["0.weight.packed"].numel() == kept.numel() // 2
    write_safetensors(tmp_path / "a", tensors, metadata)

    loaded = reader.EXAMPLE["load_semi_structured"](tmp_path / "a", device="cpu")
    assert isinstance(loaded["0.weight"], SparseSemiStructuredTensorCUTLASS)
    assert torch.equal(loaded["0.weight"].to_dense(), state["0.weight"])
    assert all(torch.equal(loaded[name], state[name]) for name in ("0.bias", "1.weight"))
    expanded = read_weights(tmp_path / "a").tensors
    assert expanded.keys() == state.keys()
    assert all(torch.equal(expanded[name], state[name]) for name in state)

    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(16, 8, bias=False)).requires_grad_(False)
    model.load_state_dict(loaded, assign=True)
    assert isinstance(model[0].weight.data, SparseSemiStructuredTensorCUTLASS)
    assert torch.equal(model[0].weight.to_dense(), state["0.weight"])


def test_float32_would_lose_weights() -> None:
    lossy = weight(mask((32, 64), 2, 4))
    packed, _ = compress(lossy)
    assert (packed != 0).sum() < (lossy != 0).sum()  # why it is refused
    assert why_not(lossy) != ""
    assert why_not(lossy.half()) == ""


@pytest.mark.parametrize(
    ("shape", "pattern", "dtype", "reason"),
    [
        ((32, 64), "2:4", torch.float32, "2:4 in half precision, not float32"),
        ((32, 64), "3:4", torch.float16, "more than 2 non-zeros in 4"),
        ((32, 64), "4:8", torch.float16, "more than 2 non-zeros in 4"),
        ((32, 48), "2:4", torch.float16, "is no multiple of"),
        ((32, 64, 1, 1), "2:4", torch.float16, "matrices only, not 4-dimensional"),
        ((32, 64), "2:4", torch.float64, "2:4 in half precision, not float64"),
    ],
)
def test_a_model_without_a_fitting_weight_is_refused(
    tmp_path: Path, shape: tuple[int, ...], pattern: str, dtype: torch.dtype, reason: str
) -> None:
    kept = mask(shape, *map(int, pattern.split(":")))
    save(tmp_path / "a.ckpt", {"fc.weight": weight(kept, dtype)}, {"fc.weight": entry(kept, pattern)})
    with pytest.raises(ExportError, match=reason) as caught:
        semi_structured_tensors(load_trained(tmp_path / "a.ckpt"))
    assert "fc.weight: " in str(caught.value)
    assert "`--format packed`" in str(caught.value)
