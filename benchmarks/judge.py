"""Judges the filed trainings by the rules as they are now, and puts the verdicts into their machine's newest claims.

    python benchmarks/judge.py            rewrites those rows; then run benchmarks/publish.py
    python benchmarks/judge.py --check    exit code 1 where a filed row is not what the rules say

A training and what it is judged by are two things: when a rule changes, no machine has to train again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from inception_fast.claims.context import Context
from inception_fast.claims.training import EXPERIMENTS, JUDGES, read_comparisons
from inception_fast.measure.machine import commit
from inception_fast.measure.results import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of claims, by id, that the trainings filed in `folder` give today."""
    trained = read_comparisons(folder)
    context = Context(folder, trained=trained)
    rows = [judge(context, EXPERIMENTS[name], found) for name, found in trained.items() for judge in JUDGES[name]]
    return {row.id: json.loads(json.dumps(row.as_json())) for row in rows}


def judged(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest claims of a machine, their document as it should be, and the ids of the rows that it changes."""
    files = [path for path in folder.glob("*-claims*.json") if re.search(r"\d-claims(-\d+)?\.json$", path.name)]
    documents = {path: json.loads(path.read_text(encoding="utf-8")) for path in files}
    newest = max(files, key=lambda path: documents[path]["provenance"]["date"])
    document, rows = documents[newest], rows_of(folder)
    changed = [row["id"] for row in document["rows"] if rows.get(row["id"], row) != row]
    document["rows"] = [rows.get(row["id"], row) for row in document["rows"]]
    return newest, document, changed


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(arguments)
    found = 0
    for folder in sorted({path.parent for path in results.glob("*/*-training-*.json")}):
        path, document, changed = judged(folder)
        print(f"{path.relative_to(results)}: {', '.join(changed) or 'nothing'} to change")
        if changed and not args.check:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            before = (document["provenance"].get("judged") or {}).get("rows", [])  # these stay judged again
            rows = list(dict.fromkeys([*before, *changed]))
            document["provenance"]["judged"] = {"date": now, "commit": commit(), "rows": rows}
            write_json(path, document)
        found += len(changed)
    return int(args.check and found > 0)


if __name__ == "__main__":
    sys.exit(main())
