"""Time every layer of an optimised network, on the CPU or on a GPU: FLOP/s, bytes, share of the measured peak."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from .common import OK, CommandError, add_json, choice, integer, out_folder, print_json, serving
from .inspect import shape, subject, untaken

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..measure.profiler import Profile
    from ..measure.roofline import Peak

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a name from 'inception-fast list', or package.module:function making a module"
    )
    parser.add_argument("--batch", type=integer(1, 4096), default=1, metavar="N", help="batch size (default 1)")
    parser.add_argument(
        "--device", type=choice(tuple(DTYPES)), default="cpu", metavar="NAME", help="cpu (default) or cuda"
    )
    parser.add_argument(
        "--dtype",
        type=choice(DTYPES["cuda"]),
        default="float32",
        metavar="NAME",
        help="float32 (default), bfloat16, or on cuda float16",
    )
    parser.add_argument("--image-size", type=integer(1, 8192), metavar="S", help="square input (default: the model's)")
    parser.add_argument("--input", type=shape, metavar="C,H,W", help="the input's shape (default: the model's)")
    parser.add_argument("--rounds", type=integer(1, 10000), default=20, metavar="N", help="timed calls (default 20)")
    parser.add_argument("--top", type=integer(1, 10000), default=25, metavar="N", help="layers shown (default 25)")
    parser.add_argument("--threads", type=integer(1, 1024), metavar="N", help="of the kernels (default: torch's)")
    parser.add_argument("--out", type=out_folder, metavar="DIR", help="write profile.json and trace.json there")
    parser.add_argument(
        "--once", action="store_true", help="one call between cudaProfilerStart and -Stop, for nsys and ncu; no table"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the dearest layers, what each kind of step takes, and the peak that they are compared with."""
    from ..measure.machine import provenance
    from ..measure.results import write_json
    from .bench import _mind_the_load, _output_folder, _threads

    if args.dtype not in DTYPES[args.device]:
        raise CommandError(f"dtype {args.dtype} on {args.device}; allowed: {', '.join(DTYPES[args.device])}")
    if args.once and args.device == "cpu":
        raise CommandError("--once is for the profilers of GPUs; allowed: with --device cuda")
    if args.once and (args.out or args.json):
        raise CommandError("--once measures nothing; drop --out and --json")
    folder = _output_folder(args.out) if args.out else None
    with _threads(args.threads) as threads, serving(args.model), redirect_stdout(sys.stderr):
        module, x = _ready(args)
        _mind_the_load()
        if args.device == "cuda":
            measured = _on_gpu(module, x, args)
        else:
            measured = _on_cpu(module, x, args)
        if measured is None:
            return OK
        found, peak, events, more = measured
        origin = provenance(threads, args.argv)
    document = {
        "provenance": origin | more,
        "model": args.model,
        "device": args.device,
        "input": list(x.shape),
        "peak": peak.to_dict(),
        "call_ms": found.call_ms,
        "steps_ms": found.steps_ms,
        "peak_share": found.flops / (found.call_ms / 1e3) / peak.flops,
        "kinds": found.by_kind(),
        "rows": [layer.as_json() for layer in found.layers],
        "walks": [walk.as_json() for walk in found.walks],
    }
    if folder is not None:
        write_json(folder / "profile.json", document)
        write_json(folder / "trace.json", events)
    if args.json:
        print_json(document)
    else:
        _show(found, peak, args.top)
        for line in more.get("deeper", {}).values():
            print(f"deeper: {line}")
        if folder is not None:
            print(f"written: {folder / 'profile.json'}, and {folder / 'trace.json'} for ui.perfetto.dev")
    return OK


Measured = tuple["Profile", "Peak", Any, dict[str, Any]]


def _on_cpu(module: nn.Module, x: Tensor, args: argparse.Namespace) -> Measured:
    """The profile, the peak, the trace, and what the provenance has besides."""
    from ..measure.profiler import against, profile
    from ..measure.roofline import measure_peak
    from ..measure.trace import trace

    fast = _optimized(module, x, args.dtype)
    peak = measure_peak(args.dtype)
    found = profile(fast, x, peak, args.rounds)
    peak = peak.best(measure_peak(args.dtype))  # who else computes may have left by now
    found = against(found, peak)
    return found, peak, trace(found.layers, f"{args.model} on the CPU"), {}


def _on_gpu(module: nn.Module, x: Tensor, args: argparse.Namespace) -> Measured | None:
    """The same on a GPU, where the trace lays branches beside each other; None after the one call of --once."""
    import torch

    from .. import Unavailable, backend_status, optimize
    from ..measure import gpu_profiler
    from ..measure.machine import gpu_versions
    from ..measure.trace import trace

    status = backend_status()["triton"]
    if isinstance(status, Unavailable):
        raise CommandError(f"profile --device cuda cannot run here: {status.reason}")
    x = x.to("cuda")
    fast = optimize(module, x, dtype=getattr(torch, args.dtype))
    if args.once:
        gpu_profiler.once(fast, x)
        return None
    from ..backends.triton_gpu import tf32_asked  # imports Triton, which the status has found

    tf32 = args.dtype == "float32" and tf32_asked()
    peak = gpu_profiler.measure_gpu_peak(args.dtype, x.device, tf32)
    found = gpu_profiler.profile(fast, x, peak, args.rounds)
    gpu = torch.cuda.get_device_name(x.device)
    needs, lanes = gpu_profiler.schedule(gpu_profiler.tasks_of(fast, x))
    launches = [*found.walks, *(layer for layer in found.layers if not layer.walk)]
    dearest = max(launches, key=lambda layer: layer.ms).layer
    more = {"gpu": gpu, "gpu_versions": gpu_versions(), "deeper": gpu_profiler.commands(args.argv, dearest)}
    return found, peak, trace(found.layers, f"{args.model} on {gpu}", needs, lanes, found.walks), more


def _ready(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The module in eval mode, behaving as after training, and [n, c, h, w] of clouds."""
    import torch

    from ..measure.compare import calibrate, clouds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, sizes = subject(args.model, args.image_size, args.input)
    x = clouds(torch.empty(1, *sizes), args.batch)
    try:
        calibrate(module, x[:1])
    except Exception as error:  # the user's own code may raise anything
        raise untaken(args.model, sizes, error) from error
    return module, x


def _optimized(module: nn.Module, x: Tensor, dtype: str) -> Any:
    import torch

    from .. import Unavailable, backend_status, optimize

    status = backend_status()["cpu"]
    if isinstance(status, Unavailable):
        raise CommandError(f"profile times the native kernels, which do not run here: {status.reason}")
    return optimize(module, x, dtype=getattr(torch, dtype), backend="cpu")


def _show(found: Profile, peak: Peak, top: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    heads = ("layer", "kind", "output", "ms", "share", "GFLOP/s", "of peak", "MB", "GB/s", "of roof")
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    dearest = sorted(found.layers, key=lambda layer: -layer.ms)[:top]
    digits = 4 if found.walks else 3  # a walk's steps take microseconds
    for x in dearest:
        size = "x".join(map(str, (*x.shape[2:], *x.shape[1:2])))
        table.add_row(
            escape(x.layer), x.kind, size, f"{x.ms:.{digits}f}", f"{100 * x.share:.1f} %", f"{x.gflops:.1f}",
            f"{100 * x.peak_share:.0f} %", f"{x.bytes / 1e6:.2f}", f"{x.gbytes:.1f}", f"{100 * x.roof_share:.0f} %",
        )  # fmt: skip
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    if len(dearest) < len(found.layers):
        print(f"the dearest {len(dearest)} of {len(found.layers)} layers; --top shows more, --json all")
    for kind, part in found.by_kind().items():
        print(f"{kind:10} {part['steps']:4.0f} steps {part['ms']:9.3f} ms {100 * part['share']:5.1f} %")
    _show_walks(found)
    threads = f", {peak.threads} threads" if peak.threads else ""
    whole = found.flops / (found.call_ms / 1e3)
    print(
        f"the call {found.call_ms:.3f} ms, its steps {found.steps_ms:.3f} ms; {whole / 1e9:.1f} GFLOP/s, "
        f"{100 * whole / peak.flops:.0f} % of the peak"
    )
    print(
        f"peak {peak.flops / 1e9:.1f} GFLOP/s in {peak.dtype}{threads}, reached by {peak.by}; "
        f"memory at {peak.bytes / 1e9:.1f} GB/s"
    )
    for reason in dict.fromkeys(found.fallbacks):
        print(f"through torch, not timed apart: {reason}")


def _show_walks(found: Profile) -> None:
    """What the table does not say of launches that are many steps."""
    for walk in found.walks:
        rest = {layer.kind: layer.ms for layer in found.layers if layer.walk == walk.layer}
        print(
            f"{walk.layer}: {walk.ms:.4f} ms in one launch, shared out to its steps, which overlap, by the units that "
            f"ran at each moment; {rest['waiting']:.4f} ms with none, {rest['launch']:.4f} ms around them"
        )
    for layer in found.layers:
        if layer.note:
            print(f"{layer.layer}: one row, without its steps: {layer.note}")
