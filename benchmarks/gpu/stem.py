"""What fewer launches of v3's stem could save, from the ceilings of an H200: arithmetic, nothing is run.

    python benchmarks/gpu/stem.py

Forms are lists of launches, each a run of stages that stay on the chip. A launch takes the longer of its products and
its bytes, and `LAUNCH`. A tile is 8x8 pixels behind the pool; what a stage ahead of another computes twice at the edges
of tiles is counted as products, and what it reads twice as bytes.
"""

from __future__ import annotations

from typing import NamedTuple

PEAK, BANDWIDTH, LAUNCH = 790e12, 4.3e12, 2.5e-6  # products a second, bytes a second, seconds
TILE = 8


class Stage(NamedTuple):
    """A convolution or the pool on a square map. `rate`: of the peak that so few columns leave."""

    name: str
    size: int
    c: int
    out: int
    oc: int
    kernel: int
    stride: int
    item: int  # bytes of an element that is read
    rate: float


STAGES = (
    Stage("conv1", 299, 3, 149, 32, 3, 2, 1, 0.25),
    Stage("conv2", 149, 32, 147, 32, 3, 1, 2, 0.5),
    Stage("conv3", 147, 32, 147, 64, 3, 1, 2, 0.75),
    Stage("pool", 147, 64, 73, 64, 3, 2, 2, 0.0),
)
FORMS = {
    "four launches": ((0, 1), (1, 2), (2, 3), (3, 4)),
    "the pool in conv3": ((0, 1), (1, 2), (2, 4)),
    "conv2 to the pool": ((0, 1), (1, 4)),
    "one launch": ((0, 4),),
}


def launch_seconds(stages: tuple[Stage, ...], n: int) -> float:
    """One launch with these stages in a row, for n images."""
    products, side = 0.0, float(TILE)
    fused = len(stages) > 1
    for stage in reversed(stages):
        # Elements that the stage computes for one that it owns: `side` of them along an axis of a tile.
        own = TILE if stage.name == "pool" else 2 * TILE
        edge = (side / own) ** 2 if fused else 1.0
        if stage.rate:
            flops = 2 * stage.out**2 * stage.c * stage.oc * stage.kernel**2
            products += n * edge * flops / (PEAK * stage.rate)
        side = (side - 1) * stage.stride + stage.kernel
    first, last = stages[0], stages[-1]
    read = (side / (2 * TILE * (2 if first.name == "conv1" else 1))) ** 2 if fused else 1.0
    moved = read * first.size**2 * first.c * first.item + last.out**2 * last.oc * 2
    return max(products, n * moved / BANDWIDTH) + LAUNCH


def seconds(form: str, n: int) -> float:
    return sum(launch_seconds(STAGES[begin:end], n) for begin, end in FORMS[form])


def main() -> None:
    for n in (1, 32, 128, 256):
        whole = seconds("four launches", n)
        told = [f"{form} {seconds(form, n) * 1e6:.1f} us ({(whole - seconds(form, n)) * 1e6:+.1f})" for form in FORMS]
        print(f"batch {n}: {', '.join(told)}")


if __name__ == "__main__":
    main()
