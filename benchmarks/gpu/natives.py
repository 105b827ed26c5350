"""The native modules of the checkout, built where the measuring queue runs or before, elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import provenance
from commands import ROOT, Result, ran
from store import FAILED, OK

PACKAGE = ROOT / "build" / "gpu" / "package"
BUILT = ROOT / "build" / "gpu" / "built.json"  # what the natives were built from, and by what


def build(cuda: str = "AUTO") -> Result:
    """The native module where the checkout has it, and the package as links: nothing is installed or fetched. Where the
    CUDA kernels do not build, or are not asked for ("OFF"), all else is built without them, and a library of theirs
    that lay there is gone: it was of other sources.
    """
    cmake = importlib.util.find_spec("pybind11")
    if cmake is None or cmake.origin is None:
        return {"status": FAILED, "note": "pybind11 is not installed"}
    if cuda == "AUTO" and built_before():
        link_package(PACKAGE / "inception_fast")
        return {
            "status": OK,
            "note": f"with the CUDA kernels, built before by nvcc {json.loads(BUILT.read_text())['nvcc']}",
        }
    where = Path(cmake.origin).parent / "share" / "cmake" / "pybind11"
    library = ROOT / "kernels" / "cuda" / "_hopper.so"
    if cuda == "AUTO":
        library.unlink(missing_ok=True)
    options = [f"-Dpybind11_DIR={where}", f"-DCMAKE_INSTALL_PREFIX={ROOT}", f"-DPython_EXECUTABLE={sys.executable}"]
    result = compiled([*options, f"-DHOPPER={cuda}"])
    first = result
    if result["status"] == FAILED:
        result = compiled([*options, "-DHOPPER=OFF"])
    if result["status"] != OK:
        return first
    link_package(PACKAGE / "inception_fast")
    built = library.exists()
    if built and first is result and cuda == "AUTO":
        provenance.written(BUILT, {**sources(), "nvcc": provenance.nvcc()})
    why = "without the CUDA kernels: no nvcc" if first is result else "without the CUDA kernels, which do not build"
    return {**first, "status": OK, "note": "with the CUDA kernels" if built and first is result else why}


def sources() -> dict[str, str]:
    """What the natives depend on: their sources and the interpreter."""
    return {"sources": provenance.native_sources(), "python": str(sys.implementation.cache_tag)}


def built_before() -> bool:
    """Whether both natives lie there, built of these sources for this interpreter, here or elsewhere."""
    try:
        said = json.loads(BUILT.read_text())
    except (OSError, ValueError):
        return False
    kernels = ROOT / "kernels"
    there = [kernels / "cuda" / "_hopper.so", *kernels.glob(f"cpu/_native.{sys.implementation.cache_tag}-*.so")]
    return len(there) == 2 and there[0].exists() and {key: said.get(key) for key in sources()} == sources()


def compiled(options: Sequence[str]) -> Result:
    """Configured, built and installed into the checkout; the first step that failed."""
    folder = ROOT / "build" / "gpu" / "cmake"
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    result: Result = {}
    for step in (
        ["cmake", "-S", ".", "-B", str(folder), *ninja, *options],
        ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)],
        ["cmake", "--install", str(folder)],
    ):
        result = ran(step)
        if result["status"] != OK:
            break
    return result


def link_package(package: Path) -> None:
    """The package as an installation has it: kernels/ inside of inception_fast/. Old links go; what Python compiled and
    left beside them is a folder, and stays.
    """
    package.mkdir(parents=True, exist_ok=True)
    wanted = {child.name: child for child in (ROOT / "inception_fast").iterdir() if child.name != "__pycache__"}
    wanted["kernels"] = ROOT / "kernels"
    for stale in filter(Path.is_symlink, package.iterdir()):
        stale.unlink()
    for name, target in wanted.items():
        (package / name).symlink_to(target)


def with_marks() -> Path | Result:
    """The library with marks of these sources, built now where it is not there; why it could not be."""
    file = ROOT / "build" / "gpu" / f"marks-{provenance.native_sources()}.so"
    if not file.exists():
        folder = ROOT / "build" / "gpu" / "cmake"
        result = ran(
            ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1), "--target", "hopper_marks"]
        )
        if result["status"] != OK:
            return result
        new = file.with_name(f".{file.name}.{os.getpid()}")
        shutil.copyfile(folder / "kernels" / "cuda" / "_hopper_marks.so", new)
        new.replace(file)
    return file
