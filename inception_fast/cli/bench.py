"""Time models beside the installed peers, on real photographs, after proving the outputs equal."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    OK,
    USAGE,
    WRONG,
    CommandError,
    add_json,
    choice,
    comma_list,
    integer,
    note,
    out_folder,
    print_json,
    seconds,
    serving,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..measure.compare import Case, Row
    from ..measure.timer import Plan
    from .progress import Meter

PEERS = ("eager", "compile", "onnxruntime", "openvino")
DTYPES = ("float32", "bfloat16")  # of the plans on a CPU, which is where all of this runs
DEFAULT_OUT = "bench-results"
MOST_PHOTOS = 64


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names from 'inception-fast list'")
    parser.add_argument(
        "--cpu-suite",
        action="store_true",
        help="all about the native kernels: the models (default: all) at batch 1 and 16 in float32 and bfloat16, every "
        "asymmetric pair, the cost as batch, image and threads grow, the first call; writes cpu-suite.json; about ten "
        "minutes on two cores, against onnxruntime and openvino unless --against names others",
    )
    parser.add_argument(
        "--resume", action="store_true", help="with --cpu-suite: take the parts that DIR holds from a run cut short"
    )
    parser.add_argument("--batch", type=comma_list(integer(1, 4096)), metavar="N,...", help="batch sizes (default 1)")
    parser.add_argument(
        "--dtype",
        type=comma_list(choice(DTYPES)),
        metavar="NAME,...",
        help=f"number formats among {', '.join(DTYPES)} (default float32)",
    )
    parser.add_argument(
        "--against",
        type=comma_list(choice((*PEERS, "none"))),
        metavar="NAME,...",
        help=f"peers among {', '.join(PEERS)}, or none (default: all of them; with --quick all but compile)",
    )
    parser.add_argument(
        "--winograd",
        action="store_true",
        help="also our plans with optimize(winograd=True), in rows of their own",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="also the models with replace_layers, called without a plan, in rows of their own",
    )
    parser.add_argument("--image", metavar="PATH", help="an image, or a folder of images (default: two sample photos)")
    parser.add_argument(
        "--out",
        type=out_folder,
        default=DEFAULT_OUT,
        metavar="DIR",
        help=f"where bench.json goes (default {DEFAULT_OUT})",
    )
    parser.add_argument(
        "--weights", metavar="SOURCE", help="a file or hf:<repo> (default: random, calibrated on the photos)"
    )
    parser.add_argument(
        "--image-size", type=integer(32, 2048), metavar="S", help="square input size (default: the model's)"
    )
    parser.add_argument(
        "--threads", type=integer(1, 1024), metavar="N", help="threads of every runtime (default: torch's)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--repeats", type=integer(2, 10000), metavar="N", help="timed rounds of each case")
    length.add_argument("--seconds", type=seconds, metavar="S", help="seconds of timing for each case (default 10)")
    length.add_argument("--quick", action="store_true", help="three rounds: shows that it works, not how fast it is")
    parser.add_argument(
        "--build-limit", type=seconds, default=120.0, metavar="S", help="seconds a peer may take to build (default 120)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compares every case, prints the table, writes bench.json and bench.png. Returns 1 when ours is wrong."""
    from .. import backend_status
    from ..measure.machine import provenance
    from ..measure.results import write_json
    from .progress import Meter

    if not args.models and not args.cpu_suite:
        raise CommandError("no MODEL; name some that 'inception-fast list' prints, or --cpu-suite")
    if args.resume and not args.cpu_suite:
        raise CommandError("--resume goes with --cpu-suite alone; drop it")
    if args.cpu_suite and (args.batch or args.dtype):
        raise CommandError("--cpu-suite has batches and dtypes of its own; drop --batch and --dtype")
    args.batch, args.dtype = args.batch or [1], args.dtype or ["float32"]
    names = _models(args.models)
    with serving("bench"):
        backend_status()  # raises where INCEPTION_FAST_ISA names what this machine cannot run
    peers = _peers(args)
    photos = _photos(args.image)
    folder = _output_folder(args.out)
    _check_subjects(names, args)
    _mind_the_load()
    with _threads(args.threads) as threads:
        if args.cpu_suite:
            return _suite(args, peers, photos, threads, folder)
        rows: list[Row] = []
        work: dict[str, dict[str, int]] = {}
        with Meter(len(names) * len(args.batch) * len(args.dtype)) as meter:
            for name in names:
                meter.stage(f"{name}: building")
                model, images = _subject(name, args, photos)
                work[name] = _work(model, images)
                rows += _cases(name, model, images, args, peers, threads, meter)
        origin = provenance(threads, args.argv)
    document = {
        "provenance": origin | {"images": [photo.name for photo in photos], "weights": args.weights or "random"},
        "models": work,
        "rows": [row.as_json() for row in rows],
    }
    write_json(folder / "bench.json", document)
    written = [folder / "bench.json", *_plot(rows, origin, folder)]
    if args.json:
        print_json(document)
    else:
        from .table import show

        show(rows, origin)
        print("written: " + ", ".join(map(str, written)))
    return _exit_code(rows)


def _suite(args: argparse.Namespace, peers: list[Any], photos: list[Any], threads: int, folder: Path) -> int:
    from ..measure.compare import Row
    from . import cpu_suite

    def networks(name: str, batches: list[int], dtypes: list[str], meter: Meter) -> tuple[dict[str, int], list[Row]]:
        meter.stage(f"{name}: building")
        model, images = _subject(name, args, photos)
        asked = argparse.Namespace(**{**vars(args), "batch": batches, "dtype": dtypes})
        return _work(model, images), _cases(
            name, model, images, asked, peers, threads, meter, lambda batch: cpu_suite.plan_of(args, batch, _plan(args))
        )

    document = cpu_suite.run(args, networks, threads, _plan(args), folder)
    fields = Row.__dataclass_fields__
    return _exit_code([Row(**{k: v for k, v in row.items() if k in fields}) for row in document["rows"]])


def _models(names: list[str]) -> list[str]:
    """The names without repeats; an unknown one is refused now, not after the first models have taken their minutes."""
    from ..models._registry import find_family

    for name in names:
        with serving("bench"):
            find_family(name)
    return list(dict.fromkeys(names))


def _check_subjects(names: list[str], args: argparse.Namespace) -> None:
    """What one of the networks cannot take is refused now too."""
    from ..models._registry import find_family
    from ..weights import resolve
    from .cpu_suite import LARGE, SMALL

    for name in names or (*LARGE, *SMALL):
        least, size = find_family(name).smallest, args.image_size
        if size and size < least:
            allowed = f"{least}x{least} or larger"
            raise CommandError(
                f"{name} cannot take {size}x{size} images (allowed: {allowed}); choose a larger --image-size"
            )
        if args.weights is not None:
            with serving(f"{name}, --weights {args.weights}"):
                resolve(args.weights, name)


def _mind_the_load() -> None:
    from ..measure.machine import cores

    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > cores() / 2:
        note(f"warning: the machine is busy (load {busy:.1f} on {cores()} cores), so the times will be too long")


def _output_folder(text: str) -> Path:
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out {folder} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".bench-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CommandError(f"--out {folder} cannot be written to ({error.strerror}); name another folder") from error
    return folder


def _peers(args: argparse.Namespace) -> list[Any]:
    from ..measure.peers import Layers, OursWinograd, named
    from .cpu_suite import AGAINST

    against = args.against
    if against is None:
        against = list(AGAINST) if args.cpu_suite else [p for p in PEERS if not (args.quick and p == "compile")]
    if "none" in against and len(against) > 1:
        raise CommandError("--against none stands alone; drop none or the other names")
    extra: list[Any] = [OursWinograd()] if args.winograd else []
    extra += [Layers(winograd) for winograd in (False, True)[: 1 + args.winograd]] if args.layers else []
    return [*extra, *named([] if against == ["none"] else against)]


def _photos(path: str | None) -> list[Any]:
    from ..images import ImageError, find_images, load_photo, sample_photos

    try:
        if path is None:
            return sample_photos()
        found = find_images(path)
        if len(found) > MOST_PHOTOS:
            note(f"{path} holds {len(found)} images; using the first {MOST_PHOTOS}")
        photos = [load_photo(file) for file in found[:MOST_PHOTOS]]
    except ImageError as error:
        raise CommandError(str(error)) from error
    for photo in photos:
        for remark in photo.notes:
            note(f"{photo.name}: {remark}")
    return photos


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def _subject(name: str, args: argparse.Namespace, photos: list[Any]) -> tuple[nn.Module, Tensor]:
    """The network in eval mode and the photos as it wants them, [n, 3, h, w]."""
    import torch

    from .. import create_model
    from ..images import check_channels, prepare_batch
    from ..measure.compare import calibrate

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with serving(name if args.weights is None else f"{name}, --weights {args.weights}"):
            model = create_model(name, weights=args.weights).eval()
            config: Any = model.data_config
            check_channels(config)
    if args.image_size:
        config = dataclasses.replace(config, input_size=(config.input_size[0], args.image_size, args.image_size))
    images = prepare_batch((photo.image for photo in photos), config)
    try:
        if args.weights is None:
            calibrate(model, images)
        with torch.inference_mode():
            model(images[:1])
    except (RuntimeError, ValueError) as error:
        size = f"{config.input_size[1]}x{config.input_size[2]}"
        if args.image_size:
            raise CommandError(f"{name} cannot take {size} images ({error}); choose a larger --image-size") from error
        raise
    return model, images


def _work(model: nn.Module, images: Tensor) -> dict[str, int]:
    from ..measure.flops import layers, totals

    macs, params = totals(layers(model, images[:1]))
    return {"macs": macs, "params": params, "image_size": images.shape[-1]}


def _cases(
    name: str,
    model: nn.Module,
    images: Tensor,
    args: argparse.Namespace,
    peers: list[Any],
    threads: int,
    meter: Meter,
    plan: Callable[[int], Plan] | None = None,
) -> list[Row]:
    """Every batch size and format of one network; `plan` says how long to measure at a batch size."""
    from ..measure.compare import Case, Subject, batches, compare, truth

    rows: list[Row] = []
    for batch in args.batch:
        meter.stage(f"{name} batch {batch}: the float64 truth")
        inputs = batches(images, batch)
        subject = Subject(model, inputs, truth(model, inputs))
        for dtype in args.dtype:
            case: Case = Case(name, batch, dtype)
            length = plan(batch) if plan else _plan(args)
            rows += compare(case, subject, peers, threads, length, args.build_limit, meter)
            meter.next()
    return rows


def _plan(args: argparse.Namespace) -> Plan:
    from ..measure.timer import CALM, ROUNDS, WARM, Plan

    if args.quick:
        return Plan(seconds=1.0, least=3, most=3, warmup=1)
    if args.repeats:
        return Plan(least=args.repeats, most=args.repeats, patience=math.inf, calm=CALM, warm=WARM)
    if args.seconds:
        return Plan(seconds=args.seconds, most=ROUNDS, calm=CALM, warm=WARM)
    return Plan(calm=CALM, warm=WARM)


def _plot(rows: list[Row], origin: dict[str, Any], folder: Path) -> list[Path]:
    if not any(row.median_ms is not None for row in rows):
        return []
    from ..measure.plots import plot

    path = folder / "bench.png"
    try:
        plot(rows, f"{origin['machine']}, threads {origin['threads']}, {origin['date'][:10]}", path)
    except ImportError as error:
        note(f"no plot: matplotlib is not installed ({error}); pip install matplotlib")
        return []
    return [path]


def _exit_code(rows: list[Row]) -> int:
    from ..measure.peers import Ours

    ours = [row for row in rows if row.runtime == Ours.name]
    if any(row.status in ("wrong", "failed") for row in ours):
        return WRONG
    if any(row.status == "ok" for row in ours):
        return OK
    print("inception-fast: error: nothing ran; " + "; ".join(dict.fromkeys(r.note for r in ours)), file=sys.stderr)
    return USAGE
