"""Kernels in CUDA C++ for Hopper (sm_90a): a library of its own, `_hopper.so`, that CMake builds where it finds nvcc.

Importing this package loads nothing. `missing()` says why the library is not to be had, `library()` loads it once;
neither starts CUDA. Tensors are handed over as pointers, so the library links against neither Python nor torch.
"""

from __future__ import annotations

from . import driver as driver
from .loader import distrusted as distrusted
from .loader import library as library
from .loader import missing as missing
