"""These tests run in Triton's interpreter, which has to be chosen before triton is imported: TRITON_INTERPRET=1.

`tests/test_triton.py` runs them in a process of their own. With a GPU they run compiled; elsewhere they are not
collected.
"""

from __future__ import annotations

import os

import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["test_*.py"]
