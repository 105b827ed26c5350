"""Train several variants on the same data, seeds and budget, and lay their curves side by side."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from .common import OK, CommandError, add_json, integer, out_folder, print_json, serving
from .train import RECIPE_FLAGS, Meter, add_budget, budget, chosen_recipe

if TYPE_CHECKING:
    from ..train.comparison import Variant
    from ..train.settings import Settings


def add(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--models", metavar="A,B,...", help="models, each with options as in inception_v1:classic=true")
    what.add_argument(
        "--experiment",
        metavar="NAME",
        help="one of the papers' claims, ready to run: the defaults below are its own then; 'list' shows them",
    )
    parser.add_argument("--out", type=out_folder, metavar="DIR", help="where compare.json, index.html and the runs go")
    parser.add_argument("--seeds", type=integer(1, 1000), metavar="K", help="runs of each variant (default 1)")
    add_budget(parser, steps=200, size="the largest of the models'")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Runs what DIR does not hold yet, prints the table. A variant that diverges is a result, not a failure."""
    import torch

    from ..train.experiments import EXPERIMENTS, get_experiment

    if args.experiment == "list":
        return _list([{**found.about(), "minutes": found.minutes} for found in EXPERIMENTS.values()], args.json)
    if not args.out:
        raise CommandError("--out DIR is needed; name the folder for compare.json and index.html")
    from ..measure.machine import provenance
    from ..train.allocator import keep_freed_memory
    from ..train.comparison import compare
    from ..train.loop import Options

    keep_freed_memory()
    with serving("compare"):
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.experiment:
            experiment = get_experiment(args.experiment)
            variants, seeds, about = list(experiment.variants), args.seeds or experiment.seeds, experiment.about()
            drift_every = experiment.drift_every
            _check_free(args, variants)
            base = _changed(experiment.settings(**budget(args)), args)
        else:
            variants, base = _asked(args)
            seeds, about, drift_every = args.seeds or 1, None, 0
        control = Options(
            args.checkpoint_every,
            workers=args.workers,
            eval_images=args.eval_images,
            device=args.device,
            download=args.download,
            drift_every=drift_every,
        )
        with Meter(base.steps, base.batch_size) as meter:
            document = compare(
                variants,
                base,
                seeds,
                args.out,
                control,
                say=meter.say,
                on_row=meter.row,
                about=about,
                provenance=provenance(torch.get_num_threads(), args.argv),
            )
    if args.json:
        print_json(document)
    else:
        _show(document, args.out)
    return OK


def _asked(args: argparse.Namespace) -> tuple[list[Variant], Settings]:
    from ..train.comparison import parse_variant
    from ..train.networks import native_size
    from ..train.settings import Settings

    variants = [parse_variant(text.strip()) for text in args.models.split(",") if text.strip()]
    if not variants:
        raise CommandError("--models is empty; allowed: names from 'inception-fast list', separated by commas")
    # One size for all, and for all a size they were made for: the largest.
    size = args.image_size or max(native_size(variant.model) for variant in variants)
    given = {"steps": 200} | budget(args) | {"image_size": size}
    return variants, Settings(variants[0].model, recipe=chosen_recipe(args), **given)


def _check_free(args: argparse.Namespace, variants: list[Variant]) -> None:
    """Raises CommandError for a flag that the variants of an experiment override, each with a value of its own."""
    for name in sorted({name for variant in variants for name in (*variant.settings, *variant.recipe)}):
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise CommandError(
                f"{flag} with --experiment {args.experiment}, whose variants set it; allowed: without {flag}"
            )


def _changed(settings: Settings, args: argparse.Namespace) -> Settings:
    """An experiment's settings with the flags that were given."""
    from dataclasses import replace

    from ..train.recipe import changed

    size = {"image_size": args.image_size} if args.image_size else {}
    if args.recipe:
        return replace(settings, recipe=chosen_recipe(args), **size)
    fields = {f: value for f in (*RECIPE_FLAGS, "optimizer") if (value := getattr(args, f)) is not None}
    return replace(settings, recipe=changed(settings.recipe, fields), **size)


def _list(rows: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['name']:<18} {row['minutes']} min  {row['claim']} ({row['source']})")
        print("Minutes are those on two cores at most, with the steps and seeds that each has by itself.")
    return OK


def _show(document: dict[str, Any], out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..train.page import spread

    table = Table("variant", "parameters", "runs", "last loss", "last accuracy", "held-out accuracy", "ms a step")
    for label in document["variants"]:
        runs = [run for run in document["runs"] if run["model"] == label]
        diverged = sum(run["status"] != "done" for run in runs)
        table.add_row(
            label,
            f"{document['networks'][label]['parameters']:,}",
            f"{len(runs)}" + (f", {diverged} diverged" if diverged else ""),
            spread([run["loss"] for run in runs]),
            spread([run["accuracy"] for run in runs], percent=True),
            spread([run["held_out_accuracy"] for run in runs], percent=True),
            spread([1000 * run["seconds"] / run["steps"] for run in runs if run["steps"]]),
        )
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    print(f"written: {os.path.join(out, 'compare.json')}, {os.path.join(out, 'index.html')}")
