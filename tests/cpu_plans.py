"""Small plans for the native backend, run over poisoned memory so that a stray read or write shows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import Buffer, ConvStep, ImportStep, Output, PairStep, Plan, PoolStep, Step, View
from inception_fast.kernels.spec import ITEM_BYTES, ConvSpec, PoolSpec

POISON = 0x7FC0DEAD  # a NaN: reading it spoils the result, overwriting it changes the bits
GUARD = 64  # floats around every buffer


def poisoned(floats: int) -> np.ndarray:
    """[floats] float32 of poison, 64-byte aligned, with a guard on both sides that `base` holds."""
    whole = np.full(floats + 2 * GUARD + 16, POISON, np.uint32)
    start = GUARD + (-(whole.ctypes.data // 4 + GUARD)) % 16
    return whole[start : start + floats].view(np.float32)


def is_poison(values: np.ndarray) -> bool:
    return bool((np.ascontiguousarray(values).view(np.uint32) == POISON).all())


@dataclass
class Scene:
    """Collects buffers and steps. Everything lives in the arena, with guards between the buffers."""

    buffers: list[Buffer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    position: int = 4 * GUARD

    def room(self, n: int, h: int, w: int, c: int, before: int = 0, after: int = 0, dtype: str = "float32") -> View:
        """A view of c channels inside a buffer of before + c + after."""
        buffer = Buffer(n, h, w, before + c + after, "arena", self.position, dtype)
        self.position += (buffer.bytes + 63) // 64 * 64 + 4 * GUARD
        self.buffers.append(buffer)
        return View(len(self.buffers) - 1, before, c)

    def put(self, x: torch.Tensor, before: int = 0, after: int = 0, dtype: str = "float32") -> View:
        """[n, c, h, w], brought in by an import step."""
        n, c, h, w = x.shape
        view = self.room(n, h, w, c, before, after, dtype)
        self.inputs.append(x)
        self.steps.append(ImportStep(f"import{len(self.inputs)}", len(self.inputs) - 1, view))
        return view

    def plan(self) -> Plan:
        shapes = tuple((x.shape[0], x.shape[1], x.shape[2], x.shape[3]) for x in self.inputs)
        return Plan(tuple(self.buffers), tuple(self.steps), shapes, self.position)

    def run(self, tier: str, threads: int = 1) -> Memory:
        """Runs all steps and checks that nothing outside the views written by them has changed."""
        compiled = cpu.compile(self.plan(), tier)
        arena = poisoned(self.position // 4)
        compiled.run([argument(x) for x in self.inputs], [], arena.ctypes.data, threads)
        memory = Memory(self.buffers, arena)
        views = [view for step in self.steps for view in written(step)]
        memory.check_guards([view for view in views if self.buffers[view.buffer].kind != "local"])
        return memory


@dataclass
class Memory:
    buffers: list[Buffer]
    arena: np.ndarray

    def bytes_of(self, view: View, memory: np.ndarray) -> np.ndarray:
        """[n, h, w, bytes of the view's channels] of bytes laid out as the arena."""
        b = self.buffers[view.buffer]
        item = ITEM_BYTES[b.dtype]
        whole = memory[b.position :][: b.bytes].reshape(b.n, b.h, b.w, b.c * item)
        return whole[..., view.offset * item : (view.offset + view.channels) * item]

    def get(self, view: View) -> torch.Tensor:
        """[n, c, h, w] in the buffer's dtype."""
        b = self.buffers[view.buffer]
        found = torch.empty(b.n, b.h, b.w, view.channels, dtype=getattr(torch, b.dtype))
        found.view(-1).view(torch.uint8).numpy()[...] = self.bytes_of(view, self.arena.view(np.uint8)).reshape(-1)
        return found.permute(0, 3, 1, 2)

    def check_guards(self, views: list[View]) -> None:
        rest = self.arena.copy()
        for view in views:
            poison = np.full(self.arena.size, POISON, np.uint32).view(np.uint8)
            self.bytes_of(view, rest.view(np.uint8))[...] = self.bytes_of(view, poison)
        assert is_poison(rest), "a step wrote outside its view"
        base = self.arena.base
        while isinstance(base.base, np.ndarray):
            base = base.base
        start = (self.arena.ctypes.data - base.ctypes.data) // 4
        assert is_poison(base[:start]) and is_poison(base[start + self.arena.size :]), "a step wrote outside the arena"


def written(step: Step) -> list[View]:
    if isinstance(step, PairStep):
        return written(step.first) + written(step.second)
    return [output.view for output in step.outputs] if isinstance(step, ConvStep) else [step.y]


def argument(x: torch.Tensor) -> tuple[int, str, tuple[int, int, int, int]]:
    n, c, h, w = x.stride()
    return x.data_ptr(), str(x.dtype).removeprefix("torch."), (n, c, h, w)


@dataclass
class Conv:
    """Operands of one convolution with two ranges of output channels at most; `reference` is float64 by torch.

    Operands are rounded to the spec's dtype first, but for a tile's weights, and the result in the end.
    """

    spec: ConvSpec
    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    residual: torch.Tensor | None = None
    residual_scale: float = 1.0
    tile: tuple[int, int] = (0, 0)

    def reference(self, relu: bool = True) -> torch.Tensor:
        top, bottom, left, right = self.spec.padding
        x = torch.nn.functional.pad(self.rounded(self.x), (left, right, top, bottom))
        weight = self.weight.double() if any(self.tile) else self.rounded(self.weight)
        y = torch.nn.functional.conv2d(x, weight, stride=self.spec.stride, groups=self.spec.groups)
        y = y * self.scale.double()[:, None, None] + self.shift.double()[:, None, None]
        if self.residual is not None:
            y = self.rounded(self.residual) + self.residual_scale * y
        return self.rounded(y.relu() if relu else y)

    def terms(self) -> torch.Tensor:
        """The root of the sum of the products' squares: the size of each sum of products that do not cancel."""
        squares = replace(self, x=self.x.double().square(), weight=self.weight.double().square(), residual=None)
        squares = replace(squares, scale=self.scale.double().square(), shift=torch.zeros_like(self.shift))
        return squares.reference(relu=False).sqrt() * (1.0 if self.residual is None else abs(self.residual_scale))

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """float64; float32 is left as it is, for its results come within a budget."""
        return x.double() if self.spec.dtype == "float32" else x.to(getattr(torch, self.spec.dtype)).double()

    def step(self, x: View, outputs: tuple[Output, ...], residual: View | None = None) -> ConvStep:
        arrays = (self.weight.numpy(), self.scale.numpy(), self.shift.numpy())
        return ConvStep("conv", self.spec, x, *arrays, outputs, residual, self.residual_scale, self.tile)

    def image(self, i: int) -> Conv:
        """The same convolution of one image of the batch."""
        residual = None if self.residual is None else self.residual[i : i + 1]
        return replace(self, spec=replace(self.spec, n=1), x=self.x[i : i + 1], residual=residual)

    def run(self, tier: str, threads: int = 1, relu: bool = True, around: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """[n, oc, oh, ow]; every operand lies between `around` channels of poison."""
        spec, scene = self.spec, Scene()
        x = scene.put(self.x, *around, spec.dtype)
        residual = None if self.residual is None else scene.put(self.residual, *around, spec.dtype)
        y = scene.room(spec.n, spec.oh, spec.ow, spec.oc, *around, spec.dtype)
        scene.steps.append(self.step(x, (Output(y, relu),), residual))
        return scene.run(tier, threads).get(y)


def integers(spec: ConvSpec, seed: int = 0, residual: bool = False) -> Conv:
    """Integers small enough that every partial sum is exact in float32."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=g).float()

    return Conv(
        spec,
        draw(-4, 4, spec.n, spec.c, spec.h, spec.w),
        draw(-3, 3, spec.oc, spec.c // spec.groups, spec.kh, spec.kw),
        draw(1, 3, spec.oc),
        draw(-99, 99, spec.oc),
        draw(-9, 9, spec.n, spec.oc, spec.oh, spec.ow) if residual else None,
        2.0,
    )


def normals(spec: ConvSpec, seed: int = 0, residual: bool = False) -> Conv:
    """Activations after a ReLU, weights around zero: the operands of an Inception layer."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    depth = spec.c // spec.groups * spec.kh * spec.kw
    return Conv(
        spec,
        draw(spec.n, spec.c, spec.h, spec.w).relu(),
        draw(spec.oc, spec.c // spec.groups, spec.kh, spec.kw) / depth**0.5,
        draw(spec.oc).abs() + 0.5,
        draw(spec.oc) * 0.1,
        draw(spec.n, spec.oc, spec.oh, spec.ow) if residual else None,
        0.17,
    )


def weights(*shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    whole = [g.integers(-1, 2, shape), g.integers(1, 2, shape[0]), g.integers(-9, 9, shape[0])]
    return whole[0].astype(np.float32), whole[1].astype(np.float32), whole[2].astype(np.float32)


def chain(n: int = 1) -> Plan:
    """Import, convolution with a residual, pool: [n, 4, 6, 6] to [n, 4, 3, 3]."""
    conv = ConvSpec(n, 6, 6, 4, 4, 3, 3, (1, 1), (1, 1, 1, 1))
    pool = PoolSpec(n, 6, 6, 4, 2, 2, (2, 2))
    buffers = (
        Buffer(n, 6, 6, 4, "arena", 0),
        Buffer(n, 6, 6, 4, "arena", 576 * max(n, 1)),
        Buffer(n, 3, 3, 4, "output", 0),
    )
    steps = (
        ImportStep("import", 0, View(0, 0, 4)),
        ConvStep("conv", conv, View(0, 0, 4), *weights(4, 4, 3, 3), (Output(View(1, 0, 4), True),), View(0, 0, 4), 2.0),
        PoolStep("pool", pool, View(1, 0, 4), View(2, 0, 4)),
    )
    return Plan(buffers, steps, ((n, 4, 6, 6),), 2 * 576 * max(n, 1))


def chain_truth(x: torch.Tensor) -> torch.Tensor:
    w, scale, shift = (torch.from_numpy(a) for a in weights(4, 4, 3, 3))
    y = x + 2 * (torch.nn.functional.conv2d(x, w, padding=1) * scale[:, None, None] + shift[:, None, None])
    return torch.nn.functional.max_pool2d(y.relu(), 2)


def chain_input(n: int = 1) -> torch.Tensor:
    return torch.randint(-9, 10, (n, 4, 6, 6), generator=torch.Generator().manual_seed(n)).float()


def call(compiled: cpu.CompiledPlan, plan: Plan, *xs: torch.Tensor, threads: int = 1) -> list[torch.Tensor]:
    """The outputs as [n, c, h, w], computed in a poisoned arena."""
    arena = poisoned(plan.arena_bytes // 4)
    ys = [torch.full((b.n, b.h, b.w, b.c), float("nan")) for b in plan.outputs]
    compiled.run([argument(x) for x in xs], [y.data_ptr() for y in ys], arena.ctypes.data, threads)
    return [y.permute(0, 3, 1, 2) for y in ys]
