"""The measuring queue: everything there is to know about the GPU kernels, on a machine without network, in slices.

    python benchmarks/gpu/run.py --out OUT --slice-seconds 540

Runs the jobs of `catalogue.py` in order, each in a process of its own, until the slice is over; a job is started only
when it fits what is left. Run it again with the same --out, or with the result.json of a former slice as --earlier, and
it goes on where it stopped. OUT/result.json, the only file, holds everything so far, with GPU, driver, clocks, versions
and commit. Exit codes: 0 all done, 3 jobs are left for another slice, 2 a wrong call.

Compiled kernels of Triton and of torch.compile are kept under build/gpu, for later slices on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import catalogue
from store import FAILED, OK, Job, Store, plan_slices

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEFT = 3
GATE = "exact/"  # what is red is not timed
HOPPER_GATE = "exact/hopper_device"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument(
        "--earlier", type=Path, action="append", default=[], help="a former slice's result.json; repeatable"
    )
    parser.add_argument("--slice-seconds", type=float, default=540.0)
    parser.add_argument("--only", default="*", help="a shell pattern of job names, such as 'network/inception_v3/*'")
    parser.add_argument("--dry-run", action="store_true", help="list the slices and run nothing")
    args = parser.parse_args(argv)
    jobs = [job for job in catalogue.jobs() if job.name in ("build", "machine") or fnmatch.fnmatch(job.name, args.only)]
    try:
        if args.dry_run:
            listed(jobs, args.slice_seconds)
            return 0
        if args.out is None:
            parser.error("--out is needed; --dry-run lists the slices without it")
        store = Store(args.out, args.earlier)
    except ValueError as error:
        parser.error(str(error))
    left = run_slice(jobs, store, args.slice_seconds, run_job)
    summary = merge(jobs, store)
    store.write(summary)
    print(f"{summary['done']} of {len(jobs)} jobs done, {len(left)} left")
    return LEFT if left else 0


def listed(jobs: Sequence[Job], seconds: float) -> None:
    for number, group in enumerate(plan_slices(jobs, seconds), 1):
        print(f"slice {number}, about {sum(job.seconds for job in group):.0f} s")
        for job in group:
            print(f"  {job.name}")


def run_slice(
    jobs: Sequence[Job], store: Store, seconds: float, run: Callable[[Job, Store, float], dict[str, Any]],
    clock: Callable[[], float] = time.monotonic,
) -> list[Job]:  # fmt: skip
    """Runs what is wanted and fits, in order; returns what is left. Builds anew in each slice: machines are fresh.

    A failed exact test keeps everything that would time the kernels from running.
    """
    end = clock() + seconds
    for job in jobs:
        fresh = job.name == "build"
        if not (fresh or store.wants(job)) or (not fresh and blocked(job, jobs, store)):
            continue
        if job.seconds > end - clock():
            break
        try:
            result = run(job, store, min(job.limit, end - clock()))
        except Exception as error:
            result = {"status": FAILED, "note": f"{type(error).__name__}: {error}"[:2000]}
        store.put(job, result)
        print(f"{job.name}: {result['status']} {result.get('note', '')}"[:200], flush=True)
        if fresh and result["status"] != OK:
            break
    return [job for job in jobs if store.wants(job) and not blocked(job, jobs, store)]


def blocked(job: Job, jobs: Sequence[Job], store: Store) -> bool:
    """Whether the job would time kernels that gave wrong numbers."""
    kind = job.name.split("/")[0]
    if kind not in ("hopper", "layers", "network", "training", "tune", "counters"):
        return False
    mine = kind == "hopper"  # the CUDA kernels have a test of their own, and nobody else waits for it
    gates = [other for other in jobs if other.name.startswith(GATE) and (other.name == HOPPER_GATE) == mine]
    tests = [store.get(other) for other in gates]
    return any(found is not None and found["status"] == FAILED for found in tests)


def run_job(job: Job, store: Store, seconds: float) -> dict[str, Any]:
    """The job in a process of its own, which writes its result to a file; a job that hangs or dies has failed, with the
    rows that it had by then.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / "work.py"), job.name, str(target)]
        output, ended = finished(command, seconds)
        try:
            result: dict[str, Any] = json.loads(target.read_text())
        except (OSError, ValueError):
            result = {"status": FAILED}
        if not ended:
            return {**result, "status": FAILED, "note": f"took longer than {seconds:.0f} s"}
        return result if result["status"] != FAILED else {"note": output[-2000:], **result}


def finished(command: Sequence[str], seconds: float) -> tuple[str, bool]:
    """What the command printed, and whether it ended in time; else it is ended, with all that it started."""
    kept = ROOT / "build" / "gpu"
    paths = [str(kept / "package"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"TRITON_CACHE_DIR": str(kept / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor")}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        ended = True
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return output.read(), ended


def merge(jobs: Sequence[Job], store: Store) -> dict[str, Any]:
    """One document of all results so far; `rows` of all jobs, `status` of each."""
    found = {job.name: store.get(job) for job in jobs}
    rows = [{"job": name, **row} for name, result in found.items() if result for row in result.get("rows", [])]
    status = {name: {k: r[k] for k in ("status", "note", "seconds") if k in r} for name, r in found.items() if r}
    machine = (found.get("machine") or {}).get("machine")
    done = sum(r is not None and r["status"] != FAILED for r in found.values())
    return {"machine": machine, "done": done, "jobs": len(jobs), "status": status, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
