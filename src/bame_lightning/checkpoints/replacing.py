"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside another, and put it in the other's place if all went well.

    Until then a file at `path` stays as it is. Afterwards the folder holds no other new file.

    Args:
        path: Where the file will lie; its folder is made if it does not exist.

    Yields:
        A path in the same folder, to write to.

    Raises:
        OSError: If the system refuses to write; its `filename` is `path`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.touch()
        mode = part.stat().st_mode  # permissions by the user's umask; safetensors makes files that others cannot read
        yield part
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        part.replace(path)
    except OSError as error:
        if error.errno is not None:  # a name would hide the library's own message
            # A full disk names no file, and the draft's name helps nobody.
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        part.unlink(missing_ok=True)
