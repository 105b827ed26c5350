"""Data: the order and the augmentation depend on seed and position alone; what is broken is named, counted, skipped."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inception_fast.train.augment import colour, crop_box, paper, whole
from inception_fast.train.data import Normalise, evaluation_loader, load_data, training_loader
from inception_fast.train.labelled import DataError, split
from inception_fast.train.stream import Stream, mix
from pictures import may_not_be_read
from training import folder_of_classes, photo


def test_stream_covers_every_epoch_once() -> None:
    stream = Stream(range(10), 4, seed=1, start=0, stop=5)
    keys = [key for batch in stream for key in batch]
    assert len(stream) == 5 and stream.epoch(5) == 2.0
    for epoch in (0, 1):
        assert sorted(index for e, index in keys if e == epoch) == list(range(10))
    assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]


def test_stream_resumes_anywhere() -> None:
    whole_run = list(Stream(range(7), 3, seed=2, start=0, stop=9))
    assert list(Stream(range(7), 3, seed=2, start=4, stop=9)) == whole_run[4:]
    assert list(Stream(range(7), 3, seed=3, start=0, stop=9)) != whole_run


def test_processes_share_the_batch() -> None:
    one = list(Stream(range(20), 6, seed=2, start=0, stop=4))
    parts = [list(Stream(range(20), 6, 2, 0, 4, rank, 3)) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*parts, strict=True)] == one
    with pytest.raises(ValueError, match="batch size 6 over 4 processes; allowed: a multiple of 4"):
        Stream(range(20), 6, 2, 0, 4, 0, 4)


def test_batch_larger_than_the_data() -> None:
    batch = Stream(range(3), 8, seed=0, start=0, stop=1).batch(0)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_mix_spreads_neighbours() -> None:
    seeds = {mix(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900 and all(0 <= seed < 2**63 for seed in seeds)


def test_split_holds_out_every_fifth_of_a_class() -> None:
    labels = [0] * 10 + [1] * 4
    train, held_out = split(labels)
    assert held_out == [4, 9] and sorted(train + held_out) == list(range(14))


def test_digits() -> None:
    data = load_data("digits")
    assert (len(data.train), len(data.held_out), data.source.classes) == (1442, 355, tuple("0123456789"))
    image = data.source.image(0)
    assert image.mode == "RGB" and image.size == (8, 8) and np.asarray(image).max() == 239  # 15 of 16
    assert data.source.labels[:3] == [0, 1, 2] and not data.source.natural


@pytest.mark.parametrize("kind", ["paper", "shift"])
def test_augmentation_does_not_depend_on_workers_or_order(kind: str) -> None:
    data = load_data("digits")

    def batches(start: int, workers: int) -> list[torch.Tensor]:
        stream = Stream(data.train, 4, seed=9, start=start, stop=4)
        return [images for images, _ in training_loader(data, stream, 16, kind, workers)]

    alone = batches(0, 0)
    assert alone[0].dtype == torch.uint8 and alone[0].shape == (4, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(alone, batches(0, 2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[2:], batches(2, 0), strict=True))


def test_loader_leaves_torchs_generator_alone() -> None:
    data = load_data("digits")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    next(iter(training_loader(data, Stream(data.train, 2, 0, 0, 1), 16, "none", 0)))
    assert torch.equal(before, torch.get_rng_state())


def test_an_image_looks_different_in_every_epoch() -> None:
    data = load_data("digits")
    stream = Stream([5], 3, seed=0, start=0, stop=1)
    images, _ = next(iter(training_loader(data, stream, 16, "shift", 0)))
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_crop_stays_inside_with_the_area_asked_for() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        left, top, right, bottom = crop_box(60, 40, rng, (0.08, 1.0), (3 / 4, 4 / 3))
        assert 0 <= left < right <= 60 + 1e-9 and 0 <= top < bottom <= 40 + 1e-9
        shares.append((right - left) * (bottom - top) / 2400)
    assert 0.08 <= min(shares) < 0.15 and max(shares) > 0.6


def test_crop_of_a_strip_is_the_whole() -> None:
    assert crop_box(1000, 2, np.random.default_rng(0), (0.9, 1.0), (3 / 4, 4 / 3)) == (0.0, 0.0, 1000.0, 2.0)


def test_paper_flips_half_of_the_images() -> None:
    """A picture dark on the left: where the brightness is tells a flip."""
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 200
    image = Image.fromarray(half)
    flips = 0
    for seed in range(80):
        pixels = np.asarray(paper(image, 16, np.random.default_rng(seed))).astype(float)
        flips += pixels[:, :8].mean() > pixels[:, 8:].mean()
    assert 20 <= flips <= 60


def test_colour_changes_hue_and_stays_rgb() -> None:
    image = Image.new("RGB", (4, 4), (200, 40, 40))
    seen = {np.asarray(colour(image, np.random.default_rng(seed)))[0, 0].tobytes() for seed in range(20)}
    assert len(seen) == 20


def test_whole_is_the_centre() -> None:
    image = Image.new("RGB", (30, 10))
    image.paste((255, 255, 255), (10, 0, 20, 10))
    assert np.asarray(whole(image, 10)).min() == 255


def test_normalise() -> None:
    x = Normalise((0.5, 0.0, 0.0), (0.5, 1.0, 0.5), torch.device("cpu"))(
        torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    )
    assert x[0, :, 0, 0].tolist() == [1.0, 1.0, 2.0] and x.is_contiguous(memory_format=torch.channels_last)


def test_folder(tmp_path: Path) -> None:
    data = load_data(str(folder_of_classes(tmp_path)))
    assert data.source.classes == ("cat", "dog") and data.source.natural
    assert (len(data.train), len(data.held_out)) == (10, 2)
    assert data.source.labels == [0] * 6 + [1] * 6
    expected = np.asarray(Image.open(tmp_path / "dog" / "2.png"))
    assert np.array_equal(np.asarray(data.source.image(8)), expected)


@pytest.mark.parametrize("part", ["val", "valid", "validation", "test"])
def test_folder_with_its_own_split(tmp_path: Path, part: str) -> None:
    folder_of_classes(tmp_path / "train", 3)
    folder_of_classes(tmp_path / part, 2)
    if part == "val":
        folder_of_classes(tmp_path / "test", 4)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.held_out)) == (6, 4)
    assert [data.source.labels[i] for i in data.held_out] == [0, 0, 1, 1]


def test_parts_with_other_classes(tmp_path: Path) -> None:
    """Not every class has to be held out; one that nothing trains on is a fault, which may be skipped."""
    folder_of_classes(tmp_path / "train", 3, ("cat", "dog", "eel"))
    folder_of_classes(tmp_path / "val", 2, ("cat", "eel"))
    data = load_data(str(tmp_path))
    assert data.source.classes == ("cat", "dog", "eel")
    assert [data.source.labels[i] for i in data.held_out] == [0, 0, 2, 2]
    photo(tmp_path / "val" / "fox" / "0.png", 0)
    with pytest.raises(DataError, match=r"1 faults in the data: class 'fox' has no sound image in .*train"):
        load_data(str(tmp_path))
    kept = load_data(str(tmp_path), "skip")
    assert kept.fingerprint() == data.fingerprint() and len(kept.bad) == 1


def test_linked_folders_are_looked_into_once(tmp_path: Path) -> None:
    elsewhere = folder_of_classes(tmp_path / "elsewhere", 3)
    root = folder_of_classes(tmp_path / "data", 2)
    (root / "cat" / "more").symlink_to(elsewhere / "cat")
    (root / "cat" / "loop").symlink_to(root / "cat")
    data = load_data(str(root))
    assert data.source.labels == [0] * 5 + [1] * 2


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first = load_data(str(folder_of_classes(tmp_path / "a"))).fingerprint()
    assert load_data(str(folder_of_classes(tmp_path / "b"))).fingerprint() == first
    assert load_data(str(folder_of_classes(tmp_path / "c", 7))).fingerprint() != first


def damage(root: Path) -> None:
    """One truncated image, one that is none, and a class without any."""
    whole_file = (root / "cat" / "1.png").read_bytes()
    (root / "cat" / "1.png").write_bytes(whole_file[: len(whole_file) // 2])
    (root / "dog" / "3.png").write_text("no picture")
    (root / "eel").mkdir()


def test_bad_images_are_refused_by_name(tmp_path: Path) -> None:
    damage(folder_of_classes(tmp_path))
    with pytest.raises(
        DataError, match=r"3 faults in the data: .*1\.png is damaged.*3\.png is not an image.*'eel'.*skip"
    ):
        load_data(str(tmp_path))


def test_names_that_are_not_utf8_are_refused_at_once(tmp_path: Path) -> None:
    root = folder_of_classes(tmp_path, classes=("cat", "dog", "\udcff\udcfe"))
    with pytest.raises(DataError, match=r"the name '.*\\udcff\\udcfe/0\.png' is not UTF-8; allowed: names that are"):
        load_data(str(root), "skip")


def test_bad_images_are_skipped_and_counted(tmp_path: Path) -> None:
    damage(folder_of_classes(tmp_path))
    data = load_data(str(tmp_path), "skip")
    assert data.source.classes == ("cat", "dog") and len(data.bad) == 3
    assert len(data.train) + len(data.held_out) == 10


def test_verdict_on_images_is_kept(tmp_path: Path) -> None:
    """The second look reads no image, until a file changes."""
    root, cache, looks = folder_of_classes(tmp_path / "data"), tmp_path / "check.json", list[str]()
    load_data(str(root), cache=cache, say=looks.append)
    load_data(str(root), cache=cache, say=looks.append)
    assert looks == ["looking at 12 images"]
    photo(root / "cat" / "9.png", 9)
    load_data(str(root), cache=cache, say=looks.append)
    assert looks[1:] == ["looking at 13 images"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("missing", "no such folder; allowed: digits"),
        ("file", "is a file; name a folder"),
        ("empty", "holds no image in a folder of its class"),
        ("flat", "holds no image in a folder of its class"),
        ("single", r"images of 1 class \(cat\); allowed: two"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, made: str, message: str) -> None:
    root = tmp_path / made
    if made == "file":
        root.write_text("")
    elif made != "missing":
        root.mkdir()
    if made == "flat":
        photo(root / "a.png", 0)
    if made == "single":
        photo(root / "cat" / "a.png", 0)
    with pytest.raises(DataError, match=message):
        load_data(str(root))


def test_evaluation_images_are_spread_and_in_order() -> None:
    data = load_data("digits")
    labels = torch.cat([y for _, y in evaluation_loader(data, 10, 4, 16, 0)])
    chosen = [data.held_out[i * 355 // 10] for i in range(10)]
    assert labels.tolist() == [data.source.labels[i] for i in chosen]


class Image_:
    """Stands in for datasets.Image."""


Image_.__name__ = "Image"


class ClassLabel:
    def __init__(self, names: list[str]) -> None:
        self.names = names


class Table:
    """A part of a data set as `datasets` gives it: rows by number, columns by name, features."""

    broken: tuple[int, ...] = ()

    def __init__(self, labels: list[int], names: list[str] | None = None, column: str = "fine") -> None:
        self.features = {"img": Image_(), column: ClassLabel(names or ["a", "b"])}
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | str) -> object:
        if isinstance(key, str):
            return self.labels
        if key in self.broken:
            raise OSError("image file is truncated (3 bytes not processed)")
        return {"img": Image.new("L", (5, 4), 10 * key), "fine": self.labels[key]}


def hub(monkeypatch: pytest.MonkeyPatch, parts: dict[str, Table]) -> None:
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name: parts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"train": Table([0, 1, 0]), "test": Table([1, 1])})
    data = load_data("hf:some/set")
    assert (list(data.train), list(data.held_out), data.source.classes) == ([0, 1, 2], [3, 4], ("a", "b"))
    assert data.source.image(4).getpixel((0, 0)) == (10, 10, 10)


def test_hub_labels_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"train": Table([0, 1, -1, 5] + [0] * 6)})
    with pytest.raises(DataError, match="2 faults in the data: image 2 of hf:x has label -1; allowed: 0 to 1"):
        load_data("hf:x")
    data = load_data("hf:x", "skip")
    assert not {2, 3} & {*data.train, *data.held_out} and len(data.bad) == 2


def test_hub_images_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found before the training, not after an hour of it; the verdict is kept for the same data."""
    train, test = Table([0, 1, 0, 1]), Table([1, 1])
    train.broken, test.broken = (2,), (1,)
    hub(monkeypatch, {"train": train, "test": test})
    with pytest.raises(DataError, match=r"2 faults in the data: image 2 of hf:x is damaged \(image file is truncated"):
        load_data("hf:x")
    data = load_data("hf:x", "skip", tmp_path / "check.json")
    assert (list(data.train), list(data.held_out), len(data.bad)) == ([0, 1, 3], [4], 2)
    said: list[str] = []
    assert load_data("hf:x", "skip", tmp_path / "check.json", said.append).bad == data.bad and not said


def test_hub_pictures_are_read_as_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits would be cut off at 255, and what hides behind transparency be seen."""
    train = Table([0, 1, 0, 1])
    kinds = [Image.new("I;16", (5, 4), 257 * 90), Image.new("RGBA", (5, 4), (9, 9, 9, 0)), Image.new("L", (5, 4), 7)]
    original = Table.__getitem__
    monkeypatch.setattr(
        Table, "__getitem__", lambda self, key: {"img": kinds[key]} if key in (0, 1, 2) else original(self, key)
    )
    hub(monkeypatch, {"train": train})
    source = load_data("hf:x").source
    assert [source.image(i).getpixel((0, 0)) for i in range(3)] == [(90,) * 3, (255,) * 3, (7,) * 3]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (Table([0, 1], ["b", "a"]), "class 'a' to train on where what is held out has 'b'; allowed: the same classes"),
        (Table([0, 0], ["a"]), "class 'b' to train on where what is held out has None"),
        (Table([0, 1], column="fine_label"), "the column 'fine' to train on, and of what is held out img, fine_label"),
    ],
)
def test_hub_parts_that_number_their_classes_otherwise(
    monkeypatch: pytest.MonkeyPatch, test: Table, message: str
) -> None:
    """Each part encoded by itself: labels would have meant other classes than in training."""
    hub(monkeypatch, {"train": Table([0, 1, 0, 1]), "test": test})
    with pytest.raises(DataError, match=message):
        load_data("hf:x")
    numbers = Table([1, 0])
    numbers.features["fine"] = object()
    hub(monkeypatch, {"train": Table([0, 1, 0, 1]), "test": numbers})
    assert load_data("hf:x").source.labels[4:] == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 1, 0], r"1 faults in the data: class 'c' of hf:x has no image to train on"),
        ([0, 0, 0], "holds images of 1 class to train on; allowed: two or more"),
        ([], "holds images of 0 class to train on"),
        ([0, None], "image 1 of hf:x has the label None; allowed: one integer"),
    ],
)
def test_hub_classes_without_images(monkeypatch: pytest.MonkeyPatch, labels: list[int], message: str) -> None:
    hub(monkeypatch, {"train": Table(labels, ["a", "b", "c"])})
    with pytest.raises(DataError, match=message):
        load_data("hf:x")


def test_hub_without_a_train_part(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"other": Table([0, 1])})
    with pytest.raises(DataError, match="has the parts other; allowed: one called train"):
        load_data("hf:x")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package says without a network, on one line, and what goes without one."""

    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(LocalEntryNotFoundError)")

    hub(monkeypatch, {})
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", unreachable)
    seen = re.escape(
        "data hf:a/b cannot be loaded (Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)); allowed: "
    )
    with pytest.raises(DataError, match=f"^{seen}.* or hf:DIR, a folder that save_to_disk wrote$"):
        load_data("hf:a/b")


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets package .*pip install"):
        load_data("hf:x")


@pytest.mark.parametrize("content", ["", "[]", '{"files": 1}', "\udcff"], ids=["empty", "list", "other", "bytes"])
def test_a_damaged_verdict_is_made_anew(tmp_path: Path, content: str) -> None:
    """As a power cut leaves it: the images are looked at again, and the run goes on."""
    root, cache, said = folder_of_classes(tmp_path / "data"), tmp_path / "check.json", []
    load_data(str(root), cache=cache)
    whole = cache.read_bytes()
    cache.write_bytes(content.encode(errors="surrogateescape"))
    load_data(str(root), cache=cache, say=said.append)
    assert "looking at" in said[0] and cache.read_bytes() == whole


def test_a_class_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of_classes(tmp_path / "data")
    shut = next(path for path in root.iterdir() if path.is_dir()) / "shut"
    shut.mkdir()
    may_not_be_read(monkeypatch, "shut")
    with pytest.raises(DataError, match=r"shut cannot be read \(Permission denied\)"):
        load_data(str(root))
