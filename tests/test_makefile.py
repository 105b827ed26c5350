"""The Makefile's set-up, with stand-ins for what it fetches and builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from checkout import ROOT

SETTINGS = ("constraints.txt", "pyproject.toml", "setup.py")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout with one kernel, whose environment is there or not."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (*SETTINGS, "CMakeLists.txt", "kernels/cuda/CMakeLists.txt", "kernels/one.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def make(place: Path, *arguments: str, check: bool = True) -> int:
    path = f"{place / 'stubs'}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MAKE"))} | {"PATH": path}
    done = subprocess.run(["make", *arguments], cwd=place, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.returncode


def test_an_environment_that_was_interrupted_is_completed(place: Path) -> None:
    venv.create(place / ".venv", symlinks=True, with_pip=False)
    make(place, ".venv/.torch", "PIP=true")
    subprocess.run([place / ".venv/bin/python", "-m", "pip", "--version"], check=True, capture_output=True)


@pytest.mark.parametrize("goals", [("bench", "test"), ("test", "bench"), ("bench",), ("test",)])
def test_two_installs_never_run_at_once(goals: tuple[str, ...], place: Path) -> None:
    """Nor is all built twice for two goals."""
    install = "#!/bin/sh\nmkdir at-work || exit 1\nsleep 0.2\nrmdir at-work\necho $* >> installs\n"
    for stub, text in ((".venv/bin/python", ""), (".venv/bin/inception-fast", ""), ("pip", install)):
        (place / stub).parent.mkdir(parents=True, exist_ok=True)
        (place / stub).write_text(text or "#!/bin/sh\n")
        (place / stub).chmod(0o755)
    make(place, "-j2", *goals, "PIP=./pip")
    assert (place / "installs").read_text().count("--editable") == 1
    assert make(place, "-q", ".venv/.bench") == 0


@pytest.mark.parametrize("changed", [*SETTINGS, "kernels/one.cpp", "CMakeLists.txt"])
def test_native_leaves_what_new_settings_ask_for_to_an_install(changed: str, place: Path) -> None:
    for stub in ("stubs/cmake", ".venv/bin/python"):
        (place / stub).parent.mkdir(parents=True, exist_ok=True)
        (place / stub).write_text("#!/bin/sh\n")
        (place / stub).chmod(0o755)
    for age, names in ((300, (*SETTINGS, "CMakeLists.txt")), (200, (".venv/.torch",)), (100, (".venv/.bench",))):
        for name in names:
            (place / name).touch()
            then = (place / name).stat().st_mtime - age
            os.utime(place / name, (then, then))
    for file in place.glob("kernels/**/*.*"):
        os.utime(file, (then, then - 300))
    assert make(place, "-q", ".venv/.bench") == 0
    (place / changed).touch()
    make(place, "native", "PIP=true")
    assert make(place, "-q", ".venv/.bench", check=False) == (changed in SETTINGS)
    assert not (place / ".venv/.test").exists()


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_checkout_at_another_place_has_an_environment_of_its_own(
    how: Callable[[Path, Path], object], place: Path
) -> None:
    """The commands of the one that came along name the other place, and so does its install of the package."""
    first, second = place / "first", place / "second"
    first.mkdir()
    for file in set(place.iterdir()) - {first}:
        file.rename(first / file.name)
    tools = ("PIP=true", "PYTHON=mkdir -p .venv; true")
    make(first, ".venv/.bench", *tools)
    (first / ".venv/old").touch()
    (place / "link").symlink_to(first)
    for same in (first, place / "link"):
        assert make(same, "-q", ".venv/.bench") == 0
    how(first, second)
    assert make(second, "-q", ".venv/.bench", check=False) == 1
    make(second, ".venv/.bench", *tools)
    assert not (second / ".venv/old").exists() and make(second, "-q", ".venv/.bench") == 0


def test_native_builds_anew_where_the_objects_are_of_another_place(place: Path) -> None:
    for stub in ("stubs/cmake", ".venv/bin/python"):
        (place / stub).parent.mkdir(parents=True, exist_ok=True)
        (place / stub).write_text("#!/bin/sh\n")
        (place / stub).chmod(0o755)
    cache = place / "build/native/CMakeCache.txt"
    cache.parent.mkdir(parents=True)
    for home, kept in ((place, True), (place / "elsewhere", False)):
        cache.write_text(f"CMAKE_HOME_DIRECTORY:INTERNAL={home}\n")
        make(place, "native", "PIP=true")
        assert cache.exists() == kept
