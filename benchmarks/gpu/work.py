"""One job of the measuring queue: `python work.py NAME RESULT` writes {"status", "rows" or "note", ...} to RESULT.

A long job writes what it has after each part, as failed, so that its rows outlive its end.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import natives
import provenance
import turns
from commands import Result, ran
from each import each
from natives import build
from store import FAILED, OK, UNAVAILABLE, beside, read_results

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# The project's own settings name plugins that the machine may lack. -P: the checkout's inception_fast, which has no
# kernels in it, must not come before the linked package.
PYTEST = [
    sys.executable,
    "-P",
    "-m",
    "pytest",
    "-v",
    "--tb=short",
    "-c",
    "benchmarks/gpu/pytest.ini",
    "--rootdir",
    ".",
    "-p",
    "no:cacheprovider",
    "-o",
    "faulthandler_timeout=120",
]
HOPPER_TESTS = "hopper_device"
# Of what is newest.
FEW_HOPPER = "two_destinations or still_stored or a_maximum_behind or (behind and (1x7 or 1x1 or 3x3s2 or 8x8))"
# Seconds that a test may take: at a barrier that nobody reaches a Hopper kernel traps after 4; Triton's tests compile,
# beside other jobs that compile.
PATIENCE, COMPILING = 40.0, 150.0
SANITIZED = ("test_conv.py", "test_pair.py", "test_pool.py", "test_pool_tiles.py", "test_norm.py")
# A few of them that reach each kernel: a sanitizer takes ten times as long, and starts slowly.
FEW = (
    "scatter or splits_sum or stem_reads or one_launch or what_tma_cannot or behind_a_1x1 or lrn or normalize "
    "or statistics_are or large_mean or two_destinations or nan_reaches"
)

# The tests ask torch for deterministic algorithms, for which cuBLAS wants this.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

Report = Callable[[Sequence[dict[str, Any]]], None]


def machine() -> Result:
    """GPU, driver, clocks, versions, commit."""
    about, problem = provenance.machine()
    return {"status": FAILED, "note": problem} if problem else {"status": OK, "machine": about}


def exact(name: str, extent: str = "", *, report: Report) -> Result:
    """The tests that the interpreter runs elsewhere, compiled and on the device, a row each; "few": of the CUDA kernels
    those that reach what is newest.
    """
    why = no_hopper() if name == HOPPER_TESTS else ""
    if why:
        return {"status": UNAVAILABLE, "note": why}
    hopper = name == HOPPER_TESTS
    command = [*PYTEST, f"tests/interpreted/test_{name}.py", *(["--forms"] if hopper else [])]
    command += ["-k", FEW_HOPPER] if extent == "few" else []
    rows: list[dict[str, Any]] = []
    for rows in each(command, DETERMINISTIC, PATIENCE if hopper else COMPILING):
        report(rows)
    return judged(rows)


def judged(rows: Sequence[dict[str, Any]]) -> Result:
    """ok where tests passed and none did anything else but skip with a reason."""
    counts = collections.Counter(row["status"] for row in rows)
    wrong = [row for row in rows if row["status"] not in ("ok", "skipped")]
    note = ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "no test ran"
    note += "".join(f"; {row['test'].split('::')[-1]}: {row.get('note', '')[-300:]}" for row in wrong[:1])
    return {"status": OK if counts["ok"] and not wrong else FAILED, "rows": list(rows), "note": note}


def sanitizer(tool: str, extent: str = "") -> Result:
    """The same tests, or a few of them, under one of compute-sanitizer's tools, each allocation on its own."""
    names = (*SANITIZED, *(() if no_hopper() else (f"test_{HOPPER_TESTS}.py",)))
    files = [f"tests/interpreted/{name}" for name in names]
    chosen = ["-k", FEW] if extent == "few" else []
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, "-x", *chosen, *files]
    result = ran(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **DETERMINISTIC)
    complaints = [line for line in result.get("log", "").splitlines() if line.startswith("=========")]
    return result | ({"note": "; ".join(complaints[:4])[:400]} if complaints else {})


def no_hopper() -> str:
    """Why the CUDA kernels cannot run here, by what is built and what the driver says; empty when they can."""
    from inception_fast.kernels import cuda

    return cuda.missing() or cuda.driver.refusal(cuda.driver.capabilities())


def hopper(batch: str, dtype: str, *, report: Report) -> Result:
    """Every cut of every layer beside cuDNN and Triton."""
    why = no_hopper()
    if why:
        return {"status": UNAVAILABLE, "note": why}
    from hopper import layer_rows
    from trusted import only

    forms = right()
    if forms is not None and not forms:
        return {"status": FAILED, "note": "no form of the kernels came out right"}
    with only(forms):
        return timed(layer_rows(int(batch), dtype), report, ("cudnn",))


def right() -> set[str] | None:
    """The forms of the Hopper kernels that the device's tests, all or a few, found right; None where none ran."""
    from trusted import right_forms

    found = read_results(earlier)
    names = [name for name in (f"exact/{HOPPER_TESTS}", f"exact/{HOPPER_TESTS}/few") if name in found]
    return right_forms([row for name in names for row in found[name].get("rows", [])]) if names else None


def probe(name: str) -> Result:
    """What the design of the CUDA kernels stands on."""
    why = no_hopper()
    if why:
        return {"status": UNAVAILABLE, "note": why}
    from hopper import probe_rows
    from rates import compiled, rate_rows

    build = ROOT / "build" / "gpu" / name
    rows = rate_rows(compiled(build / "rates.so")) if name == "rates" else probe_rows(build)
    return {"status": OK, "rows": list(rows)}


def marks(batch: str, dtype: str, *, report: Report) -> Result:
    """Where the cycles of a block go, by the kernels built with marks."""
    why = no_hopper()
    if why:
        return {"status": UNAVAILABLE, "note": why}
    file = natives.with_marks()
    if isinstance(file, dict):
        return file
    from marks import library_of, mark_rows

    return timed(mark_rows(library_of(file), int(batch), dtype), report)


def tails(batch: str, dtype: str, *, report: Report) -> Result:
    """The last images of a convolution in a launch of their own."""
    why = no_hopper()
    if why:
        return {"status": UNAVAILABLE, "note": why}
    from tails import tail_rows
    from trusted import only

    with only(right()):
        return timed(tail_rows(int(batch), dtype), report)


def pitches(batch: str, dtype: str, *, report: Report) -> Result:
    """Convolutions of maps whose pixels begin with a line of memory, and of dense ones."""
    why = no_hopper()
    if why:
        return {"status": UNAVAILABLE, "note": why}
    from pitches import pitch_rows
    from trusted import only

    with only(right()):
        return timed(pitch_rows(int(batch), dtype), report)


def layers(batch: str, dtype: str, *, report: Report) -> Result:
    from measure import layer_rows

    return timed(layer_rows(int(batch), dtype), report)


def network(model: str, batch: str, dtype: str, tiles: str = "", *, report: Report) -> Result:
    """As it ships, or with the tiles that jobs before measured."""
    import cuts
    from networks import network_rows
    from tiles import known, measured
    from trusted import only

    rows, chosen, forms = measured(earlier) if tiles else [], cuts.measured(earlier) if tiles else [], right()
    if tiles and not rows and not chosen:
        return {"status": FAILED, "note": "no tiles have been measured"}
    with known(rows), cuts.known(chosen), only(forms):
        return timed(network_rows(model, int(batch), dtype, len(rows), bool(forms)), report)


def walk(model: str, batch: str, dtype: str, *, report: Report) -> Result:
    """The network as one kernel, beside a launch for each step."""
    why = no_hopper()
    if why:
        return {"status": UNAVAILABLE, "note": why}
    from walks import walk_rows

    return timed(walk_rows(model, int(batch), dtype), report)


def profile(model: str, batch: str, dtype: str, tiles: str = "") -> Result:
    """Each layer of the network as it ships, or with what jobs before measured in the user's cache, alone and in order,
    and its share of what this GPU reaches.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = {"HOME": keep(Path(folder) / "home")} if tiles else {}
        asked = ["--device", "cuda", "--batch", batch, "--dtype", dtype, "--out", folder]
        with turns.alone():
            result = ran([sys.executable, "-P", "-m", "inception_fast", "profile", model, *asked], **home)
        if result["status"] != OK:
            return result
        found = json.loads((Path(folder) / "profile.json").read_text())
    about = {"model": model, "batch": int(batch), "dtype": dtype, "runtime": "ours", "status": OK}
    whole = {key: found[key] for key in ("call_ms", "steps_ms", "peak_share", "peak", "kinds")}
    return result | {"rows": [{**about, **whole}, *({**about, **row} for row in found["rows"])]}


def keep(home: Path) -> str:
    """A home whose caches hold what jobs before measured."""
    import cuts
    import torch
    from inception_fast.kernels.cuda import abi, choices
    from inception_fast.kernels.triton import configs
    from tiles import measured

    with unittest.mock.patch.dict(os.environ, HOME=str(home)):
        gpu, about = torch.cuda.get_device_name(), {"origin": "measured by the jobs before"}
        configs.write(configs.cache_file(gpu), measured(earlier), about)
        choices.write(choices.cache_file(gpu, abi.ABI), cuts.measured(earlier), about)
    return str(home)


def peers(model: str, batch: str, dtype: str, which: str = "peers", *, report: Report) -> Result:
    import cuts
    from networks import peer_rows
    from tiles import known, measured
    from trusted import only

    rows = measured(earlier)
    with known(rows), cuts.known(cuts.measured(earlier)), only(right()):
        return timed(peer_rows(model, int(batch), dtype, len(rows), which), report)


def tiles(model: str, batch: str, dtype: str, part: str = "", *, report: Report) -> Result:
    from tiles import tile_rows
    from trusted import only

    with only(right()):
        return timed(tile_rows(model, int(batch), dtype, part), report)


def steady(model: str, batch: str, dtype: str, *, report: Report) -> Result:
    """Clocks and power of the network in a loop, with what jobs before measured."""
    import cuts
    from steady import steady_rows
    from tiles import known, measured
    from trusted import only

    with known(measured(earlier)), cuts.known(cuts.measured(earlier)), only(right()):
        return timed(steady_rows(model, int(batch), dtype), report)


def training(dtype: str, *, report: Report) -> Result:
    from training_layers import training_rows

    return timed(training_rows(dtype), report)


def tune(layer: str, dtype: str, *, report: Report) -> Result:
    from measure import tuned_rows

    return timed(tuned_rows(layer, dtype), report)


def timed(parts: Iterator[list[dict[str, Any]]], report: Report, peers: Sequence[str] | None = None) -> Result:
    """The last of the parts, each of which is all rows so far. Failed where a row of ours is not right, or there is
    none; the rows that are right count all the same. Of ours are those by `ours`, or with `peers` by all but these, and
    those that name no runtime.
    """
    rows: list[dict[str, Any]] = []
    for rows in parts:
        report(rows)
    about = {"rows": rows, "clocks": provenance.smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")[0]}
    wrong = [row for row in rows if is_wrong(row, peers)]
    if wrong or not rows:
        first = wrong[0] if wrong else {"note": "no row"}
        where = " ".join(str(first[key]) for key in ("layer", "shape") if key in first)
        note = f"{first.get('runtime', 'ours')}: {first.get('note', 'wrong')}"
        return {"status": FAILED, **about, "note": f"{where} by {note}" if where else note}
    return {"status": OK, **about}


def is_wrong(row: dict[str, Any], peers: Sequence[str] | None) -> bool:
    """Whether a row is of ours and not right. Of what there is no kernel for, none had to be."""
    runtime = row.get("runtime")
    mine = runtime in (None, "ours") if peers is None else runtime not in peers
    return mine and row.get("status", OK) not in ((OK,) if runtime == "ours" else (OK, UNAVAILABLE))


def counters(pair: str, form: str) -> Result:
    """What Nsight Compute counts for one call of a pair."""
    from counters import metrics_of

    return metrics_of(f"once/{pair}/{form}", {"pair": pair, "form": form})


def once(pair: str, form: str) -> Result:
    from measure import pair_once

    pair_once(pair, form)
    return {"status": OK}


IN_PARTS = (exact, hopper, layers, marks, network, peers, pitches, steady, tails, tiles, training, tune, walk)
WORK: dict[str, Callable[..., Result]] = {
    f.__name__: f for f in (build, machine, sanitizer, probe, profile, counters, once, *IN_PARTS)
}
earlier = Path(os.devnull)  # the file with the results of the jobs before


def main(argv: Sequence[str]) -> int:
    global earlier
    name, target, *others = argv
    earlier = Path(others[0]) if others else earlier
    kind, *arguments = name.split("/")
    begin, work = time.monotonic(), WORK[kind]

    def write(result: Result) -> None:
        result = {**result, "seconds": round(time.monotonic() - begin, 1)}
        new = beside(Path(target))
        new.write_text(json.dumps(result, allow_nan=False).replace(f"{ROOT}/", ""))  # tracebacks: no paths of a machine
        new.replace(target)

    def report(rows: Sequence[dict[str, Any]]) -> None:
        write({"status": FAILED, "rows": list(rows), "note": "ended before it was done"})

    if target != os.devnull:
        end_with_parent()
        if work is not build:
            turns.join()
    result = work(*arguments, report=report) if work in IN_PARTS else work(*arguments)
    if target != os.devnull:
        write(result)
    return 0


def end_with_parent(seconds: float = 1.0) -> None:
    """Nobody else ends this job, and what it started, once the queue was killed; and it holds the GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os.killpg(0, signal.SIGKILL)

    if os.getpgrp() == os.getpid():  # a group of its own
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
