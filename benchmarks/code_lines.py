"""Count lines of code: without docstrings, comments and blank lines.

python -m benchmarks.code_lines            # of src, room by room
python -m benchmarks.code_lines FOLDER     # of another tree, an earlier commit's for example
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "bame_lightning"
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Lines of a module that hold code."""
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def main(folder: Path) -> None:
    """Print the lines of each room, and of all."""
    rooms = Counter[str]()
    for path in folder.rglob("*.py"):
        room, *inside = path.relative_to(folder).parts
        rooms[room if inside else "(root)"] += code_lines(path.read_text())
    for room, lines in sorted(rooms.items()):
        print(f"{room:12} {lines:6,}")
    print(f"{'all':12} {rooms.total():6,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else PACKAGE)
