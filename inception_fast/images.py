"""Photographs from files to the tensor a network asks for.

Every file that is no picture, or not a whole one, raises `ImageError`, whose message is one line that says what to do.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import torch

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB: the size at which Pillow itself speaks of a decompression bomb
MAX_ASPECT = 16  # longer images lose their ends before the resize: the centre crop never shows them


class ImageError(ValueError):
    """A file that cannot be read as a picture; the message names it and says what to do."""


class Preparation(Protocol):
    """The part of a model's data config that preprocessing reads."""

    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def std(self) -> Sequence[float]: ...
    @property
    def input_size(self) -> tuple[int, int, int]: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def interpolation(self) -> str: ...


@dataclass(frozen=True)
class Photo:
    """An 8-bit RGB picture, upright, and what had to be done to the file to get it."""

    name: str
    image: Image.Image
    notes: tuple[str, ...] = ()


def files_below(folder: str | Path) -> Iterator[Path]:
    """Those in a folder and in folders inside it, linked ones too, each folder once: a link may lead back.

    Raises OSError for one that may not be read.
    """
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(folders)
        yield from () if real in seen else (Path(place, name) for name in sorted(files))
        seen.add(real)


def _refuse(error: OSError) -> NoReturn:
    """What `os.walk` would pass over in silence."""
    raise error


def load_photo(path: str | Path) -> Photo:
    """Reads the picture at `path`: the first frame, turned upright, transparency laid on white, any depth to 8 bits.

    Raises:
        ImageError: the path is missing, a folder, a pipe, not a picture, truncated, or larger than MAX_PIXELS.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{path} is a folder; pass the image files in it")
    if not path.exists():
        raise ImageError(f"{path}: no such file; pass the path of an image")
    if is_pipe(path):
        raise ImageError(f"{path} is a pipe or a device; write it to a file first")
    return _read(path, str(path))


def read_photo(data: bytes, name: str, *, plain: bool = False) -> Photo:
    """The picture in the bytes of a file, as `load_photo` gives it; `name` stands in messages.

    Args:
        plain: only convert to RGB, as tools that compare images do: orientation and transparency stay unread.

    Raises:
        ImageError: the bytes are no picture, or not a whole one, or it is larger than MAX_PIXELS.
    """
    if not data:
        raise ImageError(f"{name} is empty; get a whole copy of it")
    return _read(io.BytesIO(data), name, plain)


def _read(file: Path | io.BytesIO, name: str, plain: bool = False) -> Photo:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; the size is checked below
            with Image.open(file) as source:
                _check_size(name, source.size)
                image, notes = (source.convert("RGB"), []) if plain else _decode(source, name)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {MAX_PIXELS} pixels; resize it first") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name} is not an image that Pillow reads; convert it to JPEG or PNG") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read; check its permissions") from None
    except Exception as error:  # decoders meet hostile bytes and raise whatever they like
        raise ImageError(f"{name} is damaged or cut short ({_reason(error)}); get a whole copy of it") from error
    return Photo(name, image, tuple(notes))


def is_pipe(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device, for which reading may wait without end."""
    return path.exists() and not path.is_file() and not path.is_dir()


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path` as an upright 8-bit RGB image; raises ImageError."""
    return load_photo(path).image


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture that another library opened, as `load_image` gives the one of a file; raises ImageError for pixels out
    of range.
    """
    return _decode(image, name)[0]


def find_images(path: str | Path) -> list[Path]:
    """`path` itself when it is a file, else the images in that folder, by name; raises ImageError without any."""
    check_path(str(path))
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path}: no such file or folder; pass the path of an image or of a folder of images")
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ImageError(f"{path} holds no image; looked for {' '.join(SUFFIXES)}")
    check_names(found)
    return found


def check_path(text: str) -> None:
    """Raises ImageError for a name that `check_names` refuses, and for none: the current folder would be taken."""
    if not text:
        raise ImageError("'' is no path; pass the path of an image or of a folder of images")
    check_names([text])


def check_names(paths: Iterable[str | Path]) -> None:
    """Raises ImageError for a name that is no UTF-8: neither JSON nor parquet could hold it when the work is done."""
    for text in map(str, paths):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ImageError(f"the name {text!r} is not UTF-8; allowed: names that are, rename it") from None


def sample_photos() -> list[Photo]:
    """The two photographs that scikit-learn ships; raises ImageError when it is not installed."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImageError(f"the sample photos need scikit-learn ({error}); install it or name an image") from error
    samples = load_sample_images()
    names = [Path(name).name for name in samples.filenames]
    return [Photo(name, Image.fromarray(data)) for name, data in zip(names, samples.images, strict=True)]


def check_channels(config: Preparation) -> None:
    """Raises ValueError for a network that takes no pictures, so that this is said once and not of every image."""
    channels = config.input_size[0]
    if channels not in (1, 3):
        raise ValueError(f"a network of {channels} channels; allowed for images: 3 (RGB), 1 (grey)")


def prepare(image: Image.Image, config: Preparation) -> torch.Tensor:
    """[c, h, w] float32: short side to floor(size / crop_pct), centre crop to input_size, x / 255, (x - mean) / std.

    c is 3, or 1 for a network of grey images; another number raises ValueError.
    """
    import torch

    check_channels(config)
    channels, height, width = config.input_size
    pixels = np.asarray(_resize_and_crop(image, height, width, config.crop_pct, config.interpolation))
    pixels = pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().to(torch.float32).div_(255.0)
    mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu").view(-1, 1, 1) for v in (config.mean, config.std))
    return x.sub_(mean).div_(std)


def prepare_batch(images: Iterable[Image.Image], config: Preparation) -> torch.Tensor:
    """[n, c, h, w] float32, an image a row, each as by `prepare`."""
    import torch

    return torch.stack([prepare(image, config) for image in images])


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:160] if text else type(error).__name__


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} is {width}x{height}, more than {MAX_PIXELS} pixels; resize it first")


def _decode(source: Image.Image, name: str) -> tuple[Image.Image, list[str]]:
    notes = []
    frames = getattr(source, "n_frames", 1)
    if frames > 1:
        source.seek(0)
        notes.append(f"first of {frames} frames")
    source.load()
    image: Image.Image = source
    try:
        image = ImageOps.exif_transpose(source)
    except Exception as error:  # a picture with damaged metadata is still a picture
        notes.append(f"orientation unknown, its EXIF data is damaged ({_reason(error)})")
    if image.mode.startswith("I") or image.mode == "F":
        notes.append(f"{image.mode} pixels scaled to 8 bits")
        return _deep_to_rgb(image, name), notes
    if image.has_transparency_data:
        notes.append("transparency laid on white")
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), notes
    if image.mode == "CMYK":
        notes.append("CMYK converted without its colour profile")
    return image.convert("RGB"), notes


def _deep_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Grey of more than 8 bits to RGB. Pillow's own conversion clips at 255, which turns a 16-bit picture white."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
            raise ImageError(f"{name} has float pixels from {low:g} to {high:g}; allowed: 0 to 1, or 0 to 255")
        scale = 255.0 if high <= 1 else 1.0
    else:
        if low < 0 or high > 65535:
            raise ImageError(f"{name} has integer pixels from {low:g} to {high:g}; allowed: 0 to 65535")
        scale = 255.0 / 65535.0
    grey = np.rint(values * scale).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _resize_and_crop(image: Image.Image, height: int, width: int, crop_pct: float, interpolation: str) -> Image.Image:
    filters = {f.name.lower(): f for f in Image.Resampling}
    if interpolation not in filters:
        raise ValueError(f"interpolation {interpolation!r}; allowed: {', '.join(sorted(filters))}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct {crop_pct}; allowed: more than 0, at most 1")
    image = _shorten(image)
    short, long = sorted(image.size)
    # A square input follows the short side; another shape scales each way so that the crop stays inside.
    target = max(int(height / crop_pct), int(width / crop_pct))
    stretched = max(target, int(target * long / short))
    size = (target, stretched) if image.width <= image.height else (stretched, target)
    image = image.resize(size, filters[interpolation])
    left = round((size[0] - width) / 2.0)
    top = round((size[1] - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _shorten(image: Image.Image) -> Image.Image:
    """Cuts the ends off a very long image, or a 1x100000 strip would ask for gigabytes."""
    short, long = sorted(image.size)
    if long <= MAX_ASPECT * short:
        return image
    cut = (long - MAX_ASPECT * short) // 2
    keep = MAX_ASPECT * short
    return image.crop((0, cut, short, cut + keep) if image.height == long else (cut, 0, cut + keep, short))
