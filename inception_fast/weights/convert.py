"""Any readable weights -> one safetensors file of ours, with metadata, moved into its place when complete."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ._source import Source
from .torch_files import own_metadata

EXTENSIONS = (".safetensors",)
LAYOUTS = ("inception_fast",)


def convert(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], model: str | None = None, layout: str | None = None
) -> Source:
    """Writes the weights of `src`, a path or "hf:<repo>", to `dst` and returns what was written.

    The names in the file are those of torchvision, timm or facenet-pytorch, whichever has the variant; the background
    class of TF-slim's ImageNet nets is left out.

    Args:
        model: the variant that `src` must hold; recognised by default.
        layout: "inception_fast".

    Raises WeightsError (a ValueError) or FileNotFoundError as `resolve` does, ValueError for a `dst` of another
    extension. Nothing is written then, and an existing file stays as it was.
    """
    from . import resolve

    target = Path(dst)
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout={layout!r}; allowed: {', '.join(LAYOUTS)}")
    if target.suffix not in EXTENSIONS:
        raise ValueError(f"{target} ends in {target.suffix!r}; allowed: {', '.join(EXTENSIONS)}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} to")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; allowed: a file name")
    source = resolve(src, model)
    tensors = source.state_dict()
    _verify(source, tensors)
    write(target, source, tensors)
    return source


def _verify(source: Source, tensors: dict[str, Tensor]) -> None:
    """Raises WeightsError where the tensors are not exactly those of the net that the options describe."""
    from ..models import create_model

    with torch.device("meta"):
        net = create_model(source.model, **source.options)
    source.check(net.state_dict(), tensors)


def write(target: Path, source: Source, tensors: dict[str, Tensor]) -> None:
    """Writes beside `target`, then replaces it: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, name, own_metadata(source, source.options)
        )
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
