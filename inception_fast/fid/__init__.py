"""Features of the FID network and the scores of generative models: FID, KID, Inception score, precision and recall."""

from __future__ import annotations

from .distance import frechet_distance
from .extractor import InceptionFeatures
from .files import read_statistics, write_statistics
from .kernel_distance import KernelDistance, kernel_inception_distance
from .neighbours import Neighbours, precision_recall_density_coverage
from .score import InceptionScore, inception_score
from .statistics import Gaussian, Statistics
from .torch_fidelity import register_with_torch_fidelity

__all__ = [
    "Gaussian",
    "InceptionFeatures",
    "InceptionScore",
    "KernelDistance",
    "Neighbours",
    "Statistics",
    "frechet_distance",
    "inception_score",
    "kernel_inception_distance",
    "precision_recall_density_coverage",
    "read_statistics",
    "register_with_torch_fidelity",
    "write_statistics",
]
