"""Reading pictures: every odd kind is served or refused in one line, and the tensor is the one torchvision makes."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from inception_fast import images
from inception_fast.images import ImageError, find_images, load_image, load_photo, prepare, prepare_batch

CONFIG = SimpleNamespace(
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    input_size=(3, 75, 75),
    crop_pct=0.875,
    interpolation="bicubic",
)


def config(**changes):
    return SimpleNamespace(**{**vars(CONFIG), **changes})


def gradient(width: int = 40, height: int = 30) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_rgb_png_is_read_unchanged(tmp_path):
    pixels = gradient()
    photo = load_photo(save(tmp_path / "a.png", Image.fromarray(pixels)))
    assert photo.notes == () and photo.image.mode == "RGB"
    assert np.array_equal(np.asarray(photo.image), pixels)


def test_cmyk_becomes_rgb(tmp_path):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    photo = load_photo(save(tmp_path / "a.jpg", red, quality=100))
    assert photo.image.mode == "RGB" and "CMYK" in photo.notes[0]
    assert np.abs(np.asarray(photo.image).astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257 * 10], [257 * 128, 65535]], dtype=np.uint16)
    photo = load_photo(save(tmp_path / f"a.{suffix}", Image.fromarray(values)))
    assert np.asarray(photo.image)[..., 0].tolist() == [[0, 10], [128, 255]]
    assert "scaled" in photo.notes[0]


def test_float_pixels_of_either_range(tmp_path):
    unit = np.array([[0.0, 1.0]], dtype=np.float32)
    assert np.asarray(load_image(save(tmp_path / "a.tif", Image.fromarray(unit))))[0, :, 0].tolist() == [0, 255]
    assert np.asarray(load_image(save(tmp_path / "b.tif", Image.fromarray(unit * 200))))[0, :, 0].tolist() == [0, 200]
    with pytest.raises(ImageError, match=r"0 to 1, or 0 to 255"):
        load_image(save(tmp_path / "c.tif", Image.fromarray(unit * 1e6)))
    with pytest.raises(ImageError, match="nan"):
        load_image(save(tmp_path / "d.tif", Image.fromarray(unit * np.nan)))


def test_pixels_out_of_range_are_no_damage(tmp_path):
    path = save(tmp_path / "a.tif", Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)))
    with pytest.raises(ImageError) as refusal:
        load_image(path)
    assert str(refusal.value) == f"{path} has integer pixels from 70000 to 70000; allowed: 0 to 65535"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    clear = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 2, 4))
    photo = load_photo(save(tmp_path / "a.png", clear.convert(mode)))
    assert np.asarray(photo.image)[0].tolist() == [[0, 0, 0]] * 2 + [[255, 255, 255]] * 2
    assert "white" in photo.notes[0]


def test_palette_without_transparency(tmp_path):
    image = Image.fromarray(gradient()).convert("P", palette=Image.Palette.ADAPTIVE)
    photo = load_photo(save(tmp_path / "a.png", image))
    assert photo.notes == () and np.array_equal(np.asarray(photo.image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr"])
def test_other_modes(tmp_path, mode):
    path = save(tmp_path / ("a.jpg" if mode == "YCbCr" else "a.png"), Image.new(mode, (5, 5), 1))
    assert load_image(path).mode == "RGB"


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    photo = load_photo(save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:]))
    assert np.abs(np.asarray(photo.image)[3, 3].astype(int) - [255, 0, 0]).max() <= 6
    assert photo.notes[0] == "first of 3 frames"


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(gradient(20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    turned = load_image(save(tmp_path / "a.png", image, exif=exif))
    assert np.array_equal(np.asarray(turned), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (100000, 1)])
def test_extreme_sizes_still_fill_the_input(tmp_path, size):
    x = prepare(load_image(save(tmp_path / "a.png", Image.new("RGB", size, (255, 255, 255)))), CONFIG)
    white = (1 - torch.tensor(CONFIG.mean)) / torch.tensor(CONFIG.std)
    torch.testing.assert_close(x, white.view(3, 1, 1).expand(3, 75, 75))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tif"])
@pytest.mark.parametrize("keep", [0, 3, 0.3, 0.9])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    whole = save(
        tmp_path / f"a.{suffix}", Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    )
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(data[: keep if keep in (0, 3) else int(len(data) * keep)])
    with pytest.raises(ImageError) as caught:
        load_image(cut)
    message = str(caught.value)
    assert "\n" not in message and str(cut) in message and ("whole copy" in message or "not an image" in message)


def test_random_damage_raises_nothing_but_image_errors(tmp_path):
    rng = np.random.default_rng(1)
    for suffix in ("jpg", "png", "gif", "tif", "webp"):
        data = np.frombuffer(save(tmp_path / f"a.{suffix}", Image.fromarray(gradient())).read_bytes(), np.uint8)
        for trial in range(20):
            broken = data.copy()
            broken[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            path = tmp_path / f"b{trial}.{suffix}"
            path.write_bytes(broken.tobytes())
            try:
                assert load_image(path).mode == "RGB"
            except ImageError as error:
                assert "\n" not in str(error)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (13500, 50000):  # above ours, and above the size at which Pillow raises by itself
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        path = tmp_path / "a.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        with pytest.raises(ImageError, match="resize it first"):
            load_image(path)


def test_paths_that_are_no_picture(tmp_path):
    text = tmp_path / "a.jpg"
    text.write_text("not a picture")
    with pytest.raises(ImageError, match="is not an image"):
        load_image(text)
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "missing.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png is a pipe or a device; write it to a file first"):
        load_image(tmp_path / "pipe.png")  # it was waited for


def test_find_images(tmp_path):
    with pytest.raises(ImageError, match="holds no image"):
        find_images(tmp_path)
    with pytest.raises(ImageError, match="no such file or folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ImageError, match="'' is no path; pass the path of an image"):
        find_images("")
    for name in ("b.PNG", "a.jpeg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c.png").mkdir()
    assert [p.name for p in find_images(tmp_path)] == ["a.jpeg", "b.PNG"]
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


@pytest.mark.parametrize("folder", ["plain", "\udcff"])
def test_find_images_refuses_names_that_are_not_utf8(tmp_path, folder):
    (tmp_path / folder).mkdir()
    path = save(tmp_path / folder / "\udcfe.png", Image.new("RGB", (8, 8)))
    for named in (path, tmp_path / folder):
        with pytest.raises(ImageError, match=r"the name '.*\\udc.*' is not UTF-8; allowed: names that are"):
            find_images(named)


def test_sample_photos_are_photographs():
    pytest.importorskip("sklearn")
    photos = images.sample_photos()
    assert [p.name for p in photos] == ["china.jpg", "flower.jpg"]
    assert all(p.image.mode == "RGB" and min(p.image.size) > 400 for p in photos)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(40, 30), (30, 41), (64, 64), (301, 177)])
def test_prepare_equals_torchvisions_transforms(size, interpolation):
    transforms = pytest.importorskip("torchvision.transforms", exc_type=(ImportError, RuntimeError))
    mode = {"bicubic": transforms.InterpolationMode.BICUBIC, "bilinear": transforms.InterpolationMode.BILINEAR}
    reference = transforms.Compose(
        [
            transforms.Resize(int(75 / 0.875), interpolation=mode[interpolation]),
            transforms.CenterCrop(75),
            transforms.ToTensor(),
            transforms.Normalize(CONFIG.mean, CONFIG.std),
        ]
    )
    image = Image.fromarray(gradient(*size))
    assert torch.equal(prepare(image, config(interpolation=interpolation)), reference(image))


def test_prepare_against_a_hand_computed_crop():
    pixels = gradient(9, 5)
    x = prepare(Image.fromarray(pixels), config(input_size=(3, 5, 5), crop_pct=1.0))
    expected = (pixels[:, 2:7].astype(np.float32) / 255 - np.float32(CONFIG.mean)) / np.float32(CONFIG.std)
    np.testing.assert_allclose(x.numpy(), expected.transpose(2, 0, 1), rtol=1e-6, atol=1e-6)


def test_prepare_other_shapes_and_refusals():
    image = Image.fromarray(gradient())
    assert prepare(image, config(input_size=(3, 40, 75))).shape == (3, 40, 75)
    grey = prepare(image, config(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,)))
    assert grey.shape == (1, 32, 32) and -1 <= grey.min() < grey.max() <= 1
    assert prepare_batch([image, image], CONFIG).shape == (2, 3, 75, 75)
    with pytest.raises(ValueError, match="4 channels"):
        prepare(image, config(input_size=(4, 32, 32)))
    with pytest.raises(ValueError, match=r"interpolation 'magic'; allowed: .*bicubic"):
        prepare(image, config(interpolation="magic"))
    with pytest.raises(ValueError, match="crop_pct 0"):
        prepare(image, config(crop_pct=0))


def test_reading_does_not_touch_the_callers_file(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    load_image(path)
    assert path.read_bytes() == buffer.getvalue()
