"""FID between two sets of images, with KID, Inception score, precision and recall on request."""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import OK, CommandError, add_json, integer, note, only_with, print_json, serving
from .features import add_extraction, set_threads, show_unreadable, workers_of
from .progress import Counter

if TYPE_CHECKING:
    from ..fid.sides import Opened

SOURCES = "images (a folder, a list, .tar, .parquet), features from 'inception-fast features', or statistics (.npz)"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help=f"the generated side: {SOURCES}")
    parser.add_argument("b", metavar="B", help="the real side, in the same forms; with --save-stats the file to write")
    parser.add_argument(
        "--weights", metavar="FILE", help="the FID network's, in pytorch-fid's or torch-fidelity's layout"
    )
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of A to B, an .npz")
    parser.add_argument("--kid", action="store_true", help="kernel Inception distance")
    parser.add_argument("--kid-subsets", type=integer(1, 10**6), metavar="N", help="of --kid (default 100)")
    parser.add_argument(
        "--kid-subset-size",
        type=integer(2, 10**6),
        metavar="N",
        help="of --kid (default 1000, or all of the smaller side)",
    )
    parser.add_argument("--is", dest="score", action="store_true", help="Inception score of A")
    parser.add_argument("--is-splits", type=integer(1, 10**6), metavar="N", help="of --is (default 10)")
    parser.add_argument("--prdc", action="store_true", help="precision, recall, density and coverage of A in B")
    parser.add_argument("--neighbours", type=integer(1, 10**6), metavar="K", help="of --prdc (default 5)")
    parser.add_argument(
        "--check-images",
        type=integer(2, 10**6),
        metavar="N",
        help="images a side on which the effect of --dtype and --winograd on FID is measured (default 64)",
    )
    add_extraction(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the scores, or one JSON object `fid a b warnings settings ...` with the scores that were asked for."""
    only_with(args, "--kid", args.kid, kid_subsets=100, kid_subset_size=None)
    only_with(args, "--is", args.score, is_splits=10)
    only_with(args, "--prdc", args.prdc, neighbours=5)
    only_with(args, "--dtype bfloat16 or --winograd", args.dtype != "float32" or args.winograd, check_images=64)
    with serving("fid"):
        set_threads(args)
        if args.save_stats:
            return _save(args)
        report = _compare(args)
        _check_finite(report)
    if args.json:
        print_json(report)
    else:
        _show(report)
    return OK


@cache
def _extractor(weights: str | None, dtype: str, preprocessing: str | None, device: str, winograd: bool) -> Any:
    import torch

    from ..features.extractors import FidExtractor

    if weights is None:
        raise CommandError("--weights is needed for images and for --is; name the weight file of the FID network")
    held = None if dtype == "float32" else getattr(torch, dtype)
    return FidExtractor(weights, held, preprocessing or "tensorflow", device, winograd=winograd)


def _made(args: argparse.Namespace, exact: bool = False) -> Any:
    dtype, winograd = ("float32", False) if exact else (args.dtype, args.winograd)
    return _extractor(args.weights, dtype, args.preprocessing, args.device, winograd)


def _plan(args: argparse.Namespace, counter: Counter) -> Any:
    from ..fid.sides import Plan

    def start(name: str, total: int) -> None:
        counter.text = Path(name).name
        counter.start(0, total)

    options = {"batch_size": args.batch_size, "workers": workers_of(args), "unreadable": args.unreadable}
    rows = args.kid or args.score or args.prdc
    return Plan(lambda: _made(args), rows, options, on_start=start, on_batch=counter.add)


def _save(args: argparse.Namespace) -> int:
    from ..fid import write_statistics

    if not args.b.endswith(".npz"):
        raise CommandError(f"--save-stats writes {args.b}; allowed: a name that ends in .npz")
    if args.kid or args.score or args.prdc:
        raise CommandError("--save-stats with --kid, --is or --prdc; allowed: one or the other")
    if Path(args.b).is_dir():
        raise CommandError(f"--save-stats writes {args.b}, a folder; allowed: a file name")
    if not Path(args.b).parent.is_dir():
        raise CommandError(f"no folder {Path(args.b).parent} to write {Path(args.b).name} to")
    try:
        tempfile.TemporaryFile(dir=Path(args.b).parent).close()
    except OSError as error:
        raise CommandError(f"{args.b} cannot be written ({error.strerror}); name another folder") from error
    with Counter("") as counter:
        plan = _plan(args, counter)
        side = plan.side(plan.open(args.a))
    write_statistics(args.b, side.gaussian)
    show_unreadable(side.unreadable)
    if args.json:
        print_json({"out": args.b, **side.about()})
    else:
        print(f"statistics of {side.gaussian.count} images in {args.b}")
    return OK


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    from ..fid import frechet_distance
    from ..fid.sides import arithmetic, check_comparable

    with Counter("") as counter:
        plan = _plan(args, counter)
        other = replace(plan, keep_rows=args.kid or args.prdc)  # the Inception score is of A alone
        opened = plan.open(args.a), other.open(args.b)
        _check_request(args, *opened)
        _check_pair(args, *opened)
        a, b = plan.side(opened[0]), other.side(opened[1])
    for side in (a, b):
        show_unreadable(side.unreadable)
    warnings = check_comparable(a, b)
    others = _others(args, a, b, warnings)
    report: dict[str, Any] = {"fid": frechet_distance(a.gaussian, b.gaussian), **others}
    if (used := arithmetic({"dtype": args.dtype, "winograd": args.winograd})) != "float32" and (a.images or b.images):
        report[used] = _effect(args, a, b)
    for warning in warnings:
        note(f"warning: {warning}")
    return {
        **report,
        "a": a.about(),
        "b": b.about(),
        "warnings": warnings,
        "settings": a.settings or b.settings,
        **plan.clock.summary(),
    }


def _check_request(args: argparse.Namespace, a: Opened, b: Opened) -> None:
    """Raises ValueError for scores that the sides cannot have, before features are computed."""
    from ..fid.kernel_distance import check_subset_size
    from ..fid.neighbours import check_neighbours
    from ..fid.score import NEEDED, check_splits

    if args.score and a.settings is not None and a.settings.get("form") != "fid":
        seen = f"{a.name} holds features of {a.settings.get('model')}"
        raise CommandError(f"{seen}; allowed for the Inception score: {NEEDED}")
    if args.score and a.settings is not None and a.source is None:
        held, given = a.settings.get("weights"), _made(args).settings["weights"]
        if held != given:
            raise CommandError(
                f"{a.name} holds features of weights {held!r} and --weights has {given!r}; allowed for the Inception "
                "score: the same"
            )
    if args.score and a.count is not None:
        check_splits(args.is_splits, a.count)
    if args.score and _made(args).features.classifier_weight is None:
        raise CommandError(
            f"--weights {args.weights} has no classifier; allowed for the Inception score: weights with it"
        )
    if a.count is None or b.count is None:
        return
    least = min(a.count, b.count)
    if args.kid and args.kid_subset_size:
        check_subset_size(args.kid_subset_size, least)
    if args.prdc:
        check_neighbours(args.neighbours, least)


def _check_pair(args: argparse.Namespace, a: Opened, b: Opened) -> None:
    """Raises ValueError for images beside features or statistics of another network, before their features are made."""
    from ..fid.sides import check_settings

    if (a.source is None) == (b.source is None):
        return
    extractor = _made(args)
    check_settings(*(side if side.source is None else replace(side, settings=extractor.settings) for side in (a, b)))
    for side in (a, b):
        if side.statistics is not None and len(side.statistics.mean) != extractor.width:
            seen = f"{side.name} holds statistics of {len(side.statistics.mean)} features"
            raise CommandError(f"{seen}; allowed beside images: {extractor.width}")


def _check_finite(report: dict[str, Any]) -> None:
    for key, value in report.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CommandError(f"fid: {key} is {value}; allowed: features and statistics of which it is a number")


def _others(args: argparse.Namespace, a: Any, b: Any, warnings: list[str]) -> dict[str, Any]:
    from ..fid import inception_score, kernel_inception_distance, precision_recall_density_coverage

    found: dict[str, Any] = {}
    if args.kid:
        size = args.kid_subset_size or min(1000, len(a.rows), len(b.rows))
        if args.kid_subset_size is None and size < 1000:
            warnings.append(f"KID on subsets of {size} images, all of the smaller side; 1000 are usual")
        kid = kernel_inception_distance(a.rows, b.rows, subsets=args.kid_subsets, subset_size=size)
        found |= {"kid_mean": kid.mean, "kid_std": kid.std, "kid_subset_size": size}
    if args.score:
        score = inception_score(a.rows, _made(args).features.classifier_weight, splits=args.is_splits)
        found |= {"is_mean": score.mean, "is_std": score.std}
    if args.prdc:
        found |= precision_recall_density_coverage(a.rows, b.rows, neighbours=args.neighbours)._asdict()
    return found


def _effect(args: argparse.Namespace, a: Any, b: Any) -> dict[str, Any]:
    from ..fid.sides import effect_of_arithmetic

    options = {"batch_size": args.batch_size, "workers": workers_of(args)}
    return effect_of_arithmetic(a, b, _made(args), _made(args, exact=True), args.check_images, **options)


def _show(report: dict[str, Any]) -> None:
    print(f"FID        {report['fid']:.6g}")
    if "kid_mean" in report:
        print(f"KID        {report['kid_mean']:.6g} +- {report['kid_std']:.3g}, subsets of {report['kid_subset_size']}")
    if "is_mean" in report:
        print(f"IS         {report['is_mean']:.6g} +- {report['is_std']:.3g}")
    for key in ("precision", "recall", "density", "coverage"):
        if key in report:
            print(f"{key:<10} {report[key]:.6g}")
    for name in ("bfloat16", "float32+winograd", "bfloat16+winograd"):
        if name in report:
            effect = report[name]
            print(
                f"{name:<10} moves FID by {effect['shift']:+.3g}, from {effect['fid_float32']:.6g} in float32, on "
                f"{effect['images']} images; features by {effect['feature_error']:.2g} relative"
            )
    print(f"images     {report['a']['images'] or 'unknown'} and {report['b']['images'] or 'unknown'}")
