"""Cache misses of single layers: cachegrind on the native driver, beside a model of reuse distances.

The misses of one call in the steady state are those of a run with several calls less those of a run with one, divided
by the calls between them: set-up, packing and the cold first call cancel.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

LINE = 64  # bytes
CHUNK, PANEL = 288, 16  # of the kernels in float32: the longest sum of a chunk, the columns of a panel under AVX2
COUNTS = ("Dr", "D1mr", "DLmr", "Dw", "D1mw", "DLmw")


@dataclass(frozen=True)
class Caches:
    """Bytes and ways of the simulated level 1 data cache and last level, 64-byte lines.

    cachegrind has two levels: one between them is simulated as the last level of a run of its own.
    """

    l1: int = 32 << 10
    l1_ways: int = 8
    last: int = 1 << 20
    last_ways: int = 16

    def flags(self) -> list[str]:
        return [f"--D1={self.l1},{self.l1_ways},{LINE}", f"--LL={self.last},{self.last_ways},{LINE}"]


@dataclass(frozen=True)
class Layer:
    """A stride 1 convolution "conv" of kh x kw, or 1 x kw and kh x 1 in its place, padded to the same size, float32.

    The two are a "pair" in sequence, "fused" into one operator that takes an image at a time, or "separate": each
    called again and again by itself, the counts of both added.
    """

    kind: str
    h: int
    w: int
    c: int
    oc: int
    kh: int
    kw: int
    mid: int = 0
    n: int = 1

    def convs(self) -> list[tuple[int, int, int, int]]:
        """(c, oc, kh, kw) of each convolution."""
        if self.kind == "conv":
            return [(self.c, self.oc, self.kh, self.kw)]
        return [(self.c, self.mid, 1, self.kw), (self.mid, self.oc, self.kh, 1)]

    def alone(self) -> list[Layer]:
        """Each of its convolutions as a layer of its own."""
        return [Layer("conv", self.h, self.w, c, oc, kh, kw, mid=0, n=self.n) for c, oc, kh, kw in self.convs()]

    def bytes(self) -> int:
        """Of all maps and weights: what a level must hold for the next call to miss nothing in it."""
        convs, pixels = self.convs(), self.n * self.h * self.w
        maps = pixels * self.c + sum(pixels * oc for _, oc, _, _ in convs)
        if self.kind == "fused":
            maps -= (self.n - 1) * self.h * self.w * self.mid
        return 4 * (maps + sum(c * oc * kh * kw for c, oc, kh, kw in convs))

    def arguments(self) -> list[str]:
        sizes = {"n": self.n, "h": self.h, "w": self.w, "c": self.c, "oc": self.oc, "kh": self.kh, "kw": self.kw}
        return [f"kind={self.kind}", f"mid={max(self.mid, 1)}", *(f"{key}={value}" for key, value in sizes.items())]


@dataclass(frozen=True)
class Misses:
    """Of one call: data accesses, and those of them that miss the level 1 data cache and the last level."""

    accesses: float
    l1: float
    last: float


def parse_cachegrind(text: str) -> dict[str, int]:
    """The totals of a cachegrind output file, by event. Raises ValueError where the file is cut short."""
    lines = text.splitlines()
    events = next((line.split()[1:] for line in lines if line.startswith("events:")), None)
    totals = next((line.split()[1:] for line in lines if line.startswith("summary:")), None)
    if events is None or totals is None or len(events) != len(totals):
        raise ValueError("this is no whole cachegrind file; allowed: one with matching lines 'events:' and 'summary:'")
    found = dict(zip(events, map(int, totals), strict=True))
    missing = [name for name in COUNTS if name not in found]
    if missing:
        raise ValueError(f"cachegrind counted no {', '.join(missing)}; allowed: a run with --cache-sim=yes")
    return found


def simulate(driver: Path, layer: Layer, caches: Caches, repeats: int, tier: str = "avx2") -> dict[str, int]:
    """Every event of one run of the driver. Raises FileNotFoundError without valgrind, RuntimeError when it fails."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise FileNotFoundError("valgrind is not installed; install the system's package valgrind")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cachegrind.out"
        options = ["--tool=cachegrind", "--cache-sim=yes", f"--cachegrind-out-file={out}", *caches.flags()]
        arguments = ["layer", f"tier={tier}", f"repeats={repeats}", *layer.arguments()]
        done = subprocess.run([valgrind, *options, str(driver), *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"cachegrind on {' '.join(arguments)}:\n{done.stderr[-2000:]}")
        json.loads(done.stdout)
        return parse_cachegrind(out.read_text())


def per_call(few: dict[str, int], many: dict[str, int], calls: int) -> Misses:
    """What `calls` more calls cost, each."""
    if calls < 1:
        raise ValueError(f"{calls} calls between the runs; allowed: 1 or more")
    # A call that misses nothing may come out a miss or two below none: the first one's end is not the last one's.
    cost = {name: max(0.0, (many[name] - few[name]) / calls) for name in COUNTS}
    return Misses(cost["Dr"] + cost["Dw"], cost["D1mr"] + cost["D1mw"], cost["DLmr"] + cost["DLmw"])


def measure(driver: Path, layer: Layer, caches: Caches, tier: str = "avx2") -> Misses:
    """The misses of a call whose data the one before has left in the caches."""
    if layer.kind == "separate":
        first, second = (measure(driver, one, caches, tier) for one in layer.alone())
        return Misses(first.accesses + second.accesses, first.l1 + second.l1, first.last + second.last)
    return per_call(simulate(driver, layer, caches, 1, tier), simulate(driver, layer, caches, 2, tier), 1)


def modelled_misses(layer: Layer, cache: int, block_pixels: int = 48 * 6) -> float:
    """Lines that calls in a row bring into a fully associative cache of `cache` bytes, by reuse distance.

    Data whose reuse distance, the bytes touched in between, is below the cache's size is found there; anything else
    comes in line by line. The distances are those inside a convolution (see `_convolution`), between a convolution
    and the next, which reads what it wrote, and between calls, which touch everything. A fused pair takes the images
    one by one, so that its intermediate is never larger than that of one.
    """
    if layer.kind == "separate":
        return sum(modelled_misses(one, cache, block_pixels) for one in layer.alone())
    if layer.bytes() <= cache:
        return 0.0
    if layer.kind == "fused":
        image = replace(layer, n=1)
        if image.bytes() <= cache:
            return 4 * layer.n * layer.h * layer.w * (layer.c + layer.oc) / LINE
        return layer.n * modelled_misses(replace(image, kind="pair"), cache, block_pixels)
    misses, convs, pixels = 0.0, layer.convs(), layer.n * layer.h * layer.w
    for step, (c, oc, kh, kw) in enumerate(convs):
        misses += _convolution(layer, (c, oc, kh, kw), cache, block_pixels)
        if step and 4 * (c * oc * kh * kw + pixels * (c + max(oc, convs[0][0]))) <= cache:
            misses -= 4 * pixels * c / LINE  # the map between the two has stayed
    return misses


def _convolution(layer: Layer, conv: tuple[int, int, int, int], cache: int, block_pixels: int) -> float:
    """One convolution that finds none of its data.

    The kernel walks blocks of about `block_pixels` output pixels; in each it passes over all weights, panel by panel of
    16 columns, and a panel chunk by chunk: every chunk reads the block's input again and adds to the panel's sums. The
    distances are those between chunks (a block's input, its sums and a chunk of weights) and between blocks (the
    weights and a block's maps).
    """
    c, oc, kh, kw = conv
    pixels = layer.n * layer.h * layer.w
    blocks = max(1.0, pixels / block_pixels)
    panels = max(1.0, oc / PANEL)
    chunks = math.ceil(kh * kw / max(1, CHUNK // c)) * math.ceil(c / CHUNK)
    weights, taken, written = 4 * c * oc * kh * kw, 4 * pixels * c, 4 * pixels * oc
    halo = 4 * layer.n * layer.w * c * (kh - 1) * (blocks - 1)  # rows that two blocks share
    block, sums = (taken + halo) / blocks, 4 * PANEL * pixels / blocks
    again = block + sums + 4 * PANEL * min(CHUNK, c * kh * kw) > cache
    reads_of_weights = 1.0 if blocks == 1 or weights + block + written / blocks <= cache else blocks
    reads_of_input = panels * chunks if again else 1.0
    added_up = panels * (chunks - 1) * blocks * sums if again else 0.0
    first = taken + (halo if weights + block > cache else 0.0)
    return (weights * reads_of_weights + first * reads_of_input + added_up + written) / LINE
