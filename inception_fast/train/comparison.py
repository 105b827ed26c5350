"""Several variants on the same data, order, seeds and budget: their curves as rows, and where they end with the
spread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..measure.results import write_json
from .check import Say
from .checkpoint import Checkpoints
from .data import check_apart, load_data
from .drift import movements, read_drift
from .labelled import Data
from .log import read_log
from .loop import SUMMARY, VERDICT, Options, train
from .recipe import changed
from .settings import Settings, parse_value
from .torchrun import place
from .trainer import assemble

COLUMNS = ("step", "loss", "cross_entropy", "accuracy", "seconds")


@dataclass(frozen=True)
class Variant:
    """One contestant. options: of the network; settings: fields of `Settings` it changes; recipe: fields of the
    recipe.
    """

    label: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    def apply(self, base: Settings, seed: int) -> Settings:
        """The settings of its run with one seed."""
        recipe = changed(base.recipe, self.recipe)
        fields = {"options": {**base.options, **self.options}, **self.settings}
        return replace(base, model=self.model, seed=seed, recipe=recipe, **fields)


def parse_variant(text: str) -> Variant:
    """ "inception_v1" or "inception_v1:classic=true:drop_rate=0.1": a model with options, the text its label.

    >>> parse_variant("inception_v1:classic=true").options
    {'classic': True}
    """
    model, *pairs = text.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"variant {text!r}; allowed: MODEL or MODEL:KEY=VALUE:KEY=VALUE")
        options[key] = parse_value(value)
    if not model:
        raise ValueError(f"variant {text!r} names no model; allowed: MODEL or MODEL:KEY=VALUE")
    return Variant(text, model, options)


def compare(
    variants: Sequence[Variant],
    base: Settings,
    seeds: int,
    out: Path | str,
    options: Options | None = None,
    *,
    say: Say = lambda text: None,
    on_row: Callable[[dict[str, Any], str], None] = lambda row, name: None,
    about: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains every variant with seeds 0 to `seeds` - 1 (counted from base's) and returns what OUT/compare.json holds.

    Runs that OUT already holds are not run again, one that was killed goes on, and after each run the files are whole.
    A run whose loss stops being a number ends there and counts as such.

    Raises:
        ValueError: no variant, two with one label, settings that cannot be used, or OUT holds runs with other settings
            or other data. No variant is trained before all of them could be built.
    """
    labels = [variant.label for variant in variants]
    if not variants or len(set(labels)) < len(labels):
        raise ValueError(f"variants {', '.join(labels) or '(none)'}; allowed: at least one, each once")
    if seeds < 1:
        raise ValueError(f"seeds {seeds}; allowed: 1 or more")
    _, processes = place()
    if processes > 1:
        raise ValueError(f"a comparison by {processes} processes of torchrun; allowed: one, or train for each variant")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out} is a file; name a folder")
    folders = [run_folder(out, label, base.seed).name for label in labels]
    if len(set(folders)) < len(folders):
        raise ValueError(f"variants {', '.join(labels)} with folders {', '.join(folders)}; allowed: one for each")
    options = options or Options()
    judged = _check(variants, base, out, options, say)
    runs: list[dict[str, Any]] = []
    document: dict[str, Any] = {}
    for seed in range(base.seed, base.seed + seeds):
        for variant in variants:
            settings = variant.apply(base, seed)
            runs.append(_run(variant, settings, judged[variant.label], out, options, say, on_row))
            origin = {"provenance": provenance, "about": about, "settings": base.as_json(), "variants": labels}
            document = origin | _results(runs)
            write_json(out / "compare.json", document)
            write_page(document, out)
    return document


Basis = tuple[str, int]
"""What a run's end depends on beside its settings: the data's fingerprint and the number of images judged on."""


def _check(variants: Sequence[Variant], base: Settings, out: Path, options: Options, say: Say) -> dict[str, Basis]:
    """Builds every variant, without memory, and looks at its data; raises ValueError for one that cannot be trained."""
    found: dict[tuple[str, str], Data] = {}
    basis: dict[str, Basis] = {}
    for variant in variants:
        settings = variant.apply(base, base.seed)
        key = settings.data, settings.bad_data
        if key not in found:
            for each in (out, run_folder(out, variant.label, base.seed).parent):
                check_apart(settings.data, each)
            cache = out / VERDICT if out.is_dir() else None
            found[key] = load_data(*key, cache, say, options.download)
        data = found[key]
        basis[variant.label] = data.fingerprint(), min(options.eval_images, len(data.held_out))
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            assemble(replace(settings, weights=None), len(data.source.classes))
    return basis


def write_page(document: dict[str, Any], out: Path) -> None:
    from ..measure.results import write_text
    from .page import page

    write_text(out / "index.html", page(document))


def run_folder(out: Path, label: str, seed: int) -> Path:
    """Where a variant's run with one seed lies."""
    name = re.sub(r"[^\w.=-]+", "_", label)
    return out / "runs" / f"{name}-seed{seed}"


def _run(
    variant: Variant,
    settings: Settings,
    basis: Basis,
    out: Path,
    options: Options,
    say: Say,
    on_row: Callable[[dict[str, Any], str], None],
) -> dict[str, Any]:
    folder = run_folder(out, variant.label, settings.seed)
    name = f"{variant.label} seed {settings.seed}"
    summary = _finished(folder, settings, basis)
    if summary is None:
        say(f"{name}: training")
        control = replace(options, resume=folder.is_dir(), export=False)
        summary = train(settings, folder, control, say=say, on_row=lambda row: on_row(row, name))
    else:
        say(f"{name}: already done")
    _drop_checkpoints(folder, summary)
    return {"label": variant.label, "seed": settings.seed, "folder": folder, "summary": summary}


def _drop_checkpoints(folder: Path, summary: dict[str, Any]) -> None:
    """Removes those of a run that has ended, also where it was killed meanwhile, and names them in its summary no
    longer.
    """
    kept = Checkpoints(folder)
    paths = [kept.path(step) for step in kept.steps()]
    if paths:
        summary["files"] = [name for name in summary["files"] if name not in {path.name for path in paths}]
        write_json(folder / SUMMARY, summary)
    for path in paths:
        path.unlink()


def _finished(folder: Path, settings: Settings, basis: Basis) -> dict[str, Any] | None:
    """The summary of a run that has ended; ValueError where it is one of other settings or of another basis."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        held = summary["data"]["fingerprint"], (summary["evaluation"] or {}).get("images", 0)
        settings_there = dict(summary["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove its folder to have it trained again") from error
    wanted = json.loads(json.dumps(settings.as_json()))
    for key, value in wanted.items():
        if settings_there.get(key) != value:
            there = settings_there.get(key)
            raise ValueError(f"{folder} holds a run with {key} {there!r}, not {value!r}; name another --out")
    for name, before, now in zip(("other data, of fingerprint", "images judged:"), held, basis, strict=True):
        if before != now:
            raise ValueError(f"{folder} holds a run with {name} {before}, not {now}; name another --out")
    return summary


def _results(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the networks are, where each run ended, and every step of every run."""
    rows: list[dict[str, Any]] = []
    drift: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    networks: dict[str, dict[str, Any]] = {}
    for run in runs:
        summary = run["summary"]
        networks[run["label"]] = {
            "network": summary["settings"]["model"],
            "options": summary["settings"]["options"],
            "parameters": summary["parameters"],
            "macs_per_image": summary["macs_per_image"],
            "flops_per_step": summary["flops_per_step"],
        }
        for row in read_log(run["folder"]):
            kept = {key: row[key] for key in COLUMNS}
            flops = row["step"] * summary["flops_per_step"]
            rows.append({"model": run["label"], "seed": run["seed"]} | kept | {"flops": flops})
        own = {"model": run["label"], "seed": run["seed"]}
        drift += [own | moved for moved in movements(read_drift(run["folder"]))]
        judged = summary["evaluation"] or {}
        ends.append(
            {
                "model": run["label"],
                "seed": run["seed"],
                "status": summary["status"],
                "steps": summary["steps"],
                "loss": summary["loss"],
                "accuracy": summary["accuracy"],
                "held_out_loss": judged.get("loss"),
                "held_out_accuracy": judged.get("accuracy"),
                "seconds": summary["seconds"],
            }
        )
    return {"networks": networks, "runs": ends, "rows": rows} | ({"drift": drift} if drift else {})
