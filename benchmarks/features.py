"""FID features of a folder of JPEGs, from files to an array: ours beside torch-fidelity and pytorch-fid.

    python benchmarks/features.py --images 1024 --size 256 --rounds 5 --out benchmarks/results/MACHINE/features.json

All run in this process with the same number of threads and of decoding processes, in rounds of a new order each; models
are made before. Where features differ from those of the packages, nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import references
from inception_fast.features.extractors import FidExtractor
from inception_fast.features.sources import open_source
from inception_fast.features.stream import Clock, stream
from inception_fast.images import sample_photos
from inception_fast.measure.machine import provenance
from inception_fast.measure.results import write_json
from inception_fast.measure.timer import summarise
from numerics import BF16_FEATURES, FEATURES_MAX, NET_WINOGRAD_MAX, rel_l2

Job = Callable[[], np.ndarray]
OURS = {
    "float32": FEATURES_MAX,
    "float32+winograd": NET_WINOGRAD_MAX,
    "bfloat16": BF16_FEATURES,
    "bfloat16+winograd": BF16_FEATURES,
}
"""By the name of our arithmetic what its features may err: of the largest one in float32, of their norm in bfloat16."""


def write_folder(folder: Path, count: int, size: int) -> None:
    """`count` JPEGs of size x size, cut from photographs at places that a seed decides."""
    photos, draw = [photo.image for photo in sample_photos()], random.Random(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        side = draw.randint(min(photo.size) // 3, min(photo.size))
        left, top = (draw.randint(0, length - side) for length in photo.size)
        cut = photo.crop((left, top, left + side, top + side)).resize((size, size))
        cut.save(folder / f"{i:06d}.jpg", quality=90)


def ours(folder: Path, weights: Path, args: argparse.Namespace, clocks: dict[str, Clock]) -> Iterator[tuple[str, Job]]:
    source = open_source(str(folder))
    for name in OURS:
        dtype = torch.bfloat16 if name.startswith("bfloat16") else None
        extractor = FidExtractor(str(weights), dtype, winograd=name.endswith("+winograd"))

        def run(name: str = name, extractor: FidExtractor = extractor) -> np.ndarray:
            clock = clocks[name] = Clock()
            options: dict[str, Any] = {"batch_size": args.batch_size, "workers": args.workers, "clock": clock}
            return np.concatenate([batch.values for batch in stream(source, extractor, **options)])

        yield f"inception_fast {name}", run


def torch_fidelity(folder: Path, weights: Path, args: argparse.Namespace) -> Job:
    """With its own number of decoding processes, which cannot be set: twice the cores, four at most."""
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import get_featuresdict_from_dataset

    net = FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(weights))
    files = [str(path) for path in sorted(folder.iterdir())]

    def run() -> np.ndarray:
        data = ImagesPathDataset(files)
        found = get_featuresdict_from_dataset(data, net, args.batch_size, False, False, False)
        values: np.ndarray = found["2048"].numpy()
        return values

    return run


def pytorch_fid(folder: Path, weights: Path, args: argparse.Namespace) -> Job:
    from pytorch_fid import fid_score, inception

    held, inception.load_state_dict_from_url = inception.load_state_dict_from_url, lambda *_, **__: torch.load(weights)
    net = inception.InceptionV3([3])
    inception.load_state_dict_from_url = held
    files = sorted(folder.iterdir())

    def run() -> np.ndarray:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            found: np.ndarray = fid_score.get_activations(files, net, args.batch_size, 2048, "cpu", args.workers)
        return found

    return run


def check(found: dict[str, np.ndarray], folder: Path, weights: Path) -> dict[str, float]:
    """The error of each of ours, float32 against both packages. Raises SystemExit where one is over its budget."""
    errors, budgets = {}, {"pytorch-fid": FEATURES_MAX}
    reference = found["torch-fidelity"].astype(np.float64)
    other = FidExtractor(str(weights), preprocessing="pytorch-fid")
    first = next(iter(stream(open_source(str(folder)), other, range(min(8, len(reference)))))).values
    errors["pytorch-fid"] = references.relative(first, found["pytorch-fid"][: len(first)])
    for arithmetic, budget in OURS.items():
        name = f"inception_fast {arithmetic}"
        values, rounded = found[name], arithmetic.startswith("bfloat16")
        exact = torch.from_numpy(reference)
        errors[name] = rel_l2(torch.from_numpy(values), exact) if rounded else references.relative(values, reference)
        budgets[name] = budget
    for name, error in errors.items():
        if error > budgets[name]:
            raise SystemExit(f"{name}: features differ by {error:.3g}; nothing is timed")
    return errors


def timed(jobs: dict[str, Job], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, the order drawn anew each time."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    order, draw = list(jobs), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:32} {seconds[name][-1]:8.2f} s", file=sys.stderr, flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, help="JPEGs of one size (default: cut from scikit-learn's photographs)")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    references.torchvision()
    with tempfile.TemporaryDirectory() as place:
        folder, weights = args.folder or Path(place) / "images", Path(place) / "weights.pth"
        torch.save(references.fid_net().state_dict(), weights)
        if args.folder is None:
            folder.mkdir()
            write_folder(folder, args.images, args.size)
        clocks: dict[str, Clock] = {}
        jobs = dict(ours(folder, weights, args, clocks))
        jobs |= {"torch-fidelity": torch_fidelity(folder, weights, args)}
        jobs |= {"pytorch-fid": pytorch_fid(folder, weights, args)}
        errors = check({name: job() for name, job in jobs.items()}, folder, weights)
        seconds = timed(jobs, args.rounds)
        count = len(open_source(str(folder)).names)
    report(args, count, seconds, errors, clocks)


def report(
    args: argparse.Namespace,
    count: int,
    seconds: dict[str, list[float]],
    errors: dict[str, float],
    clocks: dict[str, Clock],
) -> None:
    """Prints the table and writes the file: `speedup` is the faster peer's median time over the runtime's, and what
    `clocks` hold is of the last round.
    """
    medians = {name: summarise(values).median for name, values in seconds.items()}
    best = min(medians["torch-fidelity"], medians["pytorch-fid"])
    rows = []
    for name, values in seconds.items():
        clock = clocks.get(name.rpartition(" ")[2])
        rows.append(
            {
                "runtime": name,
                "images_per_second": count / medians[name],
                "median_s": medians[name],
                "iqr_s": summarise(values).iqr,
                "speedup": best / medians[name],
                "rel_error": errors.get(name),
                "waiting_s": clock.waiting if clock else None,
                "computing_s": clock.computing if clock else None,
            }
        )
        share = f", {100 * clock.waiting / values[-1]:.0f} % waiting for images" if clock else ""
        print(f"{name:32} {count / medians[name]:8.1f} images/s  {best / medians[name]:5.2f}x{share}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: getattr(args, key) for key in ("size", "batch_size", "threads", "workers", "rounds")}
        command = shlex.join(["python", "benchmarks/features.py", *sys.argv[1:]])
        origin = provenance(args.threads, sys.argv[1:]) | {"command": command}
        write_json(args.out, {"rows": rows, "images": count, "settings": settings, "provenance": origin})


if __name__ == "__main__":
    main()
