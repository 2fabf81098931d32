"""Arrows between rooms go downwards only, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
from benchmarks.code_lines import code_lines

import bame_lightning

PACKAGE = Path(__file__).parents[1] / "src" / "bame_lightning"
FRAMEWORKS = {"lightning", "hydra", "omegaconf", "wandb", "plotly", "torchmetrics", "torchvision", "sklearn", "timm"}
PICTURES = {"matplotlib", "PIL", "wandb_workspaces"}
# What each room may use beside itself. Whoever adds an arrow draws it in docs/architecture.md, too.
ROOMS: dict[str, set[str]] = {
    "blocks": set(),
    "weights": {"blocks"},
    "compute": {"blocks"},
    "bame": {"blocks", "weights"},
    "ledger": set(),
    "methods": {"blocks", "weights", "compute", "bame", "ledger"},
    "checkpoints": {"blocks", "weights"},
    "show": {"blocks", "weights", "checkpoints"},
    "callbacks": {"blocks", "weights", "bame", "ledger", "methods", "checkpoints", "show"},
    "tasks": set(),
    "cli": {"blocks", "weights", "bame", "ledger", "methods", "checkpoints", "show", "callbacks", "tasks"},
}
CORE = {"blocks", "weights", "compute", "bame", "ledger", "methods"}
"""Rooms of pure tensor code."""
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


def test_the_root_holds_no_room() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__"}
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == {*ROOMS}


def test_arrows_go_downwards() -> None:
    order = list(ROOMS)
    assert all(order.index(below) < order.index(room) for room, used in ROOMS.items() for below in used)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_uses_only_what_lies_below_it(module: str) -> None:
    room = module.split("/")[0]
    found = imports(PACKAGE / module)
    outside = {name.split(".")[0] for name in found}
    assert rooms(found) <= {room, *ROOMS[room]}
    if room in CORE:
        assert not outside & (FRAMEWORKS | PICTURES)
    if room in {"checkpoints", "show"}:
        assert "lightning" not in outside
    if room != "cli":
        assert "hydra" not in outside


@pytest.mark.parametrize(
    "module", ["checkpoints.audit", "bame.evolution", "cli.audit", "cli.compare", "cli.export", "cli.report"]
)
def test_what_does_not_train_does_not_wait_for_lightning(module: str) -> None:
    check = f"import sys, bame_lightning.{module}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_callback_costs_no_import_beyond_lightning() -> None:
    # jaxtyping, in which annotations give shapes, takes 20 ms of the seconds that Lightning takes.
    check = (
        "import sys, lightning; before = set(sys.modules); from bame_lightning import BAMECallback; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) <= {"bame_lightning", "jaxtyping"}


@pytest.mark.parametrize("module", MODULES)
def test_no_class_has_more_than_fifteen_methods(module: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            if module.startswith("callbacks/"):
                methods = [name for name in methods if not hasattr(lightning.Callback, name) or name == "__init__"]
            assert len(methods) <= 15, f"{node.name}: {len(methods)} methods"


def test_the_driver_is_one_short_file() -> None:
    assert code_lines((PACKAGE / "callbacks" / "driver.py").read_text()) <= 300


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            assert not body or body[-1].end_lineno - body[0].lineno < 40, f"{node.name} has more than 40 lines"


def test_public_names_come_when_they_are_asked_for() -> None:
    for name in bame_lightning.__all__:
        found = getattr(bame_lightning, name)
        assert found.__name__ == name
        assert found.__module__.startswith("bame_lightning.")
    assert set(bame_lightning.__all__) <= set(dir(bame_lightning))
    with pytest.raises(AttributeError, match="'bame_lightning' has no attribute 'BAME'"):
        _ = bame_lightning.BAME
