"""Files results under benchmarks/results/<machine>/ and writes README's tables from what lies there.

    python benchmarks/publish.py bench-results/bench.json    files it, then rewrites the tables
    python benchmarks/publish.py                             rewrites the tables
    python benchmarks/publish.py --check                     exit code 1 where README is not what the files say

Takes what `inception-fast bench`, `benchmarks/keras_models.py` and `inception-fast claims` write, unchanged. The newest
file of a machine speaks for each case in it; older ones stay as history.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "inception_fast"
KERAS = " in Keras"  # behind the names of models that benchmarks/keras_models.py times
KINDS = {"bench": "runtime", "claims": "claim"}  # of result files, by a key that only their rows have
UNMEASURED = "Not yet measured: no run on an idle machine has been published."
NEEDED = ("machine", "cpu", "cores", "threads", "versions", "commit", "date", "command")
BUSY = 0.5  # load a core, above which times are too long

Document = dict[str, Any]
Case = tuple[str, int, str]  # model, batch, dtype


def kind_of(document: Mapping[str, Any]) -> str:
    """ "bench" or "claims"; raises ValueError for anything else and for a file that lacks its provenance."""
    rows, origin = document.get("rows"), document.get("provenance")
    kind = next((k for k, key in KINDS.items() if isinstance(rows, list) and rows and key in rows[0]), None)
    if kind is None or not isinstance(origin, dict):
        raise ValueError("no rows with their provenance; allowed: what inception-fast bench or claims wrote")
    missing = [key for key in NEEDED if key not in origin]
    if missing:
        raise ValueError(f"its provenance lacks {', '.join(missing)}")
    return kind


def file_result(source: Path, results: Path) -> Path:
    """Copies a result to results/<machine>/<date>-<kind>.json and returns the copy; the same run is filed once.

    Raises ValueError for a quick run and for one on a busy machine, which show that it works, not how fast.
    """
    text = source.read_text(encoding="utf-8")
    document = json.loads(text)
    kind, origin = kind_of(document), document["provenance"]
    if "--quick" in origin["command"].split():
        raise ValueError(f"{source}: a run with --quick; allowed: full ones")
    if kind == "bench" and (origin.get("load") or 0.0) > BUSY * origin["cores"] + origin["threads"]:
        raise ValueError(f"{source}: load {origin['load']} on {origin['cores']} cores; allowed: an idle machine")
    folder = results / slug(f"{origin['cpu']} {origin['cores']} cores")
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        target = folder / f"{origin['date'][:10]}-{kind}{'' if number == 1 else f'-{number}'}.json"
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
    """(file, kind, document) of every filed bench and claims, oldest first; other files are not for README's tables."""
    found = []
    for path in (p for p in results.glob("*/*.json") if re.search(r"-(bench|claims)(-\d+)?\.json$", p.name)):
        document = json.loads(path.read_text(encoding="utf-8"))
        found.append((path, kind_of(document), document))
    return sorted(found, key=lambda item: (item[2]["provenance"]["date"], item[0].name))


def bench_section(found: Sequence[tuple[Path, str, Document]], root: Path, keras: bool = False) -> str:
    """A table for each file that is the newest to speak of a case on its machine, the newest file first.

    keras: of the models run by Keras, or of the others.
    """
    newest: dict[tuple[str, Case], Path] = {}
    for path, kind, document in found:
        if kind == "bench":
            newest.update({(path.parent.name, case): path for case in _cases(document["rows"], keras)})
    parts = []
    for path, kind, document in reversed(found):
        if kind == "bench":
            cases = [c for c in _cases(document["rows"], keras) if newest[path.parent.name, c] == path]
            if cases:
                parts.append(_bench_table(cases, document, path.relative_to(root)))
    return "\n\n".join(parts) or UNMEASURED


def _cases(rows: Iterable[Mapping[str, Any]], keras: bool) -> list[Case]:
    wanted = (row for row in rows if row["model"].endswith(KERAS) == keras)
    return list(dict.fromkeys((row["model"], row["batch"], row["dtype"]) for row in wanted))


def _bench_table(cases: Sequence[Case], document: Document, path: Path) -> str:
    rows = {((r["model"], r["batch"], r["dtype"]), r["runtime"]): r for r in document["rows"]}
    runtimes = [OURS, *dict.fromkeys(r["runtime"] for r in document["rows"] if r["runtime"] != OURS)]
    head = ["model", "batch", "format", *runtimes, "rel. error"]
    lines = [_line(head), "|---|--:|---|" + "--:|" * (len(runtimes) + 1)]
    notes: dict[str, None] = {}
    for case in cases:
        model, batch, dtype = case
        cells = [f"`{model.removesuffix(KERAS)}`", str(batch), dtype]
        for name in runtimes:
            row = rows.get((case, name))
            cells.append(_time(row))
            if row is not None and row["status"] != "ok":
                notes[f"{name}, {dtype}: {row['status']}: {row['note']}"] = None
        mine = rows.get((case, OURS))
        error = mine["rel_error"] if mine else None
        lines.append(_line([*cells, "-" if error is None else f"{error:.1e}"]))
    remarks = [
        "Milliseconds a call, the median and in brackets its time over ours; ~: within the noise of the run. The error "
        "is ours against float64.",
        _origin(document["provenance"], path),
    ]
    return "\n".join([*lines, "", *remarks, *([""] if notes else []), *(f"- {note}" for note in notes)])


def _time(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["median_ms"] is None:
        return str(row["status"])
    text = f"{row['median_ms']:.2f}" if row["median_ms"] < 100 else f"{row['median_ms']:.1f}"
    if row["runtime"] == OURS:
        return f"**{text}**"
    doubt = "~" if row.get("established") is False else ""
    return f"{text} ({doubt}{row['ratio']:.2f}x)"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _origin(origin: Mapping[str, Any], path: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return (
        f"From [{path.as_posix()}]({path.as_posix()}): {origin['machine']}, threads {origin['threads']}, "
        f"load {origin.get('load')}, {origin['date'][:10]}, commit {(origin['commit'] or 'unknown')[:10]}; {versions}; "
        f"`{origin['command']}`."
    )


def claims_section(found: Sequence[tuple[Path, str, Document]], root: Path) -> str:
    """The newest report of claims of each machine, without what is only listed as published."""
    newest = {path.parent.name: (path, document) for path, kind, document in found if kind == "claims"}
    parts = []
    for path, document in newest.values():
        lines = [_line(["claim", "stated", "measured", "unit", "verdict"]), "|---|--:|--:|---|---|"]
        for row in document["rows"]:
            if row["verdict"] != "published":
                figures = [_figure(row["stated"]), _figure(row["measured"])]
                lines.append(_line([_cell(row["claim"]), *figures, _cell(row["unit"]), row["verdict"]]))
        parts.append("\n".join([*lines, "", _origin(document["provenance"], path.relative_to(root))]))
    return "\n\n".join(parts) or UNMEASURED


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def rewritten(readme: str, results: Path, root: Path) -> str:
    """README with every marked section as the files say; ValueError where a pair of markers is missing or twice."""
    found = read_results(results)
    sections = {
        "results": bench_section(found, root),
        "keras": bench_section(found, root, keras=True),
        "claims": claims_section(found, root),
    }
    for name, section in sections.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if readme.count(begin) != 1 or readme.count(end) != 1:
            raise ValueError(
                f"README has {readme.count(begin)} of {begin} and {readme.count(end)} of {end}; allowed: 1"
            )
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{section}\n{end}{rest.split(end)[1]}"
    return readme


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="bench.json or claims.json to file first")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README has drifted")
    args = parser.parse_args(arguments)
    results, readme = root / "benchmarks" / "results", root / "README.md"
    try:
        if args.check and args.files:
            raise ValueError("--check changes nothing; give no files with it")
        for source in args.files:
            print(f"filed: {file_result(source, results).relative_to(root)}")
        text = readme.read_text(encoding="utf-8")
        wanted = rewritten(text, results, root)
    except (ValueError, OSError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    if args.check:
        print("README is what the files say" if text == wanted else "README has drifted; run benchmarks/publish.py")
        return int(text != wanted)
    readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
