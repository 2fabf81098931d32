"""Products of sparse layers beside dense ones, by shape and phase: how many times as fast.

    python -m benchmarks.products [--threads 1] [--patterns 1:16 1:8 1:4 2:4] [--contenders 0.05] [--rounds 9]

Each line is a layer: milliseconds of the dense product, and for each implementation dense / sparse time of the forward pass,
the gradient of the input and the gradient of the weight. Layout changes, the gathering of kept weights (with the forward pass)
and the making of the weight's dense gradient are part of the products. `+` is the weight gradient with contenders, `update` the
milliseconds to follow a mask of which one block in each row has changed, by all rows.

With one thread it is the shortest processor time of some rounds in which all take turns; with several the shortest wall-clock
time, for threads that wait burn processor time, too.
"""

from __future__ import annotations

import argparse
import time

import torch

from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.masks import random_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.choose import Call, choose
from bame_lightning.compute.layer import IMPLEMENTATIONS
from bame_lightning.compute.operation import Conv2d, Linear, Operation

LAYERS: dict[str, tuple[Operation, tuple[int, ...], tuple[int, ...]]] = {
    # An MLP, and blocks of a GPT of width 1024: what is multiplied, weight, input.
    "linear 512 x 512, batch 128": (Linear(), (512, 512), (128, 512)),
    "linear 2048 x 2048, batch 256": (Linear(), (2048, 2048), (256, 2048)),
    "linear 2048 x 784, batch 256": (Linear(), (2048, 784), (256, 784)),
    "linear 1024 x 1024, 8 x 128 tokens": (Linear(), (1024, 1024), (8, 128, 1024)),
    "linear 4096 x 1024, 8 x 128 tokens": (Linear(), (4096, 1024), (8, 128, 1024)),
    "linear 1024 x 4096, 8 x 128 tokens": (Linear(), (1024, 4096), (8, 128, 4096)),
    # ResNet-18 on images of 32 x 32, in batches of 32.
    "conv 64, 3x3 on 32x32": (Conv2d(padding=(1, 1)), (64, 64, 3, 3), (32, 64, 32, 32)),
    "conv 64 to 128, 3x3 / 2 on 32x32": (Conv2d((2, 2), (1, 1)), (128, 64, 3, 3), (32, 64, 32, 32)),
    "conv 64 to 128, 1x1 / 2 on 32x32": (Conv2d((2, 2)), (128, 64, 1, 1), (32, 64, 32, 32)),
    "conv 128, 3x3 on 16x16": (Conv2d(padding=(1, 1)), (128, 128, 3, 3), (32, 128, 16, 16)),
    "conv 256, 3x3 on 8x8": (Conv2d(padding=(1, 1)), (256, 256, 3, 3), (32, 256, 8, 8)),
    "conv 512, 3x3 on 4x4": (Conv2d(padding=(1, 1)), (512, 512, 3, 3), (32, 512, 4, 4)),
    "conv 256 to 64, 1x1 on 32x32": (Conv2d(), (64, 256, 1, 1), (32, 256, 32, 32)),
}


def row(name: str, pattern: NMPattern, args: argparse.Namespace) -> str:
    """Measure one layer under one pattern."""
    operation, shape, source = LAYERS[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    mask = from_blocks(random_mask(to_blocks(weight, pattern.m), pattern.n), weight.shape)
    contenders = int(args.contenders * (1 - pattern.density) * weight.numel())
    clock = time.process_time if args.threads == 1 else time.perf_counter
    both = [
        choose(
            operation,
            weight,
            mask,
            pattern,
            Call(source, channels_last=len(source) == 4, contenders=count),
            implementations=IMPLEMENTATIONS,
            rounds=args.rounds,
            clock=clock,
        ).milliseconds
        for count in (0, contenders)
    ]
    cells = []
    for kind in IMPLEMENTATIONS:
        ratios = [
            f"{took['dense'] / took[kind]:.2f}" if kind in took else "-"
            for took in (*both[0].values(), both[1]["weight_gradient"])
        ]
        cells.append("/".join(ratios) if set(ratios) != {"-"} else "-")
    dense = "/".join(f"{took['dense']:.1f}" for took in both[0].values())
    whole = [sum(took[kind] for took in both[0].values()) for kind in ("dense", "kernels")]
    return f"| {name} | {pattern} | {dense} | {' | '.join(cells)} | {whole[0] / whole[1]:.2f} | {_update(name, pattern):.2f} |"


def _update(name: str, pattern: NMPattern) -> float:
    """Milliseconds to follow one changed block in every row."""
    operation, shape, _ = LAYERS[name]
    mask = from_blocks(random_mask(to_blocks(torch.randn(shape), pattern.m), pattern.n), torch.Size(shape))
    products = IMPLEMENTATIONS["kernels"](operation, mask, pattern, torch.float32)
    _ = products.index.lists
    shortest = float("inf")
    for _ in range(5):
        blocks = to_blocks(mask, pattern.m).clone().view(shape[0], -1, pattern.m)
        chosen = torch.randint(blocks.shape[1], (shape[0],))
        rows = torch.arange(shape[0])
        blocks[rows, chosen] = blocks[rows, chosen].roll(1, -1)
        mask = from_blocks(blocks.flatten(0, 1), torch.Size(shape)).contiguous()
        start = time.perf_counter()
        products.update(mask)
        shortest = min(shortest, 1e3 * (time.perf_counter() - start))
    return shortest


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patterns", nargs="*", default=["1:16", "1:8", "1:4", "2:4"])
    parser.add_argument("--contenders", type=float, default=0.05, help="share of pruned positions")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", default="", help="part of the names of layers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    phases = "forward/input gradient/weight gradient"
    print(
        f"| layer | pattern | dense ms: {phases} | {' | '.join(f'{k}: ratios, +' for k in IMPLEMENTATIONS)} | all | update |"
    )
    print("|---|---|---|" + "---|" * len(IMPLEMENTATIONS) + "---:|---:|")
    for name in LAYERS:
        for pattern in args.patterns if args.layers in name else []:
            print(row(name, NMPattern.parse(pattern), args), flush=True)


if __name__ == "__main__":
    main()
