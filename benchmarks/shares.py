"""How evenly the threads of a CPU plan share its steps, on more threads than this machine has cores.

    python benchmarks/shares.py --out bench-results

Every thread notes for how long the system gave it a core in each step. Where every thread has a core of its own, a step
takes as long as its busiest thread; so `critical_ms`, the sum of these over the steps, is a lower bound of what a call
would take there. What it leaves out: waiting for each other at the end of a step, and caches and memory that many cores
share. `speedup` is the time of one thread over it. Writes DIR/shares.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import ALIGNMENT, Plan

import inception_fast as fast
from inception_fast.measure.compare import clouds
from inception_fast.measure.machine import provenance
from inception_fast.measure.results import write_json

CASES = tuple(product(("float32", "bfloat16"), (False, True)))
SIZES = {"inception_v1": 224, "inception_v2": 224, "inception_resnet_v1": 160}


class Call:
    """One plan with memory of its own, whose threads note what they computed."""

    def __init__(self, plan: Plan, x: torch.Tensor) -> None:
        self.compiled, self.x = cpu.compile(plan), x
        outputs = sorted((b for b in plan.buffers if b.kind == "output"), key=lambda b: b.position)
        self.outputs = [torch.empty(b.bytes, dtype=torch.uint8) for b in outputs]
        self.arena = torch.empty(plan.arena_bytes + ALIGNMENT, dtype=torch.uint8)

    def shares(self, threads: int) -> np.ndarray:
        """Seconds, [threads, steps]."""
        n, c, h, w = self.x.stride()
        arena = -(-self.arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        pointers = [output.data_ptr() for output in self.outputs]
        return np.array(
            self.compiled.run_shares([(self.x.data_ptr(), "float32", (n, c, h, w))], pointers, arena, threads)
        )

    def least(self, threads: int, calls: int, seconds: float) -> np.ndarray:
        """A thread's shortest share of each step, of so many calls and seconds: others slow a machine for a while."""
        found, start, left = self.shares(threads), time.monotonic(), calls - 1
        while left > 0 or time.monotonic() - start < seconds:
            found, left = np.minimum(found, self.shares(threads)), left - 1
        return found


def rows_of(
    model: str, dtype: str, winograd: bool, batch: int, threads: Sequence[int], calls: int, seconds: float
) -> Iterator[Any]:
    """A row for each number of threads."""
    side = SIZES.get(model, 299)
    x = clouds(torch.empty(1, 3, side, side), batch)
    net, counts = fast.create_model(model).eval(), sorted({1, *threads})
    least: dict[int, np.ndarray] = {}
    for count in (*counts, 1):  # the one that all are compared with at the end too: a machine may change its pace
        torch.set_num_threads(count)
        (plan,) = fast.optimize(net, x, dtype=getattr(torch, dtype), winograd=winograd).native_plans()
        images = plan.inputs[0][0]  # of as many at a time as there are
        call = Call(plan, x[:images])
        call.shares(count)
        found = batch / images * call.least(count, calls, seconds)
        least[count] = np.minimum(least.get(count, found), found)
    for count in counts:
        critical, work = least[count].max(axis=0).sum(), least[count].sum()
        yield {
            "model": model,
            "batch": batch,
            "dtype": dtype,
            "winograd": winograd,
            "shared_by": count,
            "critical_ms": 1e3 * critical,
            "work_ms": 1e3 * work,
            "balance": work / count / critical,
            "speedup": least[1].sum() / critical,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("models", nargs="*", default=["inception_v3", "inception_v1"], metavar="MODEL")
    parser.add_argument("--batch", default="1,4,16", metavar="N,...", help="images (default 1,4,16)")
    parser.add_argument("--threads", default="2,4,8,16,32", metavar="N,...", help="(default 2,4,8,16,32)")
    parser.add_argument("--calls", type=int, default=7, metavar="N", help="for each row (default 7)")
    parser.add_argument("--seconds", type=float, default=0.8, metavar="S", help="at least, for each row (default 0.8)")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="for shares.json")
    args = parser.parse_args(arguments)
    batches, threads = ([int(word) for word in text.split(",")] for text in (args.batch, args.threads))
    if min(*batches, *threads, args.calls) < 1:
        parser.error(f"--batch {args.batch} --threads {args.threads} --calls {args.calls}; allowed: 1 and more")
    args.out.mkdir(parents=True, exist_ok=True)
    own = torch.get_num_threads()
    origin = provenance(own, []) | {"command": " ".join(["python benchmarks/shares.py", *sys.argv[1:]])}
    rows: list[dict[str, Any]] = []
    cases = [c for c in product(args.models, CASES, batches) if c[2] == 1 or not c[1][1]]
    for number, (model, (dtype, winograd), batch) in enumerate(cases, 1):
        for row in rows_of(model, dtype, winograd, batch, threads, args.calls, args.seconds):
            rows.append(row)
            print(f"{number}/{len(cases)} {told(row)}", flush=True)
            write_json(args.out / "shares.json", {"provenance": origin, "tier": cpu.default_tier(), "rows": rows})
    torch.set_num_threads(own)
    print(f"written: {args.out / 'shares.json'}")
    return 0


def told(row: dict[str, Any]) -> str:
    how = f"{row['dtype']}{', Winograd' if row['winograd'] else ''}, {row['batch']} images"
    return (
        f"{row['model']}, {how}, {row['shared_by']} threads: {row['critical_ms']:.2f} ms, "
        f"{row['speedup']:.1f} times as fast as one, balance {row['balance']:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
