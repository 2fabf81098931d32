"""Train with many random settings, check every promise at every step, and write the numbers to docs/reliability.md.

    python -m benchmarks.reliability [--cases 400] [--seed 0]

The settings, and what is checked, are those of `tests/soak.py`. It stops at the first broken promise and prints the setting.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path

import lightning
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from tests.soak import Setting, all_settings, run

from benchmarks.documents import fill

DOCUMENT = Path(__file__).parents[1] / "docs" / "reliability.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    total: Counter[str] = Counter()

    @seeded(args.seed)
    @settings(
        max_examples=args.cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(all_settings())
    def soak(setting: Setting) -> None:
        total.update(run(setting))

    soak()
    lines = [
        f"{total['cases']} settings, {total['steps']:,} optimizer steps over {total['batches']:,} batches, "
        f"{total['flips']:,} mask positions flipped, {total['resumed']} runs interrupted and resumed; every promise held.",
        "",
        f"torch {torch.__version__}, lightning {lightning.__version__}, seed {args.seed}:",
        "",
        "```",
        f"python -m benchmarks.reliability --cases {args.cases}",
        "```",
    ]
    fill(DOCUMENT, "soak", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
