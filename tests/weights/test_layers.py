from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.layers import LayerPlan, SparseWeight, plan_layers
from tests.helpers import block_positions, random_kept

P24 = NMPattern(2, 4)


class MyLinear(nn.Linear):
    """A subclass, as many libraries make."""


class Net(nn.Module):
    """Modules by name; nothing runs."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def plans(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Pattern or reason by name."""
    result = plan_layers(model, P24, *args, **kwargs)
    assert all(bool(plan.reason) == (plan.pattern is None) for plan in result)
    return {plan.name: str(plan.pattern or plan.reason) for plan in result}


def test_linear_layers_convolutions_attention_and_their_subclasses_become_sparse() -> None:
    model = Net(
        stem=nn.Conv2d(3, 8, 3),
        conv1=nn.Conv1d(8, 4, 3),
        conv2=nn.Conv2d(8, 4, 3),
        conv3=nn.Conv3d(8, 4, 3),
        grouped=nn.Conv2d(16, 8, 3, groups=4),
        depthwise=nn.Conv2d(8, 8, 3, groups=8),
        norm=nn.BatchNorm2d(8),
        attention=nn.MultiheadAttention(8, 2),
        other=MyLinear(8, 8),
        head=nn.Linear(8, 3),
    )
    assert plans(model) == {
        "stem.weight": "input dimension 3 is not divisible by 4",
        "conv1.weight": "2:4",
        "conv2.weight": "2:4",
        "conv3.weight": "2:4",
        "grouped.weight": "2:4",
        "depthwise.weight": "input dimension 1 is not divisible by 4",
        "attention.in_proj_weight": "2:4",
        "attention.out_proj.weight": "2:4",
        "other.weight": "2:4",
        "head.weight": "classifier (last linear layer)",
    }


def test_attention_with_other_widths_has_three_projections() -> None:
    model = Net(attention=nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True), head=nn.Linear(8, 2))
    assert plans(model) == {
        "attention.q_proj_weight": "2:4",
        "attention.k_proj_weight": "2:4",
        "attention.v_proj_weight": "input dimension 6 is not divisible by 4",
        "attention.bias_k": "no N:M view for MultiheadAttention.bias_k",
        "attention.bias_v": "no N:M view for MultiheadAttention.bias_v",
        "attention.out_proj.weight": "2:4",
        "head.weight": "classifier (last linear layer)",
    }


def test_modules_without_a_view_as_blocks_stay_dense() -> None:
    model = Net(
        embedding=nn.Embedding(8, 8),
        transposed=nn.ConvTranspose2d(8, 8, 3),
        lstm=nn.LSTM(8, 4),
        bilinear=nn.Bilinear(8, 8, 8),
        layer=nn.Linear(8, 8),
        head=nn.Linear(8, 8),
    )
    assert plans(model) == {
        "embedding.weight": "no N:M view for Embedding.weight",
        "transposed.weight": "no N:M view for ConvTranspose2d.weight",
        "lstm.weight_ih_l0": "no N:M view for LSTM.weight_ih_l0",
        "lstm.weight_hh_l0": "no N:M view for LSTM.weight_hh_l0",
        "bilinear.weight": "no N:M view for Bilinear.weight",
        "layer.weight": "2:4",
        "head.weight": "classifier (last linear layer)",
    }


def test_a_plan_holds_the_parameter_its_kind_and_its_blocks() -> None:
    model = Net(layer=MyLinear(8, 6), head=nn.Linear(8, 2))
    layer, head = plan_layers(model, P24)
    assert (layer.weight is model.layer.weight, layer.kind, layer.blocks) == (True, "MyLinear", 12)
    assert (head.weight is model.head.weight, head.kind, head.blocks) == (True, "Linear", 0)


def test_a_tied_weight_is_planned_once() -> None:
    model = Net(first=nn.Linear(8, 8), second=nn.Linear(8, 8), head=nn.Linear(8, 2))
    model.second.weight = model.first.weight
    assert plans(model) == {
        "first.weight": "2:4",
        "head.weight": "classifier (last linear layer)",
        "second.weight": "tied to first.weight",
    }


def test_a_head_tied_to_an_embedding_stays_dense() -> None:
    model = Net(embedding=nn.Embedding(8, 8), layer=nn.Linear(8, 8), head=nn.Linear(8, 8, bias=False))
    model.head.weight = model.embedding.weight
    assert plans(model)["head.weight"] == "tied to embedding.weight"
    assert plans(model)["layer.weight"] == "2:4"


def tied() -> Net:
    model = Net(first=nn.Linear(8, 8), second=nn.Linear(8, 8), third=nn.Linear(8, 8), head=nn.Linear(8, 2))
    model.second.weight = model.first.weight
    return model


def test_a_rule_may_use_any_name_of_a_tied_weight() -> None:
    assert plans(tied(), {"second": "dense"})["first.weight"] == "dense by the rule 'second'"
    assert plans(tied(), {"second": "1:4"})["first.weight"] == "1:4"
    with pytest.raises(ValueError, match="asks for 1:3 in `second`, which cannot be: input dimension 8"):
        plan_layers(tied(), P24, {"second": "1:3"})


def test_a_frozen_network_that_follows_holds_no_classifier() -> None:
    teacher = nn.Linear(8, 2).requires_grad_(False)
    assert plans(Net(layer=nn.Linear(8, 8), head=nn.Linear(8, 2), teacher=teacher)) == {
        "layer.weight": "2:4",
        "head.weight": "classifier (last linear layer)",
        "teacher.weight": "not trained (requires_grad=False)",
    }


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_stays_dense() -> None:
    assert plans(Net(layer=nn.Linear(8, 8), none=nn.Linear(0, 8), head=nn.Linear(8, 2))) == {
        "layer.weight": "2:4",
        "none.weight": "empty",
        "head.weight": "classifier (last linear layer)",
    }


def test_the_classifier_is_known_by_its_second_name_too() -> None:
    model = Net(first=nn.Linear(8, 8), layer=nn.Linear(8, 8), head=nn.Linear(8, 8))
    model.head.weight = model.first.weight
    assert plans(model) == {
        "first.weight": "classifier (last linear layer)",
        "layer.weight": "2:4",
        "head.weight": "tied to first.weight",
    }


def test_a_module_used_twice_is_planned_once() -> None:
    shared = nn.Linear(8, 8)
    assert plans(Net(first=shared, second=shared, head=nn.Linear(8, 2))) == {
        "first.weight": "2:4",
        "head.weight": "classifier (last linear layer)",
    }


def test_weights_that_are_not_trained_stay_dense() -> None:
    model = Net(frozen=nn.Linear(8, 8), left_out=nn.Linear(8, 8), layer=nn.Linear(8, 8), head=nn.Linear(8, 2))
    model.frozen.weight.requires_grad_(False)
    trained = {id(p) for name, p in model.named_parameters() if not name.startswith("left_out")}
    assert plans(model, trained=trained) == {
        "frozen.weight": "not trained (requires_grad=False)",
        "left_out.weight": "not trained (in no optimizer)",
        "layer.weight": "2:4",
        "head.weight": "classifier (last linear layer)",
    }


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"a.fc": "1:4"}, ["1:4", "2:4", "2:4", "classifier (last linear layer)"]),
        ({"a.fc.weight": "1:4"}, ["1:4", "2:4", "2:4", "classifier (last linear layer)"]),
        ({"a.fc": NMPattern(4, 8)}, ["4:8", "2:4", "2:4", "classifier (last linear layer)"]),
        ({"a.*": "dense"}, ["dense by the rule 'a.*'"] * 2 + ["2:4", "classifier (last linear layer)"]),
        ({"*.fc": "1:2"}, ["1:2", "2:4", "1:2", "classifier (last linear layer)"]),
        ({"*": "1:8"}, ["1:8"] * 4),
        ({"head": "1:8"}, ["2:4", "2:4", "2:4", "1:8"]),
        ({"head": "dense"}, ["2:4", "2:4", "2:4", "dense by the rule 'head'"]),
        # The last match wins.
        ({"*": "dense", "a.fc": "1:4"}, ["1:4"] + ["dense by the rule '*'"] * 3),
        ({"a.fc": "1:4", "a.*": "dense"}, ["dense by the rule 'a.*'"] * 2 + ["2:4", "classifier (last linear layer)"]),
        ({"a.*": "dense", "*.fc": "1:4"}, ["1:4", "dense by the rule 'a.*'", "1:4", "classifier (last linear layer)"]),
    ],
)
def test_rules_override_the_default(rules: dict[str, Any], expected: list[str]) -> None:
    a, b = (Net(fc=nn.Linear(8, 8), out=nn.Linear(8, 8)), Net(fc=nn.Linear(8, 8)))
    model = Net(a=a, b=b, head=nn.Linear(8, 8))
    assert list(plans(model, rules).values()) == expected


def test_a_glob_leaves_layers_that_it_does_not_fit_dense() -> None:
    model = Net(a=nn.Linear(6, 8), b=nn.Linear(8, 8), head=nn.Linear(8, 2))
    assert plans(model, {"?": "2:8"})["a.weight"] == "input dimension 6 is not divisible by 8"


def test_a_rule_for_attention_reaches_its_parameters_by_name() -> None:
    model = Net(attention=nn.MultiheadAttention(8, 2), head=nn.Linear(8, 2))
    rules = {"attention.in_proj_weight": "1:4", "attention.out_proj": "dense"}
    assert plans(model, rules) == {
        "attention.in_proj_weight": "1:4",
        "attention.out_proj.weight": "dense by the rule 'attention.out_proj'",
        "head.weight": "classifier (last linear layer)",
    }


@pytest.mark.parametrize("rule", ["block.attention", "*.attention"])
def test_a_rule_for_attention_by_its_name_is_for_all_that_it_holds(rule: str) -> None:
    model = Net(block=Net(attention=nn.MultiheadAttention(8, 2, add_bias_kv=True)), layer=nn.Linear(8, 8))
    found = plans(model, {rule: "dense", "layer": "2:4"})
    assert found.pop("layer.weight") == "2:4"
    assert set(found.values()) == {f"dense by the rule {rule!r}"}
    assert len(found) == 4
    assert plans(model, {rule: "1:4"})["block.attention.in_proj_weight"] == "1:4"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 8, 8))
        self.position = nn.Parameter(torch.zeros(1, 8, 8))


class Lora(nn.Module):
    """As PEFT builds it around a layer."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 8, bias=False)})


def test_experts_fused_into_one_weight_and_adapters_stay_dense_with_the_reason() -> None:
    assert plans(Net(experts=Experts(), query=Lora(), head=nn.Linear(8, 2))) == {
        "experts.up": "no N:M view for Experts.up (several matrices fused into one weight)",
        "experts.position": "no N:M view for Experts.position",
        "query.base_layer.weight": "2:4",
        "query.lora_A.default.weight": "adapter (merged, it would fill the zeros of its base)",
        "query.lora_B.default.weight": "adapter (merged, it would fill the zeros of its base)",
        "head.weight": "classifier (last linear layer)",
    }
    assert plans(Net(query=Lora()), {"*lora_A*": "2:4"})["query.lora_A.default.weight"] == "2:4"


def test_adapters_of_ones_own_stay_dense_by_their_names() -> None:
    class Added(nn.Module):
        def __init__(self, down: str, up: str) -> None:
            super().__init__()
            self.base, self.explora_tion = nn.Linear(8, 8), nn.Linear(8, 8)
            setattr(self, down, nn.Linear(8, 4, bias=False))
            setattr(self, up, nn.Linear(4, 8, bias=False))

    found = plans(Net(a=Added("lora_A", "lora_B"), b=Added("lora_down", "lora_up"), head=nn.Linear(8, 2)))
    sparse = {name for name, what in found.items() if what == "2:4"}
    assert sparse == {f"{layer}.{name}.weight" for layer in "ab" for name in ("base", "explora_tion")}
    assert sum("adapter" in what for what in found.values()) == 4


def test_what_is_not_trained_holds_no_classifier() -> None:
    model = Net(layer=nn.Linear(8, 8), head=nn.Linear(8, 2), average=nn.Linear(8, 2), follower=nn.Linear(8, 2))
    trained = {id(p) for name, p in model.named_parameters() if not name.startswith("follower")}
    unreached = "not trained (the loss does not reach it)"
    assert plans(model, trained=trained, found={"average.weight": unreached}) == {
        "layer.weight": "2:4",
        "head.weight": "classifier (last linear layer)",
        "average.weight": unreached,
        "follower.weight": "not trained (in no optimizer)",
    }


def frozen() -> nn.Module:
    return Net(layer=nn.Linear(8, 8), head=nn.Linear(8, 2)).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (nn.LSTM(8, 4), r"recurrent layers and transposed convolutions cannot be N:M sparse\.$"),
        (nn.ConvTranspose2d(8, 8, 3), r"recurrent layers and transposed convolutions cannot be N:M sparse\.$"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), r"Train the plain parameter \(.*\)\.$"),
        (frozen(), r"Unfreeze layers before fit\.$"),
        (Experts(), r"[Ss]plit fused weights into linear layers, or "),
        (nn.Linear(8, 8), r"\. Name the classifier with `layers=\{name: pattern\}`\.$"),
    ],
)
def test_advice_for_a_model_without_an_eligible_layer_is_what_can_help(model: nn.Module, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        plan_layers(Net(model=model), P24)


def test_advice_for_a_model_in_no_optimizer() -> None:
    with pytest.raises(ValueError, match=r"Hand the layers' parameters to the optimizer in `configure_optimizers`\.$"):
        plan_layers(Net(layer=nn.Linear(8, 8)), P24, trained=set())


def test_a_rule_that_matches_nothing_is_refused_and_similar_names_are_suggested() -> None:
    model = Net(encoder=nn.Linear(8, 8), head=nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"`layers` has a rule for 'encodr', which matches no.*Similar names: encoder"):
        plan_layers(model, P24, {"encodr": "dense"})
    model = Net(block=Net(attention=nn.MultiheadAttention(8, 2)), layer=nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"Similar names: block\.attention[,.]"):
        plan_layers(model, P24, {"attention": "dense"})


@pytest.mark.parametrize("rule", ["stem", "stem.weight"])
def test_a_layer_asked_for_by_name_must_fit(rule: str) -> None:
    model = Net(stem=nn.Conv2d(3, 8, 3), layer=nn.Linear(8, 8), head=nn.Linear(8, 2))
    says = rf"`layers` asks for 1:4 in `{rule}`.*input dimension 3 is not divisible by 4\. Drop the rule"
    with pytest.raises(ValueError, match=says):
        plan_layers(model, P24, {rule: "1:4"})
    assert plans(model, {rule: "dense"})["stem.weight"] == f"dense by the rule '{rule}'"


def test_an_embedding_asked_for_by_name_is_refused() -> None:
    model = Net(words=nn.Embedding(8, 8), layer=nn.Linear(8, 8), head=nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"asks for 1:4 in `words`.*no N:M view for Embedding"):
        plan_layers(model, P24, {"words": "1:4"})


@pytest.mark.parametrize("rule", ["none", "4:1"])
def test_a_malformed_rule_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=f"`pattern`.*{rule}"):
        plan_layers(Net(layer=nn.Linear(8, 8), head=nn.Linear(8, 2)), P24, {"layer": rule})


def test_a_model_without_an_eligible_layer_is_refused_with_all_reasons() -> None:
    model = Net(stem=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 2))
    says = r"No layer is eligible for `pattern` 2:4.*stem.weight: input dimension 3.*head.weight: classifier.*layers="
    with pytest.raises(ValueError, match=says):
        plan_layers(model, P24)


def test_a_model_without_weight_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No layer is eligible.*the model has no weight matrices"):
        plan_layers(nn.BatchNorm1d(4), P24)


def test_a_lazy_module_is_refused() -> None:
    model = Net(layer=nn.LazyLinear(8), head=nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"`layer.weight` has no shape yet.*Run one batch"):
        plan_layers(model, P24)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_sparse_weight_keeps_its_mask_in_the_layout_of_the_weight(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = nn.Parameter(torch.randn(2, 8, 3, 3).to(memory_format=layout))
    kept = random_kept(2 * 9 * 2, P24)
    sparse = SparseWeight.of(LayerPlan("net.conv.weight", "Conv2d", weight, P24), kept)
    assert sparse.pruned.stride() == weight.stride()
    assert sparse.pruned.dtype == torch.bool
    for row, block in enumerate(block_positions(weight.shape, 4)):
        assert [not sparse.pruned[place] for place in block] == kept[row].tolist()
    assert torch.equal(sparse.mask(), kept)
    assert sparse.weight is weight


@pytest.mark.parametrize(
    ("name", "label"), [("net.fc.weight", "net.fc"), ("block.attn.in_proj_weight", "block.attn.in_proj_weight")]
)
def test_a_sparse_weight_is_labelled_by_its_module(name: str, label: str) -> None:
    assert SparseWeight(name, nn.Parameter(torch.zeros(2, 4)), P24, torch.zeros(2, 4, dtype=torch.bool)).label == label
