"""Sphinx: `make docs` makes pages of the repository's Markdown files and of the docstrings."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import bame_lightning  # noqa: E402 the one of this repository

project = "bame_lightning"
release = version = bame_lightning.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"bame_lightning {release}"
html_extra_path = ["start"]

# Documents refer to each other by their places in the repository, so that is where Sphinx finds them.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "recipes/*.md", "examples/*.md", "benchmarks/**.md"]
exclude_patterns = [".*", "build", "dist", "multirun", "outputs", "src", "tests", "conf"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

default_role = "literal"  # docstrings write code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # jaxtyping's shapes are not types that Sphinx could resolve; signatures show them
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_rtype = False
napoleon_use_ivar = True


def docstrings(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn what docstrings share with Markdown into reStructuredText: formulas, and asterisks that are no emphasis."""
    for index, line in enumerate(lines):
        pieces = re.split(r"(`[^`]*`|\$[^$]*\$)", line)
        for place, piece in enumerate(pieces):
            if piece.startswith("$") and piece.endswith("$") and len(piece) > 2:
                pieces[place] = f":math:`{piece[1:-1]}`"
            elif not piece.startswith("`") and not piece.lstrip().startswith(">>>"):
                pieces[place] = re.sub(r"\*(?=\w)|\|", r"\\\g<0>", piece)
                if place and piece[:1].isalnum():  # the plural of a name in backticks
                    pieces[place] = "\\ " + pieces[place]
        lines[index] = "".join(pieces)


def setup(app: Any) -> None:
    """Connect `docstrings` before napoleon reads them."""
    app.connect("autodoc-process-docstring", docstrings, priority=400)
