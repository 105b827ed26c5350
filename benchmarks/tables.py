"""The tables of the filed results, each a function from what was filed to the text of a marked section.

A section takes (file, kind, document) of every filed result, oldest first, and the root that files are named from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inception_fast.claims.page import number
from inception_fast.measure.timer import FLOOR, holm

OURS = "inception_fast"
KERAS = " in Keras"  # behind the names of models that benchmarks/keras_models.py times
UNMEASURED = "Not yet measured: no run on an idle machine has been published."

Document = dict[str, Any]
Case = tuple[str, int, str]  # model, batch, dtype
Found = Sequence[tuple[Path, str, Document]]


def bench_section(found: Found, root: Path, keras: bool = False) -> str:
    """A table for each file that still speaks for a case on its machine, the newest file first.

    A newer file takes a case over where it has a time of every runtime that the older one has a time of: none that is
    ahead is lost, and no failure hides a time. keras: of the models run by Keras, or of the others.
    """
    speaks: dict[tuple[object, ...], dict[Path, set[str]]] = {}
    for path, kind, document in found:
        if kind == "bench":
            for case in _cases(document["rows"], keras):
                timed = {r["runtime"] for r in document["rows"] if case_of(r) == case and r["median_ms"] is not None}
                older = speaks.setdefault(_question(path, document, case), {})
                for file in [file for file, held in older.items() if held <= timed]:
                    del older[file]
                older[path] = timed
    parts = []
    for path, kind, document in reversed(found):
        if kind == "bench":
            cases = [c for c in _cases(document["rows"], keras) if path in speaks[_question(path, document, c)]]
            if cases:
                parts.append(_bench_table(cases, document, path.relative_to(root)))
    return "\n\n".join(parts) or UNMEASURED


def _question(path: Path, document: Document, case: Case) -> tuple[object, ...]:
    """What two files that answer it have in common: the machine, the threads, the network on images of one size."""
    return path.parent.name, document["provenance"]["threads"], _image_size(document, case[0]), case


def _image_size(document: Document, model: str) -> int | None:
    return (document.get("models", {}).get(model) or {}).get("image_size")


def case_of(row: Mapping[str, Any]) -> Case:
    return row["model"], row["batch"], row["dtype"]


def _cases(rows: Iterable[Mapping[str, Any]], keras: bool) -> list[Case]:
    wanted = (row for row in rows if row["model"].endswith(KERAS) == keras)
    return list(dict.fromkeys(map(case_of, wanted)))


def _bench_table(cases: Sequence[Case], document: Document, path: Path) -> str:
    rows = {(case_of(r), r["runtime"]): r for r in document["rows"]}
    runtimes = [OURS, *dict.fromkeys(r["runtime"] for r in document["rows"] if r["runtime"] != OURS)]
    head = ["model", "batch", "format", *runtimes, "rel. error"]
    lines = [line(head), "|---|--:|---|" + "--:|" * (len(runtimes) + 1)]
    notes: dict[str, None] = {}
    resized = any(word.startswith("--image-size") for word in document["provenance"]["command"].split())
    for case in cases:
        model, batch, dtype = case
        side = f" {_image_size(document, model)}x{_image_size(document, model)}" if resized else ""
        cells = [f"`{model.removesuffix(KERAS)}`{side}", str(batch), dtype]
        for name in runtimes:
            row = rows.get((case, name))
            cells.append(_time(row))
            notes |= dict.fromkeys(_notes(row))
        mine = rows.get((case, OURS))
        error = mine["rel_error"] if mine else None
        lines.append(line([*cells, "-" if error is None else f"{error:.1e}"]))
    remarks = [
        "Milliseconds a call, the median and in brackets its time over ours; ~: within the noise of the run. The error "
        "is ours against float64." + _apart(document["rows"]),
        origin_of(document["provenance"], path),
    ]
    return "\n".join([*lines, "", *remarks, *([""] if notes else []), *(f"- {note}" for note in notes)])


def _notes(row: Mapping[str, Any] | None) -> list[str]:
    """What is said of a row that is not ok."""
    if row is None or row.get("status", "ok") == "ok":
        return []
    said = row.get("note") or f"its loss is off by {row.get('loss_error', 0):.1e}"
    return [f"{row['runtime']}, {row['dtype']}: {row['status']}: {said}"]


def _time(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["median_ms"] is None or row.get("status", "ok") != "ok":
        return str(row["status"])
    text = f"{row['median_ms']:.2f}" if row["median_ms"] < 100 else f"{row['median_ms']:.1f}"
    if row["runtime"] == OURS:
        return f"**{text}**"
    doubt = "~" if row.get("established") is False else ""
    return f"{text} ({doubt}{row['ratio']:.2f}x)"


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _apart(rows: Iterable[Mapping[str, Any]]) -> str:
    """How far the cores were from each other; nothing of files from before that was measured."""
    found = sorted(row["handover_ns"] for row in rows if row.get("handover_ns"))
    if not found:
        return ""
    return f" What one core writes, another saw after {found[0]:.0f} to {found[-1]:.0f} ns, by the medians of the rows."


def origin_of(origin: Mapping[str, Any], path: Path) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return (
        f"From [{path.as_posix()}]({path.as_posix()}): {origin['machine']}, threads {origin['threads']}, "
        f"load {origin.get('load')}, {origin['date'][:10]}, commit {(origin['commit'] or 'unknown')[:10]}; {versions}; "
        f"`{origin['command']}`.{_judged(origin)}"
    )


def _judged(origin: Mapping[str, Any]) -> str:
    """What benchmarks/judge.py noted in the file."""
    if "judged" not in origin:
        return ""
    note = origin["judged"]
    rows = ", ".join(f"`{row}`" for row in note["rows"])
    return f" Judged again by later rules, {note['date'][:10]}, commit {(note['commit'] or 'unknown')[:10]}: {rows}."


def newest(found: Found, kind: str) -> list[tuple[Path, Document]]:
    """Of each machine the newest result of one kind."""
    newest = {path.parent.name: (path, document) for path, k, document in found if k == kind}
    return list(newest.values())


def claims_section(found: Found, root: Path, ids: Collection[str] | None = None) -> str:
    """The newest report of claims of each machine, of all or some ids, without what is only listed as published."""
    parts = []
    for path, document in newest(found, "claims"):
        lines = [line(["claim", "stated", "measured", "unit", "verdict"]), "|---|--:|--:|---|---|"]
        for row in document["rows"]:
            if row["verdict"] != "published" and (ids is None or row["id"] in ids):
                figures = [number(row["stated"]), number(row["measured"])]
                lines.append(line([_cell(row["claim"]), *figures, _cell(row["unit"]), row["verdict"]]))
        parts.append("\n".join([*lines, "", origin_of(document["provenance"], path.relative_to(root))]))
    return "\n\n".join(parts) or UNMEASURED


def suite_section(found: Found, root: Path) -> str:
    """The newest CPU suite of each machine: every network with its share of the peak, then what fused pairs save."""
    return "\n\n".join(_suite(path, document, root) for path, document in newest(found, "cpu-suite")) or UNMEASURED


def _suite(path: Path, document: Document, root: Path) -> str:
    rows = {(case_of(r), r["runtime"]): r for r in document["rows"]}
    runtimes = [OURS, *dict.fromkeys(r["runtime"] for r in document["rows"] if r["runtime"] != OURS)]
    lines = [line(["model", "batch", "format", *runtimes, "of the peak"])]
    lines.append("|---|--:|---|" + "--:|" * (len(runtimes) + 1))
    for case in _cases(document["rows"], False):
        share = (rows.get((case, OURS)) or {}).get("peak_share")
        cells = [f"`{case[0]}`", str(case[1]), case[2], *(_time(rows.get((case, name))) for name in runtimes)]
        lines.append(line([*cells, "-" if share is None else f"{100 * share:.0f} %"]))
    peaks = " and ".join(f"{gflops:,.0f} in {dtype}" for dtype, gflops in document["peak_gflops"].items())
    lines += [
        "",
        f"As above. The peak is that of arithmetic on registers, GFLOP/s: {peaks}, {document['tier']}."
        + _apart(document["rows"]),
        *_pairs(document["pairs"]),
        origin_of(document["provenance"], path.relative_to(root)),
    ]
    return "\n".join(lines)


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What one operator for a pair saves, by batch size and format: worst, middle, best; and the same over oneDNN."""
    said = []
    for batch, dtype in dict.fromkeys((p["batch"], p["dtype"]) for p in pairs):
        some = [p for p in pairs if (p["batch"], p["dtype"]) == (batch, dtype)]
        gain = sorted(p["separate_us"] / p["fused_us"] for p in some)
        taken = sorted(p["onednn_us"] / p["fused_us" if p["fused"] else "separate_us"] for p in some)
        middle = len(some) // 2
        mixed = sorted(p["mixed_us"] / p["fused_us" if p["fused"] else "separate_us"] for p in some if "mixed_us" in p)
        said.append(
            f"- {len(some)} asymmetric pairs, {batch} image{'s' if batch > 1 else ''}, {dtype}: two convolutions take "
            f"{gain[0]:.2f} to {gain[-1]:.2f} times the fused operator's time, {gain[middle]:.2f} in the middle; "
            f"oneDNN {taken[0]:.2f} to {taken[-1]:.2f} times that of the form that plans take"
            + (
                f", whose first call after one of oneDNN's takes {mixed[0]:.2f} to {mixed[-1]:.2f} times."
                if mixed
                else "."
            )
        )
    return ["", *said, ""] if said else []


def step_section(found: Found, root: Path) -> str:
    """The newest training step of each machine: times over ours, and the most bytes that a step's tensors take."""
    parts = []
    for path, document in newest(found, "step"):
        lines = [line(["model", "images", "format", "runtime", "time", "peak MB"]), "|---|---|---|---|--:|--:|"]
        notes = [note for row in document["rows"] for note in _notes(row)]
        for row in _steps_judged(document["rows"]):
            side = f"{row['batch']} of {row['size']}x{row['size']}"
            cells = [f"`{row['model']}`", side, row["dtype"], row["runtime"], _time(row)]
            lines.append(line([*cells, f"{row['peak_bytes'] / 1e6:.0f}"]))
        remark = "Milliseconds a step, the median and in brackets its time over the plain layers'; ~: within the noise."
        said = [remark, origin_of(document["provenance"], path.relative_to(root)), *([""] if notes else [])]
        parts.append("\n".join([*lines, "", *said, *(f"- {note}" for note in notes)]))
    return "\n\n".join(parts) or UNMEASURED


def _steps_judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of training steps with what `timer.contrasts` would say of each: established, or within the noise."""
    verdicts: dict[int, bool] = {}
    for case in dict.fromkeys(map(case_of, rows)):
        own = [row for row in rows if case_of(row) == case]
        ours = max(row["noise"] for row in own if row["runtime"] == OURS)
        rivals = [row for row in own if row["runtime"] != OURS]
        for row, beyond in zip(rivals, holm([row["p_value"] for row in rivals]), strict=True):
            verdicts[id(row)] = beyond and abs(row["ratio"] - 1) > max(FLOOR, ours, row["noise"])
    return [{**row, "established": verdicts.get(id(row))} for row in rows]


def shares_section(found: Found, root: Path) -> str:
    """How many times one thread's speed others would have on cores of their own, of the newest study of a machine."""
    parts = []
    for path, document in newest(found, "shares"):
        counts = sorted({row["shared_by"] for row in document["rows"]} - {1})
        lines = [line(["model", "images", "format", *(f"{n} threads" for n in counts)])]
        lines.append("|---|--:|---|" + "--:|" * len(counts))
        cases: dict[tuple[Any, ...], dict[int, float]] = {}
        for row in document["rows"]:
            form = row["dtype"] + (", Winograd" if row["winograd"] else "")
            cases.setdefault((row["model"], row["batch"], form), {})[row["shared_by"]] = row["speedup"]
        for (model, batch, form), speedups in cases.items():
            lines.append(line([f"`{model}`", str(batch), form, *(f"{speedups[n]:.1f}" for n in counts)]))
        said = f"Times the speed of one thread; {document['tier']}."
        parts.append("\n".join([*lines, "", said, origin_of(document["provenance"], path.relative_to(root))]))
    return "\n\n".join(parts) or UNMEASURED


def aa_section(found: Found, root: Path) -> str:
    """What the newest A/A study of each machine says."""
    said = []
    for path, document in newest(found, "aa"):
        origin = origin_of(document["provenance"], path.relative_to(root))
        said.append(
            f"The same code against itself, {document['runs']} times: {document['false_alarms']} false alarms, where "
            f"{document['allowed_percent']:g} in 100 are allowed. {origin}"
        )
    return "\n\n".join(said) or UNMEASURED


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
