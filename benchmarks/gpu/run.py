"""The measuring queue: everything there is to know about the GPU kernels, on a machine without network, in slices.

    python3 benchmarks/gpu/run.py --out OUT --slice-seconds 400

Runs the jobs of `catalogue.py` in order, each in a process of its own, until the slice is over; a job is started only
when it fits what is left. Run it again with the same --out, or with the result.json of a former slice as --earlier, and
it goes on where it stopped. OUT/result.json, the only file, holds everything so far, with GPU, driver, clocks, versions
and commit; it is whole after each job. On SIGTERM and SIGINT the jobs are ended and what they have is kept; after a
SIGKILL the next run takes that over, or --merge, which runs nothing. Exit codes: 0 all done, 3 jobs are left for
another slice, 2 a wrong call.

To go on from filed results where the kernels have changed since, name what has to run again; as of 2026-11-28:

    R=benchmarks/results/nvidia-h200; F=$R/2026-11-26-gpu
    python3 benchmarks/gpu/run.py --out OUT --slice-seconds 400 --earlier $R/2026-11-28-gpu.json \\
        --earlier $R/2026-11-28-gpu-2.json --earlier $R/2026-11-27-gpu-3.json \\
        --earlier $R/2026-11-27-gpu-2.json --earlier $R/2026-11-27-gpu.json --earlier $F-14.json --earlier $F-13.json \\
        --earlier $F-12.json --earlier $F-10.json --earlier $F-9.json --earlier $F-5.json --earlier $F-4.json \\
        --earlier $F-3.json --earlier $F-2.json --earlier $F.json --again exact/hopper_device --again probe/rates \\
        --again 'walk/*' --again 'network/*' --again 'marks/*' --again 'profile/*' --again 'tiles/*/cuda' \\
        --again 'tiles/*/new'

and each slice after it with --earlier and the result.json of the one before, without --again. The same call with
--dry-run lists what is left in slices of that length.

Compiled kernels of Triton and of torch.compile are kept under build/gpu, for later slices on the same machine. Natives
may come from another: `python benchmarks/gpu/work.py build /dev/null` there, under the same version of Python, and the
two libraries below kernels/ with build/gpu/built.json are taken as they are while their sources stay.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import fnmatch
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import catalogue
from store import (
    ABOUT,
    CUT_OFF,
    FAILED,
    OK,
    Job,
    Store,
    earlier_results,
    grouped,
    plan_slices,
    planned_seconds,
    read_result,
    to_do,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEFT = 3
ALWAYS = ABOUT  # in each slice: machines are fresh
SLICE = 570.0  # seconds: of the ten minutes that machines lend, a reserve for the end
LOG = 6000  # characters of what a failed job printed
BESIDE = 6  # timed jobs at once: each compiles by several cores, and holds a network on the GPU
# What is red is not timed: the exact tests that a kind of job stands on, by their names.
KERNELS = ("conv", "pair", "pool", "gpu_plan")
STANDS_ON = {
    "hopper": (),  # leaves out the forms of its kernels that were wrong by itself
    "layers": ("conv",),
    "marks": (),
    "tails": (),
    "pitches": (),
    "tune": ("conv",),
    "tiles": ("conv",),
    "network": KERNELS,
    "steady": KERNELS,
    "walk": (),  # compares with separate launches itself
    "profile": KERNELS,
    "peers": KERNELS,
    "training": ("conv", "norm"),
    "counters": ("conv", "pair"),
}

Run = Callable[[Job, Store, float], dict[str, Any]]
stopped = threading.Event()  # by a signal: nothing new starts
_groups: set[int] = set()  # of processes that run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument(
        "--earlier", type=Path, action="append", default=[], help="a former slice's result.json; repeatable"
    )
    parser.add_argument(
        "--again",
        action="append",
        default=[],
        help="a pattern of names whose --earlier results do not count; repeatable",
    )
    parser.add_argument("--slice-seconds", type=float, default=SLICE)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="a shell pattern of job names, such as 'network/inception_v3/*'; repeatable",
    )
    parser.add_argument("--red", action="store_true", help="time what failed its exact test too; its rows say `red`")
    parser.add_argument("--merge", action="store_true", help="write the results so far and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="list the slices and run nothing")
    args = parser.parse_args(argv)
    jobs = [job for job in catalogue.jobs() if job.name in ALWAYS or named(job, args.only)]
    for pattern in args.only:
        if not any(named(job, [pattern]) for job in jobs):
            parser.error(f"--only {pattern}: no job of that name; --dry-run without --only lists them")
    with contextlib.ExitStack() as stack:
        try:
            if args.dry_run:
                before = earlier_results(args.earlier, args.again)
                listed([job for job in jobs if job.name in ALWAYS or to_do(before.get(job.name))], args.slice_seconds)
                return 0
            if args.out is None:
                parser.error("--out is needed; --dry-run lists the slices without it")
            stack.enter_context(held(args.out))
            store = Store(args.out, args.earlier, len(jobs), args.again)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return worked(args, jobs, store)


def worked(args: argparse.Namespace, jobs: Sequence[Job], store: Store) -> int:
    """Runs a slice, or merges; the exit code."""
    mark_taken(store)
    if args.merge:
        left = wanted(jobs, store, args.red)
    else:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        left = run_slice(jobs, store, args.slice_seconds, run_job, red=args.red)
    store.write()
    store.tidy()
    print(f"{store.summary()['done']} of {len(jobs)} jobs done, {len(left)} left")
    return LEFT if left else 0


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Inside, no other run has the folder: it would take what jobs here have so far for what a dead one left. Raises
    ValueError where one has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {out}: another run is at work there; allowed: one at a time") from None
        except OSError:  # a file system that locks no folders
            pass
        yield
    finally:
        os.close(folder)


def named(job: Job, patterns: Sequence[str]) -> bool:
    """Whether a job is asked for: by one of the patterns, or without any, where it need not be asked for."""
    return any(fnmatch.fnmatch(job.name, pattern) for pattern in patterns) if patterns else not job.asked


def listed(jobs: Sequence[Job], seconds: float) -> None:
    for number, group in enumerate(plan_slices(jobs, seconds), 1):
        print(f"slice {number}, about {planned_seconds(group):.0f} s")
        for job in group:
            print(f"  {job.name}{f' (with {job.together})' if job.together else ''}")


def stop(number: int, frame: object) -> None:
    """Ends what runs; the slice then writes what that had, and returns."""
    stopped.set()
    for group in tuple(_groups):
        _kill(group)


def run_slice(
    jobs: Sequence[Job], store: Store, seconds: float, run: Run,
    clock: Callable[[], float] = time.monotonic, *, red: bool = False,
) -> list[Job]:  # fmt: skip
    """Runs what is wanted and fits, in order; returns what is left. What is ALWAYS run is run in each slice.

    A failed exact test keeps what stands on it from being timed, unless `red`; rows are marked then.
    """
    end = clock() + seconds
    for group in grouped(jobs):
        mine = group if group[0].name in ALWAYS else wanted(group, store, red)
        mine = [job for job in mine if job.seconds <= end - clock() and not waits(job, store)]
        if stopped.is_set():
            break
        for job, result in results(mine, store, run, lambda job: min(job.limit, end - clock())):
            store.put(job, {**result, "red": True} if blocked(job, store) else result)
            *_, last = ["", *str(result.get("note", "")).strip().splitlines()]
            print(f"{job.name}: {result['status']} {last}"[:200], flush=True)
            if job.name == "build" and result["status"] != OK:
                return wanted(jobs, store, red)
    return wanted(jobs, store, red)


def wanted(jobs: Sequence[Job], store: Store, red: bool) -> list[Job]:
    return [job for job in jobs if store.wants(job) and (red or not blocked(job, store))]


def results(
    jobs: Sequence[Job], store: Store, run: Run, limit: Callable[[Job], float]
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job's result as it comes; several jobs run at once. One that cannot even be started has failed."""

    def attempted(job: Job) -> dict[str, Any]:
        try:
            return run(job, store, limit(job))
        except Exception as error:
            return {"status": FAILED, "note": f"{type(error).__name__}: {error}"[:LOG]}

    if len(jobs) == 1:
        yield jobs[0], attempted(jobs[0])
    elif jobs:
        with concurrent.futures.ThreadPoolExecutor(BESIDE if jobs[0].alone else len(jobs)) as pool:
            futures = {pool.submit(attempted, job): job for job in jobs}
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()


def blocked(job: Job, store: Store) -> bool:
    """Whether the job would time kernels that gave wrong numbers. Those of one kind do not hold up the others."""
    tests = [store.results.get(f"exact/{name}") for name in STANDS_ON.get(job.name.split("/")[0], ())]
    return any(found is not None and found["status"] == FAILED for found in tests)


def mark_taken(store: Store) -> None:
    """What was taken over of jobs that ran all the same says so, as `run_slice` would have."""
    for name in store.taken:
        if blocked(Job(name, 0, 0), store):
            store.results[name]["red"] = True


def waits(job: Job, store: Store) -> bool:
    """Whether the job wants tiles that are not measured: where the longer job did not fit, the shorter comes first. Of
    a job that has failed for good those that came out right are all there will be.
    """
    _, _, whole = job.name.partition("/")
    tiles, _, tuned = whole.rpartition("/")
    found = [store.results.get(f"tiles/{name}", {}) for name in (tiles, f"{tiles}/cuda", f"{tiles}/new")]
    measured = [one["status"] == OK or (one.get("rows") and not to_do(one)) for one in found if one]
    return tuned == "tuned" and not any(measured)


def run_job(job: Job, store: Store, seconds: float) -> dict[str, Any]:
    """The job in a process of its own, which writes its result to a file; a job that hangs or dies has failed, with the
    rows that it had by then, and the end of what it printed.
    """
    target = store.running(job)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    output, ended = finished([sys.executable, str(HERE / "work.py"), job.name, str(target), str(store.file)], seconds)
    result = read_result(target)
    if result["status"] != FAILED:
        return result
    if stopped.is_set():
        return {**result, "note": CUT_OFF, "log": output[-LOG:]}
    if not ended:
        return {**result, "note": f"took longer than {seconds:.0f} s", "log": output[-LOG:]}
    return {"note": output[-LOG:], **result}


def finished(command: Sequence[str], seconds: float) -> tuple[str, bool]:
    """What the command printed, and whether it ended in time; else it is ended, with all that it started."""
    kept = ROOT / "build" / "gpu"
    paths = [str(kept / "package"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment |= {"TRITON_CACHE_DIR": str(kept / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor")}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        _groups.add(process.pid)
        ended = True
        try:
            if stopped.is_set():  # between the look before and the start
                _kill(process.pid)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            _groups.discard(process.pid)
            _kill(process.pid)
            process.wait()
        output.seek(0)
        return output.read(), ended


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
