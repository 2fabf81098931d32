"""Take the pictures of docs/dashboards.md in headless Chromium.

Run: python -m benchmarks.pictures FROZEN FREE SWEEP

Each is a folder that a command of that document has filled: the run with `method.freeze_after=1`, the same one without, and the
sweep. Needs playwright and Chromium, as the tests of pages do.
"""

from __future__ import annotations

import argparse
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.show.map_pictures import count_picture, mask_picture, trace_picture
from bame_lightning.show.maps import changes, mask_title
from bame_lightning.show.mask_file import most_restless, read_snapshots
from bame_lightning.show.report.files import write_report

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("frozen", "free", "sweep"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        frozen, free, sweep = (opened(browser, folder) for folder in (args.frozen, args.free, args.sweep))
        masks = taken(frozen, "section:has(#flip_rate)")
        bottom = frozen.evaluate(
            "document.querySelector('figure:has(#oscillation_layers)').getBoundingClientRect().bottom"
            " - document.querySelector('section:has(#flip_rate)').getBoundingClientRect().top"
        )
        save(masks.crop((0, 0, masks.width, int(bottom) + 8)), "report_masks")
        save(taken(frozen, "#maps"), "report_maps")
        save(taken(free, "figure:has(#restless)"), "report_restless")
        save(taken(sweep, "section:has(#task_0)"), "report_sweep")
        browser.close()
    save(logged(args.free), "mask_images")


def opened(browser: Any, folder: Path) -> Any:
    """The report of a folder, drawn, on a screen that is high enough for all of it."""
    page = browser.new_page(viewport={"width": 1100, "height": 9000})
    page.set_default_timeout(180_000)
    page.goto(write_report(folder).resolve().as_uri())
    page.wait_for_selector("body[data-drawn]")
    page.wait_for_timeout(500)
    return page


def taken(page: Any, selector: str) -> Image.Image:
    return Image.open(BytesIO(page.locator(selector).first.screenshot())).convert("RGB")


def logged(folder: Path) -> Image.Image:
    """What W&B and TensorBoard get of the first layer, and of restless blocks, one below the other."""
    found = read_snapshots(folder)
    assert found is not None
    layer, first, last = found.layers[0], found.maps[0][0], found.maps[-1][0]
    assert last.oscillations is not None
    size = (layer.filters, layer.positions)
    title = mask_title(layer.label, NMPattern.parse(layer.pattern), size, last.mask.shape)
    pictures = [
        mask_picture(changes(last.mask, first.mask), layer.m, title),
        count_picture(last.oscillations, layer.m, f"Oscillations: {title}"),
        trace_picture(most_restless(found.traces)),
    ]
    images = [Image.fromarray(picture.numpy()) for picture in pictures]
    joined = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        joined.paste(image, (0, top))
        top += image.height
    return joined


def save(image: Image.Image, name: str) -> None:
    small = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
