"""Models of other libraries, without their weights, inside a plain LightningModule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from bame_lightning import BAMECallback, Schedule
from bame_lightning.cli import audit, export
from tests.checkpoints.export import reader
from tests.training import trainer

CLASSES, VOCABULARY, LENGTH = 3, 64, 16


class Images(L.LightningModule):
    """A user's own module around a network for images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(32, 3, 16, 16, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(32) % CLASSES), batch_size=8)


class Text(Images):
    """The same around a network of transformers, which computes its own loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        return self.network(tokens, labels=tokens if isinstance(self.network, GPT2LMHeadModel) else labels).loss

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (32, LENGTH), generator=generator)
        return DataLoader(TensorDataset(tokens, torch.arange(32) % CLASSES), batch_size=8)


def gpt2() -> nn.Module:
    marks = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **marks, use_cache=False))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=CLASSES, **sizes)
    return BertForSequenceClassification(config)


def timm_vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.models.VisionTransformer(num_classes=CLASSES, **sizes)


def convnext() -> nn.Module:
    return timm.models.ConvNeXt(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), patch_size=1)


def mobilenet() -> nn.Module:
    return torchvision.models.MobileNetV2(
        CLASSES, width_mult=0.5, inverted_residual_setting=[[1, 8, 1, 1], [2, 16, 1, 2]]
    )


def regnet() -> nn.Module:
    sizes = torchvision.models.regnet.BlockParams.from_init_params(2, 16, 16.0, 2.0, group_width=8)
    return torchvision.models.RegNet(sizes, CLASSES, stem_width=8)  # grouped convolutions


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 16, 32, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # which is zero, so that no other weight has a gradient at first
    return model


# Which weights stay dense, and why: all others are sparse.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "regnet": (
        regnet,
        {"stem.0": "input dimension 3 is not divisible by 4", "fc": "classifier (last linear layer)"},
    ),
    "mobilenet": (
        mobilenet,
        {
            "features.0.0": "input dimension 3 is not divisible by 4",
            "features.1.conv.0.0": "input dimension 1 is not divisible by 4",
            "features.2.conv.1.0": "input dimension 1 is not divisible by 4",
            "classifier.1": "classifier (last linear layer)",
        },
    ),
    "torchvision_vit": (
        torchvision_vit,
        {
            "class_token": "no N:M view for VisionTransformer.class_token",
            "conv_proj": "input dimension 3 is not divisible by 4",
            "encoder.pos_embedding": "no N:M view for Encoder.pos_embedding",
            "heads.head": "classifier (last linear layer)",
        },
    ),
    "timm_vit": (
        timm_vit,
        {
            "cls_token": "no N:M view for VisionTransformer.cls_token",
            "pos_embed": "no N:M view for VisionTransformer.pos_embed",
            "patch_embed.proj": "input dimension 3 is not divisible by 4",
            "head": "classifier (last linear layer)",
        },
    ),
    "convnext": (
        convnext,
        {
            "stem.0": "input dimension 3 is not divisible by 4",
            "stages.0.blocks.0.conv_dw": "input dimension 1 is not divisible by 4",
            "stages.1.blocks.0.conv_dw": "input dimension 1 is not divisible by 4",
            "stages.2.blocks.0.conv_dw": "input dimension 1 is not divisible by 4",
            "stages.3.blocks.0.conv_dw": "input dimension 1 is not divisible by 4",
            "head.fc": "classifier (last linear layer)",
        },
    ),
    "bert": (
        bert,
        {
            "bert.embeddings.word_embeddings": "no N:M view for Embedding.weight",
            "bert.embeddings.position_embeddings": "no N:M view for Embedding.weight",
            "bert.embeddings.token_type_embeddings": "no N:M view for Embedding.weight",
            "classifier": "classifier (last linear layer)",
        },
    ),
    "gpt2": (
        gpt2,
        {
            "transformer.wte": "no N:M view for Embedding.weight",
            "transformer.wpe": "no N:M view for Embedding.weight",
            "lm_head": "tied to network.transformer.wte.weight",
        },
    ),
}


def crowded(weight: Tensor, dim: int) -> int:
    """Groups of 4 consecutive weights along `dim` that hold more than 2 non-zeros, counted in plain loops."""
    lines = weight.movedim(dim, -1).reshape(-1, weight.shape[dim]).tolist()
    return sum(sum(x != 0 for x in line[i : i + 4]) > 2 for line in lines for i in range(0, len(line), 4))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that the user is shown as a table when fit begins."""
    seen: list[Any] = []
    module = sys.modules["bame_lightning.callbacks.membership"]
    monkeypatch.setattr(module, "layer_table", lambda plans: seen.extend(() if seen else plans) or "")
    return seen


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_of_another_library_trains_sparse(name: str, tables: list[Any], tmp_path: Path) -> None:
    make, dense = NETWORKS[name]
    torch.manual_seed(0)
    task = (Text if name in ("bert", "gpt2") else Images)(make())
    keys = list(task.state_dict())
    callback = BAMECallback("2:4", schedule=Schedule(every=1), verify=True)
    run = trainer(callback, max_epochs=2)
    run.fit(task)

    assert list(task.state_dict()) == keys
    found = {plan.name.removeprefix("network.").removesuffix(".weight"): plan for plan in tables}
    assert {name: plan.reason for name, plan in found.items() if plan.pattern is None} == dense
    sparse = {name: plan for name, plan in found.items() if plan.pattern}
    assert len(sparse) >= 3
    for plan in sparse.values():
        dim = 0 if plan.kind == "Conv1D" else 1
        assert crowded(plan.weight.detach(), dim) == 0, plan.name
        assert (plan.weight != 0).sum() > 0.4 * plan.weight.numel(), plan.name
    summary = callback.summary()
    assert summary["flips"] > 0
    assert 0.5 < summary["flops"]["flops/train_vs_dense"] < 1
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert audit.main([str(tmp_path / "last.ckpt"), "--pattern", "2:4"]) == 0


def test_packed_projections_of_attention_are_sparse_in_all_three_parts() -> None:
    vit, gpt = Images(torchvision_vit()), Text(gpt2())
    for task in (vit, gpt):
        trainer(BAMECallback("2:4"), max_epochs=1).fit(task)
    packed = vit.network.encoder.layers[0].self_attention.in_proj_weight.detach()
    assert [crowded(part, 1) for part in packed.chunk(3)] == [0, 0, 0]
    assert [int((part != 0).sum()) for part in packed.chunk(3)] == [128, 128, 128]
    conv1d = gpt.network.transformer.h[0].attn.c_attn.weight.detach()
    assert [crowded(part, 0) for part in conv1d.chunk(3, dim=1)] == [0, 0, 0]
    assert [int((part != 0).sum()) for part in conv1d.chunk(3, dim=1)] == [128, 128, 128]


def test_a_tied_head_is_refused_by_name_and_an_untied_one_can_be_sparse() -> None:
    with pytest.raises(ValueError, match=r"asks for 2:4 in `network\.lm_head`, which cannot be.*Embedding"):
        trainer(BAMECallback("2:4", layers={"network.lm_head": "2:4"})).fit(Text(gpt2()))
    task = Text(gpt2())
    task.network.lm_head.weight = nn.Parameter(task.network.lm_head.weight.detach().clone())
    trainer(BAMECallback("2:4", layers={"*.lm_head": "2:4"}), max_epochs=1).fit(task)
    assert crowded(task.network.lm_head.weight.detach(), 1) == 0
    assert (task.network.transformer.wte.weight != 0).all()


@pytest.fixture(scope="module")
def gpt2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    run = trainer(BAMECallback("1:4"), max_epochs=2)
    run.fit(Text(gpt2()))
    path = tmp_path_factory.mktemp("gpt2") / "last.ckpt"
    run.save_checkpoint(path)
    return path


def test_gpt2_is_handed_on_packed(gpt2_checkpoint: Path, tmp_path: Path) -> None:
    words = ["--format", "packed", "--prefix", "network.", "--output", str(tmp_path / "a")]
    assert export.main([str(gpt2_checkpoint), *words]) == 0
    found = {
        name: torch.frombuffer(bytearray(content), dtype=kind).view(shape)
        for name, (kind, shape, content) in reader.read_packed(tmp_path / "a").items()
    }
    saved = torch.load(gpt2_checkpoint, weights_only=True)["state_dict"]
    plain, handed = gpt2().eval(), gpt2().eval()
    plain.load_state_dict({name.removeprefix("network."): value for name, value in saved.items()})
    handed.load_state_dict(found)
    tokens = torch.arange(LENGTH)[None]
    assert torch.equal(plain(tokens).logits, handed(tokens).logits)
    # Without the callback's state, the user says which weights are (in, out).
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    words = [str(tmp_path / "plain.pt"), "--pattern", "1:4", "--dense", "*wte", "--dense", "*wpe", "--dense", "lm_head"]
    assert audit.main(words) == 1
    assert audit.main([*words, "--transposed", "*.h.*"]) == 0


@pytest.mark.slow
def test_gpt2_becomes_onnx(gpt2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    words = ["--format", "onnx", "--prefix", "network.", "--output", "a.onnx", "--tokens", str(VOCABULARY)]
    model = ["--model", "tests.callbacks.test_libraries:gpt2", "--input-shape", str(LENGTH)]
    assert export.main([str(gpt2_checkpoint), *words, *model]) == 0
    network = gpt2().eval()
    saved = torch.load(gpt2_checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): value for name, value in saved.items()})
    tokens = torch.arange(3 * LENGTH).view(3, LENGTH)
    computed = onnxruntime.InferenceSession("a.onnx").run(None, {"input": tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(computed[0]), network(tokens).logits.detach())


def test_products_with_transposed_weights_are_counted() -> None:
    callback, task = BAMECallback("2:4"), Text(gpt2())
    trainer(callback, max_epochs=1).fit(task)
    assert callback.books.ledger is not None
    costs = callback.books.ledger._weights
    block = "network.transformer.h.0"
    sizes = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}
    tokens = 8 * LENGTH
    for layer, (inputs, outputs) in sizes.items():
        assert costs[f"{block}.{layer}.weight"].forward == tokens * inputs * outputs
        assert costs[f"{block}.{layer}.weight"].weight_gradient == tokens * inputs * outputs
