"""Portable GPU kernels (NVIDIA, sm_80 and up) in Triton, and the host code that packs weights and describes launches.

Nothing here is imported until a GPU backend or the offline compiler asks for it: importing triton takes time.
"""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("triton is not installed; `pip install inception-fast[triton]`") from error
