"""Which tile a convolution runs with: shipped as data, looked up by the nearest shape, overridden by tuning.

A row of `configs.json` is [arch, precision, m, oc, k] and a `Config`; m = n * oh * ow, k = taps * channels. The nearest
row is that with the smallest distance in octaves. `tuned()` adds the rows that the tuner left in the user's cache for
this machine's GPU, which win where they are as near. Nothing is tuned that was not asked for.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).with_name("configs.json")
ARCHES = ("sm_80", "sm_90")
FORMS = ("pointer", "cached", "tma", "turned", "rows", "stem")
PRECISIONS = ("half", "float32", "tf32")
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
REACH = 2.0  # octaves from a stem's shape within which a measured tile is taken
FULL = 6  # tiles a multiprocessor, as the layers had by which `fitted` judges


@dataclass(frozen=True)
class Config:
    """One way to run a convolution. form: "pointer"; "cached", with x through L1; "tma"; "turned", by TMA with x as the
    product's second operand; "rows", the same with a row of taps as one; or "stem", straight from an image. block_n: a
    power of two or the sum of two; split: programs that share the walk over k.
    """

    form: str = "pointer"
    block_m: int = 128
    block_n: int = 64
    block_k: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r}; allowed: {', '.join(FORMS)}")
        for name in ("block_m", "block_k", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} {value}; allowed: powers of two")
        rest = self.widths[1]
        if rest and (rest < 16 or rest & (rest - 1) or self.split > 1):
            raise ValueError(
                f"block_n {self.block_n}, split {self.split}; allowed: powers of two, unsplit sums of two from 16 on"
            )
        if min(self.block_m, self.block_n, self.block_k) < 16 or min(self.split, self.stages) < 1:
            raise ValueError(f"{self}; allowed: blocks of at least 16, split and stages of at least 1")

    def __str__(self) -> str:
        split = f" split{self.split}" if self.split > 1 else ""
        return f"{self.form} {self.block_m}x{self.block_n}x{self.block_k}{split} w{self.warps} s{self.stages}"

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of the tile's two products, or of its one and 0."""
        wide = 1 << max(self.block_n.bit_length() - 1, 0)
        return wide, self.block_n - wide

    def shared_bytes(self, item: int) -> int:
        """The tiles of x and w that are in flight."""
        return (self.block_m + self.block_n) * self.block_k * item * self.stages


class Row(NamedTuple):
    """A shape and what runs it best. `seconds`: measured, or None for a prediction of the cost model."""

    arch: str
    precision: str
    m: int
    oc: int
    k: int
    config: Config
    seconds: float | None = None

    def distance(self, m: int, oc: int, k: int) -> float:
        """In octaves; columns weigh double, since their tile wastes most when it does not fit."""
        near = (math.log2(self.m / m), 2 * math.log2(self.oc / oc), 0.5 * math.log2(self.k / k))
        return math.hypot(*near)


def precision_of(dtype: str, tf32: bool = False) -> str:
    """The class of a dtype: "half" for both 16-bit formats."""
    if dtype in ("float16", "bfloat16"):
        return "half"
    if dtype == "float32":
        return "tf32" if tf32 else "float32"
    raise ValueError(f"dtype {dtype!r}; allowed: float16, bfloat16, float32")


def arch_of(capability: tuple[int, int]) -> str:
    """The data set for a compute capability: Hopper's has its own, everything else runs on that of sm_80."""
    return "sm_90" if capability[0] == 9 else "sm_80"


def choose(
    arch: str, precision: str, m: int, oc: int, k: int, rows: Iterable[Row] | None = None, c: int | None = None
) -> Config:
    """The config of the nearest shape; a predicted one in steps that fit the c channels of a tap, where c is given."""
    found = shipped() if rows is None else tuple(rows)
    same = [row for row in found if (row.arch, row.precision) == (arch, precision) and row.config.form != "stem"]
    if not same:
        raise ValueError(f"no config for {arch} {precision}; allowed: {', '.join(ARCHES)} with {', '.join(PRECISIONS)}")
    # A measured row beats a predicted one that is as near; of measured ones the last does, tuned on this machine.
    ranked = [row for row in reversed(same) if row.seconds is not None] + [row for row in same if row.seconds is None]
    best = min(ranked, key=lambda row: row.distance(max(m, 1), oc, k))
    if c is None or best.seconds is not None:
        return best.config
    return fitted(best.config, arch, m, oc, c)


def choose_stem(arch: str, precision: str, m: int, oc: int, k: int, rows: Iterable[Row]) -> Config | None:
    """The tile of the nearest stem; None where none was measured within `REACH`: no model predicts them."""
    same = [row for row in rows if (row.arch, row.precision, row.config.form) == (arch, precision, "stem")]
    best = min(reversed(same), key=lambda row: row.distance(max(m, 1), oc, k), default=None)
    return best.config if best is not None and best.distance(max(m, 1), oc, k) <= REACH else None


def fitted(config: Config, arch: str, m: int, oc: int, c: int) -> Config:
    """`config`, or one whose steps over c channels waste less. A step never spans two taps: steps of 64 multiply 128
    channels for 96, and 64 for 32; the prediction knows nothing of c.

    Up to 32 channels shorter steps are as many, and each does half. Beyond that they are more, which should pay where
    tiles fill the machine several times over: at batch 128 an H200 ran layers by 128x64x32 at 200 to 289 TFLOP/s, and
    96 to 96 channels, 3x3, by 128x32x64 at 135 (benchmarks/results/nvidia-h200/2026-11-26-gpu-2.json,
    hopper/128/bfloat16). The rule itself is not yet measured on hardware.
    """
    if config.block_k != 64 or -(-c // 64) * 64 == -(-c // 32) * 32:
        return config
    if c <= 32:
        return replace(config, block_k=32)
    wider = replace(config, block_n=64, block_k=32)
    tiles = math.ceil(m / 128) * math.ceil(oc / wider.block_n)
    full = arch == "sm_90" and tiles >= FULL * MULTIPROCESSORS[arch]
    return wider if full and (config.block_m, config.block_n) == (128, 32) and oc > 32 else config


@functools.cache
def shipped() -> tuple[Row, ...]:
    """The rows of `configs.json`."""
    return tuple(read(SHIPPED))


def read(file: Path) -> list[Row]:
    """Rows of a file. Raises ValueError naming the file for one that holds something else."""
    try:
        return [row_of(values) for values in json.loads(file.read_text())["rows"]]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file} holds no tile configurations: {error}") from error


def row_of(values: Sequence[Any]) -> Row:
    """A row as a file or a result has it. Raises ValueError for one that cannot be."""
    try:
        arch, precision, *sizes, config, seconds = values
        m, oc, k = map(int, sizes)
        row = Row(arch, precision, m, oc, k, Config(*config), seconds)
        right = min(m, oc, k) >= 1 and (seconds is None or 0 < seconds < math.inf)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"row {values!r}: {error}") from error
    if not right or not (isinstance(arch, str) and isinstance(precision, str)):
        raise ValueError(f"row {values!r}; allowed: names, sizes and seconds above 0")
    return row


def write(file: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Writes beside the file and renames, a row a line."""
    lines = [json.dumps([*row[:5], list(asdict(row.config).values()), row.seconds]) for row in rows]
    head = json.dumps({"about": about})[:-1]
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(head + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n")
    beside.replace(file)


def cache_file(gpu: str) -> Path:
    """Where the tuner keeps what it measured on a GPU of this name."""
    name = "".join(c if c.isalnum() else "-" for c in gpu)
    return Path.home() / ".cache" / "inception_fast" / "triton" / f"{name}.json"


def tuned(gpu: str) -> tuple[Row, ...]:
    """The shipped rows and those tuned on this machine."""
    try:
        file = cache_file(gpu)
        there = file.exists()
    except (OSError, RuntimeError):  # a user without a home, or with another's
        return shipped()
    return (*shipped(), *(read(file) if there else ()))


def candidates(arch: str, precision: str, m: int, oc: int, k: int) -> list[Config]:
    """Every config worth a try, the most promising by the cost model first."""
    item = 2 if precision == "half" else 4
    found = []
    for block_m in (32, 64, 128):
        for block_n in (32, 64, 128, 256):
            for block_k in (32, 64) if item == 2 else (16, 32):
                for split in (1, 2, 4, 8):
                    for stages in (3, 4):
                        warps = 8 if block_m * block_n > 128 * 64 else 4
                        config = Config("pointer", block_m, block_n, block_k, split, warps, stages)
                        if _fits(config, arch, precision, item) and split * block_k <= max(k // 2, block_k):
                            found.append(config)
    return sorted(found, key=lambda config: predict(config, arch, precision, m, oc, k))


def _fits(config: Config, arch: str, precision: str, item: int) -> bool:
    accumulators = config.block_m * config.block_n // (32 * config.warps)
    allowed = 32 if precision == "float32" else 128
    return accumulators <= allowed and config.shared_bytes(item) <= SHARED_BYTES[arch] // 2


def predict(config: Config, arch: str, precision: str, m: int, oc: int, k: int) -> float:
    """Seconds by a model of tile and wave quantisation; good for an order among tiles, not for a figure."""
    peak = {"sm_80": 3.0e14, "sm_90": 7.9e14}[arch] * {"half": 1, "tf32": 0.5, "float32": 0.06}[precision]
    processors = MULTIPROCESSORS[arch]
    tiles = math.ceil(m / config.block_m) * math.ceil(oc / config.block_n) * config.split
    reuse = config.block_m * config.block_n / (config.block_m + config.block_n)
    efficiency = reuse / (reuse + (16 if precision == "half" else 4))
    steps = math.ceil(k / config.split / config.block_k)
    rate = peak / processors * efficiency
    # A step costs its products, and never less than the latency that the stages in flight leave.
    alone = steps * max(2 * config.block_m * config.block_n * config.block_k / rate, 0.3e-6 / config.stages)
    start = 1.5e-6
    waves = max(tiles / processors, 1.0)
    finish = 0.0 if config.split == 1 else 2.5e-6 + 4 * m * oc * (config.split + 1) / 3e12
    return start + math.ceil(waves) * alone + finish


def predicted(arch: str, precision: str) -> list[Row]:
    """The rows that ship before anything was measured: the model's choice over a grid of shapes."""
    rows = []
    for m in (64, 289, 1225, 4624, 21609, 78400, 313600, 1254400):
        for oc in (32, 64, 96, 128, 192, 256, 384, 1024):
            for k in (64, 256, 768, 1344, 3456):
                best = candidates(arch, precision, m, oc, k)[0]
                rows.append(Row(arch, precision, m, oc, k, replace(best, stages=3)))
    return rows
