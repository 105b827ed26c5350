"""The inference engine: capture, exact rewrites, one plan over one arena, one native call.

fast_model = inception_fast.optimize(model, example)
print(fast_model.report())
"""

from __future__ import annotations

import sys

from ..weights._tensorflow import settle_triton

if "tensorflow" in sys.modules:  # torch loads Triton to capture, and the two live in one process only so
    settle_triton()

from .report import NodeReport, Report, StepReport
from .runner import OptimizedModule, optimize

__all__ = ["NodeReport", "OptimizedModule", "Report", "StepReport", "optimize"]
