"""A folder with a folder for each class, looked through before training starts so that no broken file ends it later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ..images import SUFFIXES, ImageError, check_names, files_below, load_image
from .check import broken_images, judge
from .labelled import Data, DataError, split

TRAIN_PART, HELD_OUT_PARTS = "train", ("val", "valid", "validation", "test")


class ImageFolder:
    """`paths` relative to `root`, with their labels."""

    natural = True

    def __init__(self, root: Path, classes: Sequence[str], paths: Sequence[str], labels: Sequence[int]) -> None:
        self.name, self.root = str(root), root
        self.classes, self.paths, self.labels = tuple(classes), list(paths), list(labels)

    def image(self, index: int) -> Image.Image:
        return _load(self.root / self.paths[index])


def load_folder(root: Path, bad: str, cache: Path | None, say: Callable[[str], None]) -> Data:
    """ROOT/class/image, every fifth of a class held out, or ROOT/train/class/image and, for what is held out, the first
    of ROOT/val, valid, validation and test.
    """
    if not root.exists():
        raise DataError(
            f"data {str(root)!r}: no such folder; allowed: digits, a folder with a folder for each class, hf:NAME, "
            "torchvision:NAME"
        )
    if not root.is_dir():
        raise DataError(f"data {root} is a file; name a folder with a folder for each class")
    parts = _parts(root)
    names = sorted({p.name for part in parts for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")})
    found = {(part, name): _images(part / name) for part in parts for name in names}
    files = [path for paths in found.values() for path in paths]
    if not files:
        raise DataError(
            f"data {root} holds no image in a folder of its class; looked for {' '.join(SUFFIXES)} in ROOT/class/"
        )
    try:
        check_names(files)
    except ImageError as error:
        raise DataError(str(error)) from error
    stats = [(_key(root, path), s.st_size, s.st_mtime_ns) for path in files for s in (path.stat(),)]
    broken = broken_images([key for key, _, _ in stats], lambda i: _load(files[i]), stats, cache, say)
    sound = {key: [path for path in paths if _key(root, path) not in broken] for key, paths in found.items()}
    problems = list(broken.values())
    problems += [f"class {name!r} has no sound image in {parts[0]}" for name in names if not sound[parts[0], name]]
    judge(problems, bad)
    classes = [name for name in names if sound[parts[0], name]]
    if len(classes) < 2:
        raise DataError(
            f"data {root} holds images of {len(classes)} class ({', '.join(classes)}); allowed: two classes or more"
        )
    return _assemble(root, parts, classes, sound, problems)


def check_apart(root: Path, out: Path) -> None:
    """Raises DataError where OUT lies among the classes: it would be one of them for whoever resumes or looks next."""
    for part in _parts(root):
        if out.resolve().parent == part.resolve() and not out.name.startswith("."):
            raise DataError(f"out {out} lies among the classes of data {part}; name a folder elsewhere")


def _assemble(
    root: Path, parts: list[Path], classes: list[str], sound: dict[tuple[Path, str], list[Path]], problems: list[str]
) -> Data:
    rows = [
        [(_key(root, path), label) for label, name in enumerate(classes) for path in sound[part, name]]
        for part in parts
    ]
    flat = [row for part in rows for row in part]
    source = ImageFolder(root, classes, [path for path, _ in flat], [label for _, label in flat])
    if len(parts) == 1:
        train, held_out = split(source.labels)
    else:
        train, held_out = list(range(len(rows[0]))), list(range(len(rows[0]), len(flat)))
    return Data(source, train, held_out, tuple(problems))


def _parts(root: Path) -> list[Path]:
    """What to train on and what is held out, or the root where it has no such folders."""
    held_out = [root / part for part in HELD_OUT_PARTS if (root / part).is_dir()]
    return [root / TRAIN_PART, held_out[0]] if held_out and (root / TRAIN_PART).is_dir() else [root]


def _images(folder: Path) -> list[Path]:
    """Those in the folder and in folders inside it, linked ones too; none where a part has no folder of this class."""
    if not folder.exists():
        return []
    try:
        return sorted(path for path in files_below(folder) if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise DataError(f"data {error.filename} cannot be read ({error.strerror})") from error


def _key(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _load(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except ImageError as error:
        raise DataError(str(error)) from error
