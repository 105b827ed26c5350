"""`bench --cpu-suite`: every network in both formats beside its peers, the pairs, the growth of cost, the start."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import note, print_json

if TYPE_CHECKING:
    from ..measure.compare import Row
    from ..measure.timer import Plan
    from .progress import Meter

LARGE = ("inception_v3", "inception_v4", "inception_resnet_v2")
SMALL = ("inception_v1", "inception_v2", "inception_resnet_v1")
DTYPES = ("float32", "bfloat16")
STUDIED = "inception_v3"  # whose cost is followed as the work grows

Networks = Callable[[str, list[int], list[str], "Meter"], "tuple[dict[str, int], list[Row]]"]


AGAINST = ("onnxruntime", "openvino")  # the fastest peers; the others by --against, at a minute or two a network
# How long to time: of a pair; of ours at one size, without a rival; of many images, too long to notice what ran before.
SHORT: dict[str, Any] = {"seconds": 0.5, "least": 9, "most": 50}
ALONE: dict[str, Any] = {"seconds": 0.4, "least": 3, "most": 15, "warmup": 1, "settle": 0}
SLOW: dict[str, Any] = {"seconds": 5.0, "warmup": 1, "settle": 0}


def plan_of(args: argparse.Namespace, batch: int, plan: Plan) -> Plan:
    """`plan` where its length was asked for; else one that keeps the whole suite within twelve minutes on two cores."""
    from ..measure.timer import CALM, WARM, Plan

    if _asked(args):
        return plan
    return Plan(**(SLOW if batch > 1 else {"seconds": SLOW["seconds"]}), calm=CALM, warm=WARM)


def _asked(args: argparse.Namespace) -> bool:
    return bool(args.quick or args.repeats or args.seconds)


def run(args: argparse.Namespace, networks: Networks, threads: int, rounds: Plan, folder: Path) -> dict[str, Any]:
    """All parts; `networks` compares one model at some batch sizes and formats. Writes cpu-suite.json and its plots.

    A part that is done lies in FOLDER/parts and is not measured again with --resume.
    """
    from ..kernels import cpu
    from ..measure.machine import provenance
    from ..measure.results import Parts, conditions, write_json
    from .progress import Meter

    names = args.models or [*LARGE, *SMALL]
    batches = {name: [1] if args.quick or name in SMALL else [1, 16] for name in names}
    origin = provenance(threads, args.argv)
    options = ("quick", "repeats", "seconds", "against", "image", "image_size", "weights", "winograd", "layers")
    asked = {key: getattr(args, key) for key in (*options, "build_limit")}
    parts = Parts(folder / "parts", conditions(origin) | asked | {"models": names}, args.resume)
    document: dict[str, Any] = {"tier": cpu.default_tier(), "peak_gflops": {}, "models": {}, "rows": [], "seconds": {}}
    total = len(names) + 4
    with Meter(len(DTYPES) * sum(map(len, batches.values())) + 4) as meter:

        def part(name: str, measure: Callable[[], Any]) -> Any:
            value = parts.load(name)
            number = len(document["seconds"]) + 1
            meter.stage(f"part {number} of {total}: {name}" + ("" if value is None else ", already measured"))
            if value is None:
                start = time.monotonic()
                value = {"found": measure(), "seconds": None}
                value["seconds"] = time.monotonic() - start
                parts.save(name, value)
            document["seconds"][name] = value["seconds"]
            return value["found"]

        document["peak_gflops"] = part("peak", lambda: _peaks(threads))
        meter.next()
        for name in names:
            held = meter.finished
            work, rows = part(name, lambda name=name: _compared(networks, name, batches[name], meter))  # type: ignore[misc]
            for _ in range(len(DTYPES) * len(batches[name]) - (meter.finished - held)):
                meter.next()  # cases of an earlier run
            document["models"][name] = work
            document["rows"] += [row | _share(row, work, document["peak_gflops"]) for row in rows]
        start: Any = partial(_start, winograd=args.winograd)
        for name, study in (("pairs", _pairs), ("growth", _growth), ("start", start)):
            plan = rounds if _asked(args) else _plan(SHORT if name == "pairs" else ALONE)
            document[name] = part(name, lambda s=study, p=plan: list(s(names, threads, p, args.quick)))  # type: ignore[misc]
            meter.next()
    document["provenance"] = origin
    write_json(folder / "cpu-suite.json", document)
    written = [folder / "cpu-suite.json", *_plots(document, folder)]
    if args.json:
        print_json(document)
    else:
        show(document)
        print("written: " + ", ".join(map(str, written)))
    return document


def _plan(lengths: dict[str, Any]) -> Plan:
    from ..measure.timer import Plan

    return Plan(**lengths)


def _peaks(threads: int) -> dict[str, float]:
    from ..kernels import cpu

    return {dtype: max(cpu.peak_flops(dtype, threads) for _ in range(3)) / 1e9 for dtype in DTYPES}


def _compared(networks: Networks, name: str, batches: list[int], meter: Meter) -> tuple[dict[str, int], list[Any]]:
    work, rows = networks(name, batches, list(DTYPES), meter)
    return work, [row.as_json() for row in rows]


def _share(row: dict[str, Any], work: dict[str, int], peaks: dict[str, float]) -> dict[str, Any]:
    """What part of the peak a network's multiply-adds reach; zero-padding taps count, as in the literature."""
    if row["median_ms"] is None:
        return {"peak_share": None}
    gflops = 2e-6 * work["macs"] * row["batch"] / row["median_ms"]
    return {"peak_share": gflops / peaks[row["dtype"]]}


def _networks(names: list[str]) -> Iterator[Any]:
    import torch

    from .. import create_model

    for name in names:
        torch.manual_seed(0)
        yield create_model(name).eval()


def _pairs(names: list[str], threads: int, rounds: Plan, quick: bool) -> Iterator[dict[str, Any]]:
    from ..measure.cpu_suite import distinct_pairs, resized, time_pair

    found = distinct_pairs(_networks([name for name in names if name in LARGE]))
    for pair, count in sorted(found.items(), key=lambda item: -item[0].flops())[: 2 if quick else None]:
        for dtype in DTYPES:
            for batch in (1, 16):
                yield time_pair(resized(pair, batch, dtype), count, threads, rounds).as_json()


def _growth(names: list[str], threads: int, rounds: Plan, quick: bool) -> Iterator[dict[str, Any]]:
    from ..measure.cpu_suite import BATCHES, SIDES, growth
    from ..measure.timer import WARM

    (model,) = _networks([STUDIED])
    batches, sides = (BATCHES[:1], SIDES[:1]) if quick else (BATCHES, SIDES)
    rounds = rounds if quick else replace(rounds, warm=WARM)
    for dtype in DTYPES:
        yield from growth(model, dtype, sorted({1, threads}), batches, sides, rounds)


def _start(
    names: list[str], threads: int, rounds: Plan, quick: bool, winograd: bool = False
) -> Iterator[dict[str, Any]]:
    from ..measure.cpu_suite import first_call_alone

    for name in names:
        for tiles in (False, True)[: 1 + winograd]:
            for dtype in DTYPES:
                yield {"model": name} | first_call_alone(name, dtype, winograd=tiles, threads=threads)


def show(document: dict[str, Any]) -> None:
    """The tables that bench's own does not print."""
    from ..measure.compare import Row
    from .table import show as show_rows

    fields = Row.__dataclass_fields__
    show_rows(
        [Row(**{k: v for k, v in row.items() if k in fields}) for row in document["rows"]], document["provenance"]
    )
    peaks = ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in document["peak_gflops"].items())
    print(f"\ntier {document['tier']}; peak on registers, GFLOP/s: {peaks}")
    print(
        "\npair, batch, dtype: ours separate / ours fused / oneDNN, microseconds; * the form that plans take, and the"
        " time of that form right after a call of oneDNN's"
    )
    for row in document["pairs"]:
        stars = ("", "*") if row["fused"] else ("*", "")
        print(
            f"  {row['pair']:32s} {row['batch']:3d} {row['dtype']:9s} {row['separate_us']:8.0f}{stars[0]} /"
            f" {row['fused_us']:8.0f}{stars[1]} / {row['onednn_us']:8.0f}; {row['mixed_us']:8.0f}"
        )
    print(
        "\nmodel, dtype (w: Winograd's tiles): seconds to optimise, of them packing; first call; MiB packed, arena,"
        " grown by the first call, by all, and of that pages of files"
    )
    for row in document["start"]:
        keys = ("packed_bytes", "arena_bytes", "first_call_grew_bytes", "grew_bytes", "files_bytes")
        sizes = [row[key] / 2**20 for key in keys]
        print(
            f"  {row['model']:20s} {row['dtype']:9s}{' w'[row['winograd']]} {row['optimize_s']:6.2f}"
            f" {row['packing_s']:6.2f} {row['first_call_s']:6.2f} " + " ".join(f"{size:7.1f}" for size in sizes)
        )


def _plots(document: dict[str, Any], folder: Path) -> list[Path]:
    from ..measure.cpu_plots import plot_growth

    path = folder / "cpu-growth.png"
    try:
        plot_growth(document["growth"], f"{STUDIED}, {document['provenance']['machine']}, {document['tier']}", path)
    except ImportError as error:
        note(f"no plot: matplotlib is not installed ({error}); pip install matplotlib")
        return []
    return [path]
