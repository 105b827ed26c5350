"""torchvision's data sets as data: their parts, labels and pictures, and what is refused."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import references
from inception_fast.cli import main
from inception_fast.train.data import load_data
from inception_fast.train.labelled import DataError
from training import photo


@pytest.fixture(autouse=True)
def sets() -> Any:
    references.torchvision()
    from torchvision import datasets

    return datasets


def cifar(root: Path, labels: list[int]) -> None:
    """CIFAR-10's files as they lie on a disk, with a handful of pictures; torchvision's digests are not asked."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = np.random.default_rng(len(name)).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    names = [f"kind{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


@pytest.fixture
def unsigned(sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)


def test_a_set_without_parts_is_split() -> None:
    data = load_data("torchvision:FakeData")
    assert len(data.train) + len(data.held_out) == 1000 and 190 <= len(data.held_out) <= 200
    assert data.source.classes == tuple(map(str, range(10))) and data.source.natural
    assert data.source.image(3).mode == "RGB" and data.source.image(3).size == (224, 224)
    assert data.fingerprint() == load_data("torchvision:FakeData").fingerprint()


def test_a_set_with_parts_keeps_them(tmp_path: Path, unsigned: None) -> None:
    cifar(tmp_path, list(range(10)))
    data = load_data(f"torchvision:CIFAR10:{tmp_path}")
    assert (list(data.train), list(data.held_out)) == (list(range(50)), list(range(50, 60)))
    assert data.source.classes[3] == "kind3" and data.source.labels[53] == 3
    assert np.array_equal(np.asarray(data.source.image(53)), np.asarray(data.source.parts[1][3][0]))  # type: ignore[attr-defined]


def test_bad_labels_and_missing_classes_are_named(tmp_path: Path, unsigned: None) -> None:
    cifar(tmp_path, [0, 1, 2, 3, 4, 5, 6, 7, 8, 12])
    with pytest.raises(DataError, match=r"7 faults in the data: image 9 of .* has label 12; allowed: 0 to 9"):
        load_data(f"torchvision:CIFAR10:{tmp_path}")
    data = load_data(f"torchvision:CIFAR10:{tmp_path}", "skip")
    assert len(data.bad) == 7 and any("'kind9'" in fault for fault in data.bad)
    assert not {9, 19, 59} & {*data.train, *data.held_out}


def test_images_that_cannot_be_read_are_found_first(tmp_path: Path) -> None:
    for i in range(8):
        photo(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "a" / "2.png").read_bytes()[:70])
    (tmp_path / "b" / "3.png").write_bytes(b"")
    name = f"torchvision:ImageFolder:{tmp_path}"
    with pytest.raises(DataError, match=r"2 faults in the data: image 1 of .* is damaged \("):
        load_data(name)
    data = load_data(name, "skip")
    assert len(data.bad) == 2 and sorted([*data.train, *data.held_out]) == [0, 2, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:Nowhere", "torchvision has no data set 'Nowhere'; allowed: .*CIFAR10"),
        ("torchvision:", "torchvision has no data set ''"),
        ("torchvision:CIFAR10:/no/where", "cannot be opened with root='/no/where'.*--download"),
        ("torchvision:CelebA:/no/where", "cannot be opened with root='/no/where'"),
    ],
)
def test_what_cannot_be_opened(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(name)


def test_nothing_is_fetched_unless_asked(sets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def made(root: str, train: bool = True, download: bool = False) -> Any:
        asked.append(download)
        return sets.FakeData(20, (3, 8, 8), 2)

    class Set:
        __signature__ = inspect.signature(made)

        def __new__(cls, **arguments: Any) -> Any:
            return made(**arguments)

    monkeypatch.setattr(sets, "MNIST", Set)
    load_data(f"torchvision:MNIST:{tmp_path}")
    load_data(f"torchvision:MNIST:{tmp_path}", download=True)
    assert asked == [False, False, True, True]
    with pytest.raises(DataError, match="torchvision cannot download it"):
        load_data("torchvision:FakeData", download=True)
    with pytest.raises(DataError, match="only torchvision's sets"):
        load_data("digits", download=True)


def test_the_command_trains_on_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "train --model tiny_inception --data torchvision:FakeData --steps 2 --batch-size 4 --image-size 16 --workers 0"
    )
    assert main([*line.split(), "--eval-images", "4", "--out", str(tmp_path)]) == 0
    assert "held out" in capsys.readouterr().out
