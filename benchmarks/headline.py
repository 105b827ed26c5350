"""What README shows first of the filed benchmarks: one image by each network.

Of the machine that was timed last, the newest file for each network and number format in which ours and a peer have
times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import KERAS, UNMEASURED, Case, Found, case_of, line

from inception_fast.measure.peers import Layers, Ours, OursWinograd

MODELS = (
    "inception_v1", "inception_v2", "inception_v3", "inception_v4", "inception_resnet_v1", "inception_resnet_v2",
)  # fmt: skip
OWN = (Ours.name, OursWinograd.name, Layers().name, Layers(winograd=True).name)
Rows = dict[str, Mapping[str, Any]]  # by runtime


def newest_cases(found: Found) -> tuple[dict[Case, Rows], list[tuple[Path, dict[str, Any]]]]:
    """The rows of one image by network and format, networks in MODELS' order, and the files that they are from."""
    files = [(path, document) for path, kind, document in found if kind == "bench" and _plain(document)]
    if not files:
        return {}, []
    machine = files[-1][0].parent
    cases: dict[Case, tuple[Rows, Path]] = {}
    for path, document in files:
        if path.parent != machine:
            continue
        rows: dict[Case, Rows] = {}
        for row in document["rows"]:
            if row["batch"] == 1 and row["median_ms"] is not None and row["model"] in MODELS:
                rows.setdefault(case_of(row), {})[row["runtime"]] = row
        timed = {case: own for case, own in rows.items() if Ours.name in own and own.keys() - OWN}
        cases |= {case: (own, path) for case, own in timed.items()}
    ordered = sorted(cases, key=lambda case: (MODELS.index(case[0]), case[2] != "float32"))
    used = {path for _, path in cases.values()}
    return {case: cases[case][0] for case in ordered}, [item for item in files if item[0] in used]


def _plain(document: Mapping[str, Any]) -> bool:
    """Whether images have the networks' own size, on all threads, and the models are ours and not those in Keras."""
    words = re.split(r"[ =]", document["provenance"]["command"])
    own = any(not row["model"].endswith(KERAS) for row in document["rows"])
    return own and not {"--image-size", "--threads", "--image"} & set(words)


def headline_section(found: Found, root: Path) -> str:
    """A row for each network and format: ours, ours by tiles, and the peer that is fastest."""
    cases, files = newest_cases(found)
    if not cases:
        return UNMEASURED
    head = [
        "network",
        "format",
        "`optimize`",
        "`winograd=True`",
        "fastest peer",
        "its time over ours",
        "over `winograd`",
    ]
    lines = [line(head), "|---|---|--:|--:|---|--:|--:|"]
    for (model, _, dtype), rows in cases.items():
        ours, tiles = rows[Ours.name], rows.get(OursWinograd.name)
        best = min((row for name, row in rows.items() if name not in OWN), key=lambda row: row["median_ms"])
        doubt = "~" if best["established"] is False else ""
        lines.append(line([
            f"`{model}`", dtype, f"{ours['median_ms']:.1f} ms", f"{tiles['median_ms']:.1f} ms" if tiles else "-",
            f"{best['runtime']}, {best['median_ms']:.1f} ms", f"{doubt}{best['ratio']:.2f}",
            f"{best['median_ms'] / tiles['median_ms']:.2f}" if tiles else "-",
        ]))  # fmt: skip
    origin = files[-1][1]["provenance"]
    remark = (
        f"One image on {origin['threads']} threads, {origin['machine']}; medians, ~: within the noise of the run. The "
        "last column divides two medians of one run."
    )
    sources = [
        f"{document['provenance']['date'][:10]}, [{path.name}]({path.relative_to(root).as_posix()}): "
        f"`{document['provenance']['command']}`."
        for path, document in files
    ]
    return "\n".join([*lines, "", remark, *sources])
