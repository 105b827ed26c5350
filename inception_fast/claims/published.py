"""Accuracies on ImageNet as their authors published them; measuring them takes the data set and trained weights."""

from __future__ import annotations

from .context import Context
from .row import PUBLISHED, Row

SLIM = "TF-slim's list of pretrained models"
TORCHVISION = "torchvision's documentation of its weights"
TOP = (
    ("inception_v1", SLIM, 69.8, 89.6),
    ("inception_v2", SLIM, 73.9, 91.8),
    ("inception_v3", SLIM, 78.0, 93.9),
    ("inception_v4", SLIM, 80.2, 95.2),
    ("inception_resnet_v2", SLIM, 80.4, 95.3),
    ("inception_v1", TORCHVISION, 69.778, 89.530),
    ("inception_v3", TORCHVISION, 77.294, 93.450),
)


def published(context: Context) -> list[Row]:
    rows = []
    for model, source, *accuracies in TOP:
        for k, accuracy in zip((1, 5), accuracies, strict=True):
            name = f"{model}_{'slim' if source == SLIM else 'torchvision'}_top{k}"
            claim = f"{model} classifies {accuracy:g} % of ImageNet's validation images right, top {k}."
            rows.append(Row(name, claim, source, accuracy, None, f"% top-{k}", context.command("published"), PUBLISHED))
    claim = "Inception-ResNet v1 verifies 99.65 % of the pairs of LFW right."
    source = "facenet's release of 2018-04-02"
    unit = "% of pairs"
    name = "inception_resnet_v1_lfw"
    return [*rows, Row(name, claim, source, 99.65, None, unit, context.command("published"), PUBLISHED)]
