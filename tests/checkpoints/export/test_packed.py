import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.checkpoints.export import (
    ExportError,
    load_trained,
    pack_weight,
    packed_tensors,
    read_packed,
    unpack_weight,
)
from bame_lightning.checkpoints.export.files import write_safetensors
from tests.checkpoints.export import reader
from tests.checkpoints.export.models import entry, mask, save, weight

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@st.composite
def sparse_weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, NMPattern, bool]:
    m = draw(st.integers(1, 20))
    n = draw(st.integers(1, m))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (draw(st.integers(1, 4)), m * draw(st.integers(1, 3)), *kernel)
    kept = mask(shape, n, m, seed=draw(st.integers(0, 99)))
    values = weight(kept, draw(st.sampled_from(TYPES)))
    special = draw(st.sampled_from([None, 0.0, -0.0, float("nan"), float("inf")]))
    if special is not None:  # in about a third of the kept places
        where = kept & (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3)
        values = torch.where(where, torch.tensor(special).to(values.dtype), values)
    if len(kernel) == 2 and draw(st.booleans()):
        values = values.to(memory_format=torch.channels_last)
    transposed = not kernel and draw(st.booleans())
    if transposed:
        values, kept = values.t().contiguous(), kept.t().contiguous()
    return values, kept, NMPattern(n, m), transposed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sparse_weights())
def test_any_weight_comes_back_bit_by_bit(tmp_path: Path, case: tuple[Tensor, Tensor, NMPattern, bool]) -> None:
    values, kept, pattern, transposed = case
    state = {"fc.weight": values, "fc.bias": torch.ones(3), "seen": torch.tensor(7)}
    save(tmp_path / "a.ckpt", state, {"fc.weight": entry(kept, str(pattern), transposed)})
    tensors, metadata = packed_tensors(load_trained(tmp_path / "a.ckpt"))
    write_safetensors(tmp_path / "a", tensors, metadata)

    expected = reader.raw_state(state)
    assert reader.read_packed(tmp_path / "a") == expected
    assert reader.raw_state(read_packed(tmp_path / "a")) == expected
    assert reader.raw_state(reader.EXAMPLE["read_packed"](tmp_path / "a")) == expected
    # Which zeros were kept comes back, too: the values say how many, the positions which.
    kept = kept.t() if transposed else kept
    restored = unpack_weight(
        torch.ones_like(tensors["fc.weight.nm_values"]), tensors["fc.weight.nm_indices"], pattern, kept.shape
    )
    assert torch.equal(restored != 0, kept)


def test_the_layout_of_a_small_weight_is_the_documented_one() -> None:
    # Blocks of filter 0: 7 at position 1, 8 at 3; of filter 1: 9 at 0, and a kept zero at 2.
    values = torch.tensor([[0.0, 7, 0, 8], [9, 0, 0, 0]])
    kept = torch.tensor([[False, True, False, True], [True, False, True, False]])
    packed, indices = pack_weight(values, kept, NMPattern(2, 4))
    assert packed.tolist() == [[7, 8], [9, 0]]
    assert indices.tolist() == [0b10_00_11_01]
    # 1:5 takes three bits: positions 4, 2 and 3 fill a byte and a bit.
    weight = torch.zeros(1, 15)
    weight[0, [4, 7, 13]] = torch.tensor([1.0, 2.0, 3.0])
    packed, indices = pack_weight(weight, weight != 0, NMPattern(1, 5))
    assert packed.tolist() == [[1], [2], [3]]
    assert indices.tolist() == [0b11_010_100, 0b0]


def test_blocks_of_a_convolution_run_along_its_inputs() -> None:
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, 1, 0, 0], weight[0, 2, 0, 1] = 5.0, 6.0  # input 1 at the first kernel position, 2 at the second
    packed, indices = pack_weight(weight, weight != 0, NMPattern(1, 4))
    assert packed.tolist() == [[5], [6]]
    assert indices.tolist() == [0b10_01]


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (1, 16), (4, 8), (8, 16), (3, 5), (1, 17)])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_a_file_is_within_ten_percent_of_the_bound(
    tmp_path: Path, n: int, m: int, dtype: torch.dtype, bits: int
) -> None:
    shape = (256, 16 * m)
    kept = mask(shape, n, m)
    save(tmp_path / "a.ckpt", {"fc.weight": weight(kept, dtype)}, {"fc.weight": entry(kept, f"{n}:{m}")})
    path = tmp_path / "a"
    write_safetensors(path, *packed_tensors(load_trained(tmp_path / "a.ckpt")))
    log2_m = torch.tensor(float(m)).log2().item()
    bound = shape[0] * shape[1] * n / m * (bits + log2_m) / 8
    assert bound <= path.stat().st_size <= 1.1 * bound


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    kept = mask((4, 8), 1, 4)
    tied = weight(kept)
    state = {"model.head.weight": tied, "model.embed.weight": tied, "model.bias": torch.ones(2)}
    save(tmp_path / "a.ckpt", state, {"model.embed.weight": entry(kept, "1:4")})
    tensors, metadata = packed_tensors(load_trained(tmp_path / "a.ckpt"))
    assert sorted(tensors) == ["bias", "embed.weight.nm_indices", "embed.weight.nm_values"]
    assert json.loads(metadata["same_as"]) == {"head.weight": "embed.weight"}
    write_safetensors(tmp_path / "a", tensors, metadata)
    expected = reader.raw_state({name.removeprefix("model."): tensor for name, tensor in state.items()})
    assert reader.read_packed(tmp_path / "a") == reader.raw_state(read_packed(tmp_path / "a")) == expected


def test_each_layer_has_its_own_pattern_in_the_metadata(tmp_path: Path) -> None:
    one, two = mask((2, 16), 1, 16), mask((2, 8, 3, 3), 2, 4)
    layers = {"a.weight": entry(one, "1:16"), "b.weight": entry(two, "2:4")}
    save(tmp_path / "a.ckpt", {"a.weight": weight(one), "b.weight": weight(two)}, layers)
    _, metadata = packed_tensors(load_trained(tmp_path / "a.ckpt"))
    assert json.loads(metadata["layers"]) == {
        "a.weight": {"pattern": "1:16", "shape": [2, 16]},
        "b.weight": {"pattern": "2:4", "shape": [2, 8, 3, 3]},
    }


def test_wrong_masks_are_refused() -> None:
    weight = torch.tensor([[1.0, 0, 0, 0]])
    with pytest.raises(ValueError, match="`kept` must keep exactly 2 of every 4"):
        pack_weight(weight, weight != 0, NMPattern(2, 4))
    with pytest.raises(ValueError, match="`weight` must be zero where `kept` is False"):
        pack_weight(weight, torch.tensor([[False, True, False, False]]), NMPattern(1, 4))


def test_a_name_that_the_layout_needs_is_refused(tmp_path: Path) -> None:
    kept = mask((4, 8), 1, 4)
    state = {"fc.weight": weight(kept), "fc.weight.nm_values": torch.ones(2)}
    save(tmp_path / "a.ckpt", state, {"fc.weight": entry(kept, "1:4")})
    with pytest.raises(ExportError, match=r"`fc\.weight\.nm_values`, a name that the packed layout needs"):
        packed_tensors(load_trained(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("damage", ["indices", "values", "missing", "layers", "cut", "other", "version"])
def test_damaged_files_are_refused_in_a_line(tmp_path: Path, damage: str) -> None:
    kept = mask((4, 15), 1, 5)
    save(tmp_path / "a.ckpt", {"fc.weight": weight(kept)}, {"fc.weight": entry(kept, "1:5")})
    tensors, metadata = packed_tensors(load_trained(tmp_path / "a.ckpt"))
    if damage == "indices":
        tensors["fc.weight.nm_indices"].fill_(255)  # position 7 of a block of 5
    elif damage == "values":
        tensors["fc.weight.nm_values"] = tensors["fc.weight.nm_values"][:-1]
    elif damage == "missing":
        del tensors["fc.weight.nm_indices"]
    elif damage == "layers":
        metadata["layers"] = '{"fc.weight": []}'
    elif damage == "other":
        del metadata["format"]
    elif damage == "version":
        metadata["version"] = "2"
    path = tmp_path / "a"
    write_safetensors(path, tensors, metadata)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError) as caught:
        read_packed(path)
    assert str(caught.value).startswith(f"`{path}` is ")
    assert "xport" in str(caught.value)
