"""`batch_invariant=True` on a GPU: every batch has the same kernels, no sum is in parts, and an image has the same bits
alone and among others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from inception_fast.kernels.cuda import loader
from inception_fast.kernels.cuda.choices import Row, Shape
from inception_fast.kernels.cuda.convolve import Cut
from inception_fast.kernels.plan import PairStep
from inception_fast.kernels.spec import ConvSpec
from inception_fast.kernels.triton.configs import Config
from torch import Tensor, nn
from triton.runtime import interpreter

import engine_nets
import numerics
from hopper_library import stub, stub_file
from inception_fast import backend_status, create_model
from inception_fast.backends import hopper_gpu, triton_gpu
from inception_fast.engine import gpu_hopper, gpu_invariant, gpu_session, gpu_walk, optimize
from inception_fast.engine.gpu_hopper import Hopper
from inception_fast.engine.gpu_plan import GpuPlan, Packs
from inception_fast.engine.gpu_runner import GpuCompiled
from inception_fast.engine.session import Session

from .maps import DEVICE
from .test_gpu_plan import Block, Mixed, block
from .test_hopper_plan import Block as Wide
from .test_hopper_plan import compiled


class Ordered:
    """NumPy, but that a product adds up in the order of k, as a GPU's does; its own order depends on the row."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def matmul(a: Any, b: Any, dtype: Any) -> Any:
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k : k + 1].astype(dtype) * b[k : k + 1].astype(dtype)
        return total


@pytest.fixture(autouse=True)
def ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(interpreter, "np", Ordered())


def parted(spec: ConvSpec) -> Config:
    """Sums in parts where the map is small."""
    return Config(block_m=128, block_n=64, block_k=16, split=2 if spec.n * spec.oh * spec.ow < 128 else 1)


def plan_of(batch: int, choose: Callable[[ConvSpec], Config]) -> GpuPlan:
    return GpuCompiled(block(batch)[1], Packs(DEVICE), choose).plan


def tiles(plan: GpuPlan) -> list[Config | None]:
    return [task.config for task in plan.tasks]


def test_every_batch_has_the_tiles_of_one() -> None:
    """By the shipped tiles, which differ from batch to batch where nobody asks for this."""
    free = triton_gpu.chooser(DEVICE)
    fixed = gpu_invariant.chooser(free)
    found = [tiles(plan_of(batch, fixed)) for batch in (1, 2, 64)]
    assert found[0] == found[1] == found[2]
    assert any(found[0]) and all(config.split == 1 for config in found[0] if config)
    plain = [tiles(plan_of(batch, free)) for batch in (1, 64)]
    assert plain[0] != plain[1] and any(config.split > 1 for config in plain[0] if config)
    spec = ConvSpec(1, 8, 8, 16, 16, 1, 1)
    assert gpu_invariant.chooser(lambda _: Config(split=4))(spec) == Config()


def test_an_image_has_the_same_bits_alone_and_among_others() -> None:
    """Not so by tiles that split small batches, which shows that this would be seen."""
    x = numerics.random(3, 3, 23, 21).to(DEVICE)

    def same(choose: Callable[[ConvSpec], Config]) -> bool:
        whole, one = (GpuCompiled(block(n)[1], Packs(DEVICE), choose) for n in (3, 1))
        y = whole.run([x])[0]
        return all(torch.equal(y[i : i + 1], one.run([x[i : i + 1]])[0]) for i in range(3))

    assert same(gpu_invariant.chooser(parted))
    assert not same(parted)


def test_a_session_keeps_it() -> None:
    module, x = engine_nets.randomised(Block()).eval(), numerics.random(2, 3, 23, 21)
    session = Session(module, (x[:1].to(DEVICE),), {}, "triton", "float32", invariant=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Triton's interpreter before 3.7 has NumPy's.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"triton\.runtime\.interpreter")
        y = session((x.to(DEVICE),), {})
        alone = [session((x[i : i + 1].to(DEVICE),), {}) for i in range(2)]
    assert torch.equal(y, torch.cat(alone))
    assert engine_nets.relative(y.cpu(), engine_nets.eager(module, x)) <= numerics.NET_MAX


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the stub's pointers are host memory")
class TestHopper:
    """The Hopper kernels, plain loops here: what is asked for is looked at, and what comes out."""

    @staticmethod
    def hopper(invariant: bool, rows: list[Row], always: bool = True) -> Hopper:
        return Hopper(stub(), DEVICE, always=always, gpu="", rows=rows, invariant=invariant)

    @staticmethod
    def cuts(plan: GpuPlan) -> dict[str, object]:
        """How each convolution is cut, by the names of its steps."""
        return {
            step.name: task.hopper.cut for task in plan.tasks if task.hopper is not None for step in task.hopper.steps
        }

    def test_every_batch_has_the_cuts_of_one(self) -> None:
        """The stem's second convolution by what was measured at batch 32; unasked by what is nearer, in two parts."""
        few, many = stub().configs[0], stub().configs[1]
        shape = Shape("conv", "half", 110, 64, 576, 9)
        rows = [
            Row("", shape, few.name, 2, 1e-6, 2e-6),
            Row("", shape._replace(m=110 * gpu_invariant.BATCH), many.name, 2, 1e-6, 2e-6),
        ]
        fixed = [self.cuts(compiled(n, self.hopper(True, rows))[1].plan) for n in (1, 3)]
        assert fixed[0] == fixed[1] and Cut(many, 1) in fixed[0].values()
        assert all(cut.splits == 1 for cut in fixed[0].values() if isinstance(cut, Cut))
        assert Cut(few, 2) in self.cuts(compiled(1, self.hopper(False, rows))[1].plan).values()

    def test_what_nobody_measured_is_cut_as_the_model_says_of_one_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[ConvSpec] = []
        cut_of = hopper_gpu.cut_of

        def noted(kernels: loader.Library, spec: ConvSpec, *rest: Any) -> Cut:
            asked.append(spec)
            return cut_of(kernels, spec, *rest)

        monkeypatch.setattr(hopper_gpu, "cut_of", noted)
        plans = [compiled(n, self.hopper(True, []))[1].plan for n in (1, 3)]
        assert asked and {spec.n for spec in asked} == {gpu_invariant.BATCH}
        assert self.cuts(plans[0]) == self.cuts(plans[1])

    def test_who_wins_is_decided_once_for_all_batches(self) -> None:
        """A race that one image wins and 32 lose leaves both to Triton, and the other way about."""
        shape = Shape("conv", "half", 110, 64, 576, 9)
        won = Row("", shape, stub().configs[0].name, 1, 1e-6, 2e-6)
        lost = won._replace(shape=shape._replace(m=110 * gpu_invariant.BATCH), seconds=9e-6)
        other = [won._replace(seconds=9e-6), lost._replace(seconds=1e-6)]
        for rows, taken in (([won, lost], False), (other, True)):
            for n in (1, 2):
                hopper = self.hopper(True, rows, always=False)
                plan = compiled(n, hopper)[1].plan
                assert any(task.hopper for task in plan.tasks) == taken
        assert any(task.hopper for task in compiled(1, self.hopper(False, [won, lost], always=False))[1].plan.tasks)

    def test_a_pair_is_fused_at_every_batch_or_none(self) -> None:
        chain = next(
            step for step in compiled(1)[1].plan.plan.steps if isinstance(step, PairStep) and step.kind == "chain"
        )
        shape = hopper_gpu.shape_of(chain.second.spec, "pair")
        for batch, taken in ((1, False), (gpu_invariant.BATCH, True)):
            row = Row("", shape._replace(m=shape.m * batch), stub().pair_configs[0].name, 1, 1e-6, 2e-6)
            for n in (1, 3):
                plan = compiled(n, self.hopper(True, [row]))[1].plan
                fused = [work for work in (t.hopper for t in plan.tasks) if work and not isinstance(work.cut, Cut)]
                assert bool(fused) == taken, "one image's row is five octaves from that of 32"

    def test_no_batch_walks(self) -> None:
        plan = compiled(1, self.hopper(False, []))[1].plan
        assert gpu_walk.possible(self.hopper(False, []), plan.plan.buffers)
        assert not gpu_walk.possible(self.hopper(True, []), plan.plan.buffers)
        assert not gpu_walk.denied(self.hopper(True, []), plan.plan.buffers)

    def test_an_image_has_the_same_bits_alone_and_among_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From `Session` on, by both kinds of kernels."""
        monkeypatch.setattr(loader, "FILE", stub_file())
        module, x = engine_nets.randomised(Wide()).eval(), numerics.random(2, 3, 23, 21)
        session = Session(module, (x[:1],), {}, "cuda", "float16", invariant=True)
        assert torch.equal(session((x,), {}), torch.cat([session((x[i : i + 1],), {}) for i in range(2)]))
        assert session._gpu is not None and session._gpu.hopper is not None and session._gpu.hopper.invariant
        executable, _ = session.executable([x[:1]])
        assert isinstance(executable, GpuCompiled)
        assert {task.backend for task in executable.plan.tasks} == {"cuda", "triton"}
        assert not any(task.walk for task in executable.plan.tasks)
        unasked = gpu_hopper.of(DEVICE, "float16", "cuda", True)
        assert unasked is not None and not unasked.invariant


class Softmax(nn.Module):
    """torch runs its softmax and its product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2)
        return torch.softmax(y @ y.transpose(1, 2), -1)


def test_what_torch_may_run_otherwise_is_named_once() -> None:
    x = numerics.random(2, 3, 9, 11).to(DEVICE)
    session = Session(Softmax().eval(), (x[:1],), {}, "triton", "float32", invariant=True)
    with pytest.warns(RuntimeWarning, match=r"torch runs matmul, softmax \(2 in all\), whose bits may be others"):
        session.plan([x[:1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session((x,), {})
        unasked = Session(Softmax().eval(), (x,), {}, "triton", "float32")
        unasked.plan([x])


def test_what_torch_only_moves_is_no_reason_to_warn() -> None:
    """A mirrored map, a division and a sum, element by element."""
    x = numerics.random(2, 3, 9, 11).to(DEVICE)
    session = Session(Mixed().eval(), (x,), {}, "triton", "float32", invariant=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.plan([x])
    executable, _ = session.executable([x])
    assert isinstance(executable, GpuCompiled) and executable.ops


def test_the_fixed_batch_is_no_batch_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an image's bits are does not depend on the example either."""
    asked: list[ConvSpec] = []

    def choose(spec: ConvSpec) -> Config:
        asked.append(spec)
        return Config()

    monkeypatch.setattr(gpu_session.triton_gpu, "chooser", lambda *_: choose)
    made = gpu_session.GpuSession(DEVICE, "float32", invariant=True)
    plan_of(2, made.choose)
    assert asked and {spec.n for spec in asked} == {gpu_invariant.BATCH}


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a network of full size, for a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    if backend == "cuda" and (dtype is torch.float32 or not backend_status()["cuda"]):
        pytest.skip("no Hopper kernels for it here")
    model = engine_nets.randomised(create_model("inception_v3", num_classes=10)).eval()
    x = numerics.random(33, 3, 139, 139).to(DEVICE)
    fast = optimize(model, x[:1], dtype=dtype, backend=backend, batch_invariant=True, batch_sizes=[1, 5, 33])
    y = fast(x)
    assert torch.equal(y[:5], fast(x[:5])) and torch.equal(y[32:], fast(x[32:]))
    assert torch.equal(torch.cat([y[5:6], y[9:10]]), torch.cat([fast(x[5:6]), fast(x[9:10])]))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the CPU's are tested elsewhere")
def test_features_on_a_gpu() -> None:
    pytest.importorskip("PIL", reason="pictures need Pillow")
    from inception_fast.features.extractors import ModelExtractor

    here, there = (ModelExtractor("inception_v3", None, device=device) for device in ("cpu", "cuda"))
    x = numerics.random(37, *here.prepare.shape)
    y = there.run(x)
    assert numerics.rel_l2(y, here.run(x)) <= numerics.NET_MAX
    assert torch.equal(y[:1], there.run(x[:1])) and torch.equal(y[5:7], there.run(x[5:7]))
    assert there.settings["device"] and "device" not in here.settings
