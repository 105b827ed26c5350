"""What kind of file a path is, by its first and last bytes; extensions are only how people call files."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

from . import hub, keras, slim, torch_files
from ._source import Source, WeightsError
from .names import ROOTS

HDF5 = b"\x89HDF\r\n\x1a\n"
TABLE_END = bytes.fromhex("57fb808b247547db")
"""Last bytes of a LevelDB table: a V1 checkpoint, or the index of a V2 one."""


def resolve(weights: str | os.PathLike[str], model: str | None = None) -> Source:
    """Reads weights from a path or from "hf:<repo>[@revision][:file]" and recognises layout, variant and options.

    A TF checkpoint is given by its prefix, its index, its single file (V1) or its folder. A folder with a timm
    `config.json` works too.

    Args:
        model: the variant the weights must be of; any by default.

    Raises FileNotFoundError with what was looked for, WeightsError (a ValueError) for files that are damaged, foreign,
    of another variant or would run code, ImportError naming the extra to install.
    """
    if model is not None and model not in ROOTS:
        raise ValueError(f"unknown model {model!r}; allowed: {', '.join(ROOTS)}")
    text = os.fspath(weights) if isinstance(weights, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        raise TypeError(f"weights={weights!r}; allowed: a path or hf:<repo>")
    if text.startswith("hf:"):
        path, config = hub.download(text)
    else:
        path, config = Path(text).expanduser(), None
        if path.is_dir() and slim.prefix_of(path) is None:
            path, config = _folder(path)
    source = replace(_read(path, model), origin=text)
    held = hub.pretrained_config(config) if config is not None and source.layout != "inception_fast" else None
    return source if held is None else replace(source, data_config=torch_files.parse_config(str(config), held))


def _folder(path: Path) -> tuple[Path, Path | None]:
    """The weight file of a folder laid out like a hub repository, and its `config.json`."""
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    name = hub.choose(names, str(path), "by its path, not the folder's")
    config = path / "config.json"
    return path / name, config if config.is_file() else None


def _read(path: Path, model: str | None) -> Source:
    prefix = slim.prefix_of(path)
    if not path.is_file():
        if prefix is None:
            raise FileNotFoundError(
                f"no weights at {path}: looked for {path} and {path}.index; from the hub: hf:<repo>"
            )
        return slim.read(prefix, model)
    with open(path, "rb") as file:
        head = file.read(64)
        file.seek(-min(8, path.stat().st_size), os.SEEK_END)
        tail = file.read()
    if not head:
        raise WeightsError(f"{path} is empty")
    if head.startswith(HDF5):
        return keras.read(path, model)
    if head.startswith(b"PK"):
        return _read_zip(path, model)
    if tail == TABLE_END or ".data-" in path.suffix or path.suffix == ".index":
        assert prefix is not None
        return slim.read(prefix, model)
    if len(head) > 8 and head[8:9] == b"{":
        return torch_files.read_safetensors(path, model)
    if head[:1] == b"{":
        return keras.read(path, model)
    if head[:1] == b"\x80":
        return torch_files.read_pickle(path, model)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a git-lfs pointer, not the file: fetch it with git lfs pull")
    raise WeightsError(
        f"{path} begins with {head[:8]!r}; allowed: safetensors, PyTorch, Keras HDF5, .keras, TensorFlow checkpoint"
    )


def _read_zip(path: Path, model: str | None) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # the others of names and versions
        raise WeightsError(f"{path} is a damaged archive: {error}") from error
    if keras.WEIGHTS_MEMBER in names:
        return keras.read(path, model)
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"{path} is a TorchScript program; allowed: torch.save(model.state_dict(), ...)")
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return torch_files.read_pickle(path, model)
    first = names[0] if names else "(nothing)"
    raise WeightsError(
        f"{path} is an archive with {first}; allowed: a PyTorch file (data.pkl) or a Keras one ({keras.WEIGHTS_MEMBER})"
    )
