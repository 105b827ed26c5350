"""How an image becomes the input of the FID network, in plain NumPy so that worker processes can do it.

Three ways are in use, and their scores are not comparable. "tensorflow" is the graph of 2015-12-05 itself, and
torch-fidelity: TensorFlow 1's bilinear resize, then (x - 128) / 128. "pytorch-fid" is that package: torch's resize with
half-pixel centres, then 2 x / 255 - 1. "clean-fid" is the mode "clean" of that one (arXiv 2104.11222): Pillow's bicubic
resize with antialiasing of each channel in float32, kept in [0, 255], then as the graph.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SIZE = 299
PREPROCESSING = ("tensorflow", "pytorch-fid", "clean-fid")

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@lru_cache(maxsize=1024)
def _taps(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Lower neighbour, upper neighbour and weight of the upper one for every target pixel, in float32 as TensorFlow."""
    position = np.arange(target, dtype=np.float32) * np.float32(source / target)
    low = position.astype(np.intp)
    return low, np.minimum(low + 1, source - 1), position - low.astype(np.float32)


def resize_like_tensorflow1(image: Bytes, size: int = SIZE) -> Floats:
    """[c, h, w] uint8 -> [c, size, size] float32 in [0, 255], bit for bit `tf.compat.v1.image.resize_bilinear`.

    No antialiasing and corners at pixel 0. Left + (right - left) * weight on both rows, then the same between them; any
    other order rounds differently.
    """
    left, right, across = _taps(image.shape[2], size)
    above, below, down = _taps(image.shape[1], size)
    pixels = image.astype(np.float32)
    rows = pixels.take(left, axis=2)
    step = pixels.take(right, axis=2)
    step -= rows
    step *= across
    rows += step
    top = rows.take(above, axis=1)
    step = rows.take(below, axis=1)
    step -= top
    step *= down[:, None]
    top += step
    return top


def prepare(image: Bytes, preprocessing: str = "tensorflow") -> Floats:
    """[3, h, w] uint8 -> [3, 299, 299] float32, what the network takes."""
    if preprocessing == "pytorch-fid":
        return _prepare_like_pytorch_fid(image)
    x = _resize_like_clean_fid(image) if preprocessing == "clean-fid" else resize_like_tensorflow1(image)
    x -= 128
    x *= np.float32(1 / 128)  # a power of two: the same bits as the division
    return x


def _resize_like_clean_fid(image: Bytes) -> Floats:
    from PIL import Image

    def resized(channel: Floats) -> Floats:
        return np.asarray(Image.fromarray(channel).resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    return np.stack([resized(channel) for channel in image.astype(np.float32)]).clip(0, 255)


def _prepare_like_pytorch_fid(image: Bytes) -> Floats:
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(np.ascontiguousarray(image)).unsqueeze(0).to(torch.float32).div_(255)
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    result: Floats = x.mul_(2).sub_(1)[0].numpy()
    return result
