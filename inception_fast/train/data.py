"""Labelled images by name: scikit-learn's digits, folders, data sets of Hugging Face and torchvision; and the tensors
of a step.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import augment
from .labelled import Data, DataError, Source, split
from .stream import Key, Stream

PARENT_SECONDS = 2.0  # between two looks of a worker at whether its parent lives


class Digits:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels: the data set that is always at hand."""

    name = "digits"
    classes = tuple("0123456789")
    natural = False

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                f"the digits need scikit-learn ({error}); pip install scikit-learn, or name a folder"
            ) from error
        found = load_digits()
        self.pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
        self.labels = [int(label) for label in found.target]

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")


def load_data(
    name: str,
    bad: str = "refuse",
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    download: bool = False,
) -> Data:
    """The data set `name`: "digits", "hf:NAME", "torchvision:NAME" (of the folder data), "torchvision:NAME:ROOT" or a
    folder.

    bad: "refuse" raises on broken images, empty classes and labels out of range, "skip" leaves them out and counts
    them.
    download: let torchvision fetch what ROOT does not hold.
    cache: a file in which the verdict on the images is kept, so that a resumed run does not read them all again.

    Raises:
        DataError: naming what is missing or broken.
    """
    if download and not name.startswith("torchvision:"):
        raise DataError(f"a download of data {name!r}; allowed: only torchvision's sets are fetched on request")
    if name == "digits":
        source: Source = Digits()
        train, held_out = split(source.labels)
        return Data(source, train, held_out)
    if name.startswith("hf:"):
        from .hub import load_hub

        return load_hub(name, bad, cache, say)
    if name.startswith("torchvision:"):
        from .vision import load_vision

        return load_vision(name, bad, download, cache, say)
    if not name:
        raise DataError("data ''; allowed: digits, a folder, hf:NAME, torchvision:NAME")
    from .folder import load_folder

    return load_folder(Path(name), bad, cache, say)


def check_apart(name: str, out: Path) -> None:
    """Raises DataError where OUT would count as a class of the data set `name`, a folder."""
    if name and name != "digits" and not name.startswith(("hf:", "torchvision:")):
        from . import folder

        folder.check_apart(Path(name), out)


class Pixels(Dataset[tuple[Tensor, int]]):
    """Keys to (image, label): uint8 [3, size, size]. Without `seed`, whole images by index."""

    def __init__(self, source: Source, size: int, kind: str = "none", seed: int | None = None) -> None:
        self.source, self.size, self.kind, self.seed = source, size, kind, seed

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        if isinstance(key, tuple):
            epoch, index = key
            rng = np.random.default_rng([self.seed or 0, epoch, index])
        else:
            index, rng = key, np.random.default_rng(0)
        image = augment(self.kind, self.source.image(index), self.size, rng)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), self.source.labels[index]


class Normalise:
    """uint8 [n, 3, h, w] to float32, channels last: (x / 255 - mean) / std on the device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.mean.device, memory_format=torch.channels_last, non_blocking=True)
        return x.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)


def training_loader(data: Data, stream: Stream, size: int, kind: str, workers: int) -> DataLoader[Any]:
    """Batches (uint8 [n, 3, size, size], int64 [n]) of the stream; their content does not depend on `workers`."""
    if kind == "auto":
        kind = "paper" if data.source.natural else "shift"
    pixels = Pixels(data.source, size, kind, stream.seed)
    return _loader(pixels, batch_sampler=stream, workers=workers)


def evaluation_loader(data: Data, images: int, batch_size: int, size: int, workers: int) -> DataLoader[Any]:
    """Batches of at most `images` held-out images, evenly spread over them, whole and in order."""
    count = min(images, len(data.held_out))
    chosen = [data.held_out[i * len(data.held_out) // count] for i in range(count)]
    batches = [chosen[i : i + batch_size] for i in range(0, count, batch_size)]
    return _loader(Pixels(data.source, size), batch_sampler=batches, workers=workers)


def _loader(pixels: Pixels, batch_sampler: Any, workers: int) -> DataLoader[Any]:
    # Its own generator: a loader that draws from torch's global one would move the numbers of the model's randomness.
    return _Loader(
        pixels,
        batch_sampler=batch_sampler,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_signals_to_the_parent,
        multiprocessing_context=_own_children() if workers else None,
    )


def _own_children() -> str:
    """How workers are started: as Python does by itself, but by no fork server, which Python 3.14 has. A signal to all
    processes ends that, and torch's workers end with the process that started them.
    """
    method = multiprocessing.get_start_method()
    return "spawn" if method == "forkserver" else method


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Any:
        """Workers are born with SIGINT and SIGTERM blocked: one that starts Python anew takes seconds until it leaves
        them to the parent, which gets here afterwards what came meanwhile.
        """
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        if _own_children() == "spawn":
            resource_tracker.ensure_running()  # started inside, it would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def readable(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches. An image that broke after the check is named without the traceback that a worker wraps round it."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from error


def _leave_signals_to_the_parent(worker: int) -> None:
    """A terminal and `docker stop` signal all processes at once; the parent still needs the images of its last step.

    Workers end when the parent says so, and a few seconds after it was killed. That they look for this in a thread
    matters: a worker waits for ever for a lock that was held by one that was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        found = signal.sigtimedwait({signal.SIGTERM}, PARENT_SECONDS)
        if found is not None and found.si_pid == parent:
            break
    os._exit(0)


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turns what torch raises when a worker dies or files run out, wherever the parent then is, into a DataError: what
    to do.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error) or type(error).__name__
        if "Too many open files" in text:  # those of the batches that workers hand over among them
            raise DataError(
                "the processes that prepare images need more open files than the system allows (ulimit -n): raise the "
                "limit, or resume with fewer workers"
            ) from error
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            raise
        if isinstance(error, RuntimeError) and not text.startswith("DataLoader worker"):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise again while the loader is cleared away
        raise DataError(
            f"a process that prepares images is gone ({text.strip().rstrip('.')}); the system kills one when memory "
            "runs out: resume, with fewer workers"
        ) from error
