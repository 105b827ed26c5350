"""What the NVIDIA driver says about this machine's GPUs, asked through its management library: CUDA is not started."""

from __future__ import annotations

import ctypes
import functools

NVML = "libnvidia-ml.so.1"
HOPPER = (9, 0)


@functools.cache
def capabilities() -> tuple[tuple[int, int], ...] | None:
    """The compute capability of every GPU; None where the driver does not tell."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        return _asked(nvml)
    finally:
        nvml.nvmlShutdown()


def _asked(nvml: ctypes.CDLL) -> tuple[tuple[int, int], ...] | None:
    count, device, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    found = []
    for index in range(count.value):
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)):
            return None
        if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
            return None
        found.append((major.value, minor.value))
    return tuple(found)


def refusal(found: tuple[tuple[int, int], ...] | None) -> str:
    """Why GPUs of these capabilities cannot run code for sm_90a; empty when one can, or when nobody knows."""
    if found is None or HOPPER in found:
        return ""
    seen = ", ".join(sorted({f"{major}.{minor}" for major, minor in found})) or "none"
    return f"GPUs of compute capability {seen}; allowed: 9.0 (Hopper), whose code is of no use to another"
