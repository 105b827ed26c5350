"""Files results under benchmarks/results/<machine>/ and writes the tables of README and docs/ from what lies there.

    python benchmarks/publish.py bench-results/bench.json    files it, then rewrites the tables
    python benchmarks/publish.py                             rewrites the tables
    python benchmarks/publish.py --check                     exit code 1 where a page is not what the files say

Takes what `inception-fast bench`, `bench --cpu-suite`, `claims`, `benchmarks/keras_models.py`, `training_step.py`,
`shares.py` and `aa.py` write, unchanged, and what `compare --experiment` writes, of its curves the losses alone. The
newest file of a machine that has its times speaks for each case in it; older ones stay as history.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from drawings import PICTURES, draw, kept
from headline import headline_section
from tables import (
    Document,
    Found,
    aa_section,
    bench_section,
    claims_section,
    shares_section,
    step_section,
    suite_section,
)

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("bench", "claims", "cpu-suite", "shares", "aa", "step", "training")
NEEDED = ("machine", "cpu", "cores", "threads", "versions", "commit", "date", "command")
BUSY = 0.5  # load a core, above which times are too long


def kind_of(document: Mapping[str, Any]) -> str:
    """One of KINDS; raises ValueError for anything else and for a file that lacks its provenance."""
    rows, origin = document.get("rows"), document.get("provenance")
    if "curves" in document:
        kind = "training"
    else:
        kind = _kind_of_rows(document, rows[0]) if isinstance(rows, list) and rows else ""
    if not kind or not isinstance(origin, dict):
        raise ValueError(
            "no rows with their provenance; allowed: what inception-fast bench, claims or compare --experiment or "
            "benchmarks/aa.py or shares.py wrote"
        )
    missing = [key for key in NEEDED if key not in origin]
    if missing:
        raise ValueError(f"its provenance lacks {', '.join(missing)}")
    return kind


def _kind_of_rows(document: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if "runtime" in row and "peak_bytes" in row:
        return "step"
    if "runtime" in row:
        return "cpu-suite" if "peak_gflops" in document else "bench"
    if "shared_by" in row:
        return "shares"
    if "claim" in row:
        return "claims"
    if "false_alarms" in document:
        return "aa"
    return "training" if (document.get("about") or {}).get("name") and "loss" in row else ""


def compacted(document: Document) -> Document:
    """A comparison as it is filed: the losses of every run in a list, rounded to six digits, in place of its rows."""
    curves: dict[tuple[str, int], list[float]] = {}
    for row in document["rows"]:
        losses = curves.setdefault((row["model"], row["seed"]), [])
        losses.append(float(f"{row['loss']:.6g}"))
        if row["step"] != len(losses):
            raise ValueError(f"step {row['step']} of {row['model']} follows {len(losses) - 1}; allowed: all in order")
    filed = {key: value for key, value in document.items() if key != "rows"}
    return filed | {"curves": [{"model": m, "seed": s, "loss": losses} for (m, s), losses in curves.items()]}


def file_result(source: Path, results: Path) -> Path:
    """Copies a result to results/<machine>/<date>-<kind>.json and returns the copy; the same run is filed once.

    Raises ValueError for a quick run and for one on a busy machine, which show that it works, not how fast. A training
    ends where it ends on a busy machine too.
    """
    text = source.read_text(encoding="utf-8")
    document = json.loads(text)
    kind, origin = kind_of(document), document["provenance"]
    if "--quick" in origin["command"].split():
        raise ValueError(f"{source}: a run with --quick; allowed: full ones")
    busy = (origin.get("load") or 0.0) > BUSY * origin["cores"] + origin["threads"]
    if busy and kind != "training":
        raise ValueError(f"{source}: load {origin['load']} on {origin['cores']} cores; allowed: an idle machine")
    name = kind
    if kind == "training":
        name += f"-{slug(document['about']['name'])}"
        text = json.dumps(document if "curves" in document else compacted(document), separators=(",", ":")) + "\n"
    folder = results / slug(f"{origin['cpu']} {origin['cores']} cores")
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        target = folder / f"{origin['date'][:10]}-{name}{'' if number == 1 else f'-{number}'}.json"
        if not target.exists():
            target.write_text(text, encoding="utf-8")
            return target
        if target.read_text(encoding="utf-8") == text:
            return target
        number += 1


def slug(text: str) -> str:
    """Lower-case words with hyphens between them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read_results(results: Path) -> list[tuple[Path, str, Document]]:
    """(file, kind, document) of every filed result that is shown, oldest first; other files are not for it."""
    found = []
    shown = re.compile(r"\d-(bench|claims|cpu-suite|shares|aa|step)(-\d+)?\.json$")
    for path in (p for p in results.glob("*/*.json") if shown.search(p.name)):
        document = json.loads(path.read_text(encoding="utf-8"))
        found.append((path, kind_of(document), document))
    return sorted(found, key=lambda item: (item[2]["provenance"]["date"], item[0].name))


def rewritten(page: str, text: str, found: Found, root: Path) -> str:
    """A page with its marked sections as the files say; ValueError where a pair of markers is missing or twice."""
    up = "../" * page.count("/")
    for name, section in PAGES[page].items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} has {text.count(begin)} of {begin} and {text.count(end)} of {end}; allowed: 1")
        before, rest = text.split(begin)
        table = section(found, root).replace("](benchmarks/", f"]({up}benchmarks/")
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


ARTICLE = (  # of the claims those that README shows, on what the package began with
    "two_3x3_for_5x5_macs", "two_3x3_for_5x5_time", "asymmetric_3_macs", "asymmetric_3_time", "asymmetric_3_l1_misses",
    "asymmetric_7_l1_misses", "reduction_parallel_bottleneck", "reduction_pool_conv_time", "batchnorm_rate",
    "batchnorm_scale", "label_smoothing", "residual", "residual_v4",
)  # fmt: skip
PAGES: dict[str, dict[str, Callable[[Found, Path], str]]] = {
    "README.md": {"headline": headline_section, "article": partial(claims_section, ids=ARTICLE)},
    "docs/results.md": {
        "results": bench_section,
        "cpu-suite": suite_section,
        "shares": shares_section,
        "step": step_section,
        "keras": partial(bench_section, keras=True),
        "aa": aa_section,
        "claims": claims_section,
    },
}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results to file first")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page has drifted")
    args = parser.parse_args(arguments)
    results = root / "benchmarks" / "results"
    try:
        if args.check and args.files:
            raise ValueError("--check changes nothing; give no files with it")
        for source in args.files:
            print(f"filed: {file_result(source, results).relative_to(root)}")
        found = read_results(results)
        texts = {page: (root / page).read_text(encoding="utf-8") for page in PAGES}
        wanted = {page: rewritten(page, text, found, root) for page, text in texts.items()}
    except (ValueError, OSError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    drifted = [page for page in PAGES if texts[page] != wanted[page]]
    numbers = {name: picture.numbers(found, results) for name, picture in PICTURES.items()}
    stale = [name for name in PICTURES if numbers[name] != kept(root / name)]
    if args.check:
        names = ", ".join([*drifted, *stale])
        print(f"drifted: {names}; run benchmarks/publish.py" if names else "all pages are what the files say")
        return int(bool(names))
    for page, text in wanted.items():
        (root / page).write_text(text, encoding="utf-8")
    for name in stale:
        if numbers[name] is not None:
            draw(PICTURES[name].figure(numbers[name]), numbers[name], root / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
