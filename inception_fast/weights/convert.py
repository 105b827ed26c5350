"""Any readable weights -> a safetensors file of ours, with metadata, or a TF-slim checkpoint.

What is written moves into its place when complete. Keras files are written by `inception_fast.tf.convert`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import slim
from ._room import make_sure_of_room
from ._source import BACKGROUND_CLASSES, Source
from ._tensorflow import settle_triton
from .torch_files import own_metadata

LAYOUTS = {"inception_fast": ".safetensors", "slim": ".ckpt"}
"""What can be written, and the ending of its files: a checkpoint is named by its prefix, such as `net.ckpt`."""
BARE = (".ckpt", ".weights.h5")
"""Endings of files that hold tensors and nothing of the net."""
ASSUMED = {"convention": "tf", "bn_eps": 1e-3, "global_pool": "avg", "fid": False, "transform_input": False}
"""What the reader of such a file takes for given."""
SAME_NETS = ("inception_v4", "inception_resnet_v1", "inception_resnet_v2")
"""The variants that are one net in both conventions."""


def convert(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], model: str | None = None, layout: str | None = None
) -> Source:
    """Writes the weights of `src`, a path or "hf:<repo>", to `dst` and returns what was written.

    The names in a safetensors file are those of torchvision, timm or facenet-pytorch, whichever has the variant; the
    background class of TF-slim's ImageNet nets is left out there and stays in a checkpoint.

    A checkpoint holds tensors alone: who loads that of a net of convention "torch", as torchvision's v1 and v3 are,
    must pass `convention="torch"`; by itself it counts as "tf". `untold` says what a file leaves out.

    Args:
        model: the variant that `src` must hold; recognised by default.
        layout: "inception_fast" or "slim"; by default what the ending of `dst` says, ".safetensors" or ".ckpt".

    Raises WeightsError (a ValueError) or FileNotFoundError as `resolve` does, ValueError for a `dst` of another
    ending. Nothing is written then, and an existing file stays as it was.
    """
    from . import resolve

    target = Path(dst)
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout={layout!r}; allowed: {', '.join(LAYOUTS)}; Keras files: inception_fast.tf.convert")
    allowed = LAYOUTS.values() if layout is None else (LAYOUTS[layout],)
    if target.suffix not in allowed:
        keras = "" if layout else ", by the command line and inception_fast.tf.convert also .keras and .weights.h5"
        raise ValueError(f"{target} ends in {target.suffix!r}; allowed: {', '.join(allowed)}{keras}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} to")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; allowed: a file name")
    source = resolve(src, model)
    tensors = source.state_dict()
    _verify(source, tensors)
    if target.suffix == LAYOUTS["slim"]:
        slim.write(target, source)
        return source
    write(target, source, tensors)
    return source


def untold(source: Source, dst: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of the net that a file `dst` cannot hold: its loader must pass them to `create_model`."""
    if not os.fspath(dst).endswith(BARE):
        return {}
    found = {key: source.options.get(key, value) for key, value in ASSUMED.items()}
    same = ("convention",) if source.model in SAME_NETS else ()
    missing = {key: value for key, value in found.items() if value != ASSUMED[key] and key not in same}
    taken = os.fspath(dst).endswith(".ckpt") and source.model != "inception_resnet_v1"  # for one with a background
    if taken and source.options.get("num_classes") == BACKGROUND_CLASSES:
        missing["num_classes"] = BACKGROUND_CLASSES
    return missing


def _verify(source: Source, tensors: dict[str, Tensor]) -> None:
    """Raises WeightsError where the tensors are not exactly those of the net that the options describe."""
    from ..models import create_model

    if "tensorflow" in sys.modules:  # torch loads Triton with its compiler, which a net without memory asks for
        settle_triton()
    with torch.device("meta"):
        net = create_model(source.model, **source.options)
    source.check(net.state_dict(), tensors)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, none in the memory of another."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        value = value.contiguous()
        place = value.untyped_storage().data_ptr()
        result[key] = value.clone() if place in seen else value
        seen.add(place)
    return result


def write(target: Path, source: Source, tensors: dict[str, Tensor]) -> None:
    """Writes beside `target`, then replaces it: a reader sees the old file or the whole new one.

    Raises OSError, naming `target`, where the disk has no room for it.
    """
    make_sure_of_room(target, tensors)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        save_file(_apart(tensors), name, own_metadata(source, source.options))
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that nobody else may read; the result should follow the umask like any other.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
