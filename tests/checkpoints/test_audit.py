import itertools
import logging
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.checkpoints.audit import AuditError, audit_checkpoint, audit_state_dict


def sparse_mask(shape: tuple[int, ...], n: int, m: int) -> Tensor:
    """Keep `n` inputs of every `m`, another choice in every block, with plain loops."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for out, *kernel in itertools.product(range(shape[0]), *map(range, shape[2:])):
        for block in range(shape[1] // m):
            for k in range(n):
                mask[out, block * m + (out + 3 * block + sum(kernel) + k) % m, *kernel] = True
    return mask


def entry(mask: Tensor, pattern: str) -> dict[str, Any]:
    packed = torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    return {"pattern": pattern, "shape": list(mask.shape), "mask": packed}


def lightning_checkpoint() -> dict[str, Any]:
    """1:4 linear, 2:4 convolution, dense classifier."""
    fc, conv = sparse_mask((6, 16), 1, 4), sparse_mask((5, 8, 3, 3), 2, 4)
    return {
        "epoch": 3,
        "state_dict": {
            "net.fc.weight": fc * 1.5,
            "net.fc.bias": torch.ones(6),
            "net.conv.weight": conv * -0.5,
            "net.head.weight": torch.ones(2, 8),
        },
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_model_score": torch.tensor(0.5)},
            "AnyNameAtAll": {
                "nm_sparsity_version": 2,
                "step": 12,
                "layers": {"net.fc.weight": entry(fc, "1:4"), "net.conv.weight": entry(conv, "2:4")},
            },
        },
    }


def layers_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["callbacks"]["AnyNameAtAll"]["layers"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


# Plain state dicts


def test_every_divisible_weight_is_judged_and_counted() -> None:
    state = {
        "attn.in_proj_weight": sparse_mask((6, 8), 1, 4) * 1.0,
        "conv.weight": sparse_mask((5, 8, 3, 3), 1, 4) * 1.0,
        "stem.weight": torch.ones(4, 3, 3, 3),
        "norm.weight": torch.ones(8),
    }
    report = audit_state_dict(state, NMPattern(1, 4))
    assert report.compliant
    assert [(x.name, x.blocks, x.nonzeros, x.density) for x in report.layers] == [
        ("attn.in_proj_weight", 12, 12, 0.25),
        ("conv.weight", 90, 90, 0.25),
    ]
    assert report.skipped == {"stem.weight": "4 does not divide its input dimension 3"}


def test_blocks_of_a_convolution_run_along_its_input_channels() -> None:
    along_inputs = torch.zeros(1, 4, 2, 2)
    along_inputs[0, 0] = 1.0  # one input channel at every kernel position: one non-zero per block
    along_kernel = torch.zeros(1, 4, 2, 2)
    along_kernel[0, :, 0, 0] = 1.0  # all inputs at one position: four non-zeros in one block
    report = audit_state_dict({"good.weight": along_inputs, "bad.weight": along_kernel}, NMPattern(1, 4))
    assert [(x.name, x.violations) for x in report.layers] == [("good.weight", 0), ("bad.weight", 1)]


def test_blocks_of_a_transposed_weight_run_along_its_first_dimension(path: Path) -> None:
    weight = sparse_mask((6, 8), 1, 4).t().contiguous()
    state = {"h.0.attn.weight": weight * 1.0, "fc.weight": sparse_mask((6, 8), 1, 4) * 1.0}
    report = audit_state_dict(state, NMPattern(1, 4), transposed=["*.attn"])
    assert report.compliant
    assert [(x.name, x.blocks, x.transposed) for x in report.layers] == [
        ("h.0.attn.weight", 12, True),
        ("fc.weight", 12, False),
    ]
    alone = {"attn.weight": torch.eye(8)[:, :1].repeat(1, 8)}  # one input, for every output
    assert audit_state_dict(alone, NMPattern(1, 8), transposed=["attn"]).compliant
    assert not audit_state_dict(alone, NMPattern(1, 8)).compliant
    state["h.0.attn.weight"][:, 5] = 1
    (layer, _) = audit_state_dict(state, NMPattern(1, 4), transposed=["*.attn"]).layers
    assert (layer.violations, layer.reason) == (2, "block 10 (filter 5) holds more than 1 non-zero")
    skipped = audit_state_dict({"conv.weight": torch.ones(4, 4, 1)}, NMPattern(1, 4), transposed=["conv"]).skipped
    assert skipped == {"conv.weight": "`transposed` is for matrices, not for the shape (4, 4, 1)"}
    with pytest.raises(AuditError, match="`transposed` 'no' matches"):
        audit_state_dict(state, NMPattern(1, 4), transposed=["no"])


def test_a_saved_layer_says_that_it_is_transposed(path: Path) -> None:
    mask = sparse_mask((6, 8), 1, 4).t().contiguous()
    checkpoint = lightning_checkpoint()
    checkpoint["state_dict"]["net.attn.weight"] = mask * 1.0
    layers_of(checkpoint)["net.attn.weight"] = entry(mask, "1:4") | {"transposed": True}
    torch.save(checkpoint, path)
    assert audit_checkpoint(path).compliant
    assert audit_checkpoint(path, "1:8").layers[-1].compliant is False  # 8 divides its inputs, not its 6 outputs
    for wrong in ("yes", None, torch.ones(2)):
        layers_of(checkpoint)["net.attn.weight"]["transposed"] = wrong
        torch.save(checkpoint, path)
        with pytest.raises(AuditError, match=r"layer `net.attn.weight` is malformed: its `transposed` is"):
            audit_checkpoint(path)


def test_one_tampered_weight_is_found_with_its_block_and_filter() -> None:
    weight = sparse_mask((4, 32), 1, 16) * 1.0
    position = int((weight[2, 16:] == 0).nonzero()[0])
    weight[2, 16 + position] = 1e-30
    (layer,) = audit_state_dict({"fc.weight": weight}, NMPattern(1, 16)).layers
    assert (layer.violations, layer.compliant) == (1, False)
    assert layer.reason == "block 5 (filter 2) holds more than 1 non-zero"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_float_type_is_judged(dtype: torch.dtype) -> None:
    good = (sparse_mask((4, 8), 1, 4) * 1.0).to(dtype)
    bad = torch.ones(4, 8).to(dtype)
    assert audit_state_dict({"weight": good}, NMPattern(1, 4)).compliant
    assert not audit_state_dict({"weight": bad}, NMPattern(1, 4)).compliant


def test_nan_counts_as_non_zero_and_minus_zero_as_zero() -> None:
    nan = torch.tensor([[1.0, float("nan"), 0.0, 0.0]])
    zero = torch.tensor([[1.0, -0.0, 0.0, 0.0]])
    assert not audit_state_dict({"weight": nan}, NMPattern(1, 4)).compliant
    assert audit_state_dict({"weight": zero}, NMPattern(1, 4)).compliant


def test_sparse_layouts_are_judged_by_their_values(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eye, full = torch.eye(8), torch.ones(8, 8)
        torch.save({"a.weight": eye.to_sparse(), "b.weight": full.to_sparse(), "c.weight": full.to_sparse_csr()}, path)
    report = audit_checkpoint(path, "1:4")
    assert [(x.name, x.violations) for x in report.layers] == [("a.weight", 0), ("b.weight", 16), ("c.weight", 16)]


@pytest.mark.parametrize(
    ("name", "weight", "reason"),
    [
        ("int.weight", torch.zeros(4, 4, dtype=torch.int8), "not floating point but int8"),
        ("complex.weight", torch.zeros(4, 4, dtype=torch.complex64), "not floating point but complex64"),
        ("empty.weight", torch.zeros(0, 4), "empty, of shape (0, 4)"),
        ("pos_embed", torch.zeros(1, 4, 4), "not named *weight"),
    ],
)
def test_weights_that_cannot_be_judged_are_listed(name: str, weight: Tensor, reason: str) -> None:
    report = audit_state_dict({name: weight}, NMPattern(1, 4))
    assert report.skipped == {name: reason}
    assert not report.compliant  # nothing was checked


def test_meta_weights_are_refused() -> None:
    with pytest.raises(AuditError, match="`weight` as a meta tensor"):
        audit_state_dict({"weight": torch.ones(4, 4, device="meta")}, NMPattern(1, 4))


@pytest.mark.parametrize("glob", ["net.head.weight", "net.head", "*head*", "net.h*"])
def test_dense_matches_weights_and_modules(glob: str) -> None:
    state = {"net.fc.weight": torch.eye(4), "net.head.weight": torch.ones(2, 4)}
    assert not audit_state_dict(state, NMPattern(1, 4)).compliant
    report = audit_state_dict(state, NMPattern(1, 4), dense=[glob])
    assert report.compliant
    assert report.skipped == {"net.head.weight": "matches `dense`"}


def test_dense_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(AuditError, match=r"`dense` 'haed' matches.*The names are fc\.weight;"):
        audit_state_dict({"fc.weight": torch.eye(4), "haed": torch.ones(4)}, NMPattern(1, 4), dense=["fc", "haed"])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "optimizer": {}}])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_every_layout_are_read(path: Path, wrap: Any, zipped: bool) -> None:
    state = {"fc.weight": torch.eye(8), "fc._extra_state": "text", "steps": 3}
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    report = audit_checkpoint(path, NMPattern(1, 8))
    assert (report.compliant, report.from_state, len(report.layers)) == (True, False, 1)


# The state that the callback saves


def test_saved_state_says_which_layers_obey_what(path: Path) -> None:
    torch.save(lightning_checkpoint(), path)
    report = audit_checkpoint(path)
    assert report.compliant
    assert report.from_state
    assert [(x.name, str(x.pattern), x.blocks, x.nonzeros) for x in report.layers] == [
        ("net.fc.weight", "1:4", 24, 24),
        ("net.conv.weight", "2:4", 90, 180),
    ]
    assert report.skipped == {"net.head.weight": "dense in the callback's saved state"}


def test_a_weight_outside_its_mask_violates_even_where_n_of_m_holds(path: Path) -> None:
    checkpoint = lightning_checkpoint()
    weight = checkpoint["state_dict"]["net.fc.weight"]
    weight[3, 4:8] = weight[3, 4:8].roll(1)  # block 3 * 4 + 1, still one non-zero
    torch.save(checkpoint, path)
    layer = audit_checkpoint(path).layers[0]
    assert (layer.name, layer.violations) == ("net.fc.weight", 1)
    assert layer.reason == "block 13 (filter 3) holds a non-zero outside its mask"


@pytest.mark.parametrize("kept", [0, 2])
def test_a_mask_that_does_not_keep_exactly_n_violates(path: Path, kept: int) -> None:
    checkpoint = lightning_checkpoint()
    mask = sparse_mask((6, 16), 1, 4)
    mask[5, :4] = torch.arange(4) < kept
    checkpoint["state_dict"]["net.fc.weight"][5, :4] = 0.0
    layers_of(checkpoint)["net.fc.weight"] = entry(mask, "1:4")
    torch.save(checkpoint, path)
    layer = audit_checkpoint(path).layers[0]
    assert layer.violations == 1
    assert layer.reason == "block 20 (filter 5) has a mask that does not keep exactly 1"


def test_a_kept_weight_may_be_zero(path: Path) -> None:
    checkpoint = lightning_checkpoint()
    checkpoint["state_dict"]["net.fc.weight"].zero_()
    torch.save(checkpoint, path)
    assert audit_checkpoint(path).compliant


def test_pattern_is_asked_on_top_of_the_saved_one(path: Path) -> None:
    torch.save(lightning_checkpoint(), path)
    report = audit_checkpoint(path, "1:4")
    assert [(x.name, str(x.pattern), x.violations) for x in report.layers] == [
        ("net.fc.weight", "1:4", 0),
        ("net.conv.weight", "2:4", 0),
        ("net.conv.weight", "1:4", 90),
    ]
    assert audit_checkpoint(path, "2:4").compliant
    skipped = audit_checkpoint(path, "1:16").skipped
    assert skipped["net.conv.weight"] == "for 1:16: 16 does not divide its input dimension 8"


def test_dense_excuses_a_saved_layer_visibly(path: Path) -> None:
    checkpoint = lightning_checkpoint()
    checkpoint["state_dict"]["net.fc.weight"].fill_(1.0)
    torch.save(checkpoint, path)
    report = audit_checkpoint(path, dense=["net.fc"])
    assert [x.name for x in report.layers] == ["net.conv.weight"]
    assert report.skipped["net.fc.weight"] == "matches `dense`"


MALFORMED = {
    "not a mapping": ([1], "lacks `pattern`, `shape` or `mask`"),
    "no mask": ({"pattern": "1:4", "shape": [6, 16]}, "lacks"),
    "pattern": ({"pattern": "x"}, "must be a string 'N:M'.*got 'x'"),
    "sexagesimal": ({"pattern": 76}, "got the integer 76"),
    "does not divide": ({"pattern": "1:5"}, "does not divide into blocks of the pattern 1:5"),
    "shape": ({"shape": [16, 6]}, r"`shape` is \[16, 6\], where the weight has \[6, 16\]"),
    "shape of tensors": ({"shape": [torch.ones(2), 16]}, "`shape`"),
    "shape is text": ({"shape": "6x16"}, "`shape`"),
    "short mask": ({"mask": torch.zeros(11, dtype=torch.uint8)}, "takes 12 bytes; got 11"),
    "float mask": ({"mask": torch.zeros(12)}, "not a vector of uint8"),
    "list mask": ({"mask": [0] * 12}, "not a vector of uint8"),
    "meta mask": ({"mask": torch.zeros(12, dtype=torch.uint8, device="meta")}, "not a vector of uint8"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_layers_are_named(path: Path, case: str) -> None:
    change, message = MALFORMED[case]
    checkpoint = lightning_checkpoint()
    layers = layers_of(checkpoint)
    partial = not isinstance(change, dict) or case == "no mask"
    layers["net.fc.weight"] = change if partial else layers["net.fc.weight"] | change
    torch.save(checkpoint, path)
    with pytest.raises(AuditError, match=rf"last\.ckpt.*layer `net\.fc\.weight` is malformed: .*{message}"):
        audit_checkpoint(path)


def test_a_saved_layer_without_weight_is_named(path: Path) -> None:
    checkpoint = lightning_checkpoint()
    del checkpoint["state_dict"]["net.conv.weight"]
    torch.save(checkpoint, path)
    with pytest.raises(AuditError, match=r"layer `net\.conv\.weight` is malformed: the state dict has no such weight"):
        audit_checkpoint(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"nm_sparsity_version": 7, "layers": {}}, "`nm_sparsity_version` 7, where this release reads 1 to 6"),
        ({"nm_sparsity_version": torch.ones(3), "layers": {}}, "where this release reads 1 to 6"),
        ({"nm_sparsity_version": 2}, "names no `layers`"),
        ({"nm_sparsity_version": 2, "layers": {}}, "names no `layers`"),
        ({"nm_sparsity_version": 2, "layers": [1]}, "names no `layers`"),
        ({"nm_sparsity_version": 2, "layers": {3: {}}}, "names no `layers`"),
    ],
)
def test_malformed_state_is_refused(path: Path, state: dict[str, Any], message: str) -> None:
    checkpoint = lightning_checkpoint()
    checkpoint["callbacks"]["AnyNameAtAll"] = state
    torch.save(checkpoint, path)
    with pytest.raises(AuditError, match=message):
        audit_checkpoint(path, "1:4")


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_masks_of_earlier_releases_are_read(path: Path, version: int) -> None:
    checkpoint = lightning_checkpoint()
    checkpoint["callbacks"]["AnyNameAtAll"]["nm_sparsity_version"] = version
    torch.save(checkpoint, path)
    assert audit_checkpoint(path).compliant


def test_two_states_may_not_share_a_layer(path: Path) -> None:
    checkpoint = lightning_checkpoint()
    checkpoint["callbacks"]["Another"] = checkpoint["callbacks"]["AnyNameAtAll"]
    torch.save(checkpoint, path)
    with pytest.raises(AuditError, match=r"two callback states that name `net\.conv\.weight`"):
        audit_checkpoint(path)


# Unusable input


def test_pattern_is_required_without_saved_state(path: Path) -> None:
    torch.save({"fc.weight": torch.eye(4), "callbacks": None}, path)
    with pytest.raises(AuditError, match=r"last\.ckpt.*Give `pattern`.*--pattern 1:16"):
        audit_checkpoint(path)


@pytest.mark.parametrize("pattern", ["x", "4:2", "0:4", "124"])
def test_invalid_patterns_are_refused(path: Path, pattern: str) -> None:
    torch.save({"fc.weight": torch.eye(4)}, path)
    with pytest.raises(AuditError, match="`pattern`"):
        audit_checkpoint(path, pattern)


class RunsCode:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_never_run(path: Path, form: str) -> None:
    witness = path.with_name("witness")
    payload = {"fc.weight": torch.eye(4), "evil": RunsCode(f"touch '{witness}'")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(AuditError, match=r"last\.ckpt` refers to `.*`, which may run code"):
        audit_checkpoint(path, "1:4")
    assert not witness.exists()
    # The payload works, so this test could fail.
    pickle.loads(path.read_bytes()) if form == "pickle" else torch.load(path, weights_only=False)
    assert witness.exists()


def test_a_class_that_is_not_allowed_is_named(path: Path) -> None:
    torch.save({"fc.weight": torch.eye(4), "log": logging.StreamHandler}, path)
    with pytest.raises(
        AuditError, match=r"refers to `logging.StreamHandler`.*not loaded.*`torch\.save` its state dict alone"
    ):
        audit_checkpoint(path, "1:4")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncation_anywhere_is_reported(path: Path, zipped: bool) -> None:
    torch.save({"fc.weight": torch.eye(16)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in {0, 1, 2, 10, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(AuditError, match=r"last\.ckpt` is (damaged|empty)"):
            audit_checkpoint(path, "1:16")


@pytest.mark.parametrize("content", [b"hello world\n", b"PK\x05\x06" + bytes(18), b"\x80\x02}q\x00.", b"\x00" * 64])
def test_foreign_files_are_reported(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(
        AuditError, match=r"last\.ckpt` is damaged, or torch.save did not write it \(.*Give a Lightning"
    ):
        audit_checkpoint(path, "1:4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.eye(4)], "holds no state dict but list"),
        ({"epoch": 1, "net": {"names": ["fc"]}}, "holds no tensors that could be weights; its keys are 'epoch'; 'net'"),
        ({}, "holds no tensors"),
        ({3: torch.eye(4)}, "holds no tensors"),
        ({"state_dict": {"fc.weight": [1.0]}}, r"has a `fc\.weight` that is not a tensor but list"),
    ],
)
def test_files_without_a_state_dict_are_reported(path: Path, content: Any, message: str) -> None:
    torch.save(content, path)
    with pytest.raises(AuditError, match=message):
        audit_checkpoint(path, "1:4")


def test_missing_files_folders_and_devices_are_reported(path: Path) -> None:
    with pytest.raises(AuditError, match=r"last\.ckpt` does not exist"):
        audit_checkpoint(path, "1:4")
    with pytest.raises(AuditError, match="is a folder"):
        audit_checkpoint(path.parent, "1:4")
    with pytest.raises(AuditError, match="is not a file"):
        audit_checkpoint(os.devnull, "1:4")


def test_a_small_file_that_claims_a_huge_weight_is_reported(path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1).expand(2**30, 2**30)}, path)
    with pytest.raises(AuditError, match=r"`fc\.weight` of shape \(1073741824, 1073741824\) that cannot be examined"):
        audit_checkpoint(path, "1:4")
