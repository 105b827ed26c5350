"""Makes what the queue measured what the package chooses by.

    python benchmarks/gpu/ship.py OUT/result.json

Files the slice's own results under benchmarks/results/<GPU>/ (what it took over from former slices is filed by these),
and puts the rows measured there into the shipped tables, each in place of an older one for the same shape: which
shapes run on the CUDA kernels and how, which networks as a walk (kernels/cuda/choices.json), and Triton's tiles and
forms (kernels/triton/configs.json). Rows of jobs that are red are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from catalogue import LAYERS
from inception_fast.kernels.cuda import choices
from inception_fast.kernels.triton import configs
from store import is_whole

from inception_fast.engine import gpu_walk
from inception_fast.measure.results import write_text

ROOT = Path(__file__).resolve().parents[2]
CHOOSING = ("hopper", "tiles", "network")  # kinds of jobs: single layers, then networks' own shapes, then walks
TILING = ("tune", "tiles")
AS_MADE = "as made"  # a walk as plans have it; its jobs are timed by other cuts as well


def main(argv: Sequence[str], root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("result", type=Path, help="the result.json of a slice")
    args = parser.parse_args(argv)
    try:
        document = own(read(args.result))
        cuts, tiles, seconds = list(cuts_of(document)), list(tiles_of(document)), seconds_of(document)
    except ValueError as error:
        parser.error(str(error))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        parser.error(f"{args.result} holds a row that is none of the queue's: {type(error).__name__}: {error}")
    filed = file_result(document, root / "benchmarks" / "results")
    about = {"origin": f"measured: {filed.relative_to(root).as_posix()}"}
    file = root / "kernels" / "cuda" / "choices.json"
    shipped = choices.read(file)
    chosen = weighed(merged(shipped, cuts, 2), {row[:2] for row in cuts}, seconds, document["machine"]["name"])
    if chosen != shipped:
        choices.write(file, chosen, about)
    if tiles:
        file = root / "kernels" / "triton" / "configs.json"
        rest = {"origin": f"{about['origin']}; rows without seconds are predicted by the cost model of configs.py"}
        configs.write(file, merged(configs.read(file), tiles, 5), rest)
    won = sum(row.seconds < row.against for row in cuts)
    print(f"{filed}: {len(cuts)} shapes of the CUDA kernels, faster in {won}; {len(tiles)} tiles of Triton")
    return 0


def read(file: Path) -> dict[str, Any]:
    """Raises ValueError for what is no result of the queue on a GPU."""
    try:
        document = json.loads(file.read_text())
        json.dumps(document, allow_nan=False)  # as it is filed: other programs may have written NaN
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}; allowed: the result.json of a slice") from error
    machine = document.get("machine") if isinstance(document, dict) else None
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(machine, dict) or not isinstance(machine.get("name"), str) or not isinstance(results, dict):
        raise ValueError(f"{file} names no GPU that it was measured on; allowed: results of a slice that ran `machine`")
    if not isinstance(machine.get("date"), str) or not re.match(r"\d{4}-\d\d-\d\d", machine["date"]):
        raise ValueError(f"{file} has no date; allowed: results of this queue")
    damaged = [name for name, result in results.items() if not is_whole(result)]
    if damaged:
        raise ValueError(f"{file} holds what is no result as {', '.join(damaged[:3])}; allowed: results of this queue")
    return dict(document)


def rows_of(document: dict[str, Any], kinds: Sequence[str], key: str) -> Iterator[dict[str, Any]]:
    """Rows of these kinds of jobs that hold a `key`, in the order of the kinds, then of the jobs."""
    for kind in kinds:
        for name, result in document["results"].items():
            if name.split("/")[0] == kind and not result.get("red"):
                yield from (row for row in result.get("rows", []) if key in row)


def cuts_of(document: dict[str, Any]) -> Iterator[choices.Row]:
    """Of a shape that several jobs measured the last counts, as in `cuts.measured`."""
    for row in rows_of(document, CHOOSING, "choice"):
        yield choices.row_of(row["choice"])
    yield from walks_of(document)


def walks_of(document: dict[str, Any]) -> Iterator[choices.Row]:
    """Of each network that was timed with walks and with separate launches: by which plans choose between them."""
    for name, result in document["results"].items():
        rows = result.get("rows", [])
        host = {row["runtime"]: row["host"]["median_ms"] / 1e3 for row in rows if "host" in row}
        jobs = sum("job" in row and row.get("walk", AS_MADE) == AS_MADE for row in rows)
        if name.split("/")[0] == "walk" and not result.get("red") and jobs and {"walk", "separate"} <= set(host):
            shape = gpu_walk.shape_of(rows[0]["dtype"], rows[0]["batch"], jobs)
            gpu = document["machine"]["name"]
            yield choices.Row(gpu, shape, "walk", 1, host["walk"], host["separate"])


def tiles_of(document: dict[str, Any]) -> Iterator[configs.Row]:
    for row in rows_of(document, TILING, "row"):
        yield configs.row_of(row["row"])


def seconds_of(document: dict[str, Any]) -> dict[choices.Shape, float]:
    """What Triton takes now for convolutions of which as much is known."""
    found = {}
    for row in rows_of(document, TILING, "row"):
        _, precision, m, oc, k, _, seconds = row["row"]
        taps = taps_of(row)
        if taps and seconds:
            found[choices.Shape("conv", precision, int(m), int(oc), int(k), taps)] = seconds
    return found


def taps_of(row: dict[str, Any]) -> int:
    """Of the convolution that a row with a tile is about, which the tile does not say; 0 where nothing says it."""
    kernel = LAYERS[row["layer"]][3] if "layer" in row else re.findall(r"\bk[hw]=(\d+)", row.get("shape", ""))
    return math.prod(map(int, kernel)) if kernel else 0


def merged(older: Sequence[Any], newer: Sequence[Any], key: int) -> list[Any]:
    """The older rows but those whose first `key` values a newer one has, then the newer, of each the last."""
    last = {row[:key]: row for row in newer}
    return [row for row in older if row[:key] not in last] + list(last.values())


def weighed(
    rows: Sequence[choices.Row], fresh: Collection[Any], seconds: Mapping[choices.Shape, float], gpu: str
) -> list[choices.Row]:
    """The rows of CUDA kernels on this GPU against what Triton takes now, but for those measured in the same race."""
    old = [row.gpu == gpu and row[:2] not in fresh and row.shape in seconds for row in rows]
    return [row._replace(against=seconds[row.shape]) if late else row for row, late in zip(rows, old, strict=True)]


def own(document: dict[str, Any]) -> dict[str, Any]:
    """The document without what it took over from former slices, and each row once."""
    mine = {name: result for name, result in document["results"].items() if "of" not in result}
    return {key: value for key, value in document.items() if key not in ("rows", "status")} | {"results": mine}


def file_result(document: dict[str, Any], results: Path) -> Path:
    """results/<GPU>/<date>-gpu.json; the same result is filed once, written beside and renamed."""
    machine, text = document["machine"], json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n"
    folder = results / re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        target = folder / f"{machine['date'][:10]}-gpu{'' if number == 1 else f'-{number}'}.json"
        if not target.exists():
            write_text(target, text)
        if target.read_text() == text:
            return target
        number += 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
