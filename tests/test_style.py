"""The house rules that a machine can check: the linters' word, which way imports run, how long files are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import inception_fast
from checkout import ROOT, project_files

BIN = Path(sys.executable).parent
NATIVE = {".cpp", ".h", ".cu", ".cuh"}
LONGEST_FILE, LONGEST_FUNCTION = 500, 60
WELL_KNOWN_VARIABLES = {
    "TF_CPP_MIN_LOG_LEVEL", "MPLBACKEND",  # set before TensorFlow and matplotlib are imported, never read
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT",  # torchrun's way to tell a process who it is
}  # fmt: skip

# The floors of the house, from the ground up. A module imports from its own floor or from a lower one.
FLOORS = (
    ("kernels",),
    ("_numbers",),
    ("dispatch", "backends"),
    (
        "ops",
        "_batch_norm",
        "_conv_batch_norm",
        "_conv_bn_relu",
        "_convolution",
        "_fold",
        "_fused",
        "_inferred_layer",
        "_inferred_pool",
        "_plain",
        "_trained_layer",
        "_trained_pool",
        "_checks",
        "_gradients",
        "_when_imported",
    ),
    ("layers", "losses", "_block_graph", "_data_config", "_residual"),
    ("models", "weights", "replace"),
    ("engine",),
    ("images", "measure", "train", "features", "fid", "claims", "tf"),
    ("cli", "__main__"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command[:2]))}\n{done.stdout}{done.stderr}"


def package_files() -> list[Path]:
    return [file for file in project_files(".py") if file.parts[0] in ("inception_fast", "kernels")]


def parsed(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), filename=str(file))


def test_ruff_check() -> None:
    run(BIN / "ruff", "check", ".")


def test_ruff_format() -> None:
    run(BIN / "ruff", "format", "--check", ".")


def test_clang_format() -> None:
    files = project_files(*NATIVE)
    assert files
    run(BIN / "clang-format", "--dry-run", "-Werror", *files)


def test_spelling() -> None:
    run(BIN / "typos", "--format", "brief")


@pytest.mark.timeout(600)
def test_types() -> None:
    """mypy over the package as it is installed: links stand for the folders that the build moves."""
    stage = ROOT / "build" / "types"
    package = stage / "inception_fast"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {child.name: child for child in (ROOT / "inception_fast").iterdir()} | {"kernels": ROOT / "kernels"}
    for stale in package.iterdir():
        if stale.name not in wanted:
            stale.unlink()
    for name, target in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(target)
    run(BIN / "mypy", "--config-file", ROOT / "pyproject.toml", "--package", "inception_fast", cwd=stage)


@pytest.mark.parametrize("file", project_files(".py", ".pyi", *NATIVE), ids=str)
def test_length(file: Path) -> None:
    lines = len((ROOT / file).read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines; allowed: {LONGEST_FILE}, aim at 400"


def test_functions_are_short() -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        f"{file}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file in package_files()
        for node in ast.walk(parsed(file))
        if isinstance(node, functions) and node.end_lineno and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long, "\n".join(long)


def home(file: Path) -> str:
    """The top-level module of the package that a file belongs to."""
    return "kernels" if file.parts[0] == "kernels" else Path(file.parts[1]).stem


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level module for every import, at any depth, of something of this package."""
    installed = ("inception_fast", *file.parts) if file.parts[0] == "kernels" else file.parts
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(installed[: -node.level]) if node.level else []
            stem = [*start, *(node.module.split(".") if node.module else [])]
            names = [[*stem, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "inception_fast" and len(name) > 1 and not name[1].startswith("__"):
                yield node.lineno, inception_fast._HOMES.get(name[1], name[1])


@pytest.mark.parametrize("file", [file for file in package_files() if home(file) != "__init__"], ids=str)
def test_imports_run_one_way(file: Path) -> None:
    assert home(file) in FLOOR, f"{home(file)!r} stands on no floor; give it one in FLOORS"
    for line, target in imported(file):
        assert FLOOR[target] <= FLOOR[home(file)], f"{file}:{line} imports {target}, which stands above {home(file)}"


def test_imports_are_seen() -> None:
    """The test above would find what it forbids."""
    assert "measure" in {target for _, target in imported(Path("inception_fast/cli/info.py"))}
    assert "kernels" in {target for _, target in imported(Path("kernels/plan.py"))}
    assert "engine" in {target for _, target in imported(Path("inception_fast/measure/peers.py"))}


def test_only_one_file_registers_operators() -> None:
    """Custom operators, their fakes and their gradients all come from ops.py; the kernels know nothing of them."""
    registering = {str(file) for file in package_files() if "torch.library" in ast.unparse(without_docstrings(file))}
    assert registering == {"inception_fast/ops.py"}


def without_docstrings(file: Path) -> ast.Module:
    tree = parsed(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return tree


def environment_reads() -> Iterator[tuple[Path, str]]:
    """Every environment variable that the package reads or sets, wherever the name is written out."""
    for file in package_files():
        source = ast.unparse(without_docstrings(file))
        for name in re.findall(r"""(?:environ(?:\.\w+\(|\[)|getenv\()['"](\w+)""", source):
            yield file, name
        for name in re.findall(r"""['"](INCEPTION_FAST_\w+)['"]""", source):
            yield file, name
    for file in project_files(*NATIVE):
        for name in re.findall(r'getenv\("(\w+)"', (ROOT / file).read_text()):
            yield file, name


def test_environment_variables_are_few_and_documented() -> None:
    found = dict((name, file) for file, name in environment_reads())
    ours = sorted(name for name in found if name.startswith("INCEPTION_FAST_"))
    readme = (ROOT / "README.md").read_text()
    assert ours == sorted(set(re.findall(r"INCEPTION_FAST_\w+", readme)))
    assert len(ours) <= 5, f"{ours}; allowed: five"
    foreign = {name: str(file) for name, file in found.items() if name not in ours}
    assert foreign.keys() <= WELL_KNOWN_VARIABLES, f"{foreign}; name them in README or leave them alone"


def test_messages_name_extras_that_exist() -> None:
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    allowed = set(re.findall(r"^([a-z]+) = ", declared, flags=re.MULTILINE))
    texts = {file: (ROOT / file).read_text() for file in (*package_files(), Path("README.md"))}
    named = {(extra, file) for file, text in texts.items() for extra in re.findall(r"inception-fast\[(\w+)\]", text)}
    assert named
    assert not [f"{file}: {extra}" for extra, file in named if extra not in allowed]
