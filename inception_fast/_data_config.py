"""How images become the input of a model, as plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass, replace

INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
"""By Pillow's names."""
LARGEST = 8192
"""Pixels of a side after the resize, of which a file may ask."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig:
    """x = (image / 255 - mean) / std, RGB, after a resize of the shorter side to size / crop_pct and a centre crop.

    input_size is (c, h, w).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def with_channels(self, channels: int) -> DataConfig:
        """The same for images of another number of channels: the mean over the old ones, for each of the new."""
        if channels == self.input_size[0]:
            return self
        mean = sum(self.mean) / len(self.mean)
        std = sum(self.std) / len(self.std)
        size = (channels, *self.input_size[1:])
        return replace(self, mean=(mean,) * channels, std=(std,) * channels, input_size=size)


def inception_config(size: int, crop_pct: float = 0.875) -> DataConfig:
    """x / 127.5 - 1: TF-slim, Keras and timm's tf weights."""
    return DataConfig((0.5,) * 3, (0.5,) * 3, (3, size, size), crop_pct)


def imagenet_config(size: int, crop_pct: float = 0.875, interpolation: str = "bilinear") -> DataConfig:
    """ImageNet's statistics: torchvision's weights, whose `transform_input` turns them into x / 127.5 - 1."""
    return DataConfig(IMAGENET_MEAN, IMAGENET_STD, (3, size, size), crop_pct, interpolation)


def facenet_config(size: int = 160) -> DataConfig:
    """(x - 127.5) / 128 on an aligned face crop: facenet's fixed image standardisation."""
    return DataConfig((0.5,) * 3, (128 / 255,) * 3, (3, size, size), 1.0, "bilinear")
