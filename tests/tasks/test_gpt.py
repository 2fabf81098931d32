import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.tasks.gpt import GPT, gpt
from bame_lightning.weights.layers import plan_layers


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return gpt((12,), 20, width=16, depth=2, heads=4)


def tokens(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(1))


def test_size() -> None:
    # Per block 12 widths squared, biases of 3 + 1 + 4 + 1 widths and two layer norms.
    block = 12 * 128**2 + 9 * 128 + 2 * 2 * 128
    assert sum(weight.numel() for weight in gpt().parameters()) == (256 + 128) * 128 + 2 * block + 2 * 128 + 128 * 256


def test_no_position_sees_a_later_one(model: GPT) -> None:
    before = tokens()
    after = before.clone()
    after[:, 7] = (after[:, 7] + 1) % 20
    changed = (model(before) != model(after)).any(-1)
    assert not changed[:, :7].any()
    assert changed[:, 7:].all()


def test_a_shorter_sequence_gives_the_same_logits(model: GPT) -> None:
    torch.testing.assert_close(model(tokens()[:, :5]), model(tokens())[:, :5])


def test_positions_count(model: GPT) -> None:
    logits = model(torch.zeros(1, 12, dtype=torch.int64))
    assert not torch.allclose(logits[0, 0], logits[0, 1])


def test_the_forward_pass_is_the_published_one(model: GPT) -> None:
    """Written as loops over heads, with a mask in place of torch's causal attention."""
    weights = dict(model.named_parameters())

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    found = tokens(rows=1)[0]
    x = weights["token.weight"][found] + weights["position.weight"][:12]
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)
    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attention.qkv").split(16, dim=-1)
        heads = []
        for head in (slice(4 * index, 4 * index + 4) for index in range(4)):
            scores = q[:, head] @ k[:, head].T / math.sqrt(4)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, head])
        x = x + linear(torch.cat(heads, -1), f"{block}.attention.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(functional.gelu(hidden), f"{block}.mlp.fc2")
    expected = norm(x, "norm") @ weights["head.weight"].T
    torch.testing.assert_close(model(found[None])[0], expected)


def test_it_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    for name, weight in gpt(depth=4).named_parameters():
        if weight.dim() == 2:
            residual = name.endswith(("attention.proj.weight", "mlp.fc2.weight"))
            expected = 0.02 / math.sqrt(8) if residual else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (weight == expected).all(), name


def test_attention_and_mlp_become_sparse_embeddings_and_head_stay_dense() -> None:
    plans = plan_layers(gpt(), NMPattern(1, 16))
    sparse = {plan.name for plan in plans if plan.pattern}
    parts = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert sparse == {f"blocks.{index}.{part}.weight" for index in range(2) for part in parts}
    assert {plan.name: plan.reason for plan in plans if not plan.pattern} == {
        "token.weight": "no N:M view for Embedding.weight",
        "position.weight": "no N:M view for Embedding.weight",
        "head.weight": "classifier (last linear layer)",
    }


def test_heads_divide_the_width() -> None:
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"`heads` must divide `width` 16; got {heads}"):
            gpt((12,), 20, width=16, heads=heads)


def test_it_learns_to_look_back() -> None:
    """Every token is the one two before it, which the one before it does not tell."""
    torch.manual_seed(0)
    model = gpt((16,), 5, width=32, depth=1, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        text = torch.randint(5, (32, 2)).repeat(1, 9)[:, :17]
        logits = model(text[:, :-1])
        loss = functional.cross_entropy(logits[:, 1:].flatten(0, 1), text[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # ln 5 = 1.6 at first
