"""What is done and what is next: one JSON file a job, whole or absent, so that any slice can be the last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, FAILED, UNAVAILABLE = "ok", "failed", "unavailable"
TRIES = 2  # a job that failed is tried once more in a later slice, then left alone


@dataclass(frozen=True)
class Job:
    """A piece of work that fits a slice. `seconds`: about how long; `limit`: when it is ended."""

    name: str
    seconds: float
    limit: float

    @property
    def file(self) -> str:
        return self.name.replace("/", "_").replace(":", "-") + ".json"


class Store:
    """Results under `out`/jobs. `earlier` are folders of former slices, whose results count as well."""

    def __init__(self, out: Path, earlier: Iterable[Path] = ()) -> None:
        self.folder = out / "jobs"
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in earlier:
            if not (folder / "jobs").is_dir():
                raise ValueError(f"{folder} holds no results; allowed: the --out folder of a former slice")
            for file in sorted((folder / "jobs").glob("*.json")):
                if not (self.folder / file.name).exists():
                    shutil.copy(file, self.folder / file.name)

    def get(self, job: Job) -> dict[str, Any] | None:
        """The job's result, or None; a torn file is none."""
        file = self.folder / job.file
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "status" in found else None

    def put(self, job: Job, result: dict[str, Any]) -> None:
        before = self.get(job)
        tries = (before or {}).get("tries", 0) + 1
        text = json.dumps({"job": job.name, **result, "tries": tries}, indent=1, allow_nan=False)
        beside = self.folder / f".{job.file}.{os.getpid()}"
        beside.write_text(text + "\n")
        beside.replace(self.folder / job.file)

    def wants(self, job: Job) -> bool:
        """Whether the job has still to run: it has no result, or failed fewer than twice."""
        found = self.get(job)
        return found is None or (found["status"] == FAILED and found.get("tries", 1) < TRIES)


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
