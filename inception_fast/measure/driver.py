"""Builds the native driver of a checkout: the CPU kernels in a program without Python, for tests and cache studies."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def tool(name: str) -> str:
    """The path of a program, this environment's first. Raises FileNotFoundError when there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"the program {name} is not installed; install the system's package {name}")
    return found


def build_driver(checkout: Path, folder: Path, *, optimize: str = "-O3", sanitize: str = "") -> Path:
    """Builds `checkout`'s native driver in `folder` and returns the program.

    `sanitize` is what the compiler's -fsanitize= takes. `folder` also gets compile_commands.json. Raises
    FileNotFoundError without CMake or Ninja, or where `checkout` has no driver, and RuntimeError with the end of the
    output when the build fails.
    """
    if not (checkout / "tests" / "native" / "CMakeLists.txt").is_file():
        raise FileNotFoundError(f"{checkout} is no checkout of this project: it has no tests/native/CMakeLists.txt")
    values = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "NATIVE_DRIVER": "ON",
        "NATIVE_OPTIMIZE": optimize,
        "NATIVE_SANITIZE": sanitize,
    }
    options = [f"-D{name}={value}" for name, value in values.items()]
    configure = [tool("cmake"), "-S", str(checkout), "-B", str(folder), "-G", "Ninja", *options]
    for command in (configure, [tool("cmake"), "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the native driver does not build:\n{(done.stdout + done.stderr)[-4000:]}")
    return folder / "tests" / "native" / "native_driver"
