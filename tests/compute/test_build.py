"""The kernels are built once, whoever is there, and whoever is gone."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bame_lightning.compute.native import build
from bame_lightning.compute.native.build import UnavailableError, cache_folder, find_compiler, load

BUILD = "from pathlib import Path; from bame_lightning.compute.native.build import load; load(Path({cache!r})); print('has it')"


def start(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def built(cache: Path) -> list[Path]:
    return sorted(cache.glob("kernels-*/*.so"))


def test_two_processes_build_once_and_one_line_says_so(tmp_path: Path) -> None:
    both = [start(BUILD.format(cache=str(tmp_path))) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [out for out, _ in told] == ["has it\n"] * 2, told
    lines = [line for _, err in told for line in err.splitlines()]
    assert len(lines) == 1
    assert "building kernels for sparse layers" in lines[0]
    assert len(built(tmp_path)) == 1
    said: list[str] = []
    load(tmp_path, said.append)
    assert said == []


def test_the_lock_of_a_dead_process_holds_nobody_up(tmp_path: Path) -> None:
    load(tmp_path, lambda line: None)
    library = built(tmp_path)[0]
    lock = library.with_name("lock")
    owner = start(f"""
        import fcntl, time
        file = open({str(lock)!r}, "w")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("locked", flush=True)
        time.sleep(600)
    """)
    assert owner.stdout.readline() == "locked\n"
    library.unlink()
    with lock.open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    assert lock.exists()  # what a dead owner leaves
    before = time.monotonic()
    load(tmp_path, lambda line: None)
    assert built(tmp_path) == [library]
    assert time.monotonic() - before < 100


def test_without_a_compiler_the_reason_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UnavailableError, match=r"no C\+\+ compiler: g\+\+, clang\+\+ and c\+\+ are not there; install one"
    ):
        load(tmp_path)
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(UnavailableError, match="`CXX` = 'my-compiler' is not there"):
        load(tmp_path)


def test_a_compiler_that_fails_is_named_with_its_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho warming up >&2; echo 'error: out of ink' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(UnavailableError, match=r"broken does not build the kernels: error: out of ink\. `CXX`"):
        load(tmp_path / "cache", lambda line: None)
    assert built(tmp_path / "cache") == []


def test_a_compiler_without_openmp_builds_for_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain"
    plain.write_text(f"""#!/bin/sh
case "$*" in *-fopenmp*|*-march=native*) echo 'error: unknown option' >&2; exit 1;; esac
exec {find_compiler()} "$@"
""")
    plain.chmod(0o755)
    monkeypatch.setenv("CXX", str(plain))
    monkeypatch.setattr(build, "_PROCESSORS", (("-march=native",), ()))
    assert load(tmp_path / "cache", lambda line: None).nm_abi() == build.ABI


def test_a_library_that_is_broken_is_built_anew(tmp_path: Path) -> None:
    # In another process, for this one would remember what it has loaded.
    start(BUILD.format(cache=str(tmp_path))).communicate(timeout=120)
    library = built(tmp_path)[0]
    library.write_bytes(b"not a library")
    with pytest.raises(UnavailableError, match="could not be built"):
        load(tmp_path)
    assert load(tmp_path, lambda line: None).nm_abi() == build.ABI


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=r"in .*file.*`BAME_LIGHTNING_CACHE` names another folder"):
        load(tmp_path / "file")


def test_users_choose_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAME_LIGHTNING_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BAME_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bame_lightning"


def test_other_sources_are_built_into_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path, lambda line: None)
    monkeypatch.setattr(build, "_processor", lambda: "another processor")
    load(tmp_path, lambda line: None)
    assert len(built(tmp_path)) == 2
