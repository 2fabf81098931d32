"""What the documents show runs: Python blocks, commands, links, and the tables of the method cards."""

import importlib
import importlib.util
import operator
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import bame_lightning
from bame_lightning.cli.conf import conf_dir

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = sorted(path for path in (ROOT / "docs" / "methods").glob("*.md") if path.stem != "README")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a document."""
    return [(match[1], match[2]) for match in FENCE.finditer(path.read_text())]


PYTHON = [
    pytest.param(text, id=f"{name(path)}-{index}")
    for path in DOCUMENTS
    for index, (language, text) in enumerate(blocks(path))
    if language == "python"
]


def commands(path: Path) -> Iterator[str]:
    """Lines of the blocks that call a command of Hydra, without comments, options and what they are piped into."""
    for language, text in blocks(path):
        for line in text.replace("\\\n", " ").splitlines() if language != "python" else ():
            command = re.split(r"\s[#|]", re.sub(r"\s\[.*?\]", "", line))[0]
            if command.startswith(("bame-train", "bame-flops", "bame-bench")) and "..." not in command:
                yield command


COMMANDS = [pytest.param(command, id=f"{name(path)}: {command}") for path in DOCUMENTS for command in commands(path)]


class Task(L.LightningModule):
    """The reader's own model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("text", PYTHON)
def test_a_python_block_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model, data and a trained network in place of the reader's own."""
    monkeypatch.chdir(tmp_path)
    for option, value in {"logger": "0", "enable_progress_bar": "0", "accelerator": "cpu"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{option.upper()}", value)
    for option in ("enable_checkpointing", "enable_model_summary"):
        monkeypatch.setenv(f"PL_TRAINER_{option.upper()}", "0")
    torch.manual_seed(0)
    images = torch.randn(20, 16)
    data = torch.utils.data.TensorDataset(images, (images[:, 0] > 0).long())
    mine = {
        "my_lightning_module": Task(),
        "my_datamodule": torch.utils.data.DataLoader(data, batch_size=4),
        "model": Task(),
        "batch": images,
    }
    torch.save({"state_dict": Task().state_dict()}, "dense.ckpt")
    exec(compile(text, "block", "exec"), mine)


def overrides(command: str) -> Iterator[list[str]]:
    """What a command overrides; one list for each value of a sweep, until all values of all choices have come."""
    words = [word for word in shlex.split(command)[1:] if not word.startswith("-") and word != "job"]
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in OverridesParser.create().parse_overrides(words)
    ]
    for index in range(max(map(len, choices), default=1)):
        yield [values[index % len(values)] for values in choices]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes(command: str) -> None:
    root = command.split()[0].removeprefix("bame-").replace("train", "config")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for words in overrides(command):
            cfg = compose(root, words, return_hydra_config=True)
            instantiate(cfg[{"config": "method", "flops": "evidence", "bench": "optimizer"}[root]])


def lines(start: str) -> list[Any]:
    """Command lines of all documents that begin so, without comments."""
    found = {}
    for path in DOCUMENTS:
        for language, text in blocks(path):
            for line in text.replace("\\\n", " ").splitlines() if language != "python" else ():
                command = re.split(r"\s#", line)[0].strip()
                if re.match(start, command):
                    found[command] = pytest.param(command, id=f"{name(path)}: {command}")
    return list(found.values())


@pytest.mark.parametrize("command", lines(r"bame-(?!train|flops|bench)"))
@pytest.mark.usefixtures("logged_out")
def test_a_command_without_hydra_parses(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[program].partition(":")
    # An option that does not exist ends in `SystemExit`; that there is no such file is an answer.
    assert getattr(importlib.import_module(module), function)(words) == 1


@pytest.mark.parametrize("command", lines("make "))
def test_make_knows_the_target(command: str) -> None:
    assert re.search(rf"^{command.split()[1]}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", lines("python "))
def test_python_finds_the_file_or_module(command: str) -> None:
    _, first, *rest = shlex.split(command)
    assert importlib.util.find_spec(rest[0]) if first == "-m" else (ROOT / first).is_file()


@pytest.mark.parametrize("command", lines("pip install"))
def test_pip_knows_the_extra(command: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"bame-lightning\[(.*?)\]", command)
    assert set(asked) <= set(extras)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)", FENCE.sub("", path.read_text()))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_every_method_has_a_card_in_the_index() -> None:
    methods = {path.stem for path in (conf_dir() / "method").glob("*.yaml")}
    index = (ROOT / "docs" / "methods" / "README.md").read_text()
    assert {path.stem for path in CARDS} == methods
    assert set(re.findall(r"^\| \[\w+\]\((\w+)\.md\)", index, re.MULTILINE)) == methods


def parameters(path: Path) -> dict[str, str]:
    """Defaults in the tables of parameters, by name."""
    return dict(re.findall(r"^\| `([\w.]+)` \| `?(.*?)`? \| ", path.read_text(), re.MULTILINE))


SHARED = parameters(ROOT / "docs" / "methods" / "README.md")


@pytest.mark.parametrize("path", CARDS, ids=name)
def test_the_parameters_of_a_card_are_those_of_the_code(path: Path) -> None:
    """Those of its table, and the shared ones that it lists."""
    own, [shared] = parameters(path), re.findall(r"\(README\.md#[\w-]+\):([^.]*)", path.read_text()) or [""]
    named = own | {parameter: SHARED[parameter] for parameter in re.findall(r"`(\w+)`", shared)}
    choose = ["ckpt=dense.ckpt"] if path.stem == "magnitude" else []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [f"method={path.stem}"])
        method = instantiate(compose("config", [f"method={path.stem}", *choose]).method)
    evidence = {"evidence": type(method.evidence)()} if "evidence" in cfg.method else {}
    required = {"checkpoint": "dense.ckpt"} if path.stem == "magnitude" else {}
    in_python = type(method)("1:16", **required, **evidence)
    for parameter, text in named.items():
        if text != "required" and parameter != "layers":
            default = None if text == "None" else yaml.safe_load(text)
            assert operator.attrgetter(parameter)(in_python) == default, parameter
            assert OmegaConf.select(cfg.method, parameter) == default, parameter
    if path.stem != "bame_one_batch":  # which refers to the card of bame for the others
        assert {parameter.partition(".")[0] for parameter in named} == {
            key for key in cfg.method if not str(key).startswith("_")
        }


def test_the_card_of_one_batch_says_what_the_command_line_sets() -> None:
    found = re.findall(r"`method\.([\w.]+)=(\d+)`", (ROOT / "docs" / "methods" / "bame_one_batch.md").read_text())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", ["method=bame_one_batch"])
    assert len(found) == 2
    assert [OmegaConf.select(cfg.method, key) for key, _ in found] == [int(value) for _, value in found]


def test_the_index_leads_to_every_document() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = {line for text in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for line in text.splitlines()}
    documents = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert documents - {"index"} <= listed, "add the document to a toctree of docs/index.md"


def test_the_version_stands_in_one_place_and_its_changes_in_the_changelog() -> None:
    version = bame_lightning.__version__
    assert re.search(rf"^## {re.escape(version)}( \(|$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    texts = {
        path: (ROOT / path).read_text() for path in ("pyproject.toml", "README.md", "CITATION.cff", "docs/conf.py")
    }
    assert not [path for path, text in texts.items() if re.search(rf"(?<![\d.=]){re.escape(version)}(?![\d.])", text)]


def test_the_citation_names_the_paper_of_the_method() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "preferred-citation"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("BAME: Block-Aware Mask Evolution")
    assert (paper["year"], len(paper["authors"])) == (2025, 7)


REFERENCES = sorted(
    {match for path in DOCUMENTS for match in re.findall(r"`(tests/[\w/]+\.py)(?:::([\w:]+))?`", path.read_text())}
)


@pytest.mark.parametrize(("file", "test"), REFERENCES)
def test_a_test_that_a_document_names_exists(file: str, test: str) -> None:
    text = (ROOT / file).read_text()
    for part in filter(None, test.split("::")):
        assert re.search(rf"^\s*(def|class) {part}\b", text, re.MULTILINE)


def test_the_defects_of_other_tools_are_looked_for() -> None:
    assert len([file for file, _ in REFERENCES if file.startswith("tests/callbacks/")]) > 15
