"""What is done and what is next: one file for all results, whole or absent, so that any slice can be the last."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, FAILED, UNAVAILABLE = "ok", "failed", "unavailable"
TRIES = 2  # a job that failed is tried once more in a later slice, then left alone
NAME = "result.json"
RUNNING = "running"  # a folder for what jobs have so far, empty and gone when none runs
ABOUT = ("build", "machine")  # jobs that measure nothing
CUT_OFF = "cut off with its slice"


@dataclass(frozen=True)
class Job:
    """A piece of work that fits a slice. `seconds`: about how long; `limit`: when it is ended. Neighbours that are
    `together` run at once; what they measure takes `alone` of that, one after the other. `asked`: only where `--only`
    names it, for it is a part of another.
    """

    name: str
    seconds: float
    limit: float
    together: str = ""
    alone: float = 0.0
    asked: bool = False


class Store:
    """Results in `out`/result.json, one file, for machines that return few, and with a summary at any time. `earlier`
    are such files of former slices, or their folders, whose results count as well, but for those whose names match a
    pattern of `again`; `jobs`: how many there are.

    Of a slice that was cut off in the middle of a job, what that job had by then is taken over.
    """

    def __init__(self, out: Path, earlier: Iterable[Path] = (), jobs: int = 0, again: Sequence[str] = ()) -> None:
        before = earlier_results(earlier, again)
        if is_foreign(out / NAME):
            raise ValueError(f"{out / NAME} is no file of this queue, and stays; allowed: a folder of the queue's own")
        out.mkdir(parents=True, exist_ok=True)
        self.file, self.jobs = out / NAME, jobs
        self.results: dict[str, dict[str, Any]] = {**before, **read_results(self.file)}
        self.taken: list[str] = []  # names of the jobs whose results were taken over
        self._take_over()

    def get(self, job: Job) -> dict[str, Any] | None:
        """The job's result, or None."""
        return self.results.get(job.name)

    def put(self, job: Job, result: dict[str, Any]) -> None:
        """Raises ValueError for what JSON has no form for, and keeps what there was. Of two failures the rows of the
        longer stay, and what the last machine was.
        """
        before = self.get(job) or {}
        kept = {**result, "tries": before.get("tries", 0) + 1}
        if kept["status"] == FAILED and len(before.get("rows", [])) > len(kept.get("rows", [])):
            kept |= {key: before[key] for key in ("rows", "of", "red") if key in before}
        if kept["status"] == FAILED and "machine" in before:
            kept = {**before, **kept}
        json.dumps(kept, allow_nan=False)
        if differ(before.get("machine"), kept.get("machine")):
            self._set_apart(before["machine"])
        self.results[job.name] = kept
        self.write()
        self._forget(self.running(job))

    def write(self) -> None:
        """The whole file anew, its summary before the results."""
        new = self.file.with_name(f".{NAME}.{os.getpid()}")
        new.write_text(json.dumps({**self.summary(), "results": self.results}, indent=1, allow_nan=False) + "\n")
        new.replace(self.file)

    def summary(self) -> dict[str, Any]:
        """`rows` of all jobs, `status` of each, the machine, and how many of all jobs are done."""
        pairs = [(name, r, row) for name, r in self.results.items() for row in r.get("rows", [])]
        rows = [{"job": name, **row, **({"red": True} if r.get("red") else {})} for name, r, row in pairs]
        told = ("status", "note", "seconds", "red", "clocks", "of")
        status = {name: {key: r[key] for key in told if key in r} for name, r in self.results.items()}
        machine = self.results.get("machine", {}).get("machine")
        done = sum(result["status"] != FAILED for result in self.results.values())
        return {"machine": machine, "done": done, "jobs": self.jobs, "status": status, "rows": rows}

    def _set_apart(self, machine: dict[str, Any]) -> None:
        """What was measured on a machine unlike that of this slice says so, like what `earlier` files hold."""
        mine = [name for name, result in self.results.items() if "of" not in result and name not in ABOUT]
        self.results |= {name: {"of": stamp(machine), **self.results[name]} for name in mine}

    def wants(self, job: Job) -> bool:
        """Whether the job has still to run: it has no result, or failed fewer than twice."""
        return to_do(self.get(job))

    def running(self, job: Job) -> Path:
        """Where the job writes what it has so far."""
        return self._folder / f"{job.name.replace('/', '+')}.json"

    @property
    def _folder(self) -> Path:
        return self.file.with_name(RUNNING)

    def _take_over(self) -> None:
        """What jobs wrote whose slice could not."""
        for file in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else ():
            result = read_result(file)
            if result["status"] == FAILED:
                result["note"] = CUT_OFF
            self.taken.append(file.stem.replace("+", "/"))
            self.put(Job(self.taken[-1], 0, 0), result)
        self.tidy()

    def _forget(self, file: Path) -> None:
        for path in (file, beside(file)):
            path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes the folder of what runs; once nothing does, or others would not find it."""
        shutil.rmtree(self._folder, ignore_errors=True)


def to_do(found: dict[str, Any] | None) -> bool:
    """Whether a job with this result has still to run: with none, or failed fewer than twice."""
    return found is None or (found["status"] == FAILED and found.get("tries", 1) < TRIES)


def earlier_results(earlier: Iterable[Path], again: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What files of former slices hold, of a job's results the first, without those that match a pattern of `again`.
    A result keeps `of` which GPU, day and sources it is.

    Raises ValueError for a file without results, and for a pattern that matches none.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in earlier:
        file = path / NAME if path.is_dir() else path
        found = read_results(file)
        if not found:
            raise ValueError(f"{path} holds no results; allowed: the {NAME} of a former slice, or its folder")
        of = stamp(found.get("machine", {}).get("machine") or {})
        results = {**{name: {"of": of, **result} for name, result in found.items()}, **results}
    for pattern in again:
        matching = fnmatch.filter(results, pattern)
        if not matching:
            raise ValueError(f"--again {pattern}: no earlier result of that name; allowed: {', '.join(results)}"[:400])
        for name in matching:
            del results[name]
    return results


def stamp(machine: dict[str, Any]) -> dict[str, Any]:
    """What a result keeps of the machine of another slice."""
    return {key: machine[key] for key in ("name", "date", "sources") if key in machine}


def differ(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether what was measured on two machines is two results."""
    return bool(one and other) and any(one.get(key) != other.get(key) for key in ("name", "driver_version", "sources"))


def beside(file: Path) -> Path:
    """Where a job writes before it renames."""
    return file.with_name(f"{file.name}.new")


def read_result(file: Path) -> dict[str, Any]:
    """What a job wrote of itself; a failure where it wrote nothing, or half."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        found = None
    return found if is_whole(found) else {"status": FAILED}


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The results of a file, those that are whole; none of a torn one, or where there is none."""
    try:
        found = json.loads(file.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: result for name, result in found.items() if is_whole(result)}


def is_foreign(file: Path) -> bool:
    """Whether a file is whole, and not one of results."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return not isinstance(found, dict) or not isinstance(found.get("results"), dict)


def is_whole(result: Any) -> bool:
    """Whether something read is a result, down to its rows, and can be written again: what other programs wrote may
    hold NaN, for which JSON has no form.
    """
    if not isinstance(result, dict) or not isinstance(result.get("status"), str):
        return False
    rows, tries, about = result.get("rows", []), result.get("tries", 1), result.get("machine") or {}
    try:
        json.dumps(result, allow_nan=False)
    except ValueError:
        return False
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return listed and isinstance(tries, int) and isinstance(about, dict)


def grouped(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The jobs in order, neighbours of one name under `together` as one group."""
    group: list[Job] = []
    for job in jobs:
        if group and not (job.together and job.together == group[-1].together):
            yield group
            group = []
        group.append(job)
    if group:
        yield group


def plan_slices(jobs: Sequence[Job], seconds: float) -> list[list[Job]]:
    """The jobs in order, dealt to slices of `seconds`, each of which starts with the first: machines are fresh.

    Raises ValueError for a job that fits none.
    """
    first, *rest = jobs
    slices, left = [[first]], seconds - first.seconds
    for group in grouped(rest):
        needed = group_seconds(group)
        if first.seconds + needed > seconds:
            whole = first.seconds + needed
            raise ValueError(
                f"{group[0].name} takes about {whole:.0f} s with {first.name}; allowed: slices of at least that"
            )
        if needed > left:
            slices.append([first])
            left = seconds - first.seconds
        slices[-1] += group
        left -= needed
    return slices


def group_seconds(group: Sequence[Job]) -> float:
    """About as long as its longest, and what the others measure."""
    longest = max(group, key=lambda job: job.seconds)
    return longest.seconds + sum(job.alone for job in group if job is not longest)


def planned_seconds(jobs: Sequence[Job]) -> float:
    """About how long the jobs take, group by group."""
    return sum(group_seconds(group) for group in grouped(jobs))
