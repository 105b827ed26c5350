"""Keras nets, InceptionV3, InceptionResNetV2 and our six: `.h5`, `.weights.h5`, `.keras`, `.weights.json` with its
shards, read by h5py alone.

Most layers there are unnamed, `conv2d_7`: the numbers count up in the order of creation, which is slim's, while files
list layers in topological order. Kernels are [kh, kw, cin, cout], dense ones [cin, cout]. BN has no scale; the
background class is already gone. Our own Keras nets of these two variants follow that; in the others a layer's name is
its slim scope, "_" for "/", with "_bn" behind it for its batch norm.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._source import Source, WeightsError, data_config, has_aux, head_classes, image_channels, model_mismatch
from .names import AUX, ROOTS, Layer, layers, normalised

Variables = dict[str, dict[str, Tensor]]
"""Layer name -> variable name -> value."""

CONV = re.compile(r"conv2d(?:_(\d+))?$")
NORM = re.compile(r"batch_normalization(?:_v\d)?(?:_(\d+))?$")
UP = re.compile(r"block(35|17|8)_(\d+)_conv$")
NUMBERED: dict[str, dict[int, tuple[str, ...]]] = {
    "batch_normalization": {
        3: ("beta", "moving_mean", "moving_variance"),
        4: ("gamma", "beta", "moving_mean", "moving_variance"),
    },
    "conv2d": {1: ("kernel",), 2: ("kernel", "bias")},
    "dense": {1: ("kernel",), 2: ("kernel", "bias")},
    "separable_conv2d": {3: ("depthwise_kernel", "pointwise_kernel", "bias")},
}
"""The order of a layer's variables, by their count, in the formats that only number them."""
HELD = {"bn": ("kernel",), "linear_bn": ("kernel",), "separable": ("depthwise_kernel", "pointwise_kernel", "bias")}
"""The variables of a layer by its kind, where they are not a kernel and a bias."""
WEIGHTS_MEMBER = "model.weights.h5"
CONFIG_MEMBER = "config.json"
MAXIMA = re.compile(rb'"class_name":\s*"GlobalMaxPooling2D"')
"""In a model's config: that the net ends in maxima, not in averages."""
FIRST = ("Conv2D", "SeparableConv2D")
"""Kinds of the layer that a net begins with."""
ZEROS = "ZeroPadding2D"
PADDED_FIRST = ("inception_v1", "inception_v2")
"""The variants that in convention "torch" have zeros before this layer."""
EPSILON = 1e-3
"""Of the variants' batch norms."""
NUMBERED_MODELS = ("inception_v3", "inception_resnet_v2")
"""The variants that Keras has too, with numbers for names."""


def read(path: Path, asked: str | None) -> Source:
    """Reads a file of any of the formats. Raises WeightsError for one that is damaged or holds another network."""
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError(f"{path} is a Keras file; to read it: pip install inception-fast[keras-files]") from error
    origin, config = str(path), b""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents: list[Any] = [io.BytesIO(archive.read(WEIGHTS_MEMBER))]
                config = archive.read(CONFIG_MEMBER) if CONFIG_MEMBER in archive.namelist() else b""
        else:
            contents = shards(path)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(h5py.File(content, "r")) for content in contents]
            variables, named = _variables(files, h5py.Dataset)
            config = config or _h5_config(files[0])
        listed = list(_listed(json.loads(config))) if config else []
    except WeightsError as error:
        raise WeightsError(f"{origin}: {error}") from error
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{origin} is not a readable Keras file: {error}") from error
    kinds = [(kind, name) for kind, name, _ in listed]
    found = source(origin, variables, named, asked, pads(kinds))
    _check_epsilon(origin, listed)
    check_beginning(origin, found, kinds)
    return replace(found, options=found.options | {"global_pool": "max"}) if MAXIMA.search(config) else found


def shards(path: Path) -> list[Path]:
    """The HDF5 files that a `.weights.json` lists, which lie beside it; `path` itself where it is no JSON.

    Keras lists each variable's file, or files.
    """
    with open(path, "rb") as file:
        if file.read(1) != b"{":
            return [path]
    places = json.loads(path.read_bytes()).get("weight_map")
    listed = places.values() if isinstance(places, dict) else ()
    names = {name for held in listed for name in (held if isinstance(held, list) else [held])}
    if not names or not all(isinstance(name, str) and name.endswith(".h5") for name in names):
        raise WeightsError("JSON that lists no .h5 files; allowed: what Keras writes with max_shard_size=")
    return [path.with_name(name) for name in sorted(names)]


def _h5_config(file: Any) -> bytes:
    """The config of a whole model in HDF5, as `model.save("net.h5")` writes it; empty beside weights alone."""
    config = file.attrs.get("model_config", b"")
    if isinstance(config, str):
        return config.encode()
    return config if isinstance(config, bytes) else b""


def _listed(config: Any) -> Iterator[tuple[str, str, float | None]]:
    """(kind, name, epsilon of a batch norm) of a config's layers, in order, and of those in models among them."""
    inner = config.get("config") if isinstance(config, dict) else None
    if not isinstance(inner, dict):
        return
    if not isinstance(inner.get("layers"), list):
        kind = str(config.get("class_name"))
        yield kind, str(inner.get("name")), inner.get("epsilon") if kind.startswith("BatchNormalization") else None
        return
    for layer in inner["layers"]:
        yield from _listed(layer)


def _start(kinds: Sequence[tuple[str, str]]) -> int:
    """The place of the first layer of a net; 0 where it is not listed."""
    return next((index for index, (kind, _) in enumerate(kinds) if kind in FIRST), 0)


def pads(kinds: Sequence[tuple[str, str]]) -> bool:
    """Whether a net pads with zeros, as those of convention "torch" alone do; not what stands before the net."""
    return any(kind == ZEROS for kind, _ in kinds[_start(kinds) :])


def _check_epsilon(origin: str, listed: Iterable[tuple[str, str, float | None]]) -> None:
    """Raises WeightsError for a batch norm whose epsilon is not that of the variants: weights alone do not tell it."""
    for kind, name, epsilon in listed:
        if epsilon not in (None, EPSILON):
            raise WeightsError(f"{origin}: layer {name!r} ({kind}) has epsilon={epsilon}; allowed: {EPSILON}")


def check_beginning(origin: str, source: Source, kinds: Sequence[tuple[str, str]]) -> None:
    """Raises WeightsError for what stands before the first layer of a net, but for the zeros that this one needs."""
    before = [(kind, name) for kind, name in kinds[: _start(kinds)] if kind != "InputLayer"]
    own = source.model in PADDED_FIRST and source.options["convention"] == "torch"
    if own and before and before[-1][0] == ZEROS:
        before.pop()
    if before:
        kind, name = before[0]
        raise WeightsError(
            f"{origin}: layer {name!r} ({kind}) stands before the net; allowed: models that begin with the net's own "
            "layers, or the weights alone, a .weights.h5"
        )


def source(
    origin: str, variables: Variables, named: bool = True, asked: str | None = None, padded: bool = False
) -> Source:
    """What the variables of a Keras net hold. `named`: its layers have their own names, not class and position.

    `padded`: the net has layers that pad with zeros, as those of convention "torch" have.

    Raises WeightsError where they are of no variant, of another than `asked`, or not exactly those of the variant.
    """
    model, stem = _recognise(origin, variables, named, asked)
    tensors = _tensors(origin, model, stem, variables if named else _rename(origin, model, variables))
    classes = head_classes(origin, model, tensors)
    convention = "torch" if padded else "tf"
    options: dict[str, Any] = {"num_classes": classes, "convention": convention, "bn_eps": EPSILON}
    if model in AUX:
        options["aux_logits"] = has_aux(model, tensors)
    if model == "inception_v2":
        options["stem"] = stem
    if model == "inception_resnet_v1":
        has_embedding = "last_linear.weight" in tensors
        options["embedding_size"] = tensors["last_linear.weight"].shape[0] if has_embedding else None
    options |= image_channels(tensors)
    return Source("keras", model, options, data_config("keras", model, options.get("in_chans", 3)), tensors, origin)


def _variables(files: Sequence[Any], dataset: type) -> tuple[Variables, bool]:
    """All variables but the optimizer's, and whether the layers have their own names (not class and position).

    `files`: the shards, of which several may hold parts of a layer.
    """
    found: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}

    def visit(path: str | bytes, node: Any) -> None:
        if isinstance(path, bytes):  # what h5py makes of a name that is no text
            raise WeightsError(f"a layer or variable has the name {path!r}; allowed: UTF-8")
        parts = path.split("/")
        if parts[0] in ("optimizer", "optimizer_weights"):
            return
        if isinstance(node, dataset):
            if parts[-2:-1] == ["vars"]:
                found.setdefault("/".join(parts[:-2]), {})[parts[-1]] = node
            elif len(parts) > 1:
                found.setdefault(parts[-2], {})[parts[-1].partition(":")[0]] = node
        elif parts[-1] == "vars" and "name" in node.attrs:
            names["/".join(parts[:-1])] = str(node.attrs["name"])

    for file in files:
        file.visititems(visit)
    numbered = any("0" in values for values in found.values())
    result: Variables = {}
    for place, values in found.items():
        layer = names.get(place, place.rpartition("/")[2])
        order = _order(place.rpartition("/")[2], len(values)) if numbered else tuple(values)
        if order is None:
            continue
        keys = map(str, range(len(order))) if numbered else order
        result[layer] = {name: _tensor(values[key]) for name, key in zip(order, keys, strict=True)}
    return result, not numbered or all(place in names for place in found)


def _tensor(node: Any) -> Tensor:
    """The values of a variable; those of bfloat16, which HDF5 has not, lie there as two opaque bytes each."""
    values = node[...]
    if values.dtype.kind == "V" and values.dtype.itemsize == 2:
        return torch.from_numpy(values.view("int16")).view(torch.bfloat16)
    try:
        return torch.from_numpy(values)
    except TypeError as error:
        raise WeightsError(f"{node.name} has dtype {values.dtype}; allowed: floating point numbers") from error


def _order(layer: str, count: int) -> tuple[str, ...] | None:
    kind = re.sub(r"(_v\d)?(_\d+)?$", "", layer)
    if kind not in NUMBERED:
        return None
    if count not in NUMBERED[kind]:
        raise WeightsError(f"{layer} has {count} variables; allowed: {' or '.join(map(str, NUMBERED[kind]))}")
    return NUMBERED[kind][count]


def _numbers(variables: Variables, pattern: re.Pattern[str]) -> list[tuple[int, str]]:
    matches = ((pattern.match(name), name) for name in variables)
    return sorted((int(match[1] or 0), name) for match, name in matches if match)


def _recognise(origin: str, variables: Variables, named: bool, asked: str | None) -> tuple[str, str]:
    """The variant, and for v2 its stem."""
    resnet = any(UP.match(name) or name == "conv_7b" for name in variables)
    if not named:
        resnet = any("bias" in values for name, values in variables.items() if CONV.match(name))
    first = min(variables, default="(nothing)")
    convs = _numbers(variables, CONV)
    stem = "separable" if any("depthwise_kernel" in values for values in variables.values()) else "plain"
    if convs:
        model = "inception_resnet_v2" if resnet else "inception_v3"
        shown = next((name for name in variables if UP.match(name)), convs[0][1])
    else:
        others = [model for model in ROOTS if model not in NUMBERED_MODELS]
        known = {model: {name for name, _ in layer_names(model, stem).values()} for model in others}
        model = max(others, key=lambda other: len(known[other] & set(variables)))
        shown = next((name for name in variables if name in known[model] - {"predictions"}), "")
        if not shown:
            raise WeightsError(
                f"{origin}: {first} is no layer of an Inception net; allowed: conv2d, conv2d_1 ... of Keras' Inception "
                "nets, or Conv2d_2b_1x1 ... of ours"
            )
    if asked is not None and asked != model:
        raise model_mismatch(origin, shown, model, asked)
    return model, stem


@cache
def layer_names(model: str, stem: str = "separable") -> Mapping[str, tuple[str, str]]:
    """Our path of each layer -> its names in our Keras nets, (weights, batch norm or ""), in the order of creation."""
    result: dict[str, tuple[str, str]] = {}
    number = 0
    for layer in layers(model, stem):
        name = layer.scope.replace("/", "_").strip("_")
        if layer.kind == "linear" and not layer.aux:
            result[layer.path] = "predictions", ""
        elif model not in NUMBERED_MODELS or layer.aux:
            result[layer.path] = name, f"{name}_bn" if normalised(layer)[1] else ""
        elif layer.kind == "bn" and layer.path != "conv2d_7b":
            suffix = f"_{number}" if number else ""
            result[layer.path] = f"conv2d{suffix}", f"batch_normalization{suffix}"
            number += 1
        else:
            result[layer.path] = _own_name(layer)
    return result


def _unnamed(model: str) -> list[Layer]:
    """The layers that Keras numbers, in creation order."""
    return [layer for layer in layers(model) if layer.kind == "bn" and not layer.aux and layer.path != "conv2d_7b"]


def _sequence(origin: str, model: str, variables: Variables, pattern: re.Pattern[str], count: int) -> list[str]:
    """Exactly `count` names in the order of their numbers, without a gap."""
    numbers = _numbers(variables, pattern)
    for (before, _), (after, name) in pairwise(numbers):
        if after != before + 1:
            raise WeightsError(f"{origin}: {name} follows number {before}, so {model} lacks a layer between them")
    if len(numbers) != count:
        last = numbers[-1][1] if numbers else "(nothing)"
        raise WeightsError(f"{origin}: {len(numbers)} layers like {last}; allowed for {model}: {count}")
    return [name for _, name in numbers]


def _tensors(origin: str, model: str, stem: str, variables: Variables) -> dict[str, Tensor]:
    names = dict(layer_names(model, stem))
    if model in NUMBERED_MODELS:
        # The numbers go on from what the session made before: their order counts.
        unnamed = _unnamed(model)
        convs = _sequence(origin, model, variables, CONV, len(unnamed))
        norms = _sequence(origin, model, variables, NORM, len(unnamed))
        names |= zip((layer.path for layer in unnamed), zip(convs, norms, strict=True), strict=True)
    table = layers(model, stem)
    head = "predictions" in variables
    aux = any(layer.aux and names[layer.path][0] in variables for layer in table)
    used: set[str] = set()
    result: dict[str, Tensor] = {}
    for layer in table:
        conv, norm = names[layer.path]
        # A net without its head ends in the trunk: the bottleneck of Inception-ResNet-v1 goes with it.
        optional = conv == "predictions" or (layer.kind == "linear_bn" and not head)
        if (layer.aux and not aux) or (optional and conv not in variables):
            continue
        used |= {conv, norm}
        result |= dict(_layer(origin, layer, variables, conv, norm))
        _check_variables(origin, conv, variables[conv], HELD.get(layer.kind, ("kernel", "bias")))
        _check_variables(origin, norm, variables.get(norm, {}), NUMBERED["batch_normalization"][4])
    for name in sorted(set(variables) - used):
        raise WeightsError(
            f"{origin}: layer {name} does not belong to {model}; allowed: Keras' application, with its head or without"
        )
    return result


def _check_variables(origin: str, layer: str, seen: Iterable[str], allowed: Sequence[str]) -> None:
    """Raises WeightsError for a variable that a layer of the variants has not, as a bias before a batch norm is."""
    for name in sorted(set(seen) - set(allowed)):
        raise WeightsError(
            f"{origin}: {layer}/{name} has no place in the net; allowed of this layer: {', '.join(allowed)}"
        )


def _own_name(layer: Layer) -> tuple[str, str]:
    """Names of the layers that Keras does not number."""
    if layer.kind == "linear":
        return "predictions", ""
    if layer.path == "conv2d_7b":
        return "conv_7b", "conv_7b_bn"
    block, index = layer.scope.split("/")[-2:-1][0], 0
    if block == "Block8":
        return "block8_10_conv", ""
    name, _, index = block.partition("_")  # type: ignore[assignment]
    return f"{name}_{index}_conv", ""


def _layer(origin: str, layer: Layer, variables: Variables, conv: str, norm: str) -> Iterator[tuple[str, Tensor]]:
    def get(name: str, variable: str) -> Tensor:
        if variable not in variables.get(name, {}):
            raise WeightsError(f"{origin}: {name}/{variable} is missing")
        return variables[name][variable]

    if layer.kind == "separable":
        depthwise = get(conv, "depthwise_kernel").permute(2, 3, 0, 1)  # [cin, multiplier, kh, kw]
        yield f"{layer.path}.depthwise.weight", depthwise.reshape(-1, 1, *depthwise.shape[2:])
        yield f"{layer.path}.pointwise.weight", get(conv, "pointwise_kernel").permute(3, 2, 0, 1)
        yield f"{layer.path}.pointwise.bias", get(conv, "bias")
        return
    weight, bn = normalised(layer)
    kernel = get(conv, "kernel")
    rank = 2 if layer.kind.startswith("linear") else 4
    if kernel.ndim != rank:
        raise WeightsError(f"{origin}: {conv}/kernel has shape {tuple(kernel.shape)}; allowed: rank {rank}")
    yield f"{weight}.weight", kernel.T if rank == 2 else kernel.permute(3, 2, 0, 1)
    if not bn:
        yield f"{weight}.bias", get(conv, "bias")
        return
    beta = get(norm, "beta")
    yield f"{bn}.weight", variables[norm].get("gamma", torch.ones_like(beta))
    yield f"{bn}.bias", beta
    yield f"{bn}.running_mean", get(norm, "moving_mean")
    yield f"{bn}.running_var", get(norm, "moving_variance")


def _rename(origin: str, model: str, variables: Variables) -> Variables:
    """Own names for layers that older Keras saved under class and position in `model.layers`."""
    listed = _listing(model)
    unnamed = {layer.path: index for index, layer in enumerate(_unnamed(model))}
    convs = _sequence(origin, model, variables, CONV, len(listed))
    norms = _sequence(origin, model, variables, NORM, sum(layer.kind == "bn" for layer in listed))
    result: Variables = {}
    remaining = iter(norms)
    for layer, conv in zip(listed, convs, strict=True):
        index = unnamed.get(layer.path)
        name, norm = _own_name(layer) if index is None else (f"conv2d_{index}", f"batch_normalization_{index}")
        result[name] = variables[conv]
        if norm:
            result[norm] = variables[next(remaining)]
    if "dense" in variables:
        result["predictions"] = variables["dense"]
    return result


def _listing(model: str) -> list[Layer]:
    """The convolutions in the order of Keras' `model.layers`: by distance to the output, then by branch."""
    blocks: dict[str, list[tuple[int, int, Layer]]] = {}
    for layer in (layer for layer in layers(model) if not layer.aux and layer.kind != "linear"):
        scope = layer.scope.partition("/Branch_")[0] if "/Branch_" in layer.scope else layer.scope
        blocks.setdefault(scope, []).append((_distance(model, layer), len(blocks.get(scope, [])), layer))
    return [row[2] for block in blocks.values() for row in sorted(block, key=lambda row: (-row[0], row[1]))]


def _distance(model: str, layer: Layer) -> int:
    """Keras layers between a convolution and the concatenation that ends its block."""
    if "/Branch_" not in layer.scope:
        return 0
    branch = layer.scope.rpartition("/")[0]
    inside = [other for other in layers(model) if other.scope.rpartition("/")[0] == branch]
    split = [other for other in inside if other.path[-2:] in ("2a", "2b", "3a", "3b") and model == "inception_v3"]
    if layer in split:
        return 3
    after = inside[inside.index(layer) + 1 :]
    # Convolution, batch norm and activation each; the two halves of a split lie side by side, before a concatenation of
    # their own.
    return 2 + 3 * len([other for other in after if other not in split[1:]]) + (1 if split else 0)
