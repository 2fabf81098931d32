"""Build the kernels once on a machine, and load them."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

CACHE = "BAME_LIGHTNING_CACHE"
"""Environment variable that names a folder for built kernels."""
COMPILER = "CXX"
"""Environment variable that names a compiler, as for torch's own extensions."""
ABI = 1
"""The version of the interface, which `nm_abi` of a library must return."""
_SOURCES = ("vectors.h", "memory.h", "interface.h", "packing.h", "product.h", "gradient.h", "index.h", "kernels.cpp")
_ALWAYS = ("-O3", "-std=c++17", "-fPIC", "-shared")
# The first combination that a compiler accepts is taken: Apple's has no OpenMP, and some have only -mcpu for processors.
_PROCESSORS, _THREADS = (("-march=native",), ("-mcpu=native",), ()), (("-fopenmp",), ())
_PATIENCE = 300.0
"""Seconds to wait while another process builds."""


class UnavailableError(Exception):
    """Something is not available on this machine; the message says why, and what helps."""


def announce(line: str) -> None:
    """Tell the user something in one line."""
    print(f"bame_lightning: {line}", file=sys.stderr, flush=True)


@lru_cache(maxsize=1)
def kernels() -> ctypes.CDLL:
    """The kernels of this machine, built at the first call.

    Raises:
        UnavailableError: If there is no compiler, or it fails. The next call tries again.
    """
    return load(cache_folder())


def cache_folder() -> Path:
    """The user's folder for built kernels."""
    if named := os.environ.get(CACHE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bame_lightning"


def load(cache: Path, say: Callable[[str], None] = announce) -> ctypes.CDLL:
    """Load the kernels from a cache; build them first if they are not there.

    Several processes may call this at once: one builds, the others wait. The lock is the system's own on an open file, so
    that it ends with its process, however that ends.

    Args:
        cache: Folder for what is built; made if need be.
        say: Called with a line of text when something is built.

    Returns:
        The library.

    Raises:
        UnavailableError: If there is no compiler, it fails, or the folder cannot be written.
    """
    compiler = find_compiler()
    folder = cache / f"kernels-{_key(compiler)}"
    library = folder / "kernels.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "lock"):
                if not library.exists():
                    _build(compiler, library, say)
        return _open(library)
    except OSError as error:
        _forget(library)
        raise UnavailableError(
            f"the kernels could not be built in {folder}: {error}. `{CACHE}` names another folder"
        ) from None


def find_compiler() -> str:
    """The C++ compiler to use.

    Raises:
        UnavailableError: If there is none.
    """
    wanted = os.environ.get(COMPILER)
    if sys.platform == "win32":
        raise UnavailableError("the kernels need GCC or Clang on Linux or macOS")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    tried = f"`{COMPILER}` = {wanted!r} is not there" if wanted else "g++, clang++ and c++ are not there"
    raise UnavailableError(f"no C++ compiler: {tried}; install one (on Debian: apt install g++), or set `{COMPILER}`")


def _build(compiler: str, library: Path, say: Callable[[str], None]) -> None:
    say(f"building kernels for sparse layers with {Path(compiler).name}, once on this machine, some seconds")
    source = Path(__file__).with_name("kernels.cpp")
    first_error = ""
    for threads, processor in itertools.product(_THREADS, _PROCESSORS):
        # Built in another place, then renamed: nobody ever sees half a library.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "made.so"
            command = [compiler, *_ALWAYS, *threads, *processor, str(source), "-o", str(made)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 a compiler
            if ended.returncode == 0:
                _open(made)
                made.replace(library)
                return
            first_error = first_error or ended.stderr.strip() or f"exit status {ended.returncode}"
    lines = [line for line in first_error.splitlines() if "error" in line] or first_error.splitlines()
    raise UnavailableError(f"{compiler} does not build the kernels: {lines[0]}. `{COMPILER}` names another compiler")


def _open(library: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(library))
    if not hasattr(opened, "nm_abi") or opened.nm_abi() != ABI:
        raise OSError(f"{library} is not of this version")
    return opened


def _forget(library: Path) -> None:
    """Remove a library that does not load, so that the next call builds it anew."""
    try:
        library.unlink(missing_ok=True)
    except OSError:
        return


def _key(compiler: str) -> str:
    """A key of all that a build depends on."""
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    sources = [Path(__file__).with_name(name).read_bytes() for name in _SOURCES]
    parts = [about.encode(), torch.__version__.encode(), _processor().encode(), *sources]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """Kind and abilities of the processor: different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(told)])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes. After some minutes go on without it: two builds at once do no harm."""
    import fcntl  # not on Windows

    with path.open("w") as file:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    break
                time.sleep(0.1)
        yield  # closing the file ends the lock
