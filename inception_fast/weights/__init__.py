"""Weights of every layout people have, for our nets: TF-slim, Keras, torchvision, timm, facenet-pytorch, the hub."""

from __future__ import annotations

from ._resolve import resolve
from ._source import Source, WeightsError
from .convert import convert

__all__ = ["Source", "WeightsError", "convert", "resolve"]
