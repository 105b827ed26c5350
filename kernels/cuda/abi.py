"""`api.h`, `pair_api.h` and `walk_api.h` for ctypes: the same structures in the same order, and the functions with
their types.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p

ABI = 7
GROUP = 8  # convolutions of one launch
OUTPUTS = 8  # destinations of one convolution
NEEDS = 16  # earlier jobs that one of a walk waits for
WALK_MARKS = 4  # of a unit, in a trace
FLOAT32 = 2  # a bit of an output's relu
CONV_JOB, POOL_JOB = 0, 1
MAX_POOL, AVERAGE_POOL, AVERAGE_PADDED_POOL = 0, 1, 2
TYPES = {"bfloat16": 0, "float16": 1}


class Output(ctypes.Structure):
    _fields_ = (("y", c_uint64), ("pitch", c_int64), ("channels", c_int32), ("relu", c_int32))


class Conv(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("x", "weights", "scale", "shift", "residual")),
        *((name, c_int64) for name in ("x_pitch", "residual_pitch")),
        *((name, c_int32) for name in ("n", "h", "w", "c", "oc", "kh", "kw", "stride_h", "stride_w")),
        *((name, c_int32) for name in ("top", "left", "oh", "ow", "pooled_h", "pooled_w")),
        ("residual_scale", c_float),
        ("splits", c_int32),
        ("outputs", c_int32),
        ("output", Output * OUTPUTS),
    )


class Config(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int32)
        for name in ("rows", "columns", "depth", "stages", "cluster", "turns", "behind", "pooled", "shared_bytes")
    )


class Pair(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("x", "y", "w1", "scale1", "shift1", "w2", "scale2", "shift2")),
        *((name, c_int64) for name in ("x_pitch", "y_pitch")),
        *((name, c_int32) for name in ("n", "h", "w", "c", "mid", "oc", "taps", "wide_first", "relu1", "relu2")),
    )


class PairConfig(ctypes.Structure):
    _fields_ = tuple((name, c_int32) for name in ("groups", "cluster", "middle", "shared_bytes"))


class Pool(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("x", "y", "shift")),
        *((name, c_int64) for name in ("x_pitch", "y_pitch")),
        *((name, c_int32) for name in ("n", "h", "w", "c", "kh", "kw", "stride_h", "stride_w")),
        *((name, c_int32) for name in ("top", "left", "bottom", "right", "oh", "ow", "kind", "relu")),
    )


class Job(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "columns", "ahead", "halo", "needs")),
        ("need", c_int32 * NEEDS),
        ("conv", Conv),
        ("pool", Pool),
    )


class WalkSizes(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("table", "workspace", "counters"))


STRUCTURES = {
    "HopperOutput": Output,
    "HopperConv": Conv,
    "HopperConfig": Config,
    "HopperPair": Pair,
    "HopperPairConfig": PairConfig,
    "HopperPool": Pool,
    "HopperJob": Job,
    "HopperWalkSizes": WalkSizes,
}

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

# A library may be built without the pair, without the walk, and without a walk's traces.
PAIR_FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "hopper_pair_configs": (c_int32, (POINTER(PairConfig), c_int32)),
    "hopper_pair_reasons": (c_int32, (POINTER(Pair), c_int32, c_int32, c_char_p, c_int64)),
    "hopper_pair_blob_bytes": (c_int64, ()),
    "hopper_pair_prepare": (c_int32, (POINTER(Pair), c_int32, c_int32, c_int32, c_int32, c_void_p)),
    "hopper_pair_launch": (c_int32, (c_void_p, c_uint64)),
}

_JOBS = (POINTER(Job), c_int32)
WALK_FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "hopper_walk_columns": (c_int32, (POINTER(c_int32), c_int32)),
    "hopper_walk_reasons": (c_int32, (*_JOBS, c_int32, c_char_p, c_int64)),
    "hopper_walk_sizes": (c_int32, (*_JOBS, c_int32, POINTER(WalkSizes))),
    "hopper_walk_blob_bytes": (c_int64, ()),
    "hopper_walk_prepare": (c_int32, (*_JOBS, c_int32, c_uint64, c_uint64, c_int32, c_void_p, c_void_p)),
    "hopper_walk_launch": (c_int32, (c_void_p, c_uint64)),
}

TRACE_FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "hopper_walk_units": (c_int64, (*_JOBS, c_int32, POINTER(c_int32), POINTER(c_int32), c_int64)),
    "hopper_walk_traced": (c_int32, (c_void_p, c_uint64, c_void_p)),
}


def has_pairs(library: ctypes.CDLL) -> bool:
    """Gives the pair's functions their types, where the library has them."""
    return _has(library, PAIR_FUNCTIONS)


def has_walk(library: ctypes.CDLL) -> bool:
    """Gives the walk's functions their types, where the library has them."""
    return _has(library, WALK_FUNCTIONS)


def has_traces(library: ctypes.CDLL) -> bool:
    """Gives the functions of a walk's traces their types, where the library has them."""
    return _has(library, TRACE_FUNCTIONS)


def _has(library: ctypes.CDLL, functions: dict[str, tuple[type, tuple[type, ...]]]) -> bool:
    found = {name: getattr(library, name, None) for name in functions}
    for name, function in found.items():
        if function is not None:
            function.restype, function.argtypes = functions[name]
    return None not in found.values()


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
