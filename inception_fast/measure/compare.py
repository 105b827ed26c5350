"""Ours beside its peers on one network: outputs first, and speed only where they are right."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..kernels import cpu
from .peers import DTYPES, Built, Layers, Ours, OursWinograd, Runtime, TimeLimit, limited, quiet
from .timer import Plan, contrasts, interleave, summarise

# Largest difference from the float64 network over its largest logit. float32: the parity that the models promise. The
# 16-bit formats round each of up to 250 layers once, 1.7e-3 and 2.1e-4 in relative L2; the errors add like a random
# walk to 2.6e-2 and 3.3e-3, and a network of random weights may double them (see `calibrate`).
BUDGET = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 6.5e-3}
# A peer may round in more places, the convolution, BN and ReLU each: twice the error where every layer is fused.
PEER_SHARE = {"float32": 1.0, "bfloat16": 2.0, "float16": 2.0}
# In float32 Winograd's tiles may make the rounding errors of layers up to 18 times as large in the root mean square;
# logits were off by 1.2 to 3.4 times as much. In bfloat16 a tile rounds only what a direct sum rounds too, and less.
WINOGRAD_SHARE = {"float32": 6.0, "bfloat16": 1.0}
# On images so small that the last maps are one pixel, batch norms of `calibrate` divide by the spread of six values,
# and every format errs by several times its budget. There what torch's layers err by is allowed: ours round in no more
# places, and the largest of some thousand errors was 0.55 to 1.12 times theirs on 22 such networks.
TORCH_SHARE = 1.25
BIAS = 1.5
BUILD_SHARE = 0.6  # of a case's wall time, for the progress bar


@dataclass(frozen=True)
class Case:
    """One question: which network, at which batch size, in which number format."""

    model: str
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch} {self.dtype}"


@dataclass(frozen=True)
class Row:
    """One runtime's answer. `ratio` is its time over ours.

    `status` is ok, wrong, failed or unavailable, with `note` the reason. `established` says whether the order of the
    two is beyond the noise of this run. `handover_ns` is how long a line of the cache took from core to core, the
    median of all rounds: cores that share no cache make a call a tenth longer.
    """

    model: str
    batch: int
    dtype: str
    runtime: str
    median_ms: float | None = None
    iqr_ms: float | None = None
    rel_error: float | None = None
    ratio: float | None = None
    status: str = "ok"
    note: str = ""
    rounds: int = 0
    established: bool | None = None
    handover_ns: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Watch(Protocol):
    """Hears what is being done, and how much of the whole is finished."""

    def stage(self, text: str) -> None: ...
    def done(self, fraction: float) -> None: ...


@dataclass(frozen=True)
class Subject:
    """A network and the photographs it sees: `batches` are [n, c, h, w] float32, `truth` holds its float64 logits."""

    model: nn.Module
    batches: list[Tensor]
    truth: list[Tensor] = field(repr=False)


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Makes a freshly initialised network behave like a trained one, in place.

    Every batch norm takes the statistics of one pass over `x` and some clouds, dropout off, or activations would vanish
    with depth; the clouds are there because a flat picture alone has no variance to divide by. Its bias becomes BIAS:
    with none, a random network is chaotic. A ReLU halves the energy of a rounding error but leaves only 0.34 of the
    signal's variance, so each layer grows the error 1.2 times, and float32 is wrong by 3e-4 after the 149 layers of
    inception_v4; at 1.5 the factor is 1.01 and the error 9e-7.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        if norm.bias is not None:
            nn.init.constant_(norm.bias, BIAS)
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            model(torch.cat([x, clouds(x)]))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


def clouds(like: Tensor, count: int = 4) -> Tensor:
    """[count, c, h, w] of noise at every scale, about as rough and as strong as photographs; always the same."""
    generator = torch.Generator().manual_seed(0)
    channels, height, width = like.shape[1:]
    sky = torch.zeros(count, channels, height, width)
    size = 2
    while size <= min(height, width):
        layer = torch.randn(count, channels, size, size, generator=generator)
        sky += nn.functional.interpolate(layer, (height, width), mode="bilinear") / size**0.5
        size *= 2
    return sky / sky.std()


def batches(photos: Tensor, batch: int, most: int = 4) -> list[Tensor]:
    """At most `most` full batches over [n, c, h, w] `photos`, taken in turn and repeated to fill the last one."""
    count = min(most, -(-len(photos) // batch))
    index = torch.arange(count * batch) % len(photos)
    return [photos[part].contiguous() for part in index.split(batch)]


def truth(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The network run eagerly in float64."""
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        return [exact(x.double()) for x in inputs]


def relative_error(y: Tensor, reference: Tensor) -> float:
    """max |y - r| / max |r|; NaN when y holds a NaN. Another shape raises ValueError."""
    if y.shape != reference.shape:
        raise ValueError(f"output shape {tuple(y.shape)}; allowed: {tuple(reference.shape)}")
    return ((y.double() - reference).abs().max() / reference.abs().max()).item()


def compare(
    case: Case,
    subject: Subject,
    peers: Sequence[Runtime],
    threads: int,
    plan: Plan,
    limit: float,
    watch: Watch,
    ours: Runtime | None = None,
) -> list[Row]:
    """The rows of one case, ours first; `limit` is the number of seconds a peer may take to build the network.

    `ours` is another way to call this package, of the same name, such as under TensorFlow.
    Without a right answer of ours nothing is timed: there is nothing to compare with. A peer that fails while it is
    timed has failed, and the others are timed anew without it.
    """
    with torch.inference_mode():
        rows, runners = [], {}
        for step, runtime in enumerate([ours or Ours(), *peers]):
            watch.stage(f"{case}: building {runtime.name}")
            row, built = _ready(runtime, case, subject, threads, limit)
            rows.append(row)
            if built is not None:
                runners[runtime.name] = built
            elif step == 0:
                return rows
            watch.done(BUILD_SHARE * (step + 1) / (len(peers) + 1))
        while Ours.name in runners:
            watch.stage(f"{case}: timing {', '.join(runners)}")
            calls = {name: _named(name, runner.bind(subject.batches[0])) for name, runner in runners.items()}
            try:
                apart: list[float] = []

                def after_round(share: float, apart: list[float] = apart) -> None:
                    apart += filter(None, [cpu.handover_ns() if threads > 1 else None])
                    watch.done(BUILD_SHARE + (1 - BUILD_SHARE) * share)

                rounds = interleave(calls, plan, on_round=after_round)
                return _timed(rows, rounds, round(statistics.median(apart), 1) if apart else None)
            except _Failed as failure:
                del runners[failure.runtime]
                note = f"while timed: {_said(failure.error)}"
                rows = [replace(r, status="failed", note=note) if r.runtime == failure.runtime else r for r in rows]
    return rows[:1]


class _Failed(Exception):
    """Which runtime raised what."""

    def __init__(self, runtime: str, error: Exception) -> None:
        super().__init__(runtime, error)
        self.runtime, self.error = runtime, error


def _named(name: str, run: Callable[[], object]) -> Callable[[], object]:
    """The call, whose errors say whose they are."""

    def call() -> object:
        try:
            return run()
        except Exception as error:
            raise _Failed(name, error) from error

    return call


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _ready(runtime: Runtime, case: Case, subject: Subject, threads: int, limit: float) -> tuple[Row, Built | None]:
    """Builds one runtime and checks its output; without a second value the row says why there is nothing to time."""
    row = Row(case.model, case.batch, case.dtype, runtime.name)
    reasons = runtime.reasons(case.dtype)
    if reasons:
        return replace(row, status="unavailable", note="; ".join(reasons)), None
    ours = runtime.name == Ours.name
    try:
        with quiet(), limited(math.inf if ours else limit):
            built = runtime.build(subject.model, subject.batches[0], case.dtype, threads)
            outputs = [built.result(built.bind(x)()).clone() for x in subject.batches]
    except TimeLimit as error:
        return replace(row, status="failed", note=f"building it: {error}"), None
    except Exception as error:  # libraries raise anything; the reason is listed, and where it is ours the case ends
        refusal = ours and isinstance(error, (ValueError, NotImplementedError))
        reason = " ".join(str(error).split())[:300] if refusal else _said(error)
        return replace(row, status="unavailable" if refusal else "failed", note=reason), None
    return _judged(row, built, outputs, subject)


def _torch_error(subject: Subject, dtype: str) -> float:
    """The error of torch's own layers in `dtype`; 0 where they overflow."""
    form = DTYPES[dtype]
    net = copy.deepcopy(subject.model).to(form)
    error = max(relative_error(net(x.to(form)), r) for x, r in zip(subject.batches, subject.truth, strict=True))
    return error if math.isfinite(error) else 0.0


def _judged(row: Row, built: Built, outputs: list[Tensor], subject: Subject) -> tuple[Row, Built | None]:
    try:
        errors = [relative_error(y, r) for y, r in zip(outputs, subject.truth, strict=True)]
    except ValueError as mismatch:
        return replace(row, status="wrong", note=str(mismatch)), None
    if not all(math.isfinite(e) for e in errors):
        return replace(row, status="wrong", note="its output is not finite: speed not shown"), None
    tiles, peer = WINOGRAD_SHARE.get(row.dtype, 1.0), PEER_SHARE[row.dtype]
    shares = {Ours.name: 1.0, OursWinograd.name: tiles, Layers(winograd=True).name: max(tiles, peer)}
    share = shares.get(row.runtime, peer)
    worst, budget = max(errors), share * BUDGET[row.dtype]
    if worst > budget:
        budget = max(budget, share * TORCH_SHARE * _torch_error(subject, row.dtype))
    if worst > budget:
        note = f"its output is off by {worst:.1e}, more than {budget:.1e}: speed not shown"
        return replace(row, status="wrong", note=note, rel_error=worst), None
    return replace(row, note=built.note, rel_error=worst), built


def _timed(rows: list[Row], samples: dict[str, list[float]], apart: float | None = None) -> list[Row]:
    """Fills in the times, the ratios and whether they are established, and how far the cores were from each other."""
    against = contrasts(samples, Ours.name)
    filled = []
    for row in rows:
        if row.runtime in samples:
            summary, rival = summarise(samples[row.runtime]), against.get(row.runtime)
            row = replace(
                row,
                median_ms=1e3 * summary.median,
                iqr_ms=1e3 * summary.iqr,
                ratio=rival.ratio if rival else 1.0,
                rounds=summary.count,
                established=rival.established if rival else None,
                handover_ns=apart,
            )
        filled.append(row)
    return filled
