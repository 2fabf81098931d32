"""Products for sparse tensor cores, as far as a CPU can tell: packing, shapes, and the wiring around torch's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from bame_lightning import BAMECallback, Evidence, Schedule, StaticMask
from bame_lightning.blocks.masks import top_n_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.transposable import both_ways_mask
from bame_lightning.compute import binding, layer, semi_structured
from bame_lightning.compute.choice import Choice
from bame_lightning.compute.choose import Call, choose
from bame_lightning.compute.native.build import UnavailableError
from bame_lightning.compute.operation import Conv2d, Linear
from bame_lightning.compute.semi_structured import SemiStructuredProducts, backend_of
from tests.training import Task, trainer

OUT, INP = 64, 128
PATTERNS = ["1:16", "1:8", "1:4", "2:4"]
BACKENDS = [SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT]


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.BACKEND)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Torch's class with its kernels written in dense products. Of cuSPARSELt even the packing is made up: no test of it."""

    def multiply(packed: Tensor, meta: Tensor, dense: Tensor) -> Tensor:
        return sparse_semi_structured_to_dense_cutlass(packed, meta) @ dense

    def add_multiply(bias: Tensor, packed: Tensor, meta: Tensor, dense: Tensor) -> Tensor:
        return bias[:, None] + multiply(packed, meta, dense)

    def cuda_multiply(
        packed: Tensor, dense: Tensor, bias: Any = None, transpose_result: bool = False, **_: Any
    ) -> Tensor:
        made = packed @ dense if bias is None else bias[:, None] + packed @ dense
        return made.t().contiguous() if transpose_result else made

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", multiply)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", add_multiply)
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cuda_multiply)
    monkeypatch.setattr(semi_structured, "backend_of", lambda device: request.param)
    return request.param


def matrix(
    pattern: str, seed: int = 0, both_ways: bool = True, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """A weight and its mask."""
    n, m = map(int, pattern.split(":"))
    blocks = torch.randn(OUT * INP // m, m, generator=torch.Generator().manual_seed(seed))
    mask = top_n_mask(blocks.abs(), n)
    mask = both_ways_mask(mask, blocks, OUT) if both_ways else mask
    return (blocks * mask).view(OUT, INP).to(dtype), mask.view(OUT, INP)


def products(mask: Tensor, pattern: str, dtype: torch.dtype = torch.bfloat16) -> SemiStructuredProducts:
    return SemiStructuredProducts(Linear(), mask, NMPattern.parse(pattern), dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_packed_for_cutlass_unpacks_to_the_weight_and_its_transpose(
    pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi_structured, "backend_of", lambda device: SparseSemiStructuredTensorCUTLASS)
    weight, mask = matrix(pattern, dtype=dtype)
    made: Any = products(mask, pattern, dtype).values(weight)
    for one, whole in ((made, weight), (made.t(), weight.t().contiguous())):
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(one.packed, one.meta), whole)
        # Where no kept weight is zero, it is what torch itself packs.
        packed, meta = sparse_semi_structured_from_dense_cutlass(whole)
        assert torch.equal(one.packed, packed)
        assert torch.equal(one.meta, meta)


def test_kept_weights_that_are_zero_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "backend_of", lambda device: SparseSemiStructuredTensorCUTLASS)
    weight, mask = matrix("2:4")
    made = products(mask, "2:4")
    full: Any = made.values(weight)
    weight[weight.abs() < 1] = 0
    half: Any = made.values(weight)
    assert torch.equal(half.meta, full.meta)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(half.packed, half.meta), weight)


def test_torch_drops_the_third_weight_of_four_and_we_do_not_pack_it(backend: Any) -> None:
    weight, mask = matrix("2:4", both_ways=False)
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight.t().contiguous())
    left = sparse_semi_structured_to_dense_cutlass(packed, meta).count_nonzero()
    assert left < 0.85 * weight.count_nonzero()  # without a word
    made = products(mask, "2:4")
    assert not made.both_ways
    values: Any = made.values(weight)
    assert values.packed_t is None
    gradient = torch.randn(8, OUT).bfloat16()
    assert made.input_gradient(gradient, values, torch.randn(8, INP).bfloat16()) is None
    # A forward pass that does not fit is refused, at once and when the mask changes.
    mask = mask.clone()
    mask[5, 8:12] = True
    with pytest.raises(ValueError, match="the mask keeps more than 2 of 4 consecutive inputs"):
        made.update(mask)
    with pytest.raises(ValueError, match="the mask keeps more than 2 of 4 consecutive inputs"):
        products(mask, "2:4")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("samples", [(16,), (3, 5), (1,)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_are_the_dense_ones(backend: Any, pattern: str, samples: tuple[int, ...], biased: bool) -> None:
    weight, mask = matrix(pattern)
    made = products(mask, pattern)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*samples, INP, generator=generator).bfloat16()
    gradient = torch.randn(*samples, OUT, generator=generator).bfloat16()
    bias = torch.randn(OUT, generator=generator).bfloat16() if biased else None
    values = made.values(weight)
    close: dict[str, Any] = {"rtol": 0.03, "atol": 0.1}  # sums of bfloat16
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(made.forward(x, values, bias).double(), exact, **close)
    found = made.input_gradient(gradient, values, x)
    assert found is not None
    torch.testing.assert_close(found.double(), gradient.double() @ weight.double(), **close)
    assert made.weight_gradient(gradient, x, weight) is None


def test_a_mask_that_changes_is_followed(backend: Any) -> None:
    (_, mask), (later, other) = matrix("1:8", 0), matrix("1:8", 1)
    made = products(mask, "1:8")
    x = torch.randn(4, INP).bfloat16()
    made.update(other)
    torch.testing.assert_close(made.forward(x, made.values(later), None), x @ later.t(), rtol=0.03, atol=0.1)


@pytest.mark.parametrize("biased", [True, False])
def test_shapes_on_the_meta_device(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Through torch's own classes: what they say of shapes and types without computing anything.
    for kind in BACKENDS:
        monkeypatch.setattr(semi_structured, "backend_of", lambda device, kind=kind: kind)
        monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
        weight, mask = matrix("1:8")
        made = products(mask, "1:8")
        packed: Any = made.values(weight)
        parts = [t if t is None else t.to("meta") for t in (packed.packed, packed.meta, packed.packed_t, packed.meta_t)]
        values = kind(packed.shape, *parts, None)
        x, gradient, bias = (
            torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((3, 7, INP), (3, 7, OUT), (OUT,))
        )
        output = made.forward(x, values, bias if biased else None)
        assert (output.shape, output.dtype) == (gradient.shape, torch.bfloat16)
        of_input = made.input_gradient(gradient, values, x)
        assert of_input is not None
        assert (of_input.shape, of_input.dtype) == (x.shape, torch.bfloat16)


def test_what_cannot_be_multiplied_is_refused_with_the_reason(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mask = matrix("1:4")
    with pytest.raises(TypeError, match="sparse tensor cores multiply linear layers only"):
        SemiStructuredProducts(Conv2d(), mask[:, :, None, None], NMPattern(1, 4), torch.bfloat16)
    with pytest.raises(ValueError, match=r"in float16 and bfloat16, not in torch\.float64"):
        products(mask, "1:4", torch.float64)
    with pytest.raises(ValueError, match=r"takes multiples of \d+ x \d+ weights, not 63 x 128"):
        products(mask[:63], "1:4")
    monkeypatch.undo()
    with pytest.raises(UnavailableError, match="part of NVIDIA's GPUs, and the weight is on cpu"):
        products(mask, "1:4")


def test_the_device_decides_about_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")

    def capability(*version: int) -> Callable[[Any], tuple[int, ...]]:
        return lambda device: version

    for version, expected in (
        ((8, 0), BACKENDS[0]),
        ((8, 9), BACKENDS[0]),
        ((9, 0), BACKENDS[1]),
        ((10, 0), BACKENDS[1]),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability(*version))
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
        assert backend_of(device) is expected
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"compute capability 10\.0 needs cuSPARSELt"):
        backend_of(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability(7, 5))
    with pytest.raises(UnavailableError, match=r"need compute capability 8\.0, and cuda:0 has 7\.5"):
        backend_of(device)
    with pytest.raises(UnavailableError, match="is on cpu"):
        backend_of(torch.device("cpu"))


@pytest.fixture
def on_cpu(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers on the CPU take themselves for layers on a GPU."""
    monkeypatch.setattr(SemiStructuredProducts, "device", "cpu")
    monkeypatch.setattr(layer, "IMPLEMENTATIONS", {"semi_structured": SemiStructuredProducts})
    monkeypatch.setattr("bame_lightning.compute.choose.IMPLEMENTATIONS", layer.IMPLEMENTATIONS)
    monkeypatch.setitem(layer.DTYPES, "cpu", semi_structured.DTYPES)
    monkeypatch.setitem(binding._WEIGHTS, "cpu", (*semi_structured.DTYPES, torch.float32))


class Half(Task):
    """Two sparse layers of sizes that sparse tensor cores take, in bfloat16 throughout."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        hidden = (nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128))
        model = nn.Sequential(*hidden, nn.ReLU(), nn.Linear(128, 5)).bfloat16()
        super().__init__(model, lambda p: torch.optim.SGD(p, lr=0.05))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0].bfloat16(), batch[1]), batch_idx)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("both_ways", [True, False])
def test_training_goes_the_way_of_dense_products(both_ways: bool) -> None:
    runs = []
    for compute in ("dense", "sparse"):
        task, callback = Half(), StaticMask("2:4", both_ways=both_ways, layers={"model.1": "dense"}, compute=compute)
        trainer(callback, max_epochs=2).fit(task)
        runs.append((task, callback.summary()))
    (dense, _), (sparse, summary) = runs
    for a, b in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)
    assert not torch.equal(sparse.model[3].weight, Half().model[3].weight)
    # Multiplications a sample: 48 * 64 and 128 * 5 dense; forward, and both ways the input gradient, at a half of the others.
    whole, halves = 48 * 64 + 128 * 5, 64 * 64 + 64 * 128
    expected = 2 * 128 * (3 * whole + halves * (0.5 + (0.5 if both_ways else 1) + 1))
    assert summary["flops"]["flops/executed/train_total"] == pytest.approx(expected)
    assert set(summary["compute"]) == {"model.3", "model.5"}
    assert all(words.startswith("semi_structured") for words in summary["compute"].values())


@pytest.mark.usefixtures("on_cpu")
def test_masks_that_evolve_are_packed_anew() -> None:
    task = Half()
    callback = BAMECallback(
        "1:8",
        schedule=Schedule(every=1),
        evidence=Evidence(read_every=2, contenders=0.5, step_size=8.0),
        layers={"model.1": "dense"},
        both_ways=True,
        compute="sparse",
        verify=True,
    )
    trainer(callback, max_epochs=2).fit(task)
    assert callback.summary()["flips"] > 0
    sparse = layer.SparseLayer(
        Linear(), callback.weights[0].kept, NMPattern(1, 8), Choice("semi_structured", "semi_structured")
    )
    products = sparse.products("forward")
    assert isinstance(products, SemiStructuredProducts)
    weight, x = callback.weights[0].values, torch.randn(8, 64).bfloat16()
    torch.testing.assert_close(products.forward(x, products.values(weight), None), x @ weight.t(), rtol=0.03, atol=0.05)


@pytest.mark.usefixtures("on_cpu")
def test_under_autocast_single_precision_is_trained_and_multiplied_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU autocast is another one, so what it decides is put in.
    monkeypatch.setattr(layer, "computing_type", lambda tensor: torch.bfloat16)
    weight, mask = matrix("2:4", dtype=torch.float32)
    parameter, bias = nn.Parameter(weight), nn.Parameter(torch.randn(OUT))
    x = torch.randn(16, INP, requires_grad=True)
    product = layer.SparseLayer(
        Linear(), mask, NMPattern(2, 4), Choice("semi_structured", "semi_structured"), torch.float32
    )
    y = product(x, parameter, bias)
    assert y.dtype == torch.bfloat16
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert product.ran == {"forward", "input_gradient"}
    close: dict[str, Any] = {"rtol": 0.05, "atol": 0.2}
    for found, expected in (
        (y.detach(), x @ weight.t() + bias),
        (x.grad, gradient.float() @ weight),
        (parameter.grad, gradient.float().t() @ x),
        (bias.grad, gradient.float().sum(0)),
    ):
        assert found is not None
        torch.testing.assert_close(found.float(), expected.detach(), **close)
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32


@pytest.mark.usefixtures("on_cpu")
def test_a_weight_that_somebody_has_swapped_in_is_multiplied_densely_outside_of_training() -> None:
    weight, mask = matrix("2:4")
    product = layer.SparseLayer(Linear(), mask, NMPattern(2, 4), Choice("semi_structured"), torch.bfloat16)
    product._mask = mask  # kept on a GPU
    x = torch.randn(4, INP).bfloat16()
    with torch.no_grad():
        assert not product.why_dense(x, weight)
        other = torch.randn(OUT, INP).bfloat16()
        assert product.why_dense(x, other) == "pruned weights are not zero"
        assert torch.equal(product(x, other, None), x @ other.t())


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("both_ways", [True, False])
def test_the_fastest_is_chosen_among_what_can_be_had(both_ways: bool) -> None:
    weight, mask = matrix("2:4", both_ways=both_ways)
    call = Call((32, INP), input_gradient=True)
    ticks = iter(range(1000))
    chosen = choose(Linear(), weight, mask, NMPattern(2, 4), call, clock=lambda: float(next(ticks)), margin=2.0)
    assert (chosen.forward, chosen.weight_gradient) == ("semi_structured", "dense")
    assert chosen.input_gradient == ("semi_structured" if both_ways else "dense")
    refused = choose(Linear(), weight.double(), mask, NMPattern(2, 4), call)
    assert refused.dense
    assert refused.reason == "sparse products on cpu multiply float16 and bfloat16; this one is of float64"
