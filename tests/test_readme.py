"""README and docs/ do what they say: their Python runs, their commands work, their links and files are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import inception_fast as fast
from checkout import ROOT

README = (ROOT / "README.md").read_text()
PAGES = {ROOT / "README.md": README} | {page: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
BLOCKS = [
    block
    for text in PAGES.values()
    for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
]
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the examples run in, with a photo and two folders of images as the commands expect."""
    folder = tmp_path_factory.mktemp("readme")
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    for name in ("generated", "real"):
        (folder / name).mkdir()
        for i in range(2):
            Image.fromarray(np.roll(pixels, i + len(name), axis=2) // (i + 1)).save(folder / name / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def python_examples(workplace: Path) -> dict[str, Any]:
    """Runs the Python blocks in order, as one session, in the folder; returns its names."""
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(workplace)
    try:
        for number, block in enumerate(block for kind, block in BLOCKS if kind == "python"):
            exec(compile(block, f"Python block {number + 1} of README and docs", "exec"), names)
    finally:
        os.chdir(before)
    return names


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "text"}


def test_the_python_examples_run(python_examples: dict[str, Any]) -> None:
    assert python_examples["logits"].shape == (2, 10)
    assert torch.allclose(python_examples["logits"], python_examples["model"](python_examples["images"]), atol=1e-4)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_work(command: str, workplace: Path, python_examples: dict[str, Any]) -> None:
    name, *arguments = shlex.split(command)
    if name == "make":
        done = subprocess.run([name, "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
    elif name == "inception-fast":
        module = [sys.executable, "-m", "inception_fast", *arguments]
        done = subprocess.run(module, cwd=workplace, capture_output=True, text=True)
    else:
        assert (name, arguments[0]) == ("pip", "install")
        extras = re.findall(r"\w[\w-]*", arguments[1].strip("."))
        declared = re.findall(r"^(\w[\w-]*) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
        assert set(extras) <= set(declared)
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


LINKING = {
    ROOT / name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
}


@pytest.mark.parametrize("page", [*PAGES, *LINKING], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To files of the checkout, and to headings as GitHub names them."""
    links = re.findall(r"\]\(([^)\s]+)\)", (PAGES | LINKING)[page])
    for link in (link for link in links if not link.startswith("https://")):
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() and target.is_relative_to(ROOT.resolve()), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, link


def test_the_layout_is_the_checkouts() -> None:
    (layout,) = (block for kind, block in BLOCKS if kind == "text")
    for line in layout.splitlines():
        assert (ROOT / line.split()[0]).exists(), line
    for name in re.findall(r"[\w/]+/|\w+\.py", layout.split("inception_fast/", 1)[1].splitlines()[0]):
        assert (ROOT / "inception_fast" / name).exists(), name


def test_the_table_of_models_is_theirs() -> None:
    rows = re.findall(r"^\| `(inception_\w+)` \|[^|]+\| (\d+) \| ([\d,]+) \|", README, flags=re.MULTILINE)
    assert sorted(name for name, *_ in rows) == fast.list_models()
    for name, size, count in rows:
        with torch.device("meta"):
            model = fast.create_model(name)
        assert model.data_config.input_size[1] == int(size), name
        assert sum(p.numel() for p in model.parameters()) == int(count.replace(",", "")), name
