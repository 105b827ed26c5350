"""Triton's kernels alone: tiles of a network's convolutions, then the network by them beside Inductor with CUDA graphs.

    python3 benchmarks/gpu/alone.py --out OUT [--model M] [--batches 32,128] [--dtype D] [--seconds 150] [--earlier R]

Without the CUDA kernels, neither built nor timed: for a GPU that is lent for minutes. OUT/result.json is whole after
each part and as the queue's, so that `ship.py` takes it and the queue goes on from it, as this does from R.
Exit codes: 0 all done, 1 a part failed or time was up, 2 a wrong call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import work
from run import finished
from store import FAILED, OK, Job, Store, to_do


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", default="inception_v3")
    parser.add_argument("--batches", default="32,128", help="with commas between")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=150, help="when the work is ended")
    parser.add_argument("--earlier", type=Path, action="append", default=[], help="a former run's result.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    batches = [int(n) for n in args.batches.split(",") if n.isdecimal() and int(n)]
    if len(batches) != len(args.batches.split(",")):
        parser.error(f"--batches {args.batches!r}; allowed: numbers from 1 on with commas between")
    if args.inside:
        return measured(Store(args.out), args.model, batches, args.dtype)
    begin = time.monotonic()
    try:
        store = Store(args.out, args.earlier)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    store.put(Job("build", 0, 0), work.build("OFF"))
    if store.results["build"]["status"] != OK:
        return 1
    given = ["--out", str(args.out.resolve()), "--model", args.model, "--batches", args.batches, "--dtype", args.dtype]
    left = max(args.seconds - (time.monotonic() - begin), 1)
    output, ended = finished([sys.executable, str(Path(__file__).resolve()), *given, "--inside"], left)
    print(output if ended else f"{output}\nended after {args.seconds:.0f} s")
    store = Store(args.out)
    done = [store.results.get(name, {}).get("status") == OK for name in parts(args.model, batches, args.dtype)]
    return 0 if all(done) else 1


def parts(model: str, batches: Sequence[int], dtype: str) -> list[str]:
    """The names of the results, in order."""
    names = [f"{model}/{n}/{dtype}" for n in batches]
    return ["machine", *(part for name in names for part in (f"tiles/{name}", f"network/{name}/tuned"))]


def measured(store: Store, model: str, batches: Sequence[int], dtype: str) -> int:
    """Each part's result that is not there yet, kept as it comes; 1 where one failed."""
    from tiles import known, tile_rows
    from tiles import measured as rows_in

    store.put(Job("machine", 0, 0), work.machine())
    for n in batches:
        tiles, network = f"tiles/{model}/{n}/{dtype}", f"network/{model}/{n}/{dtype}/tuned"
        if to_do(store.results.get(tiles)):
            *_, rows = tile_rows(model, n, dtype, cuda=False)
            kept(store, tiles, rows)
        if to_do(store.results.get(network)):
            found = rows_in(store.file)
            with known(found):
                kept(store, network, beside(model, n, dtype, len(found)))
    return int(any(store.results[name]["status"] != OK for name in parts(model, batches, dtype)))


def kept(store: Store, name: str, rows: Sequence[dict[str, Any]]) -> None:
    wrong = [row for row in rows if row.get("status") != OK]
    note = str(wrong[0].get("note", "wrong")) if wrong else ""
    store.put(Job(name, 0, 0), {"status": FAILED if wrong or not rows else OK, "rows": list(rows), "note": note})
    times = ", ".join(f"{row['runtime']} {row['median_ms']:.3f} ms" for row in rows if "median_ms" in row)
    print(f"{name}: {len(rows)} rows; {times or note}", flush=True)


def beside(model: str, n: int, dtype: str, tiles: int) -> list[dict[str, Any]]:
    """Rows of the network by Triton and by Inductor, which does not freeze where that is wrong, after their numbers are
    right.
    """
    import torch
    from networks import checked_calls, network_calls
    from timing import host_seconds, summary

    makers, truth = network_calls(model, n, dtype)
    peer = "graphs" if "graphs" in makers else "unfrozen"
    mine = {"triton": makers.get("triton", makers["ours"]), peer: makers[peer]}
    about = {"model": model, "batch": n, "dtype": dtype, "tiles": tiles}
    rows, calls = checked_calls(mine, about, truth, dtype)
    with torch.no_grad():
        for runtime, seconds in host_seconds(calls).items():
            rows[runtime] |= summary(seconds)
    ours = rows["triton"].get("median_ms")
    for row in rows.values():
        row["ratio"] = row["median_ms"] / ours if ours and "median_ms" in row else None
    return list(rows.values())


if __name__ == "__main__":
    sys.exit(main())
