"""The checkout that the tests run in: where it is, and which files belong to the project."""

from __future__ import annotations

import fnmatch
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def project_files(*suffixes: str, root: Path = ROOT) -> list[Path]:
    """Files tracked by git or about to be, relative to the root, sorted; with `suffixes`, only those that have one.

    In an unpacked archive, which is no repository, and where git is not installed, all that .gitignore leaves.
    """
    listed = _listed_by_git(root) if (root / ".git").exists() else None
    files = sorted(file for file in (_walked(root) if listed is None else listed) if (root / file).is_file())
    return [file for file in files if not suffixes or file.suffix in suffixes]


def _listed_by_git(root: Path) -> list[Path] | None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return None
    return [Path(name) for name in listed.split("\0") if name]


def _walked(root: Path) -> list[Path]:
    ignore = root / ".gitignore"  # an sdist has none
    patterns = ignore.read_text().split() if ignore.exists() else []
    patterns += [".git/", ".venv/", "build/", "__pycache__/", "*.egg-info/", "*.so", ".*_cache/"]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _ignored(f"{name}/", patterns)]
        found += [Path(folder, name).relative_to(root) for name in names if not _ignored(name, patterns)]
    return found


def _ignored(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
