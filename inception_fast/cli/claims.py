"""Measure what the Inception papers claim; one report with plots, stated beside measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import OK, WRONG, CommandError, add_json, comma_list, integer, note, out_folder, print_json, serving

if TYPE_CHECKING:
    from ..claims.row import Row

DEFAULT_OUT = "claims-report"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=out_folder, default=DEFAULT_OUT, metavar="DIR",
        help=f"where claims.json, index.html and the plots go (default {DEFAULT_OUT})",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="few rounds and tiny trainings: one minute, not many")
    parser.add_argument("--only", type=comma_list(str), metavar="STUDY,...", help="some studies alone (default: all)")
    parser.add_argument(
        "--training", action="append", default=[], metavar="DIR",
        help="a result of 'inception-fast compare --experiment NAME' to judge, or a folder of such, in place of a "
        "training here; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="take the studies that DIR holds from a run that was cut short"
    )
    parser.add_argument(
        "--threads", type=integer(1, 1024), metavar="N", help="threads of the kernels (default: torch's)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, writes the report. Returns 1 where an output of ours was wrong, so that it was not timed."""
    from ..claims.study import studies
    from ..claims.training import read_comparisons
    from ..measure.machine import provenance
    from ..measure.results import write_json
    from .bench import _mind_the_load, _output_folder, _threads

    names = args.only or list(studies())
    unknown = [name for name in names if name not in studies()]
    if unknown:
        raise CommandError(f"--only {unknown[0]!r} is not known; allowed: {', '.join(studies())}")
    if args.training and "training" not in names:
        raise CommandError(f"--training with --only {','.join(names)}; allowed: with the study training")
    with serving("--training"):
        trained = {k: v for path in args.training for k, v in read_comparisons(Path(path)).items()}
    _native()
    folder = _output_folder(args.out)
    _mind_the_load()
    with _threads(args.threads) as threads:
        origin = provenance(threads, args.argv)
        sections = _measure(folder, names, args, trained, origin)
    rows = [row for part in sections.values() for row in part]
    pictures = _pictures(rows, folder)
    document = {"provenance": origin, "quick": args.quick, "rows": [row.as_json() for row in rows], "plots": pictures}
    write_json(folder / "claims.json", document)
    _write_page(sections, pictures, folder, origin)
    if args.json:
        print_json(document)
    else:
        _show(rows)
        print(f"written: {folder / 'claims.json'}, {folder / 'index.html'}")
    return WRONG if any("the output is off by" in row.note for row in rows) else OK


def _native() -> None:
    from .. import Unavailable, backend_status

    with serving("claims"):
        status = backend_status()["cpu"]
    if isinstance(status, Unavailable):
        raise CommandError(f"claims times the native kernels, which do not run here: {status.reason}")


def _measure(
    folder: Path, names: list[str], args: argparse.Namespace, trained: dict[str, Any], origin: dict[str, Any]
) -> dict[str, list[Row]]:
    from ..claims.context import Context
    from ..claims.row import Row
    from ..claims.study import run
    from ..measure.results import Parts, conditions
    from .progress import Meter

    shared = conditions(origin) | {"quick": args.quick}
    runs = {"trained": {name: document["runs"] for name, document in trained.items()}}
    with Meter(len(names)) as meter:
        context = Context(folder, args.quick, trained, meter.stage, args.resume, shared)
        sections = {}
        for number, name in enumerate(names, 1):
            parts = Parts(folder / "parts", shared | (runs if name == "training" else {}), args.resume)
            held = parts.load(name)
            meter.stage(f"study {number} of {len(names)}: {name}" + ("" if held is None else ", already measured"))
            sections[name] = run(context, [name]) if held is None else [Row(**row) for row in held]
            parts.save(name, [row.as_json() for row in sections[name]])
            meter.next()
    return sections


def _pictures(rows: list[Row], folder: Path) -> dict[str, str]:
    try:
        from ..claims.figures import draw

        return draw(rows, folder)
    except ImportError as error:
        note(f"no plots: matplotlib is not installed ({error}); pip install 'inception-fast[bench]'")
        return {}


def _write_page(sections: dict[str, list[Row]], pictures: dict[str, str], folder: Path, origin: dict[str, Any]) -> None:
    from ..claims.page import page
    from ..measure.results import write_text

    write_text(folder / "index.html", page(sections, pictures, folder, origin))


def _show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..claims.page import number

    table = Table("claim", "stated", "measured", "unit", "verdict")
    for row in rows:
        table.add_row(row.claim, number(row.stated), number(row.measured), row.unit, row.verdict)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
