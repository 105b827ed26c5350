"""One training step, ours beside torch's: times of interleaved rounds, and the memory that a step needs.

    python benchmarks/training_step.py --out DIR [--model inception_v3 --batch 16 --size 139 --dtype float32,bfloat16]
    python benchmarks/training_step.py --out DIR --resume    takes the formats that DIR holds already

A step is forward, loss, backward and RMSProp's update on a channels_last batch, bfloat16 by autocast. Every runtime is
a process of its own, so that peak memory can be told, and all of them take turns under the project's timer. Each
runtime's loss on the first batch is compared with eager's; gradients are compared layer by layer in the tests, since
those of a fresh network amplify rounding errors in float32 already. Every runtime's process keeps the memory it frees
(`inception_fast.train.keep_freed_memory`), for each is faster so; `--plain-allocator` leaves that out for all alike.
All processes build and compile at once, ahead of the first round. Writes DIR/training.json.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
RUNTIMES = ("inception_fast", "inception_fast+winograd", "eager", "compile")
# Largest relative distance of the first loss from eager's: rounding that 94 layers of a fresh network amplify, a mean
# over the batch of losses near log(1000).
BUDGET = {"float32": 1e-3, "bfloat16": 5e-2}


def build(runtime: str, args: argparse.Namespace, dtype: str) -> tuple[Callable[..., float], Any]:
    """(a step that returns the loss, the model)."""
    import torch
    import torch.nn.functional as F

    import inception_fast as fast
    from inception_fast.train.allocator import keep_freed_memory
    from inception_fast.train.optim import RMSpropTF

    if not args.plain_allocator:
        keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model: Any = fast.create_model(args.model, num_classes=1000, drop_rate=0.0)
    if runtime.startswith("inception_fast"):
        model = fast.replace_layers(model, winograd=runtime.endswith("+winograd"))
    model = model.to(memory_format=torch.channels_last).train()
    called = torch.compile(model) if runtime == "compile" else model
    optimizer = RMSpropTF(model.parameters(), lr=1e-4)
    x = torch.randn(args.batch, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (args.batch,))

    def step(update: bool = True) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(called(x).float(), labels)
        loss.backward()
        if update:
            optimizer.step()
        return float(loss.detach())

    return step, model


def serve(runtime: str, args: argparse.Namespace, dtype: str, pipe: Connection) -> None:
    """A runtime's process: its first loss, then a step for each request, last the peak of its memory."""
    try:
        step, model = build(runtime, args, dtype)
        pipe.send(step(update=False))
        while pipe.recv() == "step":
            pipe.send(step())
        model.zero_grad(set_to_none=True)
        pipe.send(measured_peak(step))
    except Exception as error:  # told to the parent, which lists it
        pipe.send(f"{type(error).__name__}: {error}")


def measured_peak(step: Callable[..., float]) -> int:
    """Most bytes of tensors that lived at once in a step, weights and what was there before it left out."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(update=False)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Peer:
    """A runtime's process, seen from here."""

    def __init__(self, runtime: str, args: argparse.Namespace, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(runtime, args, dtype, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.loss = math.nan

    def wait(self) -> None:
        """Until it is built, compiled and has made its first loss."""
        self.loss = float(self._answer())

    def _answer(self) -> Any:
        answer = self.pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def step(self) -> float:
        self.pipe.send("step")
        return float(self._answer())

    def finish(self) -> int:
        self.pipe.send("end")
        peak = int(self._answer())
        self.process.join()
        return peak


def rounds_of(args: argparse.Namespace) -> Any:
    """The timer's plan; raises SystemExit for lengths that cannot be, before anything is built."""
    from inception_fast.measure.timer import ROUNDS, Plan

    if args.least < 2:
        raise SystemExit(f"--least {args.least}; allowed: 2 rounds and more, of which noise can be told")
    try:
        return Plan(seconds=args.seconds, least=args.least, most=max(ROUNDS, args.least))
    except ValueError as error:
        raise SystemExit(f"--seconds {args.seconds}: {error}") from error


def measure(
    args: argparse.Namespace, dtype: str, peers: dict[str, Peer], on_round: Callable[[float], None]
) -> list[dict[str, Any]]:
    from inception_fast.measure.timer import interleave, noise_floor, sign_test, summarise

    base = peers["eager"].loss
    errors = {name: abs(peer.loss - base) / abs(base) for name, peer in peers.items()}
    samples = interleave({name: peer.step for name, peer in peers.items()}, rounds_of(args), on_round=on_round)
    ours = summarise(samples[RUNTIMES[0]]).median
    rows = []
    for name, peer in peers.items():
        summary = summarise(samples[name])
        p_value = None if name == RUNTIMES[0] else sign_test(samples[RUNTIMES[0]], samples[name])
        rows.append(
            {
                "model": args.model,
                "batch": args.batch,
                "size": args.size,
                "dtype": dtype,
                "keeps_freed_memory": not args.plain_allocator,
                "runtime": name,
                "median_ms": 1e3 * summary.median,
                "iqr_ms": 1e3 * summary.iqr,
                "rounds": summary.count,
                "ratio": summary.median / ours,
                "noise": noise_floor(samples[name]),
                "p_value": p_value,
                "loss_error": errors[name],
                "status": "ok" if errors[name] <= BUDGET[dtype] else "wrong",
                "peak_bytes": peer.finish(),
            }
        )
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="inception_v3")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=139)
    parser.add_argument("--dtype", default=",".join(DTYPES))
    parser.add_argument("--against", default="inception_fast+winograd,eager,compile", help="eager is always among them")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring for each dtype")
    parser.add_argument("--least", type=int, default=9, help="rounds")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--plain-allocator", action="store_true", help="let glibc give freed memory back")
    parser.add_argument("--resume", action="store_true", help="take the formats that OUT holds from a run cut short")
    return parser.parse_args()


def collect(args: argparse.Namespace, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of every format: those that a run cut short has left, and the rest measured."""
    from inception_fast.cli.progress import Meter
    from inception_fast.measure.results import Parts, conditions

    dtypes = args.dtype.split(",")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise SystemExit(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    against = args.against.split(",")
    for name in against:
        if name not in RUNTIMES:
            raise SystemExit(f"--against {name!r}; allowed: {', '.join(RUNTIMES)}")
    rounds_of(args)
    runtimes = [name for name in RUNTIMES if name in ("inception_fast", "eager", *against)]
    asked = {key: value for key, value in vars(args).items() if key not in ("out", "dtype", "resume")}
    parts = Parts(args.out / "parts", conditions(origin) | asked, args.resume)
    held = {dtype: parts.load(dtype) for dtype in dtypes}
    waiting = {
        dtype: {name: Peer(name, args, dtype) for name in runtimes if dtype == "float32" or "+winograd" not in name}
        for dtype in dtypes
        if not held[dtype]
    }
    with Meter(len(waiting)) as meter:
        for dtype, peers in waiting.items():
            for runtime, peer in peers.items():
                meter.stage(f"building {runtime}, {dtype}")
                peer.wait()
        for dtype, peers in waiting.items():
            meter.stage(f"measuring {dtype}: {', '.join(peers)}")
            held[dtype] = measure(args, dtype, peers, meter.done)
            parts.save(dtype, held[dtype])
            meter.next()
    return [row for dtype in dtypes for row in held[dtype]]


def main() -> int:
    from inception_fast.measure.machine import cores, provenance
    from inception_fast.measure.results import write_json

    args = arguments()
    args.threads = args.threads or cores()
    command = " ".join(["python benchmarks/training_step.py", *sys.argv[1:]])
    origin = provenance(args.threads, sys.argv[1:]) | {"command": command}
    rows = collect(args, origin)
    print(f"{'runtime':24}{'dtype':10}{'median ms':>11}{'IQR':>8}{'ratio':>8}{'peak MB':>9}{'loss off':>10}")
    for row in rows:
        print(
            f"{row['runtime']:24}{row['dtype']:10}{row['median_ms']:11.1f}{row['iqr_ms']:8.1f}{row['ratio']:8.3f}"
            f"{row['peak_bytes'] / 1e6:9.1f}{row['loss_error']:10.1e}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "training.json", {"rows": rows, "provenance": origin})
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
