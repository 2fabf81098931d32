"""The page against the logs it is made of; and in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bame_lightning.cli.report import main
from bame_lightning.show.mask_file import FILE, Layer, LayerMaps, Snapshots, most_restless, read_snapshots
from tests.cli.conftest import Run

REPORTED = (
    "method.freeze_after=0",
    "trainer.log_every_n_steps=1",
    "trainer.max_epochs=2",
    "method.evidence.read_every=2",
    # Masks that oscillate within a few steps.
    "method.evidence.contenders=0.5",
    "method.evidence.step_size=6.0",
    "method.evidence.margin=0.0",
)


def data(folder: Path) -> dict[str, Any]:
    """The numbers that the page holds."""
    text = (folder / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def columns(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every metric of the CSV logger."""
    found = defaultdict(list)
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for key, text in row.items():
                if text:
                    found[key].append((int(row["step"]), float(text)))
    return found


def figures(folder: Path) -> dict[str, dict[str, list[tuple[Any, Any]]]]:
    """Points of every line, by figure and name."""
    return {
        figure["name"]: {
            trace["name"]: list(zip(trace["x"], trace["y"], strict=True))
            for trace in figure["data"]
            if trace["type"] == "scatter"
        }
        for figure in data(folder)["figures"]
    }


def mask_of(digits: str, shape: list[int]) -> list[list[bool]]:
    bits = bin(int("1" + digits, 16))[3:]
    return [[bits[row * shape[1] + column] == "1" for column in range(shape[1])] for row in range(shape[0])]


def test_numbers_on_the_page_are_those_of_the_logs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(*REPORTED, "model.hidden=[32,32]")
    capsys.readouterr()
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.fullmatch(r"Written: .*run/report.html \(\d\.\d MB\)\n", out)
    logged, shown = columns(folder), figures(folder)
    expected = {
        "loss": {"training": "train/loss", "validation": "val/loss", "test": "test/loss"},
        "accuracy": {"training": "train/accuracy", "validation": "val/accuracy", "test": "test/accuracy"},
        "flip_rate": {"all layers": "bame/flip_rate"},
        "oscillation_total": {"oscillations": "bame/oscillations_total", "blocks": "bame/oscillating_blocks"},
        "frozen": {"all layers": "bame/frozen_fraction"},
        "survival": {"all layers": "bame/survival"},
        "flops": {"this run": "flops/train_total"},
    }
    for name, metric in (
        ("flip_rate", "flip_rate"),
        ("frozen", "frozen_fraction"),
    ):
        expected[name] |= {f"hidden{i}": f"bame/layer/model.hidden{i}/{metric}" for i in (1, 2)}
    for name, lines in expected.items():
        for label, key in lines.items():
            assert shown[name][label] == logged[key], (name, label)
            assert len(logged[key]) >= (1 if key.startswith(("train", "val", "test")) else 30)
    for label, key in (("dense", "dense"), ("SR-STE", "sr_ste")):
        points = shown["flops"][label]
        totals, ratios = logged["flops/train_total"], logged[f"flops/train_vs_{key}"]
        assert [step for step, _ in points] == [step for step, _ in totals]
        assert [value for _, value in points] == pytest.approx(
            [t / r for (_, t), (_, r) in zip(totals, ratios, strict=True)]
        )
    assert min(value for _, value in shown["survival"]["all layers"]) < 1
    summary = json.loads((folder / "summary.json").read_text())
    html = (folder / "report.html").read_text().split("<script")[0]
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts["mask positions changed"].replace(",", "") == str(summary["sparse"]["flips"])
    (said,) = re.findall(r'<p class="headline">(.*?)</p>', html)
    assert said.startswith(f"Test accuracy: {100 * summary['test_accuracy']:.2f}%.")
    assert f"Training took {summary['flops']['flops/train_total'] / 1e6:.3g} MFLOPs" in said
    assert f"{100 * summary['flops']['flops/train_vs_dense']:.1f}% of dense training" in said
    assert "All 192 blocks obey." in said  # 32 x 4 and 32 x 2
    total, blocks = (int(logged[f"bame/{name}"][-1][1]) for name in ("oscillations_total", "oscillating_blocks"))
    assert f"{blocks} of 192 blocks oscillated, {total} times in all; " in said


def test_oscillation_can_be_held_in_the_hand(run: Run) -> None:
    folder = run(*REPORTED, "model.hidden=[32,32]", "method.freeze_after=null", "trainer.log_every_n_steps=3")
    assert main([str(folder)]) == 0
    logged, shown = columns(folder), figures(folder)
    # Rates between two points of the log, weighed with the adaptations between them, are the total.
    steps = dict(logged["bame/adaptations"])
    for label, key in (("all layers", "bame"), *((f"hidden{i}", f"bame/layer/model.hidden{i}") for i in (1, 2))):
        rates, before, summed = shown["oscillation_rate"][label], 0.0, 0.0
        for step, rate in rates:
            summed += rate * (steps[step] - before)
            before = steps[step]
        assert summed / steps[rates[-1][0]] == pytest.approx(logged[f"{key}/oscillation_frequency"][-1][1], abs=2e-6)
        assert len(rates) > 5
    snapshots = read_snapshots(folder)
    assert snapshots is not None
    page = data(folder)["figures"]
    found = {figure["name"]: figure["data"] for figure in page}
    # Every block is in the maps of these small layers.
    counts = [int(count) for maps in snapshots.maps[-1] for count in maps.oscillations.flatten()]
    (bars,) = found["oscillation_counts"]
    assert bars["y"] == [counts.count(times) for times in range(max(counts) + 1)]
    assert bars["x"] == [str(times) for times in range(max(counts) + 1)]
    assert len(bars["y"]) > 2
    (bars,) = found["oscillation_layers"]
    assert bars["x"] == [pytest.approx((maps.oscillations > 0).float().mean().item()) for maps in snapshots.maps[-1]]
    assert bars["customdata"][0].startswith("model.hidden1: ")
    # Lines of the most restless block lead through the positions that it kept.
    first = most_restless(snapshots.traces)[0]
    assert first.oscillations == max(counts)
    lines = [trace for trace in found["restless"] if trace["name"] == first.title]
    for line in lines:
        for adaptation, position in zip(line["x"], line["customdata"], strict=True):
            assert first.kept[adaptation - first.since, position]
    assert sum(len(line["x"]) - 2 for line in lines) == first.changes > 0
    # Its band, the first one, is as high as its positions, from the adaptation at which it was first followed.
    (layout,) = (figure["layout"] for figure in page if figure["name"] == "restless")
    band = layout["shapes"][0]
    assert (band["x0"], band["x1"]) == (first.since, first.since + len(first.kept) - 1)
    assert (band["y0"], band["y1"]) == (-0.5, first.kept.shape[1] - 0.5)


def test_where_nothing_is_frozen_nothing_is_drawn(run: Run) -> None:
    folder = run(*REPORTED, "method.freeze_after=null", "trainer.max_epochs=1")
    assert main([str(folder)]) == 0
    assert "frozen" not in {figure["name"] for figure in data(folder)["figures"]}
    assert all("frozen" not in layer for layer in data(folder)["maps"]["layers"])
    assert "<dt>frozen blocks</dt><dd>none</dd>" in (folder / "report.html").read_text()


def test_the_page_ends_with_how_the_run_was_made(run: Run) -> None:
    folder = run(*REPORTED, "trainer.max_epochs=1", "seed=7")
    assert main([str(folder)]) == 0
    end = (folder / "report.html").read_text().split("<script")[0].split("How this was made")[1]
    made = dict(re.findall(r"<dt>(\w+)</dt><dd>(.*?)</dd>", end, re.DOTALL))
    assert list(made) == ["command", "seed", "date", "versions", "configuration"]
    assert made["command"].startswith("<code>bame-train ")
    assert all(word in made["command"] for word in ("method.freeze_after=0", "trainer.max_epochs=1", "seed=7"))
    assert made["seed"] == "<code>7</code>"
    assert re.search(r"20\d\d-\d\d-\d\dT", made["date"])
    assert f"torch {torch.__version__}" in made["versions"]
    assert "pattern=1:16" in made["configuration"].splitlines()


def test_maps_on_the_page_are_the_snapshots(run: Run) -> None:
    folder = run(*REPORTED)
    assert main([str(folder)]) == 0
    snapshots, maps = read_snapshots(folder), data(folder)["maps"]
    assert snapshots is not None
    assert maps["steps"] == snapshots.steps
    assert maps["adaptations"] == snapshots.adaptations == [*range(18)]  # of 38 steps 34 are in the window
    (layer,) = maps["layers"]
    assert layer["title"] == "model.hidden1, 1:16: 32 filters x 64 input positions"
    for time, (one,) in enumerate(snapshots.maps):
        shown = mask_of(layer["masks"][time], layer["shape"])
        assert shown == one.mask.tolist()
        assert {sum(row[i : i + 16]) for row in shown for i in range(0, 64, 16)} == {1}
        assert one.oscillations is not None
        assert layer["oscillations"][time] == one.oscillations.tolist()
        restless = int((one.oscillations > 0).sum())
        assert layer["told"][time] == f"Of all 128 blocks of the layer {restless} have oscillated."
        assert layer["frozen"][time] == [[float(cell > 0) for cell in row] for row in layer["oscillations"][time]]
    assert layer["masks"][0] != layer["masks"][-1]


def write_run(folder: Path, rows: list[dict[str, Any]], **summary: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_run_of_many_layers_and_steps_is_thinned_but_true(tmp_path: Path) -> None:
    layers = [f"net.{i}.conv" for i in range(12)]
    rows = [
        {"step": step, "bame/flip_rate": step / 7, "bame/oscillation_frequency": 0.5, "bame/frozen_fraction": 0.0}
        | {f"bame/layer/{name}/flip_rate": step + i / 16 for i, name in enumerate(layers)}
        for step in range(0, 50_000, 10)
    ]
    assert main([str(write_run(tmp_path, rows))]) == 0
    figure = next(f for f in data(tmp_path)["figures"] if f["name"] == "flip_rate")
    line, heat = figure["data"]
    assert 500 < len(line["x"]) <= 1000
    assert (line["x"][0], line["x"][-1]) == (0, 49_990)
    assert all(y == x / 7 for x, y in zip(line["x"], line["y"], strict=True))
    assert heat["rownames"] == layers  # 2 before 10
    assert 100 < len(heat["x"]) <= 300
    # A row without a value above zero would otherwise lie in the middle of plotly's own scale.
    assert (heat["zmin"], heat["zmax"]) == (0, 49_990 + 11 / 16)
    for i, row in enumerate(heat["z"]):
        assert row == [step + i / 16 for step in heat["x"]]
    assert (tmp_path / "report.html").stat().st_size < 6e6


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    rows = [{"step": step, "train/loss": loss} for step, loss in enumerate(["1.5", "nan", "inf", "2.5"])]
    assert main([str(write_run(tmp_path, rows))]) == 0
    assert figures(tmp_path)["loss"]["training"] == [(0, 1.5), (1, None), (2, None), (3, 2.5)]


def test_a_run_that_is_going_on_can_be_looked_at(tmp_path: Path) -> None:
    assert main([str(write_run(tmp_path / "going", [{"step": 3, "train/loss": 1.0}]))]) == 0
    html = (tmp_path / "going" / "report.html").read_text().split("<script")[0]
    assert "no summary.json: it is going on" in html
    assert "recorded no snapshots" in html


def test_a_run_that_was_killed_in_the_middle_of_a_row_can_be_looked_at(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [{"step": step, "train/loss": 2.0 - step} for step in range(2)])
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,4.9e-")
    assert main([str(folder)]) == 0
    assert figures(folder)["loss"]["training"] == [(0, 2.0), (1, 1.0)]


def test_text_of_others_cannot_break_the_page(tmp_path: Path) -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    kept = torch.ones(2, 4, dtype=torch.bool)
    snapshots = Snapshots([Layer(bad, "4:4", 2, 4, False)], [0], [0], [[LayerMaps(kept)]])
    folder = write_run(
        tmp_path, [{"step": 0, f"bame/layer/{bad}/flip_rate": 1.0, "bame/flip_rate": 1.0}], method=bad, warning=bad
    )
    (folder / FILE).write_bytes(snapshots.to_bytes())
    assert main([str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert bad not in text
    assert bad in data(folder)["maps"]["layers"][0]["title"]


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    write_run(tmp_path, [{"step": 0, "train/loss": 1.0}])
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)  # the library names addresses it does not ask
    assert not re.search(r"https?://", own)
    assert not re.search(r"<script[^>]* src=|@import", own)


def sweep(folder: Path) -> dict[tuple[str, str], tuple[float, list[float]]]:
    cells = {
        ("bame", "1:4"): (2e9, [0.91, 0.93, 0.98]),
        ("bame", "1:16"): (1e9, [0.8, 0.9, 0.7]),
        ("sr_ste", "1:16"): (4e9, [0.75]),
    }
    for (method, pattern), (flops, accuracies) in cells.items():
        for seed, accuracy in enumerate(accuracies):
            here = folder / f"{method}-{pattern.replace(':', 'of')}-{seed}"
            here.mkdir(parents=True)
            known = {"data": "digits", "model": "mlp", "recipe": None, "train_loss": 0.1, "test_accuracy": accuracy}
            known |= {"method": method, "pattern": pattern, "seed": seed, "flops": {"flops/train_total": flops}}
            (here / "summary.json").write_text(json.dumps(known))
    return cells


def test_a_sweep_shows_mean_and_spread_against_flops(tmp_path: Path) -> None:
    cells = sweep(tmp_path)
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "error.txt").write_text("pattern=9:4: <too> many\n")
    assert main([str(tmp_path), "--baseline", "sr_ste"]) == 0
    (figure,) = data(tmp_path)["figures"]
    points, patterns = figure["data"][:2], figure["data"][2:]
    for trace in points:
        expected = sorted(cell for (method, _), cell in cells.items() if method == trace["name"])
        assert trace["x"] == [flops for flops, _ in expected]
        assert trace["y"] == pytest.approx([statistics.fmean(values) for _, values in expected])
        spreads = [statistics.stdev(values) if len(values) > 1 else None for _, values in expected]
        assert trace["error_y"]["array"] == pytest.approx(spreads)
        low, high = figure["layout"]["xaxis"]["range"]
        assert all(10**low < flops < 10**high for flops, _ in expected)
    assert [trace["name"] for trace in points] == ["bame", "sr_ste"]
    # The legend tells shapes, too.
    shapes = {trace["name"]: trace["marker"]["symbol"] for trace in patterns}
    assert list(shapes) == ["1:4", "1:16"]
    assert points[0]["marker"]["symbol"] == [shapes["1:16"], shapes["1:4"]]
    assert points[1]["marker"]["symbol"] == [shapes["1:16"]]
    html = (tmp_path / "report.html").read_text().split("<script")[0]
    assert "<td>1:16</td><td>bame</td>" in html
    assert "bame 1:4 has the highest accuracy in the test, 94.00 ± 3.61%. bame 1:16 costs least (1 GFLOPs" in html
    assert "80.00 ± 10.00" in html
    assert "+5.00 (one pair)" in html
    assert "failed: failed: pattern=9:4: &lt;too&gt; many" in html


def test_a_sweep_without_flops_is_shown_by_pattern(tmp_path: Path) -> None:
    sweep(tmp_path)
    for path in tmp_path.rglob("summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"flops": {}}))
    assert main([str(tmp_path)]) == 0
    (figure,) = data(tmp_path)["figures"]
    assert [trace["x"] for trace in figure["data"][:2]] == [["1:4", "1:16"], ["1:16"]]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (
            lambda folder: None,
            ["nowhere"],
            r"`RUN_OR_SWEEP_DIR` must be the folder of a run .*; there is no folder \S*nowhere",
        ),
        (lambda folder: None, [""], r"holds no summary.json of a finished run"),
        (lambda folder: (folder / "summary.json").write_text("{}"), [""], r"no metrics.csv.*Train with logger=csv"),
        (
            lambda folder: (folder / "metrics.csv").write_text("a,b\n1,2\n"),
            [""],
            r"metrics.csv is not a file of .*CSVLogger",
        ),
        (
            lambda folder: (folder / "metrics.csv").write_bytes(bytes(range(256)) * 80 + b"\n"),
            [""],
            r"metrics.csv is not a file of .*CSVLogger \(UnicodeDecodeError: .{,120}\)",
        ),
        (
            lambda folder: (folder / "metrics.csv").write_text(f"step,train/loss\n0,{'x' * 9000}\n"),
            [""],
            r"metrics.csv is not a file of .*CSVLogger \(ValueError: .{,120}\)",
        ),
        *(
            (lambda folder, text=text: (folder / "metrics.csv").write_text(text), [""], "so there is nothing to show")
            for text in ("", "step,train/loss\n", "step,train/loss\n3,\n", "step,tr")
        ),
        (
            lambda folder: write_run(folder, [{"step": 0, "train/loss": 1.0}]),
            ["", "--baseline", "sr_ste"],
            r"`--baseline` .* single run. Leave it out",
        ),
        (lambda folder: sweep(folder), ["", "--baseline", "rigl"], r"`--baseline` must be a method of these runs"),
    ],
)
def test_what_cannot_be_shown_is_told(
    make: Any, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    assert main([str(tmp_path / arguments[0]), *arguments[1:]]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(rf"bame-report: error: .*{message}", err)
    assert err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_without_plotly_the_remedy_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main([str(write_run(tmp_path, [{"step": 0, "train/loss": 1.0}]))]) == 1
    assert "pip install 'bame-lightning[report]'" in capsys.readouterr().err


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine (Debian's package is named chromium)")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


SIZES = pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)], ids=["laptop", "phone"])


def open_page(browser: Any, path: Path, width: int, height: int) -> tuple[Any, list[str]]:
    """The page once it is drawn, and a list that collects complaints and requests."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(180_000)  # other work may leave the browser little time
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-drawn]")
    return page, complaints


# Of each visible place for a plot: its id, marks drawn in it, whether it lies within the page, and its smallest letters.
LOOK = """() => [...document.querySelectorAll(".drawing")].filter(e => e.offsetParent).map(e => ({
    id: e.id,
    marks: [...e.querySelectorAll(".scatterlayer .trace path, .barlayer .point path, .heatmaplayer image")]
        .filter(m => { const b = m.getBoundingClientRect(); return b.width > 2 || b.height > 2; }).length,
    inside: e.getBoundingClientRect().right <= innerWidth && e.clientWidth > innerWidth / 4,
    high: e.clientHeight,
    letters: Math.min(...[...e.querySelectorAll("text")].map(t => parseFloat(getComputedStyle(t).fontSize))),
}))"""


def check_plots(page: Any, names: set[str]) -> None:
    seen = {plot["id"]: plot for plot in page.evaluate(LOOK)}
    assert set(seen) == names
    for plot in seen.values():
        assert plot["marks"] > 0, plot
        assert plot["inside"], plot
        assert plot["high"] >= 150, plot
        assert plot["letters"] >= 11, plot
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
@SIZES
def test_a_run_in_a_browser(run: Run, browser: Any, width: int, height: int) -> None:
    folder = run(*REPORTED, "model.hidden=[32,48]")
    assert main([str(folder)]) == 0
    page, complaints = open_page(browser, folder / "report.html", width, height)
    names = {figure["name"] for figure in data(folder)["figures"]}
    check_plots(page, names | {"mask-map", "oscillations-map", "frozen-map"})
    snapshots = read_snapshots(folder)
    assert snapshots is not None
    first = snapshots.maps[0][1].mask
    page.select_option("#map-layer", label="hidden2")
    for time in (0, 5, len(snapshots.steps) - 1):
        page.fill("#map-time", str(time))
        page.wait_for_function(
            "text => document.getElementById('map-when').textContent.startsWith(text)",
            arg=f"after {snapshots.steps[time]} steps, {snapshots.adaptations[time]} of 17",
        )
        page.wait_for_timeout(100)
        drawn = page.evaluate("document.getElementById('mask-map').data[0].z.map(row => [...row])")
        now = snapshots.maps[time][1]
        assert drawn == (first.int() + 2 * now.mask.int()).tolist()
        drawn = page.evaluate("document.getElementById('oscillations-map').data[0].z.map(row => [...row])")
        assert now.oscillations is not None
        assert drawn == now.oscillations.tolist()
        # A block lies below its positions.
        edges = page.evaluate("""() => ["mask-map", "oscillations-map", "frozen-map"].map(id => {
            const b = document.querySelector(`#${id} .heatmaplayer image`).getBoundingClientRect();
            return [b.left, b.right].map(Math.round);
        })""")
        assert edges[0] == edges[1] == edges[2]
    page.click("#map-play")
    page.wait_for_function("document.getElementById('map-time').value === '2'")
    page.click("#map-play")
    assert complaints == []
    page.close()


@pytest.mark.slow
@SIZES
def test_many_layers_in_a_browser(tmp_path: Path, browser: Any, width: int, height: int) -> None:
    layers = [f"model.blocks.{i}.attention.in_proj_weight" for i in range(24)]
    rows = [
        {"step": step, "bame/flip_rate": 0.1, "bame/oscillation_frequency": 0.2, "bame/frozen_fraction": 0.3}
        | {"bame/adaptations": step + 1}
        | {
            f"bame/layer/{name}/{metric}": step * i / 1000
            for i, name in enumerate(layers)
            for metric in ("flip_rate", "oscillation_frequency", "frozen_fraction")
        }
        for step in range(0, 400, 10)
    ]
    assert main([str(write_run(tmp_path, rows))]) == 0
    page, complaints = open_page(browser, tmp_path / "report.html", width, height)
    check_plots(page, {"flip_rate", "oscillation_rate", "frozen"})
    ticks = page.evaluate("[...document.querySelectorAll('#frozen .y2tick text')].map(t => t.textContent)")
    assert len(ticks) == len(set(ticks)) == 24
    assert complaints == []
    page.close()


@pytest.mark.slow
@SIZES
def test_a_sweep_in_a_browser(tmp_path: Path, browser: Any, width: int, height: int) -> None:
    sweep(tmp_path)
    assert main([str(tmp_path), "--baseline", "sr_ste"]) == 0
    page, complaints = open_page(browser, tmp_path / "report.html", width, height)
    check_plots(page, {"task_0"})
    bars = "[...document.querySelectorAll('#task_0 .errorbar path')].map(e => e.getBoundingClientRect().height)"
    assert [height > 5 for height in page.evaluate(bars)] == [True, True, False]  # one seed has no spread
    # Nothing that is written in the plot reaches beyond it.
    cut = page.evaluate("""() => { const outer = document.querySelector("#task_0").getBoundingClientRect();
        return [...document.querySelectorAll("#task_0 text")].map(t => [t.textContent, t.getBoundingClientRect()])
            .filter(([, b]) => b.width && (b.left < outer.left - 1 || b.right > outer.right + 1)).map(([text]) => text); }""")
    assert cut == []
    entries = page.evaluate("[...document.querySelectorAll('#task_0 .legendtext')].map(t => t.textContent)")
    assert entries == ["bame", "sr_ste", "1:4", "1:16"]
    # A table that is wider than the page says that it goes on, until its end has been seen.
    goes_on = page.evaluate(
        "() => { const t = document.querySelector('.scroll'); return t.scrollWidth > t.clientWidth + 2; }"
    )
    assert page.is_visible(".more") == goes_on
    assert goes_on == (width < 500)
    page.evaluate("() => { const t = document.querySelector('.scroll'); t.scrollLeft = t.scrollWidth; }")
    page.wait_for_function("document.querySelector('.more').hidden")
    assert complaints == []
    page.close()
