"""Random crops, flips and colours of the papers, each image's own random numbers given by seed, epoch and index."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.HAMMING)


def crop_box(
    width: int, height: int, rng: np.random.Generator, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a random part of the image: its share of the area and its width over height drawn
    from the ranges.

    GoogLeNet's sampling: 8 to 100 % of the area, 3/4 to 4/3, drawn again up to ten times where the box does not fit;
    then the whole.
    """
    for _ in range(10):
        size = rng.uniform(*area) * width * height
        ratio = np.exp(rng.uniform(*np.log(aspect)))
        w, h = np.sqrt(size * ratio), np.sqrt(size / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return float(left), float(top), float(left + w), float(top + h)
    return 0.0, 0.0, float(width), float(height)


def paper(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """RGB of any size -> size x size: crop of GoogLeNet, resize by a random filter, flip, TF-slim's colours in random
    order.
    """
    box = crop_box(*image.size, rng, (0.08, 1.0), (3 / 4, 4 / 3))
    image = image.resize((size, size), FILTERS[rng.integers(len(FILTERS))], box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return colour(image, rng)


def colour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness by up to 32 of 255, contrast and saturation by 0.5 to 1.5, hue by up to 0.2 of the circle, in random
    order.
    """
    shift, turn = rng.uniform(-32, 32), rng.uniform(-0.2, 0.2)
    contrast, saturation = rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
    for step in rng.permutation(4):
        if step == 0:
            image = image.point(lambda value: value + shift)
        elif step == 1:
            image = ImageEnhance.Contrast(image).enhance(contrast)
        elif step == 2:
            image = ImageEnhance.Color(image).enhance(saturation)
        else:
            image = turn_hue(image, turn)
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Moves every hue by `turn` of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    moved = Image.fromarray((np.asarray(hue).astype(np.int16) + round(turn * 256)).astype(np.uint8))
    return Image.merge("HSV", (moved, saturation, value)).convert("RGB")


def shift(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """For signs, whose meaning a flip or a close crop would change: at least 70 % of the area, nearly in shape, no
    flip, no colour.
    """
    box = crop_box(*image.size, rng, (0.7, 1.0), (0.9, 1 / 0.9))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def whole(image: Image.Image, size: int) -> Image.Image:
    """The centre square as size x size: what evaluation sees."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def augment(kind: str, image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """`kind` is "paper", "shift" or "none"."""
    if kind == "paper":
        return paper(image, size, rng)
    return shift(image, size, rng) if kind == "shift" else whole(image, size)
