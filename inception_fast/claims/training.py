"""Claims about training, from comparisons: those that were given, and tiny ones run here for the rest."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measure.results import Parts
from ..train.charts import smooth
from ..train.comparison import compare
from ..train.experiments import EXPERIMENTS, Experiment
from ..train.loop import Options
from .context import Context
from .row import CONFIRMED, OPEN, UNMEASURED, Row, higher

Document = dict[str, Any]
QUICK_STEPS = 6
SEEDS = 6  # the fewest that can establish anything
RUN_HERE = (
    "batchnorm_rate",
    "batchnorm_scale",
    "batchnorm_sigmoid",
    "covariate_shift",
    "label_smoothing",
    "grid_reduction",
    "residual",
)


@dataclass(frozen=True)
class Finding:
    """What a comparison says of a claim."""

    measured: float | None
    verdict: str
    note: str


def read_comparisons(path: Path) -> dict[str, Document]:
    """The documents of comparisons by their experiment's name: of a file, of the folder of a comparison, or of a folder
    with several, as compare.json in folders of their own or as filed results of kind "training", the newest of each.

    Raises ValueError for a file that no experiment of `inception-fast compare` wrote, or one that was cut short, and
    where there is none.
    """
    if not path.is_dir() or (path / "compare.json").exists():
        name, document = _read(path / "compare.json" if path.is_dir() else path)
        return {name: document}
    files = [*sorted(path.glob("*/compare.json")), *sorted(path.glob("*-training*.json"))]
    if not files:
        raise ValueError(f"{path} holds no result of 'inception-fast compare --experiment'; name its --out")
    return dict(sorted(map(_read, files), key=lambda found: (found[1].get("provenance") or {}).get("date", "")))


def _read(file: Path) -> tuple[str, Document]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        name = document["about"]["name"]
        held = {(run["model"], run["seed"]) for run in document["runs"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no result of 'inception-fast compare --experiment' ({type(error).__name__}: {error})"
        ) from error
    if "curves" in document:  # as filed: the losses of every run in a list
        document["rows"] = [
            {"model": curve["model"], "seed": curve["seed"], "step": step, "loss": loss}
            for curve in document.pop("curves")
            for step, loss in enumerate(curve["loss"], 1)
        ]
    if name not in JUDGES:
        raise ValueError(f"{file} is of experiment {name!r}; allowed: {', '.join(JUDGES)}")
    _check_whole(file, EXPERIMENTS[name], held)
    return name, document


def _check_whole(file: Path, experiment: Experiment, held: set[tuple[str, int]]) -> None:
    """Raises ValueError where a variant lacks a seed that another has."""
    for seed in sorted({seed for _, seed in held}):
        for variant in experiment.variants:
            if (variant.label, seed) not in held:
                raise ValueError(
                    f"{file} has no run of {variant.label!r} with seed {seed}, which others have: it was cut short; "
                    "give its command again, which goes on with it"
                )


def training(context: Context) -> list[Row]:
    rows = []
    for name, judges in JUDGES.items():
        document = context.trained.get(name)
        if document is None and name in RUN_HERE:
            context.say(f"training: {name}")
            document = _run(EXPERIMENTS[name], context)
        for judge in judges:
            rows.append(judge(context, EXPERIMENTS[name], document))
    return rows


def _run(experiment: Experiment, context: Context) -> Document:
    """The experiment with seeds enough; quick: a few steps of one, which show that it runs and prove nothing.

    What an earlier report trained is cleared away, but for one that this report resumes.
    """
    settings = experiment.settings(**({"steps": QUICK_STEPS, "batch_size": 8} if context.quick else {}))
    seeds = 1 if context.quick else max(SEEDS, experiment.seeds)
    watch = min(experiment.drift_every, QUICK_STEPS // 2) if context.quick else experiment.drift_every
    options = Options(checkpoint_every=10**9, eval_images=0 if context.quick else 500, drift_every=watch)
    folder = context.out / "training" / f"{experiment.name}{'-quick' if context.quick else ''}"
    kept = Parts(context.out / "parts", context.conditions, context.resume)
    if folder.exists() and not kept.load(f"training-{folder.name}"):
        shutil.rmtree(folder)
    kept.save(f"training-{folder.name}", True)
    return compare(experiment.variants, settings, seeds, folder, options, about=experiment.about())


def accuracies(document: Document, label: str) -> list[float]:
    """Held-out accuracy for each seed, or the training's where nothing was held out.

    A run that diverged has that of the last weights it had, and 0 where it made no step.
    """
    runs = [run for run in document["runs"] if run["model"] == label]
    return [
        run["held_out_accuracy"] if run["held_out_accuracy"] is not None else run["accuracy"] or 0.0 for run in runs
    ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ahead(document: Document, a: Sequence[str], b: Sequence[str]) -> Finding:
    """By how many points the worst of variants `a` is more accurate than the worst of variants `b`, seed by seed."""
    left, right = ([min(seeds) for seeds in zip(*(accuracies(document, x) for x in s), strict=True)] for s in (a, b))
    note = f"{100 * mean(left):.1f} % against {100 * mean(right):.1f} %, {_budget(document)}"
    return Finding(100 * (mean(left) - mean(right)), higher(left, right), note)


def _budget(document: Document) -> str:
    settings = document["settings"]
    seeds = len({run["seed"] for run in document["runs"]})
    return f"{settings['steps']} steps of {settings['batch_size']} {settings['data']} images, seeds: {seeds}"


def steps_saved(document: Document, fast: Sequence[str], slow: Sequence[str]) -> Finding:
    """How many times fewer steps the best of `fast` takes than the best of `slow` to a loss that both reach.

    For each seed that is the higher of their two last losses, and both count to the first step at it: with the sides
    exchanged a ratio is its inverse, and of two that are alike each is as likely ahead. Over seeds, the geometric mean.
    """
    window = max(document["settings"]["steps"] // 20, 1)
    logs: list[float] = []
    for seed in sorted({run["seed"] for run in document["runs"]}):
        sides = [_best_curve(document, labels, seed, window) for labels in (fast, slow)]
        if not all(sides):
            return Finding(None, OPEN, f"all runs of one side diverged, {_budget(document)}")
        shared = max(curve[-1] for curve in sides)
        quick, late = (next(i for i, loss in enumerate(curve, 1) if loss <= shared) for curve in sides)
        logs.append(math.log(late / quick))
    low, high = math.exp(min(logs)), math.exp(max(logs))
    note = f"to the higher of the two last losses; {low:.1f} to {high:.1f}, {_budget(document)}"
    return Finding(math.exp(mean(logs)), higher(logs, [0.0] * len(logs)), note)


def _best_curve(document: Document, labels: Sequence[str], seed: int, window: int) -> list[float]:
    """The smoothed losses of the variant that ends lowest; one that diverged ends nowhere."""
    done = {run["model"] for run in document["runs"] if run["seed"] == seed and run["status"] == "done"}
    curves = [
        smooth([row["loss"] for row in document["rows"] if (row["model"], row["seed"]) == (label, seed)], window)
        for label in labels
        if label in done
    ]
    return min((curve for curve in curves if curve), key=lambda curve: curve[-1], default=[])


def steadier(document: Document, steady: Sequence[str], moving: Sequence[str]) -> Finding:
    """How many times farther the layer inputs of `moving` drift than those of `steady`, variants in pairs.

    A run's drift is the mean of all its looks and layers, and a seed's that of its variants. A run that diverged, or
    whose inputs stopped being numbers, has none: then nothing is established.
    """
    seeds = sorted({run["seed"] for run in document["runs"]})
    sides = [[_drift(document, labels, seed) for seed in seeds] for labels in (steady, moving)]
    budget = _budget(document)
    if any(value is None for side in sides for value in side):
        return Finding(None, OPEN, f"a run diverged or was not watched, {budget}")
    still, moved = ([value for value in side if value is not None] for side in sides)
    note = f"mean drift between looks {mean(still):.3g} deviations against {mean(moved):.3g}, {budget}"
    return Finding(mean(moved) / mean(still), higher(moved, still), note)


def _drift(document: Document, labels: Sequence[str], seed: int) -> float | None:
    """The mean over the variants, one summand each; None where one has a value that is none."""
    means = []
    for label in labels:
        own = [row["drift"] for row in document.get("drift", []) if (row["model"], row["seed"]) == (label, seed)]
        if not own or any(value is None for value in own):
            return None
        means.append(mean(own))
    return mean(means)


def _labels(experiment: Experiment, start: str, end: str = "") -> list[str]:
    return [v.label for v in experiment.variants if v.label.startswith(start) and v.label.endswith(end)]


Judge = Callable[[Context, Experiment, Document | None], Row]


def _judge(
    suffix: str,
    claim: str | None,
    unit: str,
    find: Callable[[Document, Experiment], Finding],
    stated: float | None = None,
    source: str | None = None,
) -> Judge:
    def judge(context: Context, experiment: Experiment, document: Document | None) -> Row:
        base = f"inception-fast compare --experiment {experiment.name}"
        if document is None:
            command = f"{base} --seeds {SEEDS} --out DIR"
            found = Finding(None, UNMEASURED, f"it takes an hour: run '{command}', then give --training DIR")
        else:
            found = find(document, experiment)
            if context.quick and experiment.name not in context.trained and found.verdict != UNMEASURED:
                found = Finding(found.measured, OPEN, f"a tiny run that proves nothing: {found.note}")
        if found.verdict == CONFIRMED and stated is not None and found.measured is not None:
            near = 0.5 * stated <= found.measured <= 2 * stated
            found = found if near else Finding(found.measured, "differs", found.note)
        details = {} if document is None else {"ends": _ends(document)}
        return Row(
            experiment.name + suffix, claim or experiment.claim, source or experiment.source, stated, found.measured,
            unit, _command(base, document), found.verdict, found.note, details,
        )  # fmt: skip

    return judge


def _command(base: str, document: Document | None) -> str:
    """The command that made the comparison, where it says so."""
    origin = (document or {}).get("provenance")
    return origin["command"] if origin else f"{base} --seeds {SEEDS} --out DIR"


def _ends(document: Document) -> dict[str, list[float]]:
    """Accuracies by variant, a value for each seed: what the plot shows."""
    return {label: accuracies(document, label) for label in document["variants"]}


POINTS = "points of accuracy"
FEWER = "times fewer steps"
FARTHER = "times the drift with batch norm"
JUDGES: dict[str, tuple[Judge, ...]] = {
    "batchnorm_rate": (
        _judge(
            "", None, POINTS,
            lambda d, e: ahead(d, _labels(e, "with BN", "0.5"), _labels(e, "without BN", "0.5")),
        ),
        _judge(
            "_steps", "Batch norm reaches the same accuracy in 14 times fewer steps.", FEWER,
            lambda d, e: steps_saved(d, _labels(e, "with BN"), _labels(e, "without BN")), 14,
            "arXiv:1502.03167, abstract",
        ),
    ),
    "batchnorm_scale": (
        _judge("", None, POINTS, lambda d, e: ahead(d, _labels(e, "with BN"), _labels(e, "without BN"))),
    ),
    "batchnorm_sigmoid": (
        _judge("", None, POINTS, lambda d, e: ahead(d, ["sigmoid, with BN"], ["sigmoid, without BN"])),
    ),
    "covariate_shift": (
        _judge(
            "", None, FARTHER,
            lambda d, e: steadier(d, _labels(e, "with BN"), _labels(e, "without BN")),
        ),
    ),
    "label_smoothing": (
        _judge("", None, POINTS, lambda d, e: ahead(d, ["smoothing 0.1"], ["smoothing 0"]), 0.2),
    ),
    "grid_reduction": (
        _judge(
            "_accuracy", "A strided convolution beside a pool is more accurate than pool, then convolution.", POINTS,
            lambda d, e: ahead(d, ["parallel"], ["pool_conv"]),
        ),
    ),
    "residual": (
        _judge("", None, FEWER, lambda d, e: steps_saved(d, ["residual"], ["plain"])),
    ),
    "residual_v4": (
        _judge("", None, FEWER, lambda d, e: steps_saved(d, ["inception_resnet_v2"], ["inception_v4"])),
    ),
}  # fmt: skip
