"""Builds the package from a copy of the checkout and installs it where the checkout cannot be seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from checkout import ROOT, project_files


def run(*command: str | Path, cwd: Path, optimize: str = "-O0") -> str:
    """Standard output of a command that must succeed, in an environment without this process's Python settings.

    A build is without the CUDA kernels, which take minutes, and compiles the CPU's as `optimize` says.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "INCEPTION_FAST", "PYTEST"))}
    environment |= {"PYTHONSAFEPATH": "1", "CMAKE_ARGS": f"-DHOPPER=OFF -DNATIVE_OPTIMIZE={optimize}"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def copy_checkout(to: Path) -> list[Path]:
    """Copies the project's files, without anything that was built in the checkout; returns their names."""
    files = project_files()
    for file in files:
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, to / file)
    return files


class Cost(NamedTuple):
    """Processor seconds of a command, which a busy machine does not stretch, and the memory of its largest process."""

    seconds: float
    largest_bytes: int


# Runs a command and prints, last, the processor seconds and the largest memory of all the processes that it started.
COUNTED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
sys.exit(code)
"""


def counted(*command: str | Path, cwd: Path, optimize: str = "-O0") -> Cost:
    """What a command took that must succeed."""
    seconds, largest = run(sys.executable, "-c", COUNTED, *command, cwd=cwd, optimize=optimize).split()[-2:]
    return Cost(float(seconds), int(largest))


YARDSTICK_PAUSE = 5.0  # seconds from one to the next
# As a source file with a regular expression and some containers takes, some 3 to 7 s: what machines and their load make
# of a compiler's time.
YARDSTICK = """
#include <map>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

int main(int argc, char **argv) {
  std::map<std::string, std::vector<double>> found;
  for (int i = 0; i < argc; ++i) {
    const std::regex expression("([a-z]+)=([0-9.]+)");
    const std::string word(argv[i]);
    std::smatch match;
    if (std::regex_search(word, match, expression))
      found[match[1]].push_back(std::stod(match[2]));
  }
  std::ostringstream text;
  for (const auto &[name, values] : found)
    text << name << values.size();
  return static_cast<int>(text.str().size());
}
"""


@contextmanager
def yardsticks(folder: Path) -> Iterator[list[float]]:
    """Processor seconds of the yardstick, compiled again and again while the body runs: at least once.

    The same core may compile half as fast from one minute to the next: what is held against it is measured beside it.
    """
    (folder / "yardstick.cpp").write_text(YARDSTICK)
    command = ("g++", "-std=c++17", "-O3", "-c", "yardstick.cpp", "-o", "yardstick.o")
    found = [counted(*command, cwd=folder).seconds]
    over = threading.Event()

    def compile_again() -> None:
        while not over.wait(YARDSTICK_PAUSE):
            found.append(counted(*command, cwd=folder).seconds)

    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compile_again)
        try:
            yield found
        finally:
            over.set()
            compiling.result()


def build_wheel(source: Path, out: Path, optimize: str = "-O0") -> tuple[Path, Cost]:
    """The wheel of a source tree, built offline with this environment's tools, and what that took."""
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out)
    cost = counted(sys.executable, "-m", "pip", "wheel", *options, source, cwd=out, optimize=optimize)
    return only(out, "*.whl"), cost


def build_editable(source: Path, out: Path) -> Path:
    """The wheel that `pip install --editable` would install for this source tree."""
    hook = "import sys; from scikit_build_core.setuptools.build_meta import build_editable as b; b(sys.argv[1])"
    run(sys.executable, "-c", hook, out, cwd=source)
    return only(out, "*.whl")


def build_sdist(source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, source, cwd=out)
    return only(out, "*.tar.gz")


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@dataclass(frozen=True)
class Install:
    """A virtual environment of its own that holds the package; torch and the rest are lent by the running one."""

    root: Path
    site: Path

    def python(self, code: str) -> str:
        return run(self.root / "bin" / "python", "-c", code, cwd=self.root)

    def script(self, *arguments: str) -> str:
        return run(self.root / "bin" / "inception-fast", *arguments, cwd=self.root)


def install(wheel: Path, root: Path) -> Install:
    """Installs a wheel, alone, into a new environment at `root`."""
    venv.create(root, symlinks=True, with_pip=False)
    target = root / "bin" / "python"
    options = ("--no-deps", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "--python", target, "install", *options, wheel, cwd=root)
    site = only(root, "lib/python*/site-packages")
    # A folder named in a .pth file has its own .pth files left unread: an editable install over there stays unseen.
    lent = sysconfig.get_paths()["purelib"]
    (site / "zz_lent.pth").write_text(f"{lent}\n")
    return Install(root, site)
