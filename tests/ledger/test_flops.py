"""The counter against closed forms written here and against torch's own counter; the ledger against hand counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

from bame_lightning.ledger.cost import Shares
from bame_lightning.ledger.flops import Ledger, MacCounter, Macs


def forward_macs(model: nn.Module, *inputs: Tensor) -> tuple[dict[str, int], int]:
    with MacCounter(model) as counter:
        model(*inputs)
    return {name: macs.forward for name, macs in counter.weights.items()}, counter.other.forward


class Fn(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, call: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self, *inputs)


# Shapes and closed forms.


@pytest.mark.parametrize(("shape", "rows"), [((8,), 1), ((3, 8), 3), ((3, 5, 8), 15)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_costs_rows_times_inputs_times_outputs(shape: tuple[int, ...], rows: int, bias: bool) -> None:
    assert forward_macs(nn.Linear(8, 4, bias), torch.ones(shape)) == ({"weight": rows * 8 * 4}, 0)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [  # batch, output positions, filters, input channels of a group, kernel
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 2 * 4 * 4 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (3, 1), dilation=2, groups=2), (2, 4, 8, 8), 2 * 4 * 8 * 6 * 2 * 3),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (1, 4, 8, 8), 6 * 6 * 4 * 1 * 9),
        (nn.Conv2d(4, 6, 1), (4, 8, 8), 8 * 8 * 6 * 4),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), 3 * 4 * 5 * 3 * 2 * 8),
        # A transposed convolution multiplies at input positions: batch, positions, inputs, outputs of a group, kernel.
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5), 2 * 5 * 5 * 4 * 3 * 9),
    ],
    ids=lambda value: "" if not isinstance(value, nn.Module) else repr(value),
)
def test_a_convolution_costs_positions_times_filters(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert forward_macs(layer, torch.ones(shape)) == ({"weight": macs}, 0)
    assert forward_macs(layer.to("meta"), torch.ones(shape, device="meta")) == ({"weight": macs}, 0)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dims", [16, 12])
def test_attention_costs_projections_and_scores(need_weights: bool, dims: int) -> None:
    batch, queries, keys, width = 3, 5, 7, 16
    attention = nn.MultiheadAttention(width, 4, batch_first=True, kdim=dims, vdim=dims)
    q, kv = torch.randn(batch, queries, width), torch.randn(batch, keys, dims)
    weights, other = forward_macs(
        Fn(lambda self, q, kv: self.mha(q, kv, kv, need_weights=need_weights)[0], mha=attention), q, kv
    )
    projections = batch * (queries * width * width + 2 * keys * dims * width)
    assert sum(macs for name, macs in weights.items() if "out_proj" not in name) == projections
    assert weights["mha.out_proj.weight"] == batch * queries * width * width
    assert set(weights) - {"mha.out_proj.weight"} == (
        {"mha.in_proj_weight"} if dims == width else {f"mha.{name}_proj_weight" for name in "qkv"}
    )
    assert other == 2 * batch * queries * keys * width


@pytest.mark.parametrize("causal", [True, False])
def test_scaled_dot_product_attention_costs_two_products(causal: bool) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    model = Fn(lambda self, *qkv: functional.scaled_dot_product_attention(*qkv, is_causal=causal))
    assert forward_macs(model, q, k, v) == ({}, 2 * 4 * 5 * 7 * (8 + 6))


def resnet50_by_hand() -> dict[str, int]:
    """Positions x filters x inputs x kernel of ResNet-50 (stride in the 3x3 convolutions) at 224x224."""
    macs = {"conv1.weight": 112**2 * 64 * 3 * 49, "fc.weight": 2048 * 1000}
    channels, side = 64, 56
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1):
        for block in range(blocks):
            new_side = side // 2 if stage > 1 and block == 0 else side
            name = f"layer{stage}.{block}"
            macs[f"{name}.conv1.weight"] = side**2 * channels * width
            macs[f"{name}.conv2.weight"] = new_side**2 * width * width * 9
            macs[f"{name}.conv3.weight"] = new_side**2 * width * 4 * width
            if block == 0:
                macs[f"{name}.downsample.0.weight"] = new_side**2 * channels * 4 * width
            channels, side = 4 * width, new_side
    return macs


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, Tensor]:
    with torch.device("meta"):
        return resnet50(), torch.empty(2, 3, 224, 224)


def test_resnet50_is_counted_as_by_hand_and_by_torch(resnet: tuple[nn.Module, Tensor]) -> None:
    model, images = resnet
    weights, other = forward_macs(model, images)
    hand = resnet50_by_hand()
    assert weights == {name: 2 * macs for name, macs in hand.items()}
    assert other == 0
    assert sum(hand.values()) == 4_089_184_256
    assert hand["conv1.weight"] == pytest.approx(0.118e9, rel=1e-3)
    assert hand["fc.weight"] == 2_048_000

    with FlopCounterMode(display=False) as theirs:
        model(images)
    assert theirs.get_total_flops() == 2 * sum(weights.values())


def test_torch_counts_no_input_gradient_for_the_first_layer(resnet: tuple[nn.Module, Tensor]) -> None:
    model, images = resnet
    with FlopCounterMode(display=False) as theirs:
        model(images).sum().backward()
    forward, stem = sum(resnet50_by_hand().values()), resnet50_by_hand()["conv1.weight"]
    assert theirs.get_total_flops() == 2 * 2 * (3 * forward - stem)
    assert theirs.get_total_flops() / (2 * 2 * forward) == pytest.approx(2.97, abs=0.005)
    with MacCounter(model) as ours:
        model(images)
    assert sum(macs.total for macs in ours.weights.values()) == 2 * 3 * forward


# Which weight a product belongs to.


def test_casts_of_autocast_belong_to_their_weight() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(6, 5))
    for cache in (True, False):
        with MacCounter(model) as counter, torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            for _ in range(3):
                out = model(torch.randn(2, 4, 6))
                # Its memory must not be taken for that of a cast which is gone.
                torch.bmm(torch.randn(1, 5, 6), torch.randn(1, 6, 5))
        assert out.dtype == torch.bfloat16
        assert counter.weights == {
            "0.weight": Macs(*[3 * 2 * 6 * 16] * 3),
            "1.weight": Macs(*[3 * 2 * 4 * 30] * 3),
        }
        assert counter.other == Macs(3 * 150, 0, 0)


def test_tied_weights_count_under_their_first_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert forward_macs(model, torch.ones(2, 8)) == ({"0.weight": 2 * 2 * 64}, 0)


def test_functional_calls_views_and_copies_are_followed() -> None:
    def call(self: Any, x: Tensor) -> Tensor:
        x = functional.linear(x, self.weight[:4]) @ self.weight[:4]  # 4 of 8 rows, twice
        x = functional.linear(x, self.weight.t().contiguous())
        return torch.einsum("bi,oi->bo", x, self.weight)

    model = Fn(call, weight=nn.Parameter(torch.randn(8, 8)))
    assert forward_macs(model, torch.ones(3, 8)) == ({"weight": 3 * (32 + 32 + 64 + 64)}, 0)


def test_a_weight_computed_from_parameters_belongs_to_the_largest() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    assert forward_macs(model, torch.ones(2, 8)) == ({"parametrizations.weight.original1": 64}, 0)

    model = Fn(lambda self, x: x @ (self.weight * self.mask), weight=nn.Parameter(torch.randn(8, 4)))
    model.register_buffer("mask", torch.ones(8, 4))
    assert forward_macs(model, torch.ones(2, 8)) == ({"weight": 64}, 0)


def test_what_is_computed_from_activations_belongs_to_nobody() -> None:
    def call(self: Any, x: Tensor) -> Tensor:
        x = x + self.position  # as large as the parameter, at batch size 1
        return torch.bmm(x, x.transpose(1, 2))

    model = Fn(call, position=nn.Parameter(torch.randn(1, 5, 8)))
    assert forward_macs(model, torch.ones(1, 5, 8)) == ({}, 5 * 5 * 8)


def test_learned_queries_count_for_their_projection() -> None:
    model = Fn(lambda self, _: self.fc(self.queries), queries=nn.Parameter(torch.randn(3, 8)), fc=nn.Linear(8, 4))
    assert forward_macs(model, torch.ones(1)) == ({"fc.weight": 96}, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_show_all_products(mode: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()  # has a fast path
    x = torch.ones(2, 3, 8)
    expected = forward_macs(layer.train(), x)
    with mode():
        assert forward_macs(layer.eval(), x) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_compiled_model_is_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    model.compile(backend="eager")
    for _ in range(2):
        assert forward_macs(model, torch.ones(3, 8)) == ({"0.weight": 96, "2.weight": 24}, 0)


def test_a_full_graph_is_counted_and_compiled_afterwards() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    graphs: list[Any] = []
    model = nn.Linear(8, 4)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with MacCounter(model) as counter:
        compiled(torch.ones(3, 8))
    assert counter.weights["weight"].forward == 96
    assert not graphs
    compiled(torch.ones(3, 8))
    assert len(graphs) == 1


def test_jagged_tensors_are_counted() -> None:
    model = nn.Linear(8, 4)
    rows = torch.nested.nested_tensor_from_jagged(torch.ones(5, 8), offsets=torch.tensor([0, 2, 5]))
    with MacCounter(model) as counter:
        model(rows)
    assert counter.weights["weight"].forward == 5 * 8 * 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_runs_while_counted() -> None:
    x = torch.ones(1, 1, 4, 8)
    model = nn.Linear(8, 8)
    with MacCounter(model) as counter, torch.no_grad():
        attended = flex_attention(x, x, x)
        model(attended)
    assert torch.equal(attended, x)
    assert counter.weights["weight"].forward == 4 * 64


# What of a training step is counted.


def test_backward_passes_and_what_they_recompute_are_not_counted() -> None:
    for reentrant in (True, False):
        inner = nn.Linear(8, 8)
        model = Fn(lambda self, x, r: checkpoint(self.inner, x, use_reentrant=r), inner=inner)
        x = torch.ones(2, 8, requires_grad=True)
        with MacCounter(model) as counter:
            model(x, reentrant).sum().backward()
        assert inner.weight.grad is not None
        assert counter.weights == {"inner.weight": Macs(128, 128, 128)}


def test_frozen_weights_cost_no_weight_gradient() -> None:
    frozen, trained, head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    frozen.requires_grad_(False)
    head.requires_grad_(False)
    with MacCounter(model := nn.Sequential(frozen, trained, head)) as counter:
        model(torch.ones(1, 8))
    assert counter.weights == {
        "0.weight": Macs(64, 0, 0),
        "1.weight": Macs(64, 64, 64),
        "2.weight": Macs(64, 64, 0),
    }


def test_counting_changes_no_number() -> None:
    def step(count: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Dropout(), nn.TransformerEncoderLayer(5, 1, 8)
        )
        x = torch.randn(4, 3, 5)
        if count:
            with MacCounter(model) as counter:
                loss = model(x).square().mean()
            assert counter.weights
        else:
            loss = model(x).square().mean()
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers(), torch.rand(1)]

    for counted, plain in zip(step(True), step(False), strict=True):
        assert torch.equal(counted, plain)


# The ledger.


def resnet_costs() -> dict[str, Macs]:
    return {name: Macs(macs, macs, macs) for name, macs in resnet50_by_hand().items()}


def resnet_densities(density: float = 1 / 16) -> dict[str, float]:
    return {name: density for name in resnet50_by_hand() if name not in ("conv1.weight", "fc.weight")}


def shares_of(density: float, sparse: int, read: float = 0.0) -> Shares:
    """Of a step whose first `sparse` products are sparse: forward, input gradient, and weight gradient but for what is read."""
    forward, input_gradient, weight_gradient = [density] * sparse + [1.0] * (3 - sparse)
    return Shares(forward, input_gradient, weight_gradient + read * (1 - weight_gradient))


@pytest.mark.parametrize(
    ("sparse", "read", "transposed_share", "algorithmic", "hardware"),
    [
        (0, 0.0, 1.0, 1.0, 1.0),
        (1, 0.0, 1.0, 0.697, 0.697),
        (2, 0.0, 0.0, 0.393, 0.393),
        (2, 0.0, 1.0, 0.393, 0.697),
        (3, 0.0, 1.0, 0.090, 0.393),
        (3, 0.0, 0.0, 0.090, 0.090),
        # (2f + h) / 3 with an input gradient h in which sparse layers cost half: h = 1 - 8/15 (1 - f)
        (3, 0.0, 0.5, 0.090, 0.231577),
        (3, 1.0, 1.0, 0.393, 0.697),
        # (3f + 0.25 (1 - f)) / 3 and, with a dense input gradient, (2f + 1 + 0.25 (1 - f)) / 3; f = 0.0900258
        (3, 0.25, 1.0, 0.165857, 0.469182),
    ],
)
def test_resnet50_at_1_16_costs_what_is_published(
    sparse: int, read: float, transposed_share: float, algorithmic: float, hardware: float
) -> None:
    ledger = Ledger(resnet_costs(), Macs(), resnet_densities(), transposed_share=transposed_share)
    ledger.book({name: shares_of(density, sparse, read) for name, density in resnet_densities().items()})
    metrics = ledger.metrics()
    assert metrics["flops/train_vs_dense"] == pytest.approx(algorithmic, abs=5e-4)
    assert metrics["flops/hardware/train_vs_dense"] == pytest.approx(hardware, abs=5e-4)
    assert metrics["flops/train_vs_sr_ste"] == pytest.approx(algorithmic / 0.696675, abs=1e-3)
    assert metrics["flops/hardware/train_vs_sr_ste"] == pytest.approx(hardware / 0.696675, abs=1e-3)


def test_a_fully_sparse_resnet50_costs_7_7_times_less_than_sr_ste() -> None:
    ledger = Ledger(resnet_costs(), Macs(), resnet_densities())
    ledger.book({name: shares_of(1 / 16, 3) for name in resnet_densities()})
    assert 1 / ledger.metrics()["flops/train_vs_sr_ste"] == pytest.approx(7.74, abs=0.005)
    ledger = Ledger(resnet_costs(), Macs(), resnet_densities(), transposed_share=0.0)
    ledger.book({name: shares_of(1 / 16, 2) for name in resnet_densities()})
    assert 1 / ledger.metrics()["flops/train_vs_sr_ste"] == pytest.approx(1.77, abs=0.005)


@pytest.fixture
def ledger() -> Ledger:
    """A sparse weight at 1:4 of 100 MACs, a dense one of 10, scores of 1, and a sparse one that nothing multiplies with."""
    costs = {"sparse": Macs(100, 100, 100), "dense": Macs(10, 10, 10)}
    return Ledger(costs, Macs(1, 1, 1), {"sparse": 0.25, "unused": 0.25})


def test_bame_is_booked_as_by_hand(ledger: Ledger) -> None:
    # Steps read all unfrozen blocks, 10 %, nothing, and, when 20 % are frozen, 80 %.
    # The first is computed densely, of the second only the forward pass is not.
    ran = [
        {},
        {"sparse": Shares(1.0, 0.25, 0.325)},
        {"sparse": Shares(0.25, 0.25, 0.25)},
        {"sparse": Shares(0.25, 0.25, 0.85)},
    ]
    for read, executed in zip((1.0, 0.1, 0.0, 0.8), ran, strict=True):
        shares = {"sparse": shares_of(0.25, 3, read), "unused": shares_of(0.25, 3, read)}
        ledger.book(shares, executed=executed)
    rest = 4 * 3 * 11
    weight_gradients = 100 + (25 + 7.5) + 25 + (25 + 60)
    total = rest + 4 * 25 + 4 * 25 + weight_gradients
    hardware = rest + 4 * 25 + 4 * 100 + weight_gradients
    executed_macs = rest + 300 + (100 + 25 + 32.5) + 75 + (25 + 25 + 85)
    dense, sr_ste = 4 * 333, 4 * (33 + 225)
    assert ledger.metrics() == pytest.approx(
        {
            "flops/train_total": 2 * total,
            "flops/train_vs_dense": total / dense,
            "flops/train_vs_sr_ste": total / sr_ste,
            "flops/hardware/train_total": 2 * hardware,
            "flops/hardware/train_vs_dense": hardware / dense,
            "flops/hardware/train_vs_sr_ste": hardware / sr_ste,
            "flops/executed/train_total": 2 * executed_macs,
            "flops/executed/train_vs_dense": executed_macs / dense,
            "flops/executed/train_vs_sr_ste": executed_macs / sr_ste,
        }
    )
    assert ledger.uncounted == ["unused"]


def test_weights_left_out_are_dense(ledger: Ledger) -> None:
    ledger.book({})
    assert ledger.metrics()["flops/train_total"] == 2 * 333
    assert ledger.metrics()["flops/train_vs_dense"] == ledger.metrics()["flops/hardware/train_vs_dense"] == 1


def test_an_accumulated_step_costs_its_batches(ledger: Ledger) -> None:
    ledger.book({"sparse": shares_of(0.25, 3)}, batches=3)
    assert ledger.metrics()["flops/train_total"] == 2 * (3 * (33 + 75))
    assert ledger.metrics()["flops/hardware/train_total"] == 2 * (3 * (33 + 150))
    assert ledger.metrics()["flops/train_vs_dense"] == (3 * (33 + 75)) / (3 * 333)


def test_nothing_is_reported_before_the_first_step(ledger: Ledger) -> None:
    assert ledger.metrics() == {}


def test_a_resumed_ledger_goes_on_exactly(ledger: Ledger) -> None:
    def new() -> Ledger:
        return Ledger({"sparse": Macs(7, 7, 7)}, Macs(1, 1, 1), {"sparse": 0.3})

    def book(ledger: Ledger, steps: range) -> None:
        for step in steps:
            ledger.book({"sparse": shares_of(0.3, 3, step / 10)})

    straight, first, second = new(), new(), new()
    book(straight, range(10))
    book(first, range(4))
    state = first.state_dict()
    assert all(type(value) is float for value in state.values())
    second.load_state_dict(state)
    book(second, range(4, 10))
    assert second.metrics() == straight.metrics()
    assert first.metrics() != straight.metrics()
    assert state == first.state_dict()  # booking on does not change what was saved
