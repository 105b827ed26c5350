"""What a session needs of an NVIDIA GPU: its device, its configurations, its packed weights. Imports Triton."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import triton_gpu
from . import gpu_hopper, gpu_invariant
from . import graph as ir
from .capture import without_histories
from .gpu_memory import Keeper
from .gpu_plan import Packs
from .gpu_runner import GpuCompiled
from .plan import lower


class GpuSession:
    """The programs of one module on one device. Their weights are shared; TF32 is for those who asked torch for it.

    `invariant`: an image's bits are the same in every batch.
    """

    def __init__(
        self, device: torch.device, dtype: str, backend: str = "triton", named: bool = True, invariant: bool = False
    ) -> None:
        self.device, self.dtype, self.invariant = device, dtype, invariant
        self.tf32 = dtype == "float32" and triton_gpu.tf32_asked()
        self.packs, self.keeper = Packs(device), Keeper.of(device)
        choose = triton_gpu.chooser(device, self.tf32)
        self.choose = gpu_invariant.chooser(choose) if invariant else choose
        self.hopper = gpu_hopper.of(device, dtype, backend, named, invariant)
        self._warned = False

    def compiled(self, graph: ir.Graph, leaves: Sequence[Any]) -> GpuCompiled:
        """The program for inputs of these sizes; torch runs the nodes that have no GPU step."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            program = lower(graph, leaves, triton_gpu.reasons, self.dtype)  # asks about the current device
        if self.invariant and not self._warned and (loose := gpu_invariant.loose(program)):
            self._warned = True
            gpu_invariant.warn_of(loose)
        return GpuCompiled(program, self.packs, self.choose, tf32=self.tf32, keeper=self.keeper, hopper=self.hopper)


def on_cpu(leaves: Sequence[Any]) -> list[Any]:
    """Stand-ins on the CPU for inputs on a GPU: capture and planning look at shapes and dtypes only."""
    return [
        torch.zeros(x.shape, dtype=x.dtype, device="cpu") if isinstance(x, Tensor) and x.is_cuda else x for x in leaves
    ]


def module_on_cpu(module: nn.Module) -> nn.Module:
    """The module, or a copy of one whose parameters are on a GPU."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, without_histories(module)).cpu() if any(t.is_cuda for t in tensors) else module
