"""State dicts: `.safetensors`, ours with metadata or anyone's, and `.pth`/`.pt`, read without running code."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .._data_config import INTERPOLATIONS, LARGEST, DataConfig
from . import _pickles, _safetensors
from ._source import (
    BACKGROUND_CLASSES,
    Source,
    WeightsError,
    data_config,
    has_aux,
    head_classes,
    image_channels,
    model_mismatch,
    width,
)
from .names import AUX, CLASSIFIERS, ROOTS

FID_CLASSES = 1008
"""Classes of the graph of 2015-12-05 behind the FID score; no other published net has this number."""

MARKS = (
    ("inception_v1", re.compile(r"inception3a\.")),
    ("inception_v2", re.compile(r"Mixed_3[bc]\.|Mixed_4[a-e]\.")),
    ("inception_v3", re.compile(r"Mixed_[567][a-e]\.branch(\dx\d|_pool)")),
    ("inception_v4", re.compile(r"features\.\d+\.(conv\.)?(branch\d|conv\.weight|bn\.)")),
    ("inception_resnet_v1", re.compile(r"repeat_3\.\d\.branch")),
    ("inception_resnet_v2", re.compile(r"(mixed_5b|repeat_2\.\d)\.branch|stem\.\d\.branch")),
)
"""Keys that only one variant has, the first match decides."""

LAYOUTS = {
    "inception_v1": "torchvision",
    "inception_v2": "inception_fast",
    "inception_v3": "timm",
    "inception_v4": "timm",
    "inception_resnet_v1": "facenet-pytorch",
    "inception_resnet_v2": "timm",
}
WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model", "net")  # averaged weights first, as timm
PREFIXES = ("module.", "_orig_mod.", "model.")
COUNTER = "n_averaged"  # that torch's AveragedModel has beside its module
OPTIONS: dict[str, tuple[type, ...]] = {
    "num_classes": (int,),
    "in_chans": (int,),
    "convention": (str,),
    "aux_logits": (bool,),
    "bn_eps": (float,),
    "global_pool": (str,),
    "classic": (bool,),
    "fid": (bool,),
    "stem": (str,),
    "widths": (str,),
    "embedding_size": (int,),
    "transform_input": (bool,),
}
"""What the metadata of our own files may ask of `create_model`."""

FORMAT = "1"


def read_safetensors(path: Path, asked: str | None) -> Source:
    """Reads a safetensors file; metadata of ours decides, else the keys. Raises WeightsError as all readers do."""
    try:
        with _safetensors.opened(path) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("layout") == "inception_fast":
        return _own(str(path), metadata, _without_prefixes(tensors), asked)
    return recognise(str(path), _without_prefixes(tensors), asked)


def _seen(path: Path, message: str) -> str:
    """What torch's unpickler met, without its advice to go on unsafely; where it stopped early, what comes later."""
    wanted = re.search(r"GLOBAL (\S+)", message)
    if wanted:
        return f"it asks for {wanted[1]}"
    if "Unsupported operand" in message and (later := _pickles.reason(path)):
        return later
    found = re.search(r"WeightsUnpickler error:\s*(\S.*)", message)
    first = message.strip().split("\n")[0]
    return found[1] if found else "a damaged pickle" if not first or "weights_only" in first else first


def read_pickle(path: Path, asked: str | None) -> Source:
    """Reads a `.pth` or `.pt` file with torch's restricted unpickler: nothing in it is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a protocol that the error is about
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged or hostile pickle can fail in any way; whichever it is, the file is refused
        raise WeightsError(
            f"{path} does not load as plain tensors: {_seen(path, str(error))}; "
            "allowed: torch.save(model.state_dict(), ...), no code"
        ) from error
    return recognise(str(path), _state_dict(str(path), content), asked)


def _state_dict(origin: str, content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, out of trainers' wrappers."""
    seen: list[int] = []  # a pickle may hold itself
    while isinstance(content, Mapping) and id(content) not in seen:
        seen.append(id(content))
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{origin} holds a {type(content).__name__}; allowed: a state dict")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{origin}: {key!r} is a {type(value).__name__}; allowed: tensors under names")
    return _without_prefixes(dict(content))


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that wrapping modules, such as DataParallel's, give to all of them."""

    def wrapped(prefix: str) -> bool:
        keys = tensors.keys() - {COUNTER}
        return bool(keys) and all(key.startswith(prefix) for key in keys)

    while prefix := next(filter(wrapped, PREFIXES), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key != COUNTER}
    return tensors


def recognise(origin: str, tensors: dict[str, Tensor], asked: str | None) -> Source:
    """Variant, layout and options of a state dict, from its keys and shapes.

    torchvision and timm name v3 alike: with an auxiliary head it counts as torchvision's. 1008 classes without one is
    the FID net.
    """
    model, mark = _find_model(tensors)
    if model is None:
        first = next(iter(tensors), "(nothing)")
        raise WeightsError(
            f"{origin}: {first} is no key of an Inception net; allowed: weights of {asked or ', '.join(ROOTS)}"
        )
    if asked is not None and asked != model:
        raise model_mismatch(origin, mark, model, asked)
    head = CLASSIFIERS[model][0]
    if model in ("inception_v3", "inception_resnet_v2") and f"{head}.weight" not in tensors:  # Cadene's name of it
        tensors = {re.sub(r"^last_linear\.", f"{head}.", key): value for key, value in tensors.items()}
    layout = LAYOUTS[model]
    options = _options(origin, model, tensors)
    if options.get("fid"):
        layout = "pytorch-fid"
    elif model == "inception_v3" and options["aux_logits"]:
        layout = "torchvision"
    config = data_config(layout, model, options.get("in_chans", 3))
    return Source(layout, model, options, config, tensors, origin)


def _find_model(tensors: Mapping[str, Tensor]) -> tuple[str | None, str]:
    for model, pattern in MARKS:
        for key in tensors:
            if pattern.match(key):
                return model, key
    return None, ""


def _options(origin: str, model: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    classes = head_classes(origin, model, tensors)
    options: dict[str, Any] = {
        "num_classes": classes,
        "convention": "torch" if model in ("inception_v1", "inception_v3") else "tf",
        "bn_eps": 1e-3,
    }
    if model in AUX:
        options["aux_logits"] = has_aux(model, tensors)
    ported = model in ("inception_v3", "inception_v4", "inception_resnet_v2")  # timm's of slim's, v3 without its head
    if ported and classes == BACKGROUND_CLASSES and not (model == "inception_v3" and options["aux_logits"]):
        options["num_classes"] = classes - 1
    if model == "inception_v1":
        options["classic"] = "conv1.conv.bias" in tensors and "conv1.bn.weight" not in tensors
    elif model == "inception_v2":
        options["stem"] = "plain" if "Conv2d_1a_7x7.conv.weight" in tensors else "separable"
    elif model == "inception_v3" and classes == FID_CLASSES and not options["aux_logits"]:
        options |= {"fid": True, "convention": "tf"}
    elif model == "inception_resnet_v1":
        embedding = tensors.get("last_linear.weight")
        options |= (
            {"widths": "paper"}
            if embedding is None
            else {"embedding_size": width(origin, model, "last_linear.weight", embedding, "embedding_size")}
        )
    elif model == "inception_resnet_v2":
        options["widths"] = "paper" if any(key.startswith("stem.") for key in tensors) else "slim"
    return options | image_channels(tensors)


def own_metadata(source: Source, options: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file of ours: strings all, as safetensors asks."""
    config = source.data_config
    named = {} if source.labels is None else {"labels": source.labels}
    return named | {
        "format": "pt",
        "layout": "inception_fast",
        "version": FORMAT,
        "model": source.model,
        "source_layout": source.layout,
        "convention": str(options["convention"]),
        "bn_eps": repr(options["bn_eps"]),
        "num_classes": str(options["num_classes"]),
        "options": json.dumps(dict(options), sort_keys=True),
        "data_config": json.dumps(None if config is None else vars(config), sort_keys=True),
    }


def _own(origin: str, metadata: Mapping[str, str], tensors: dict[str, Tensor], asked: str | None) -> Source:
    model, version = metadata.get("model"), metadata.get("version")
    if version != FORMAT:
        raise WeightsError(
            f"{origin}: metadata version {version!r}; allowed: {FORMAT!r}, written by `inception-fast convert`"
        )
    if model not in ROOTS:
        raise WeightsError(f"{origin}: metadata model {model!r}; allowed: {', '.join(ROOTS)}")
    if asked is not None and asked != model:
        raise model_mismatch(origin, "its metadata", model, asked)
    try:
        options, config = json.loads(metadata["options"]), json.loads(metadata["data_config"])
    except (KeyError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{origin}: metadata is damaged, {error!r}; allowed: options and data_config as JSON"
        ) from error
    needed = ("num_classes", "convention", "bn_eps")
    if not isinstance(options, dict) or not set(needed) <= set(options):
        raise WeightsError(f"{origin}: metadata options {options!r}; allowed: an object with {', '.join(needed)}")
    for key, value in options.items():
        if key not in OPTIONS or type(value) not in OPTIONS[key]:
            raise WeightsError(
                f"{origin}: metadata option {key}={value!r}; allowed: {', '.join(OPTIONS)}, of their types"
            )
    shapes = {"num_classes": head_classes(origin, model, tensors), "in_chans": 3} | image_channels(tensors)
    for key, size in shapes.items():  # a net of another size is not even built
        if options.get(key, size) != size:
            raise WeightsError(f"{origin}: metadata option {key}={options[key]}; allowed: {size}, as its tensors have")
    labels = metadata.get("labels")
    return Source("inception_fast", model, options, parse_config(origin, config), tensors, origin, labels)


def parse_config(origin: str, config: Any) -> DataConfig | None:
    """A DataConfig out of JSON, ours or timm's `pretrained_cfg`; None for null. Raises WeightsError for the rest."""
    if config is None:
        return None
    try:
        size = tuple(int(value) for value in config["input_size"])
        mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
        crop, interpolation = float(config["crop_pct"]), str(config["interpolation"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"{origin}: data config {config!r} is damaged: {error!r}") from error
    good = len(size) == 3 and min(size) >= 1 and len(mean) == len(std) == size[0] and 0 < crop <= 1
    if not good or min(std) <= 0 or not all(map(math.isfinite, mean + std)):
        raise WeightsError(
            f"{origin}: data config {config!r}; allowed: input_size (c, h, w), c means, c std > 0, 0 < crop_pct <= 1"
        )
    if interpolation not in INTERPOLATIONS or max(size[1:]) > crop * LARGEST:
        raise WeightsError(
            f"{origin}: data config {config!r}; allowed: interpolation {', '.join(INTERPOLATIONS)}, input_size over "
            f"crop_pct up to {LARGEST}"
        )
    return DataConfig(mean, std, (size[0], size[1], size[2]), crop, interpolation)
