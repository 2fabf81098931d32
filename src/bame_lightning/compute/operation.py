"""What a layer computes, densely: the products that the other implementations must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


class Gradients(NamedTuple):
    """Gradients of a product; None where none was asked for.

    Args:
        input: Of the layer's input.
        weight: Of its weight.
    """

    input: Tensor | None
    weight: Tensor | None


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b, for any leading dimensions of x."""

    def forward(
        self, x: Float[Tensor, "*samples inp"], weight: Float[Tensor, "out inp"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*samples out"]:
        """The output."""
        return functional.linear(x, weight, bias)

    def backward(
        self,
        gradient: Float[Tensor, "*samples out"],
        x: Float[Tensor, "*samples inp"],
        weight: Float[Tensor, "out inp"],
        needs: tuple[bool, bool],
    ) -> Gradients:
        """Gradients of input and weight where `needs` says so; differentiable themselves."""
        of_input = gradient @ weight if needs[0] else None
        if not needs[1]:
            return Gradients(of_input, None)
        samples = gradient.reshape(-1, gradient.shape[-1])
        return Gradients(of_input, samples.t() @ x.reshape(-1, x.shape[-1]))


@dataclass(frozen=True)
class Conv2d:
    """A convolution of images, padded with zeros.

    Args:
        stride: Rows and columns between two windows.
        padding: Rows of zeros above and below, columns of zeros left and right.
        dilation: Rows and columns between two taps of a window.
        groups: Groups of channels that do not see each other.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output for those of input and kernel."""
        axes = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in axes)
        return height, width

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        weight: Float[Tensor, "out inp kh kw"],
        bias: Float[Tensor, " out"] | None,
    ) -> Float[Tensor, "batch out newheight newwidth"]:
        """The output."""
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self,
        gradient: Float[Tensor, "batch out newheight newwidth"],
        x: Float[Tensor, "batch channels height width"],
        weight: Float[Tensor, "out inp kh kw"],
        needs: tuple[bool, bool],
    ) -> Gradients:
        """Gradients of input and weight where `needs` says so; differentiable themselves."""
        of_input, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            [*needs, False],
        )
        return Gradients(of_input, of_weight)


Operation = Linear | Conv2d
