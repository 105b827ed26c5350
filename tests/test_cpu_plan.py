"""Whole plans on the native backend: order, threads, callers at once, forks, tiers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import (
    Buffer,
    ConvStep,
    EltwiseStep,
    ImportStep,
    Output,
    Plan,
    PoolStep,
    View,
)
from inception_fast.kernels.spec import ConvSpec, PairSpec, PoolSpec

from cpu_plans import Conv, Scene, argument, call, chain, chain_input, chain_truth, integers, poisoned

TIERS = cpu.tiers()
every_tier = pytest.mark.parametrize("tier", TIERS)

SHARED = 80  # images of `chain` from which on every one of its steps is shared out among threads


@every_tier
@pytest.mark.parametrize("n", [1, 3, SHARED])
def test_steps_run_in_order_into_the_output(tier: str, n: int) -> None:
    plan, x = chain(n), chain_input(n)
    compiled = cpu.compile(plan, tier)
    for threads in (1, 2, 7):
        assert torch.equal(call(compiled, plan, x, threads=threads)[0], chain_truth(x))
    assert (compiled.tier, compiled.arena_bytes) == (tier, plan.arena_bytes)
    assert compiled.packed_bytes >= 4 * 4 * 4 * 9


def test_an_empty_batch_is_nothing_to_do() -> None:
    plan = chain(0)
    compiled = cpu.compile(plan)
    compiled.run([(0, "float32", (144, 36, 6, 1))], [0], 0 if plan.arena_bytes == 0 else 4096, 2)


def test_plan_without_steps_or_arena_runs() -> None:
    cpu.compile(Plan((), (), (), 0)).run([], [], 0, 3)


@every_tier
def test_dense_inputs_and_outputs_are_used_in_place(tier: str) -> None:
    """Two inputs, two outputs, declared out of order, no arena."""
    buffers = (
        Buffer(2, 3, 5, 6, "output", 1),
        Buffer(2, 3, 5, 6, "input", 1),
        Buffer(2, 3, 5, 6, "output", 0),
        Buffer(2, 3, 5, 6, "input", 0),
    )
    view = [View(i, 0, 6) for i in range(4)]
    steps = (
        EltwiseStep("sum", view[1], view[0], residual=view[3]),
        EltwiseStep("copy", view[0], view[2], relu=True),
    )
    plan = Plan(buffers, steps, ((2, 6, 3, 5), (2, 6, 3, 5)), 0)
    a, b = (torch.randn(2, 6, 3, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    first, second = call(cpu.compile(plan, tier), plan, a, b, threads=2)
    assert torch.equal(second, a + b) and torch.equal(first, (a + b).relu())


def branches(rounds: int) -> Scene:
    """Read after write, write after read and write after write, each alone, beside siblings without a dependence."""
    scene = Scene()
    g = torch.Generator().manual_seed(9)
    a, b = (scene.put(torch.randint(-2, 3, (1, 24, 19, 19), generator=g).float()) for _ in range(2))
    for i in range(rounds):
        x, y = scene.room(1, 19, 19, 24), scene.room(1, 19, 19, 24)
        scene.steps.append(EltwiseStep(f"fill{i}", a, x, relu=i % 2 == 0))
        wide = ConvSpec(1, 19, 19, 24, 16, 3, 3, (1, 1), (1, 1, 1, 1))
        first, second = integers(wide, 2 * i), integers(replace(wide, oc=8, kh=1, padding=(0, 0, 1, 1)), 2 * i + 1)
        for conv, at in ((first, 0), (second, 16)):
            step = conv.step(x, (Output(View(y.buffer, at, conv.spec.oc), i % 2 == 0),))
            scene.steps.append(replace(step, name=f"conv{i}.{at}"))
        scene.steps.append(EltwiseStep(f"overwrite{i}", b, x))
        pool = PoolSpec(1, 19, 19, 24, 3, 3, (1, 1), (1, 1, 1, 1))
        scene.steps.append(PoolStep(f"again{i}", pool, a, x))
    return scene


@every_tier
def test_steps_wait_for_what_they_read_and_overwrite(tier: str) -> None:
    scene = branches(12)
    truth = scene.run(tier, 1).arena.copy()
    for threads in (2, 3, 5):
        for _ in range(8):
            assert np.array_equal(scene.run(tier, threads).arena.view(np.uint32), truth.view(np.uint32))


def test_more_threads_than_cores_or_work() -> None:
    plan, x = chain(SHARED), chain_input(SHARED)
    compiled = cpu.compile(plan)
    assert torch.equal(call(compiled, plan, x, threads=64)[0], chain_truth(x))


def big_plan() -> tuple[Plan, torch.Tensor]:
    """About a tenth of a second for one thread."""
    spec = ConvSpec(8, 35, 35, 96, 96, 3, 3, (1, 1), (1, 1, 1, 1))
    conv = integers(spec)
    buffers = (Buffer(8, 35, 35, 96, "arena", 0), Buffer(8, 35, 35, 96, "output", 0))
    steps = (
        ImportStep("import", 0, View(0, 0, 96)),
        conv.step(View(0, 0, 96), (Output(View(1, 0, 96), True),)),
        conv.step(View(0, 0, 96), (Output(View(1, 0, 96), True),)),
    )
    return Plan(buffers, steps, ((8, 96, 35, 35),), buffers[0].bytes), conv.x


def test_callers_at_once_do_not_disturb_each_other() -> None:
    plan = chain(SHARED)
    compiled = cpu.compile(plan)
    wrong: list[object] = []

    def work(seed: int) -> None:
        x = chain_input(SHARED) + seed
        for i in range(50):
            if not torch.equal(call(compiled, plan, x, threads=1 + (seed + i) % 4)[0], chain_truth(x)):
                wrong.append((seed, i))

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_python_goes_on_while_a_plan_runs() -> None:
    plan, x = big_plan()
    compiled = cpu.compile(plan, "generic")
    caller = threading.Thread(target=lambda: call(compiled, plan, x))
    turns = 0
    caller.start()
    while caller.is_alive():
        time.sleep(0.002)
        turns += 1
    assert turns >= 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_runs_with_threads_of_its_own() -> None:
    plan, x = chain(SHARED), chain_input(SHARED)
    compiled = cpu.compile(plan)
    truth = call(compiled, plan, x, threads=4)[0]
    child = os.fork()
    if child == 0:
        good = all(torch.equal(call(compiled, plan, x, threads=k)[0], truth) for k in (4, 1, 2))
        os._exit(0 if good else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(done[1]) == 0
    assert torch.equal(call(compiled, plan, x, threads=4)[0], truth)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("loaded", ["inception_fast", "inception_fast.kernels.cpu"])
def test_a_child_may_make_the_first_native_call(loaded: str) -> None:
    """Torch has used its threads before the fork, so that the runtime waits in the child for what is gone."""
    program = f"""if True:
        import os, signal, warnings, torch, inception_fast, {loaded}
        warnings.simplefilter("ignore")
        torch.set_num_threads(2)
        torch.ones(1000, 1000).exp()
        x, layer = torch.randn(2, 16, 20, 20), torch.nn.Conv2d(16, 64, 3).eval()
        child = os.fork()
        if child:
            raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        signal.alarm(60)
        inception_fast.optimize(layer, (x,))(x)
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_python_may_end_while_a_daemons_thread_is_in_a_call() -> None:
    program = """if True:
        import threading, time, warnings, torch
        from inception_fast.kernels import cpu
        started = threading.Event()

        def work():
            started.set()
            cpu._native.peak("generic", "float32", 1.5)

        threading.Thread(target=work, daemon=True).start()
        started.wait()
        time.sleep(0.1)
        class Slow:
            def __del__(self, sleep=time.sleep):
                sleep(2.0)  # beyond the call's end
        import sys
        sys.slow = Slow()
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list a process's threads")
def test_a_plan_runs_on_the_threads_that_torch_has() -> None:
    # In a process of its own, which no earlier test has given threads.
    program = """if True:
        import os, torch, inception_fast as fast
        torch.set_num_threads(2)
        x = torch.randn(1, 64, 56, 56)
        layer = torch.nn.Conv2d(64, 64, 3).eval()
        plan = fast.optimize(layer, (x,))
        before = len(os.listdir("/proc/self/task"))
        with torch.inference_mode():
            layer(x)
            between = len(os.listdir("/proc/self/task"))
            plan(x), plan(x)
        print(before, between, len(os.listdir("/proc/self/task")))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    _, torchs, ours = map(int, done.stdout.split())
    assert ours == torchs


def test_workers_take_the_callers_denormal_mode() -> None:
    spec = PoolSpec(1, 64, 64, 64, 1, 1, kind="avg")
    scene = Scene()
    x = scene.put(torch.full((1, 64, 64, 64), 1e-40))
    y = scene.room(1, 64, 64, 64)
    scene.steps.append(PoolStep("pool", spec, x, y))
    assert bool((scene.run(TIERS[-1], 4).get(y) > 0).all())
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    try:
        flushed = scene.run(TIERS[-1], 4).get(y)
    finally:
        torch.set_flush_denormal(False)
    assert flushed.unique().numel() == 1


@every_tier
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_the_peak_is_measured_in_no_time_too(tier: str, dtype: str) -> None:
    assert 0 < cpu.peak_flops(dtype, 1, tier, seconds=0.0) < float("inf")


def test_timed_runs_report_every_step() -> None:
    plan, x = chain(SHARED), chain_input(SHARED)
    compiled = cpu.compile(plan)
    arena, y = poisoned(plan.arena_bytes // 4), torch.full((SHARED, 3, 3, 4), float("nan"))
    for threads in (1, 3):
        seconds = compiled.run_timed([argument(x)], [y.data_ptr()], arena.ctypes.data, threads)
        assert len(seconds) == len(plan.steps) and all(0 < s < 60 for s in seconds)
        assert torch.equal(y.permute(0, 3, 1, 2), chain_truth(x))


def test_shares_report_every_thread() -> None:
    plan, x = chain(SHARED), chain_input(SHARED)
    compiled = cpu.compile(plan)
    arena, y = poisoned(plan.arena_bytes // 4), torch.full((SHARED, 3, 3, 4), float("nan"))
    shares = np.array(compiled.run_shares([argument(x)], [y.data_ptr()], arena.ctypes.data, 3))
    assert shares.shape == (3, len(plan.steps)) and bool((shares > 0).all()) and shares.max() < 60
    assert torch.equal(y.permute(0, 3, 1, 2), chain_truth(x))
    with pytest.raises(ValueError, match="2147483647 threads; allowed: 1 to 1024"):
        compiled.run_shares([argument(x)], [y.data_ptr()], arena.ctypes.data, 2**31 - 1)


def test_weights_are_copied_whatever_their_strides() -> None:
    plan, x = chain(), chain_input()
    conv = plan.steps[1]
    strided = np.zeros((4, 4, 3, 6), np.float32)[..., ::2]
    strided[...] = conv.weight
    moved = replace(conv, weight=strided, scale=conv.scale.copy())
    plan = replace(plan, steps=(plan.steps[0], moved, plan.steps[2]))
    compiled = cpu.compile(plan)
    strided[...] = np.nan
    moved.scale[...] = np.nan
    assert torch.equal(call(compiled, plan, x)[0], chain_truth(x))


@pytest.mark.parametrize(("dtype", "tile"), [("float32", (0, 0)), ("float32", (2, 2)), ("bfloat16", (0, 0))])
@pytest.mark.parametrize("tier", [*TIERS, *cpu.EMULATED])
def test_weights_in_parts_give_the_same_bits(tier: str, tile: tuple[int, int], dtype: str) -> None:
    """Panels over the ends of parts, of parts in other orders of dimensions too."""
    spec = ConvSpec(1, 5, 6, 19, 83, 3, 3, (1, 1), (1, 1, 1, 1), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((1, 19, 5, 6), (83, 19, 3, 3)))
    whole = Conv(spec, x.to(getattr(torch, dtype)), weight, torch.ones(83), torch.arange(83.0), tile=tile)
    pieces = weight.split([1, 30, 3, 49])
    orders = [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)]
    parts = [p.permute(o).contiguous().permute(*np.argsort(o)) for p, o in zip(pieces, orders, strict=True)]
    assert len({part.stride() for part in parts}) == 4
    plain = whole.step(View(0, 0, 19), (Output(View(1, 0, 83), False),))
    moved = replace(plain, weight=tuple(part.numpy() for part in parts))
    y, z = (call(cpu.compile(plan, tier), plan, x)[0] for plan in (_one(plain), _one(moved)))
    assert torch.isfinite(y).all() and torch.equal(y, z)


def _one(step: ConvStep) -> Plan:
    """The plan of one convolution from an imported map to an output."""
    s = step.spec
    x = Buffer(s.n, s.h, s.w, s.c, "arena", 0, s.dtype)
    buffers = (x, Buffer(s.n, s.oh, s.ow, s.oc, "output", 0))
    return Plan(buffers, (ImportStep("import", 0, View(0, 0, s.c)), step), ((s.n, s.c, s.h, s.w),), x.bytes)


def test_tiers_go_from_slow_to_fast() -> None:
    assert TIERS[0] == "generic" and set(TIERS) <= {"generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"}


@pytest.mark.parametrize("tier", cpu.EMULATED)
def test_what_is_emulated_runs_by_name_only(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tier not in TIERS
    plan, x = chain(), chain_input()
    assert torch.equal(call(cpu.compile(plan, tier), plan, x)[0], chain_truth(x))
    monkeypatch.setenv(cpu.ISA_VARIABLE, tier)
    assert cpu.default_tier() == tier == cpu.compile(plan).tier


def test_the_environment_chooses_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    assert cpu.default_tier() == TIERS[-1] == cpu.compile(chain()).tier
    monkeypatch.setenv(cpu.ISA_VARIABLE, "generic")
    assert cpu.default_tier() == "generic" == cpu.compile(chain()).tier
    assert cpu.compile(chain(), TIERS[-1]).tier == TIERS[-1]
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match=r"INCEPTION_FAST_ISA=sse9.*generic"):
        cpu.default_tier()
    with pytest.raises(ValueError, match=r"tier 'mmx'.*generic"):
        cpu.compile(chain(), "mmx")


def test_reasons_name_what_the_backend_cannot_run() -> None:
    spec = ConvSpec(1, 8, 8, 4, 4, 1, 1)
    assert cpu.reasons(replace(spec, dtype="bfloat16")) == []
    half = replace(spec, dtype="float16")
    assert cpu.reasons(spec) == [] == cpu.reasons(PairSpec(spec, spec)) == cpu.reasons(PoolSpec(1, 8, 8, 4, 2, 2))
    assert ["float16" in why for why in cpu.reasons(half)] == [True]
    assert [why.startswith("second") for why in cpu.reasons(PairSpec(spec, half))] == [True]
    assert cpu.reasons(ConvSpec(1, 8, 8, 2**16, 2**16, 1, 1)) != []
    assert cpu.reasons(ConvSpec(1, 2**21, 1, 4, 4, 1, 1)) != []


def test_a_missing_native_module_says_what_to_do() -> None:
    code = "import sys; sys.modules['inception_fast.kernels.cpu._native'] = None; import inception_fast.kernels.cpu"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "ImportError: the native kernels of inception_fast are not built" in result.stderr
