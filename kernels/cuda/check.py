"""Whether the kernels are right on the GPU that is here: one small convolution with an exact result, by every
configuration, before anything else runs on the device. What is wrong makes the backend unavailable, with the reason.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from ..maps import dense
from ..spec import ConvSpec
from . import convolve, loader
from .convolve import Cut, Problem, Target
from .driver import HOPPER
from .loader import Library

# Two images of 9x9, so that tiles meet every border and the next image; sums below 256 are exact in both formats.
SPEC = ConvSpec(2, 9, 9, 64, 96, 1, 3, padding=(0, 0, 1, 1), relu=False, dtype="bfloat16")
_once = threading.Lock()


def refusal(device: torch.device) -> str:
    """Why the kernels are not used on this device; empty when they are right there. Runs them at the first call."""
    index = torch.cuda.current_device() if device.index is None else device.index
    capability = torch.cuda.get_device_capability(index)
    if capability != HOPPER:
        return f"GPU {index} has compute capability {capability[0]}.{capability[1]}; allowed: 9.0"
    with _once:
        if index not in loader.verdicts:
            loader.verdicts[index] = _found(torch.device("cuda", index))
        return loader.verdicts[index]


def _found(device: torch.device) -> str:
    try:
        with torch.cuda.device(device):
            return wrong(loader.library(), device)
    except RuntimeError as error:
        return f"GPU {device.index}: the first convolution failed: {error}"


def wrong(kernels: Library, device: torch.device, spec: ConvSpec = SPEC) -> str:
    """Which configurations give another result than the exact one, in words; empty when none does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (spec.n, spec.c, spec.h, spec.w), generator=generator).float()
    weight = torch.randint(-1, 2, (spec.oc, spec.c, spec.kh, spec.kw), generator=generator).float()
    shift = torch.randint(-3, 4, (spec.oc,), generator=generator).float()
    padding = (spec.padding[0], spec.padding[2])
    wanted = F.conv2d(x.double(), weight.double(), shift.double(), spec.stride, padding)
    dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float16
    there = x.to(device, dtype).permute(0, 2, 3, 1).contiguous()
    packed = convolve.pack(weight, None, shift, dtype, device)
    bad = []
    for config in convolve.able(kernels, spec):
        for splits in (1, 2):
            y = _run(kernels, spec, there, packed, Cut(config, splits))
            if not torch.equal(y.permute(0, 3, 1, 2).double().cpu(), wanted):
                bad.append(f"{config.name} in {splits}" if splits > 1 else config.name)
    return f"the first convolution gave wrong numbers with {', '.join(bad)}" if bad else ""


def _run(kernels: Library, spec: ConvSpec, x: Tensor, packed: convolve.Packed, cut: Cut) -> Tensor:
    y = torch.full((spec.n, spec.oh, spec.ow, spec.oc), float("nan"), dtype=x.dtype, device=x.device)
    problem = Problem(spec, dense(x), packed, (Target(dense(y), spec.relu),))
    launch = convolve.group("check", kernels, [problem], cut)
    launch.run()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return y
