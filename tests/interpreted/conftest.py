"""These tests run in Triton's interpreter, which has to be chosen before triton is imported: TRITON_INTERPRET=1.

`tests/test_triton.py` runs them in a process of their own. With a GPU they run compiled; elsewhere they are not
collected.
"""

from __future__ import annotations

import os

import torch

# On a GPU torch would round the operands of float32 convolutions to TF32, which no budget here allows for.
torch.backends.cudnn.allow_tf32 = False

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["test_*.py"]
