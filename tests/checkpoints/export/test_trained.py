import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.checkpoints.audit import AuditError
from bame_lightning.checkpoints.export import ExportError, load_trained, packed_tensors, semi_structured_tensors
from tests.checkpoints.export.models import entry, mask, save, weight

KEPT = mask((4, 8), 1, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


def test_names_are_those_of_the_network(path: Path) -> None:
    state = {"model.fc.weight": weight(KEPT), "model.fc.bias": torch.ones(4)}
    save(path, state, {"model.fc.weight": entry(KEPT, "1:4")})
    trained = load_trained(path)
    assert list(trained.tensors) == ["fc.weight", "fc.bias"]
    assert (trained.patterns, trained.prefix) == ({"fc.weight": NMPattern(1, 4)}, "model.")
    assert torch.equal(trained.kept["fc.weight"], KEPT)
    assert list(load_trained(path, prefix="").tensors) == list(state)


def test_a_name_elsewhere_keeps_all_names_whole(path: Path) -> None:
    state = {"model.fc.weight": weight(KEPT), "scale": torch.ones(1)}
    save(path, state, {"model.fc.weight": entry(KEPT, "1:4")})
    assert list(load_trained(path).tensors) == list(state)
    trained = load_trained(path, prefix="model.")
    assert (list(trained.tensors), trained.left_out) == (["fc.weight"], ("scale",))


def test_a_plain_state_dict_keeps_its_names(path: Path) -> None:
    torch.save({"model.weight": weight(KEPT)}, path)
    assert list(load_trained(path, "1:4").tensors) == ["model.weight"]


def test_without_a_saved_mask_zeros_fill_blocks_up(path: Path) -> None:
    torch.save({"weight": torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 5]])}, path)
    kept = load_trained(path, "2:4").kept["weight"]
    assert kept.tolist() == [[True, True, False, False], [True, False, False, True]]


def test_a_saved_mask_says_which_zeros_are_kept_and_pruned_zeros_are_positive(path: Path) -> None:
    kept = torch.tensor([[False, False, False, True]])
    save(path, {"weight": torch.tensor([[-0.0, 0, 0, -0.0]])}, {"weight": entry(kept, "1:4")})
    trained = load_trained(path)
    assert torch.equal(trained.kept["weight"], kept)
    assert trained.tensors["weight"].signbit().tolist() == [[False, False, False, True]]


def test_a_weight_is_exported_by_its_own_pattern(path: Path) -> None:
    save(path, {"weight": weight(KEPT)}, {"weight": entry(KEPT, "1:4")})
    assert load_trained(path, "1:2").patterns == {"weight": NMPattern(1, 4)}


def test_a_transposed_weight_is_packed_along_its_first_dimension(path: Path) -> None:
    dense = torch.tensor([[0.0, 7.0], [5.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.save({"attn.weight": dense}, path)
    trained = load_trained(path, "2:4", transposed=["attn"])
    assert trained.transposed == {"attn.weight"}
    # Zeros fill up: positions 0 and 1 of the first output, 0 and 1 of the second.
    assert trained.kept["attn.weight"].tolist() == [[True, True], [True, True], [False, False], [False, False]]
    tensors, metadata = packed_tensors(trained)
    assert tensors["attn.weight.nm_values"].tolist() == [[0, 5], [7, 0]]
    assert json.loads(metadata["layers"]) == {"attn.weight": {"pattern": "2:4", "shape": [4, 2], "transposed": True}}
    with pytest.raises(ExportError, match=r"attn\.weight: it is stored as \(in, out\)"):
        semi_structured_tensors(trained.to(torch.float16))


def test_rounding_keeps_names_masks_and_integers(path: Path) -> None:
    state = {"weight": weight(KEPT), "seen": torch.tensor(3)}
    trained = load_trained(save(path, state, {"weight": entry(KEPT, "1:4")})).to(torch.bfloat16)
    assert torch.equal(trained.tensors["weight"], state["weight"].bfloat16())
    assert trained.tensors["seen"].dtype == torch.int64


def test_rounding_to_infinity_is_refused(path: Path) -> None:
    state = {"weight": weight(KEPT), "bias": torch.tensor([1e5, float("inf")])}
    trained = load_trained(save(path, state, {"weight": entry(KEPT, "1:4")}))
    with pytest.raises(ExportError, match=r"`bias` values beyond float16's largest, 65504"):
        trained.to(torch.float16)
    assert trained.to(torch.bfloat16).tensors["bias"].isinf().tolist() == [False, True]


@pytest.mark.parametrize(
    ("state", "options", "error", "message"),
    [
        (
            {"fc.weight": torch.ones(4, 4)},
            {"pattern": "1:4"},
            ExportError,
            r"fc\.weight violates 1:4, block 0 \(filter",
        ),
        ({"fc.weight": torch.ones(4, 3)}, {"pattern": "1:4"}, ExportError, "no N:M sparse weight"),
        ({"fc.weight": torch.eye(4)}, {"pattern": "1:4", "prefix": "net."}, ExportError, "below the `--prefix` 'net.'"),
        ({"fc.weight": torch.eye(4)}, {}, AuditError, "holds no state of a sparsity callback"),
        ({"fc.weight": torch.eye(4)}, {"pattern": "4:1"}, AuditError, "`pattern` N:M keeps at most"),
        (
            {"fc.weight": torch.eye(4), "b": torch.ones(2).to_sparse()},
            {"pattern": "1:4"},
            ExportError,
            "`b`, which has the layout sparse_coo",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(
    path: Path, state: dict[str, torch.Tensor], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    torch.save(state, path)
    with pytest.raises(error, match=message) as caught:
        load_trained(path, **options)
    assert "\n" not in str(caught.value)


def test_a_non_zero_outside_the_saved_mask_is_refused(path: Path) -> None:
    save(path, {"weight": weight(KEPT)}, {"weight": entry(KEPT.roll(1, 1), "1:4")})
    with pytest.raises(ExportError, match="a non-zero outside its mask"):
        load_trained(path)


def test_dense_weights_are_taken_along(path: Path) -> None:
    torch.save({"fc.weight": weight(KEPT), "head.weight": torch.ones(2, 4)}, path)
    trained = load_trained(path, "1:4", dense=["head"])
    assert set(trained.patterns) == {"fc.weight"}
    assert torch.equal(trained.tensors["head.weight"], torch.ones(2, 4))
