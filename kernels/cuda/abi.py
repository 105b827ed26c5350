"""`api.h` for ctypes: the same structures in the same order, and the functions with their types."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p

ABI = 1
GROUP = 8  # convolutions of one launch
OUTPUTS = 8  # destinations of one convolution
TYPES = {"bfloat16": 0, "float16": 1}


class Output(ctypes.Structure):
    _fields_ = (("y", c_uint64), ("pitch", c_int64), ("channels", c_int32), ("relu", c_int32))


class Conv(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("x", "weights", "scale", "shift", "residual")),
        *((name, c_int64) for name in ("x_pitch", "residual_pitch")),
        *((name, c_int32) for name in ("n", "h", "w", "c", "oc", "kh", "kw", "stride_h", "stride_w")),
        *((name, c_int32) for name in ("top", "left", "oh", "ow")),
        ("residual_scale", c_float),
        ("splits", c_int32),
        ("outputs", c_int32),
        ("output", Output * OUTPUTS),
    )


class Config(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int32) for name in ("rows", "columns", "depth", "stages", "cluster", "turns", "shared_bytes")
    )


STRUCTURES = {"HopperOutput": Output, "HopperConv": Conv, "HopperConfig": Config}

_GROUP = (POINTER(Conv), c_int32)
FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "hopper_abi": (c_int32, ()),
    "hopper_devices": (c_int32, ()),
    "hopper_error": (c_char_p, ()),
    "hopper_conv_configs": (c_int32, (POINTER(Config), c_int32)),
    "hopper_conv_reasons": (c_int32, (*_GROUP, c_int32, c_int32, c_char_p, c_int64)),
    "hopper_conv_units": (c_int64, (*_GROUP, c_int32)),
    "hopper_conv_workspace_bytes": (c_int64, (*_GROUP, c_int32)),
    "hopper_conv_counter_bytes": (c_int64, (*_GROUP, c_int32)),
    "hopper_conv_blob_bytes": (c_int64, ()),
    "hopper_conv_prepare": (c_int32, (*_GROUP, c_int32, c_int32, c_uint64, c_int32, c_int32, c_void_p)),
    "hopper_conv_launch": (c_int32, (c_void_p, c_uint64)),
}


def bind(library: ctypes.CDLL) -> None:
    """Gives the library's functions their types. Raises OSError for a library of another version."""
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise OSError(f"no function {name}; allowed: a library built from this version's sources")
        function.restype, function.argtypes = result, arguments
    found = library.hopper_abi()
    if found != ABI:
        raise OSError(f"interface {found}; allowed: {ABI}, that of this version's sources")
