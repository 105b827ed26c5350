"""One copy of the packed weights serves the plans of every batch size."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import ConvStep, Output, PairStep, Plan, View
from inception_fast.kernels.spec import ConvSpec
from torch import nn

from cpu_plans import Memory, Scene, argument, call, chain, chain_input, chain_truth, integers, poisoned
from inception_fast import create_model, optimize
from plain_layers import Siblings


def process(script: str, *arguments: str) -> str:
    """What a script prints in a process of its own: in pytest's, memory moves by what other tests left behind."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True).stdout


def with_weights(plan: Plan, value: float) -> Plan:
    """The plan with every weight replaced by one value."""
    steps = [
        dataclasses.replace(s, weight=np.full_like(s.weight, value)) if isinstance(s, ConvStep) else s
        for s in plan.steps
    ]
    return dataclasses.replace(plan, steps=tuple(steps))


@pytest.mark.parametrize("tier", cpu.tiers())
def test_a_plan_like_another_uses_its_weights(tier: str) -> None:
    first = cpu.compile(chain(1), tier)
    plan, x = chain(3), chain_input(3)
    shared = cpu.compile(with_weights(plan, float("nan")), tier, like=first)
    del first
    assert torch.equal(call(shared, plan, x, threads=2)[0], chain_truth(x))


def test_a_plan_with_other_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="weights of a plan with other convolutions"):
        cpu.compile(Plan((), (), (), 0), like=cpu.compile(chain(1)))


@pytest.mark.parametrize("tier", (*cpu.tiers(), *cpu.EMULATED))
def test_a_fused_pair_shares_the_weights_of_its_two_convolutions(tier: str) -> None:
    """Three channels of neighbouring taps are joined in bfloat16, in either form."""

    def pair(kind: str) -> tuple[Scene, View]:
        first = integers(ConvSpec(2, 5, 8, 3, 3, 3, 3, dtype="bfloat16"))
        second = integers(ConvSpec(2, 3, 6, 3, 8, 1, 3, dtype="bfloat16"))
        scene = Scene()
        x = scene.put(first.x, dtype="bfloat16")
        middle, y = scene.room(2, 3, 6, 3, dtype="bfloat16"), scene.room(2, 3, 4, 8, dtype="bfloat16")
        scene.buffers[1] = dataclasses.replace(scene.buffers[1], kind=kind)
        a, b = first.step(x, (Output(middle, True),)), second.step(middle, (Output(y, False),))
        scene.steps.append(PairStep("pair", "chain", a, b))
        return scene, y

    (apart, y), (fused, _) = pair("arena"), pair("local")
    compiled = cpu.compile(fused.plan(), tier, like=cpu.compile(apart.plan(), tier))
    arena = poisoned(fused.position // 4)
    compiled.run([argument(x) for x in fused.inputs], [], arena.ctypes.data, 2)
    assert torch.equal(Memory(fused.buffers, arena).get(y), apart.run(tier).get(y))


@pytest.mark.skipif(len(cpu.tiers()) < 2, reason="this machine runs one tier only")
def test_a_plan_for_another_tier_is_refused() -> None:
    slowest, fastest = cpu.tiers()[0], cpu.tiers()[-1]
    with pytest.raises(ValueError, match=f"for tier {slowest}"):
        cpu.compile(chain(1), slowest, like=cpu.compile(chain(1), fastest))


def test_another_batch_size_costs_no_second_copy() -> None:
    """Ten more batch sizes of 26 MB of weights stay far below one more copy each."""
    model = nn.Sequential(nn.Conv2d(512, 512, 5, padding=2), nn.ReLU()).eval()
    x = torch.randn(2, 512, 5, 5)
    fast = optimize(model, x)
    with torch.no_grad():
        fast(x)
        before = psutil.Process().memory_info().rss
        for batch in range(3, 13):
            fast(torch.randn(batch, 512, 5, 5))
    assert psutil.Process().memory_info().rss - before < 3 * 26e6


SIZES = """
import gc, psutil, torch
from plain_layers import Siblings
from inception_fast import optimize

def resident():
    return psutil.Process().memory_info().rss

fast = optimize(Siblings(2048).eval(), torch.randn(1, 2048, 5, 5))
with torch.no_grad():
    for side in (4, *range(6, 12)):
        fast(torch.randn(1, 2048, side, side))
        gc.collect()
        if side == 4:
            before = resident()
print(len(fast._session._captured), resident() - before)
"""


def test_another_image_size_costs_no_second_copy() -> None:
    """Every size is a capture of its own; 16 MB of siblings' weights are neither packed nor joined again for it."""
    captured, grew = map(int, process(SIZES).split())
    assert captured == 8
    assert grew < 16e6  # six sizes; 7 to 8 MB when nothing is copied


def test_siblings_keep_their_parameters() -> None:
    """The plan reads the module's own memory: there is no joined copy of it."""
    model = Siblings(32).eval()
    (plan,) = optimize(model, torch.randn(2, 32, 5, 5)).native_plans()
    (step,) = [step for step in plan.steps if isinstance(step, ConvStep)]
    found = [part.ctypes.data for part in step.parts]
    assert found == [part.weight.data_ptr() for part in model.parts]


def test_shared_weights_give_every_image_the_same_bits() -> None:
    model = create_model("inception_v1", num_classes=7).eval()
    x = torch.randn(5, 3, 64, 64)
    fast = optimize(model, x[:2])
    with torch.no_grad():
        whole = fast(x)
        alone = torch.cat([fast(image[None]) for image in x])
    assert torch.equal(whole, alone)
    assert len({id(captured) for _, captured in fast._session.programs().values()}) == 1


PEAK = """
import json, sys, torch
from plain_layers import Siblings
from torch import nn
from inception_fast.measure.cpu_suite import first_call

def net(channels):
    if "siblings" in how:
        return nn.Sequential(*(Siblings(4 * channels) for _ in range(2))).eval()
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers).eval()

how = sys.argv[1]
dtype = "bfloat16" if "bfloat16" in how else "float32"
torch.set_num_threads(2)
with torch.inference_mode():
    for channels in (16, 512 if how == "winograd" else 768):
        shape = (1, 4 * channels, 5, 5) if "siblings" in how else (1, channels, 17, 17)
        model, x = net(channels), torch.randn(shape)
        if "channels_last" in how:
            model = model.to(memory_format=torch.channels_last)
        found = first_call(model, dtype, x, how == "winograd")
print(json.dumps(found))
"""

# What is packed in bytes, at least and at most, of weights of float32.
PACKED = {"direct": (1, 1.1), "winograd": (2, 4.1), "channels_last": (1, 1.1)}
PACKED |= {"siblings": (1, 1.1), "siblings bfloat16": (0.5, 0.55)}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system tells no peak of resident memory")
@pytest.mark.parametrize("how", PACKED)
def test_a_plan_needs_its_packed_weights_once_and_its_arena(how: str) -> None:
    """Peak of resident memory over all of optimising and the first call: at most a tenth more than these.

    Neither merged siblings nor weights in another order of dimensions are copied on the way.
    """
    found = json.loads(process(PEAK, how))
    channels = 512 if how == "winograd" else 768
    weights = (2 * 16 if "siblings" in how else 3 * 9) * channels**2 * 4
    least, most = PACKED[how]
    assert least * weights <= found["packed_bytes"] <= most * weights
    needed = found["packed_bytes"] + found["arena_bytes"]
    assert 0.9 * needed <= found["grew_bytes"] <= 1.1 * needed


FREED = """
import ctypes, torch
from pathlib import Path
from torch import nn
from inception_fast import optimize

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

x, libc = torch.randn(1, 3, 9, 9), ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
optimize(nn.Conv2d(3, 8, 3).eval(), x)
blocks = [libc.malloc(65536) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 65536)
for block in blocks[:-1]:
    libc.free(block)
before = resident()
optimize(nn.Conv2d(3, 16, 3).eval(), x)
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back when asked")
def test_what_capturing_freed_is_given_back_before_weights_are_packed() -> None:
    assert int(process(FREED)) > 32 * 2**20


LEFT = """
import gc, torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from inception_fast import optimize

kept = []
for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(3, 4, 3)):
    gc.disable()
    kept.append(optimize(model.eval(), torch.zeros(1, 3, 8, 8)))
    print(sum(type(x) is FakeTensor for x in gc.get_objects()))
    gc.enable()
    gc.collect()
    print(sum(type(x) is fx.Graph for x in gc.get_objects()))
"""


def test_a_capture_leaves_neither_stand_ins_of_tensors_nor_a_graph_of_torch() -> None:
    """The stand-ins go at once, but for the input's, the graph with its cycles. In a process of its own, for pytest
    keeps what torch logs.
    """
    stand_ins, graphs = (list(map(int, process(LEFT).split()))[i::2] for i in range(2))
    assert max(stand_ins) <= 1 and graphs == [0, 0]
