"""These tests run Triton's interpreter, which has to be chosen before triton is imported: TRITON_INTERPRET=1.

`tests/test_triton.py` runs them in a process of their own; elsewhere they are not collected.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
