"""`hf:<repo>[@revision][:file]` through huggingface_hub: a weight file, and timm's `config.json` beside it."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from ._source import WeightsError
from .keras import shards

SPEC = re.compile(r"hf:(?P<repo>[^@:\s]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<file>\S+))?")
HTTP_CLIENTS = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")
PREFERRED = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".keras", ".weights.json", ".weights.h5", ".h5", ".index", ".ckpt")
"""Weight files, the preferred kind first."""


def choose(names: list[str], where: str, how: str = "as hf:<repo>:<file>") -> str:
    """The weight file among `names`. Raises FileNotFoundError for none, WeightsError for several of the best kind.

    `how` says how one of several is given.
    """
    for name in PREFERRED:
        if name in names:
            return name
    for suffix in SUFFIXES:
        found = sorted(name for name in names if name.endswith(suffix))
        if len(found) > 1:
            raise WeightsError(f"{where} has {len(found)} files {suffix}; choose one of {', '.join(found)} {how}")
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{where} has no weights: looked for {', '.join((*PREFERRED, *('*' + suffix for suffix in SUFFIXES)))}"
    )


def download(spec: str) -> tuple[Path, Path | None]:
    """Local paths of the weight file and of `config.json`, None where the repository has none.

    Raises ValueError for a malformed spec, FileNotFoundError for what the hub does not have or cannot be reached for.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(
            f"weights={spec!r}; allowed: hf:<repo>, with @<revision>, :<file> or @<revision>:<file> behind"
        )
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        errors: Any = importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise ImportError(f"{spec} is on the Hugging Face hub; to fetch it: pip install inception-fast[hub]") from error
    repo, revision = match["repo"], match["revision"]
    known = (OSError, errors.EntryNotFoundError, errors.HFValidationError)
    try:
        names = list(hub.list_repo_files(repo, revision=revision))
        name = match["file"] or choose(names, f"hf:{repo}")
        if name not in names:
            raise FileNotFoundError(f"hf:{repo} has no file {name}; it has {', '.join(sorted(names)) or 'none'}")
        weights = _fetch(hub, repo, revision, names, name)
        config = hub.hf_hub_download(repo, "config.json", revision=revision) if "config.json" in names else None
    except FileNotFoundError:
        raise
    except Exception as error:
        # The hub's own HTTP client, which changed from one major version to the next, raises errors of its own.
        if not isinstance(error, known) and not type(error).__module__.startswith(HTTP_CLIENTS):
            raise
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{spec} cannot be fetched from the Hugging Face hub: {type(error).__name__}: {reason}"
        ) from error
    return weights, None if config is None else Path(config)


def _fetch(hub: Any, repo: str, revision: str | None, names: list[str], name: str) -> Path:
    path = Path(hub.hf_hub_download(repo, name, revision=revision))
    if name.endswith(".index"):  # a TensorFlow checkpoint is an index and the data files beside it
        for other in names:
            if other.startswith(f"{name[: -len('.index')]}.data-"):
                hub.hf_hub_download(repo, other, revision=revision)
    if name.endswith(".weights.json"):
        for shard in shards(path):
            hub.hf_hub_download(repo, str(PurePosixPath(name).with_name(shard.name)), revision=revision)
    return path


def pretrained_config(path: Path) -> dict[str, Any] | None:
    """timm's `pretrained_cfg` in a `config.json`, None without one. Raises WeightsError for broken JSON."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    held = config.get("pretrained_cfg", config) if isinstance(config, dict) else None
    if not isinstance(held, dict) or not {"mean", "std", "input_size"} <= set(held):
        return None
    return {"crop_pct": 0.875, "interpolation": "bicubic"} | held
