"""What is done and what is next: one file for all results, whole or absent, so that any slice can be the last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, FAILED, UNAVAILABLE = "ok", "failed", "unavailable"
TRIES = 2  # a job that failed is tried once more in a later slice, then left alone
NAME = "result.json"


@dataclass(frozen=True)
class Job:
    """A piece of work that fits a slice. `seconds`: about how long; `limit`: when it is ended."""

    name: str
    seconds: float
    limit: float


class Store:
    """Results in `out`/result.json, one file, for machines that return few. `earlier` are such files of former slices,
    or their folders, whose results count as well.
    """

    def __init__(self, out: Path, earlier: Iterable[Path] = ()) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / NAME
        self.results: dict[str, dict[str, Any]] = _read(self.file) if self.file.exists() else {}
        for path in earlier:
            file = path / NAME if path.is_dir() else path
            found = _read(file) if file.is_file() else {}
            if not found:
                raise ValueError(f"{path} holds no results; allowed: the {NAME} of a former slice, or its folder")
            self.results = {**found, **self.results}

    def get(self, job: Job) -> dict[str, Any] | None:
        """The job's result, or None."""
        return self.results.get(job.name)

    def put(self, job: Job, result: dict[str, Any]) -> None:
        """Raises ValueError for what JSON has no form for, and keeps what there was."""
        kept = {**result, "tries": (self.get(job) or {}).get("tries", 0) + 1}
        json.dumps(kept, allow_nan=False)
        self.results[job.name] = kept
        self.write({})

    def write(self, summary: dict[str, Any]) -> None:
        """The whole file anew, `summary` before the results."""
        beside = self.file.with_name(f".{NAME}.{os.getpid()}")
        beside.write_text(json.dumps({**summary, "results": self.results}, indent=1, allow_nan=False) + "\n")
        beside.replace(self.file)

    def wants(self, job: Job) -> bool:
        """Whether the job has still to run: it has no result, or failed fewer than twice."""
        found = self.get(job)
        return found is None or (found["status"] == FAILED and found.get("tries", 1) < TRIES)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The results of a file; none of a torn one."""
    try:
        found = json.loads(file.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: result for name, result in found.items() if isinstance(result, dict) and "status" in result}


def plan_slices(jobs: Sequence[Job], seconds: float) -> list[list[Job]]:
    """The jobs in order, dealt to slices of `seconds`, each of which starts with the first: machines are fresh.

    Raises ValueError for a job that fits none.
    """
    first, *rest = jobs
    slices, left = [[first]], seconds - first.seconds
    for job in rest:
        if first.seconds + job.seconds > seconds:
            needed = first.seconds + job.seconds
            raise ValueError(
                f"{job.name} takes about {needed:.0f} s with {first.name}; allowed: slices of at least that"
            )
        if job.seconds > left:
            slices.append([first])
            left = seconds - first.seconds
        slices[-1].append(job)
        left -= job.seconds
    return slices
