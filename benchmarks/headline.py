"""What README shows first of the filed benchmarks: one image by each network, as a table and as a picture.

Both take, of the machine that was timed last, the newest file for each network and number format in which ours and a
peer have times. The picture keeps the numbers that it was drawn from, so that a test can tell whether they are still
those of the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inception_fast.measure.peers import Layers, Ours, OursWinograd
from inception_fast.measure.plots import COLOURS
from inception_fast.measure.results import write_atomically
from tables import KERAS, UNMEASURED, Case, Found, case_of, line

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


def drawn(found: Found) -> dict[str, dict[str, float]]:
    """The numbers of the picture: by network and format how many times as fast as eager PyTorch each runtime is."""
    cases, _ = newest_cases(found)
    return {
        f"{model} {dtype}": {
            name: round(rows["eager"]["median_ms"] / row["median_ms"], 3) for name, row in rows.items()
        }
        for (model, _, dtype), rows in cases.items()
        if "eager" in rows
    }


def kept(path: Path) -> dict[str, dict[str, float]] | None:
    """The numbers that a picture was drawn from; None where there is none."""
    held = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text("utf-8")) if path.exists() else None
    return json.loads(held[1]) if held else None


def picture(numbers: Mapping[str, Mapping[str, float]]):  # type: ignore[no-untyped-def]
    """A figure with a panel for each number format and a group of bars for each network."""
    from matplotlib.figure import Figure

    formats = list(dict.fromkeys(case.split()[1] for case in numbers))
    figure = Figure(figsize=(9, 2.3 * len(formats) + 0.4), layout="constrained", facecolor="white")
    handles: dict[str, Any] = {}
    for axes, dtype in zip(figure.subplots(len(formats), 1, squeeze=False)[:, 0], formats, strict=True):
        _panel(axes, {case.split()[0]: own for case, own in numbers.items() if case.split()[1] == dtype})
        axes.set_title(f"{dtype}, one image: times the speed of eager PyTorch", loc="left", fontsize=10)
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = sorted(handles, key=list(COLOURS).index)
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=len(names),
        fontsize=8,
        frameon=False,
    )
    return figure


def draw(numbers: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Writes the picture as an SVG that keeps its numbers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    described = {"Date": None, "Creator": None, "Description": json.dumps(numbers)}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "headline"}):
        canvas = FigureCanvasSVG(picture(numbers))
        write_atomically(path, lambda scratch: canvas.print_svg(scratch, metadata=described))


def _panel(axes, networks: Mapping[str, Mapping[str, float]]) -> None:  # type: ignore[no-untyped-def]
    order = [name for name in COLOURS if name != "eager" and any(name in own for own in networks.values())]
    for place, (_, own) in enumerate(networks.items()):
        present = [name for name in order if name in own]
        for i, name in enumerate(present):
            x = place + 0.8 * ((i + 0.5) / len(present) - 0.5)
            bar = axes.bar(x, own[name], 0.8 / len(present), color=COLOURS[name], label=name)
            axes.bar_label(bar, fmt="%.1f", fontsize=6)
    axes.axhline(1, color=COLOURS["eager"], linewidth=1)
    axes.set_xticks(range(len(networks)), list(networks), fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
