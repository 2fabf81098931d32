"""Arrows between rooms go downwards only, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bame_lightning

PACKAGE = Path(__file__).parents[1] / "src" / "bame_lightning"
CORE = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
FRAMEWORKS = {"lightning", "hydra", "omegaconf", "wandb", "plotly", "torchmetrics", "torchvision", "sklearn", "timm"}
FOUNDATIONS = {"files"}  # rooms that the core stands on
# Which other rooms a folder may use, beside the core.
ROOMS: dict[str, set[str]] = {
    "callbacks": set(),
    "compare": set(),
    "export": set(),
    "files": set(),
    "report": {"compare"},
    "tasks": set(),
    "cli": {"callbacks", "compare", "export", "report", "tasks"},
}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "bame_lightning"}
    return found


def rooms(names: set[str]) -> set[str]:
    """What of this package is imported: the part after its name."""
    return {name.split(".")[1] for name in names if name.startswith("bame_lightning.")}


@pytest.mark.parametrize("module", CORE)
def test_the_core_knows_no_framework_and_no_room_above_it(module: str) -> None:
    found = imports(PACKAGE / f"{module}.py")
    assert not {name.split(".")[0] for name in found} & FRAMEWORKS
    assert rooms(found) <= {*CORE, *FOUNDATIONS}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_uses_only_what_lies_below_it(module: str) -> None:
    room = module.split("/")[0]
    found = imports(PACKAGE / module)
    assert rooms(found) <= {room, *ROOMS[room], *CORE, *FOUNDATIONS}
    if room != "cli":
        assert not {name.split(".")[0] for name in found} & {"hydra"}
    if room in FOUNDATIONS:
        assert not {name.split(".")[0] for name in found} & FRAMEWORKS
    if room == "tasks":
        assert rooms(found) == {"tasks"} or not rooms(found), "tasks know nothing of sparsity"


@pytest.mark.parametrize("module", ["audit", "evolution", "cli.audit", "cli.compare", "cli.export", "cli.report"])
def test_what_does_not_train_does_not_wait_for_lightning(module: str) -> None:
    check = f"import sys, bame_lightning.{module}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_public_names_come_when_they_are_asked_for() -> None:
    for name in bame_lightning.__all__:
        found = getattr(bame_lightning, name)
        assert found.__name__ == name
        assert found.__module__.startswith("bame_lightning.")
    assert set(bame_lightning.__all__) <= set(dir(bame_lightning))
    with pytest.raises(AttributeError, match="'bame_lightning' has no attribute 'BAME'"):
        _ = bame_lightning.BAME
