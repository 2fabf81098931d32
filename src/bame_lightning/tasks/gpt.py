"""A decoder-only transformer over tokens, in plain PyTorch."""

from __future__ import annotations

import math

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional


class CausalAttention(nn.Module):
    """Multi-head self-attention in which no position sees a later one.

    Args:
        width: Length of a token's vector.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        """Mix each position with those before it."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    """Two linear layers with GELU; the hidden one is four times as wide.

    Args:
        width: Length of a token's vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        """Change each position by itself."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and with a shortcut around both.

    Args:
        width: Length of a token's vector.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        """Add both branches."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GPT(nn.Module):
    """Predict the token after each position from it and those before it; GPT-2's layout (Radford et al. 2019).

    Weights start normal with standard deviation 0.02; those at the end of a branch are divided by the square root of the
    number of branches. The head has a weight of its own; it does not share the embedding's.

    Args:
        context: Tokens that the model sees at most.
        vocabulary: Different tokens.
        width: Length of a token's vector.
        depth: Blocks.
        heads: Attention heads of a block.

    Raises:
        ValueError: If the heads do not divide the width.
    """

    def __init__(self, context: int, vocabulary: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"`heads` must divide `width` {width}; got {heads}.")
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                ends_branch = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if ends_branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of the token that follows each position."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def gpt(
    input_shape: tuple[int] = (128,), num_classes: int = 256, width: int = 128, depth: int = 2, heads: int = 4
) -> GPT:
    """Small GPT.

    Args:
        input_shape: Tokens of a sequence, as the only number.
        num_classes: Different tokens.
        width: Length of a token's vector; the hidden layer of a block is four times as wide.
        depth: Blocks.
        heads: Attention heads of a block.

    Returns:
        The network; its layers are called `token`, `position`, `blocks.0.attention.qkv`, `blocks.0.attention.proj`,
        `blocks.0.mlp.fc1`, `blocks.0.mlp.fc2` and `head`.

    Raises:
        ValueError: If the heads do not divide the width.
    """
    return GPT(*input_shape, num_classes, width, depth, heads)
