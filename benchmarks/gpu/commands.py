"""Commands that jobs of the measuring queue run, and what they make of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from store import FAILED, OK, UNAVAILABLE

ROOT = Path(__file__).resolve().parents[2]
LOG = 6000  # characters of what a failed command printed

Result = dict[str, Any]


def spoken(command: Sequence[str], **environment: str) -> tuple[int, str]:
    """The exit code of a command and what it printed, which is printed here too: it outlives a job that is ended."""
    said: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)


def ran(command: Sequence[str], **environment: str) -> Result:
    """ok, or failed with the end of what the command printed; unavailable where there is no such command."""
    if shutil.which(command[0]) is None:
        return {"status": UNAVAILABLE, "note": f"no {command[0]} here"}
    code, said = spoken(command, **environment)
    note = said.strip().splitlines()[-1] if said.strip() else ""
    return {"status": FAILED if code else OK, "note": note[-400:]} | ({"log": said[-LOG:]} if code else {})
