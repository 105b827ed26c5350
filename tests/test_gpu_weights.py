"""What is kept from call to call on a GPU, whose streams are stand-ins: who reads it comes behind who made it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from inception_fast._fold import Fold
from inception_fast.backends import hopper_gpu
from inception_fast.backends.gpu_weights import Packs

GPU = torch.device("cuda", 0)


class Weights(NamedTuple):
    packed: tuple[Tensor, ...]
    packed_bytes: int = 8


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waits = number, list[str]()

    def record_event(self) -> str:
        return f"packed on {self.cuda_stream}"

    def wait_event(self, event: str) -> None:
        self.waits.append(event)


class Machine:
    """A GPU whose current stream, and whether it is being captured, the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams = [Stream(number) for number in range(3)]
        self.now, self.capturing, self.readers = self.streams[0], False, list[tuple[int, int]]()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.now)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(Tensor, "record_stream", lambda t, s: self.readers.append((id(t), s.cuda_stream)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def made_of(tensors: tuple[Tensor, ...]) -> Weights:
    return Weights(tuple(t.clone() for t in tensors))


def test_another_stream_waits_for_the_packing_once_and_is_known_to_read(machine: Machine) -> None:
    packs, tensors = Packs[Weights](), (torch.ones(2), torch.zeros(3))

    def on(number: int) -> Weights:
        machine.now = machine.streams[number]
        return packs.get(("key",), tensors, GPU, lambda: made_of(tensors))

    first = on(1)
    assert all(on(number) is first for number in (1, 2, 1, 2, 0))
    assert [stream.waits for stream in machine.streams] == [["packed on 1"], [], ["packed on 1"]]
    assert sorted(machine.readers) == sorted((id(t), number) for t in first.packed for number in (0, 2))


def test_a_captured_graph_packs_weights_of_its_own(machine: Machine) -> None:
    """What it is given lives as long as it does, and is made of what the parameters hold when it runs."""
    packs, tensors = Packs[Weights](), (torch.ones(2),)

    def get() -> Weights:
        return packs.get(("key",), tensors, GPU, lambda: made_of(tensors))

    machine.capturing = True
    captured = get()
    machine.capturing = False
    outside = get()
    machine.capturing = True
    again = get()
    assert len({id(captured), id(outside), id(again)}) == 3
    machine.capturing = False
    assert get() is outside


def test_on_the_cpu_no_stream_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    packs, tensors = Packs[Weights](), (torch.ones(2),)
    first, second = (packs.get((), tensors, torch.device("cpu"), lambda: made_of(tensors)) for _ in range(2))
    assert first is second


def test_weights_of_the_hopper_kernels_are_waited_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_gpu.convolve, "pack", lambda *given: hopper_gpu.Packed(*(torch.ones(1) for _ in "wss")))
    x: Any = SimpleNamespace(dtype=torch.float16, device=GPU)
    spec: Any = SimpleNamespace()
    params = ((torch.ones(8, 8, 1, 1), torch.ones(8), torch.ones(8)),)
    first = hopper_gpu.prepare(spec, params, x, None, 1.0)
    machine.now = machine.streams[2]
    assert hopper_gpu.prepare(spec, params, x, None, 1.0).compiled is first.compiled
    assert machine.now.waits == ["packed on 0"] and len(machine.readers) == 3


def test_another_stream_waits_for_a_folded_batch_norm_and_a_graph_folds_its_own(machine: Machine) -> None:
    fold, bn = Fold(), nn.BatchNorm2d(4).eval().requires_grad_(False)
    conv: Any = SimpleNamespace(weight=SimpleNamespace(device=GPU, dtype=torch.float32), bias=None)
    first = fold(conv, bn)
    machine.now = machine.streams[1]
    assert fold(conv, bn) is first and fold(conv, bn) is first
    assert machine.now.waits == ["packed on 0"] and sorted(machine.readers) == sorted((id(t), 1) for t in first)
    machine.capturing = True
    captured = fold(conv, bn)
    assert captured is not first and all(map(torch.equal, captured, first))
    machine.capturing = False
    assert fold(conv, bn) is first
