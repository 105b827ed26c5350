"""Registers, spills, shared memory and instruction class of every GPU kernel, compiled here without a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from .common import (
    OK,
    WRONG,
    CommandError,
    add_json,
    choice,
    comma_list,
    integer,
    note,
    only_with,
    print_json,
    serving,
)

ARCHES = ("sm_80", "sm_90a", "sm_100a")
DTYPES = ("bfloat16", "float16", "float32")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="a shell pattern of kernel names, such as 'conv*'"
    )
    parser.add_argument(
        "--arch", type=choice(ARCHES), default="sm_90a", help=f"one of {', '.join(ARCHES)} (default sm_90a)"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 on a spill or a missing tensor-core instruction"
    )
    parser.add_argument("--tune", metavar="MODEL", help="on a GPU: find MODEL's fastest tiles, keep them in the cache")
    parser.add_argument("--batch", type=comma_list(integer(1, 65536)), help="of --tune (default 1,32)")
    parser.add_argument(
        "--dtype", type=choice(DTYPES), help=f"of --tune, one of {', '.join(DTYPES)} (default bfloat16)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """A row a kernel and configuration; spills and missing tensor-core instructions are named on standard error."""
    only_with(args, "--tune", args.tune is not None, batch=[1, 32], dtype="bfloat16")
    if args.tune is not None:
        if args.check or args.pattern is not None:
            raise CommandError(f"--tune {args.tune} with PATTERN or --check; allowed: one or the other")
        return tune(args)
    with serving("kernels"):
        from ..kernels.triton import catalogue

    wanted = [entry for entry in catalogue.entries() if args.arch in entry.arches]
    pattern = args.pattern if args.pattern is not None else "*"
    chosen = [entry for entry in wanted if fnmatch(entry.kernel, pattern)]
    named, built, absent = built_kernels(args.arch, pattern)
    if not chosen and not built:
        names = sorted({entry.kernel for entry in wanted} | set(named))
        why = f" ({absent})" if absent else ""
        raise CommandError(f"no kernel matches {args.pattern!r}{why}; there are {', '.join(names)}")
    if absent:
        note(absent)
    rows, wrong = [], []
    for row, complaint in (*compiled(chosen, args.arch), *listed(built)):
        rows.append(row)
        wrong += [f"{row['kernel']} {row['config']}: {complaint}"] if complaint else []
    if args.json:
        print_json(rows)
    else:
        show(rows)
    for line in wrong:
        note(line)
    return WRONG if wrong and args.check else OK


def tune(args: argparse.Namespace) -> int:
    """Times tiles for every convolution of a model and prints the cache file, or the rows that it gained."""
    from .. import create_model

    with serving(f"--tune {args.tune}"):
        from ..engine.gpu_tune import tune_model

        model: Any = create_model(args.tune).eval()
        shapes = [(batch, *model.data_config.input_size) for batch in args.batch]
        rows = []

        def progress(done: int, count: int, row: Any) -> None:
            note(f"{done}/{count} m={row.m} oc={row.oc} k={row.k}: {row.config}, {row.seconds * 1e6:.1f} us")
            rows.append(row._asdict() | {"config": str(row.config)})

        try:
            file = tune_model(model, shapes, args.dtype, progress)
        except RuntimeError as error:
            raise CommandError(f"--tune {args.tune}: {error}") from error
    print_json(rows) if args.json else print(file)
    return OK


def compiled(entries: list[Any], arch: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each entry's row, and what is wrong with it or nothing."""
    from ..kernels.triton import offline

    for entry in entries:
        named = f"{entry.kernel} {entry.config}"
        with serving(named):
            try:
                found = offline.compile_launch(entry.launch, arch)
            except RuntimeError as error:  # the compiler or its tools
                raise CommandError(f"{named}: {error}") from error
        row = {
            "kernel": entry.kernel,
            "config": entry.config,
            "arch": arch,
            "registers": found.registers,
            "spill_bytes": found.spill_bytes,
            "shared_bytes": found.shared_bytes,
            "instructions": found.instructions,
        }
        yield row, offline.complaint(found, entry.tensor_cores)


def built_kernels(arch: str, pattern: str) -> tuple[list[str], list[Any], str]:
    """The CUDA library's kernels, called "cuda/...": all their names and those that fit, or why there are none.

    The library's only architecture is sm_90a.
    """
    from ..kernels import cuda
    from ..kernels.cuda import loader, offline

    if arch != offline.ARCH:
        return [], [], ""
    if cuda.missing():
        return [], [], f"kernels/cuda: {cuda.missing()}"
    with serving("kernels of CUDA C++"):
        names = [f"cuda/{name}" for name in offline.names(loader.FILE)]
        fit = {name.removeprefix("cuda/") for name in names if fnmatch(name, pattern)}
        found = offline.kernels(loader.FILE, fit)
    return names, [replace(one, kernel=f"cuda/{one.kernel}") for one in found], ""


def listed(found: list[Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each kernel of the CUDA library as a row, and what is wrong with it or nothing."""
    from ..kernels.cuda import offline

    for one in found:
        fields = {"kernel": one.kernel, "config": one.config, "arch": offline.ARCH}
        numbers = {name: getattr(one, name) for name in ("registers", "spill_bytes", "shared_bytes", "instructions")}
        yield fields | numbers, one.complaint


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as plain columns."""
    heads = ("kernel", "config", "registers", "spill", "shared", "instructions")
    lines = [heads]
    for row in rows:
        counts = " ".join(f"{name}:{count}" for name, count in row["instructions"].items()) or "-"
        numbers = (row["registers"], row["spill_bytes"], row["shared_bytes"])
        lines.append((row["kernel"], row["config"], *map(str, numbers), counts))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) - 1)]
    for line in lines:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        print("  ".join([*cells, line[-1]]))
