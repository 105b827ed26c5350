"""How evenly threads share out a plan's steps, by what each computed: more threads than this machine has cores."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import Output, PairStep
from inception_fast.kernels.spec import ConvSpec, PairSpec

from cpu_plans import Scene, argument, normals, poisoned

TIER = cpu.tiers()[-1]


def shares(scene: Scene, threads: int) -> np.ndarray:
    """Seconds that each thread computed in the last step: the shortest of several calls."""
    compiled = cpu.compile(scene.plan(), TIER)
    inputs, arena = [argument(x) for x in scene.inputs], poisoned(scene.position // 4)
    found = [compiled.run_shares(inputs, [], arena.ctypes.data, threads) for _ in range(400)]
    return np.min(found, axis=0)[:, -1]


def of_tiles(count: int) -> Scene:
    """A 1x1 convolution of 256 channels on so many lines, each as long as a tile."""
    rows = 6 if TIER == "avx2" else 14
    conv = normals(ConvSpec(1, count, rows, 256, 256, 1, 1))
    scene = Scene()
    x, y = scene.put(conv.x), scene.room(1, count, rows, 256)
    scene.steps.append(conv.step(x, (Output(y, True),)))
    return scene


@pytest.mark.alone
def test_threads_share_out_the_lines_of_all_images_of_a_fused_pair() -> None:
    """Two columns each of three images, for six threads: shared out image by image, four would have none."""
    first, second = ConvSpec(3, 33, 2, 64, 64, 1, 3, (1, 1), (0, 0, 1, 1)), (3, 1)
    a = normals(first)
    b = normals(ConvSpec(3, 33, 2, 64, 64, *second, (1, 1), (1, 1, 0, 0)))
    scene = Scene()
    x, middle = scene.put(a.x), scene.room(3, 33, 2, 64)
    scene.buffers[-1] = replace(scene.buffers[-1], kind="local")
    y = scene.room(3, 33, 2, 64)
    steps = a.step(x, (Output(middle, True),)), b.step(middle, (Output(y, True),))
    scene.steps.append(PairStep("pair", "chain", *steps))
    spent = shares(scene, 6)
    assert spent.min() > 0.3 * spent.max()


@pytest.mark.alone
def test_few_tiles_of_winograds_algorithm_are_shared_by_groups_of_threads() -> None:
    """16 tiles for 16 threads: each with a tile of its own would read all weights for it, three times the work."""
    conv = replace(normals(ConvSpec(1, 8, 8, 384, 384, 1, 3, (1, 1), (0, 0, 1, 1))), tile=(1, 4))
    scene = Scene()
    x, y = scene.put(conv.x), scene.room(1, 8, 8, 384)
    scene.steps.append(conv.step(x, (Output(y, True),)))
    assert shares(scene, 16).sum() < 2 * shares(scene, 1).sum()


@pytest.mark.alone
def test_a_map_of_few_tiles_is_shared_by_groups_of_threads() -> None:
    """66 tiles for 48 threads: alone with their tiles 18 of them would have two and the others one."""
    spent = shares(of_tiles(66), 48)
    assert spent.max() < 1.5 * np.median(spent)


@pytest.mark.alone
def test_threads_share_the_tile_between_them() -> None:
    """Nine tiles for two threads: of whole tiles one would have five, the other four."""
    spent = shares(of_tiles(9), 2)
    assert spent.min() > 0.88 * spent.max()


ON_ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from inception_fast.kernels import cpu
print(cpu.handover_ns())
"""


@pytest.mark.alone
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_how_far_two_cores_are_from_each_other() -> None:
    """Nearer than a thread could sleep and wake, farther than a core is from its own line."""
    found = [ns for ns in (cpu.handover_ns() for _ in range(20)) if ns is not None]
    assert found and 2 < min(found) < 2000


def test_one_core_is_not_far_from_itself() -> None:
    done = subprocess.run([sys.executable, "-c", ON_ONE_CORE], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "None"


BESIDE_OTHERS = """
import os, statistics, subprocess, sys, time
cores = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cores)
import torch
import inception_fast as fast
torch.set_num_threads(2)
x = torch.zeros(1, 3, 160, 160)
model = fast.optimize(fast.create_model("inception_v2").eval(), x)
def middle():
    times = []
    for _ in range(60):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
middle()
alone = middle()
busy = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\\nwhile True: pass"
others = [subprocess.Popen([sys.executable, "-c", busy, str(core)], stdout=subprocess.PIPE) for core in cores]
try:
    for other in others:
        other.stdout.readline()
    print(middle() / alone)
finally:
    for other in others:
        other.kill()
"""


@pytest.mark.alone
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_others_on_the_same_cores_get_their_share_and_no_more() -> None:
    """About half of each core, so a call takes two to three times as long; where threads that wait yield, thirteen."""
    done = subprocess.run([sys.executable, "-c", BESIDE_OTHERS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5


@pytest.mark.parametrize(
    ("n", "threads", "fused"),
    [
        (1, 1, False),
        (2, 1, True),
        (1, 2, False),
        (2, 2, True),
        (3, 2, False),
        (4, 2, True),
        (4, 16, False),
        (16, 16, True),
        (20, 16, False),
        (25, 16, True),
    ],
)
def test_pairs_are_fused_where_every_thread_has_images_of_its_own(n: int, threads: int, fused: bool) -> None:
    first = ConvSpec(n, 17, 17, 64, 64, 1, 7, (1, 1), (0, 0, 3, 3))
    pair = PairSpec(first, ConvSpec(n, 17, 17, 64, 64, 7, 1, (1, 1), (3, 3, 0, 0)))
    assert cpu.fuses(pair, threads) == fused
