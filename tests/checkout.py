"""The checkout that the tests run in: where it is, and which files belong to the project."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def project_files(*suffixes: str) -> list[Path]:
    """Files tracked by git or about to be, relative to the root, sorted; with `suffixes`, only those that have one."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = sorted(Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file())
    return [file for file in files if not suffixes or file.suffix in suffixes]
