"""Small picture files, and a net so small that a pipeline can be tested end to end in no time."""

from __future__ import annotations

import io
import os
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from inception_fast.features import shards
from inception_fast.features.batching import batches
from inception_fast.features.ray_engine import ShardWorker


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (24, 20)) -> bytes:
    """A picture file in memory: colours that `seed` decides."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def write_folder(folder: Path, count: int, first: int = 0) -> list[Path]:
    """`count` JPEG files in `folder`, every third one a floor below."""
    paths = [folder / ("below" if i % 3 == 0 else "") / f"{i:04d}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(first + i))
    return sorted(paths, key=lambda path: path.as_posix())


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


class TinyPrepare:
    """[3, 2, 2] in [0, 1]."""

    shape, plain = (3, 2, 2), True

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((2, 2)), dtype=np.float32).transpose(2, 0, 1) / 255


class TinyExtractor:
    """Six features of a picture, by a formula that does not look at the rest of the batch."""

    prepare, width = TinyPrepare(), 6

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"model": "tiny", "weights": "none"}
        self.seen: list[int] = []

    def run(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        assert x.shape[1:] == self.prepare.shape and sum(batches(len(x))) == len(x)
        return torch.cat([x.sum((2, 3)), x.prod(3).prod(2)], 1)


class TinyRecipe:
    """Stands in for `Recipe`."""

    def make(self) -> TinyExtractor:
        return TinyExtractor()


class MortalWorker(ShardWorker):
    """Dies of SIGKILL in the middle of its second shard, unless another one has before; slow, so that both get work."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.1)
        marker = Path(self.shards.folder).with_name("killed")
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                (self.shards.folder / ".features-00000-half.parquet").write_bytes(b"half a shard")
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


class BrokenWorker(ShardWorker):
    """Whose network gives what is no number."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.extractor.run = lambda x: torch.full((len(x), 6), torch.nan)  # type: ignore[method-assign]
        return super().__call__(batch)


class FullWorker(ShardWorker):
    """On a full disk."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "write_shard", self.refuse)
            return super().__call__(batch)

    @staticmethod
    def refuse(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))


def may_not_be_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Folders of this name refuse to be listed, as the system's own do to whoever is not root."""
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
