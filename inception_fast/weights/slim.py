"""TF-slim checkpoints of both formats: V1, one file, and V2, `.index` beside `.data-*`. Read through tensorflow.

Layouts: convolutions [kh, kw, cin, cout], depthwise [kh, kw, cin, multiplier], fully connected [cin, cout]; logits of
v1 to v3 are 1x1 convolutions. BN has no scale (gamma) unless the net was built with one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._room import make_sure_of_room
from ._source import (
    BACKGROUND_CLASSES,
    Source,
    WeightsError,
    data_config,
    for_numpy,
    has_aux,
    head_classes,
    image_channels,
    model_mismatch,
)
from ._tensorflow import load_tensorflow
from .names import AUX, CLASSIFIERS, ROOTS, Layer, layers, normalised

LEAVES = (
    "weights",
    "biases",
    "depthwise_weights",
    "pointwise_weights",
    "beta",
    "gamma",
    "moving_mean",
    "moving_variance",
)
"""Last parts of the names of model variables; optimizer slots and averages end in something else."""

Read = Callable[[str], Tensor]


def prefix_of(path: Path) -> Path | None:
    """The checkpoint that `path`, a prefix, an index or data file, or a folder, stands for; None for any other path."""
    if path.is_dir():
        listed = path / "checkpoint"
        if listed.is_file():
            for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("model_checkpoint_path:"):
                    # An absolute path in the file is that of the machine which wrote it: the name alone counts.
                    return path / os.path.basename(line.partition(":")[2].strip().strip('"'))
        found = sorted(path.glob("*.index"))
        return found[0].with_suffix("") if len(found) == 1 else None
    if path.suffix == ".index" or ".data-" in path.suffix:
        return path.with_suffix("")
    return path if path.is_file() or Path(f"{path}.index").is_file() else None


def read(prefix: Path, asked: str | None) -> Source:
    """Reads the checkpoint of that prefix. Raises FileNotFoundError for missing parts, else WeightsError."""
    origin = str(prefix)
    _check_name(prefix)
    _check_parts(prefix)
    reader = _open(prefix)
    shapes: dict[str, list[int]] = reader.get_variable_to_shape_map()
    model = _recognise(origin, shapes, asked)

    def tensor(name: str) -> Tensor:
        try:
            value = np.array(reader.get_tensor(name))
        except Exception as error:  # TensorFlow has one exception class per status code
            raise WeightsError(
                f"{origin}: {name} cannot be read, the checkpoint is damaged: {_first_line(error)}"
            ) from error
        if value.dtype.name == "bfloat16":  # of another package, for NumPy has none
            return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        try:
            return torch.from_numpy(value)
        except TypeError as error:
            raise WeightsError(f"{origin}: {name} has dtype {value.dtype}; allowed: floating point numbers") from error

    names = {name for name in shapes if name.rpartition("/")[2] in LEAVES}
    stem = "separable" if f"{ROOTS[model]}/Conv2d_1a_7x7/depthwise_weights" in names else "plain"
    tensors, used = _convert(origin, model, stem, names, tensor)
    for name in sorted(names - used):
        if name.startswith(f"{ROOTS[model]}/"):
            raise WeightsError(
                f"{origin}: {name}, shape {tuple(shapes[name])}, does not belong to TF-slim's {ROOTS[model]}"
            )
    return _source(origin, model, stem, tensors)


def write(prefix: Path, source: Source) -> None:
    """Writes a V2 checkpoint under slim's names, variables in the order in which TF-slim's saver writes them.

    Batch norm's factor (gamma) is left out where it is one throughout, as slim's nets have none. The files appear when
    they are complete. Raises ValueError for tensors that slim has no layer for, FileNotFoundError without the folder.
    """
    _check_name(prefix)
    if not prefix.parent.is_dir():
        raise FileNotFoundError(f"no folder {prefix.parent} to write {prefix.name} to")
    variables = _variables(source)
    make_sure_of_room(prefix, variables)
    tensorflow = _tensorflow(prefix)
    with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as folder:
        scratch = Path(folder) / prefix.name
        names = sorted(variables)
        with tensorflow.device("CPU"):
            values = [tensorflow.constant(variables[name].contiguous().numpy()) for name in names]
            tensorflow.raw_ops.SaveV2(
                prefix=str(scratch), tensor_names=names, shape_and_slices=[""] * len(names), tensors=values
            )
        for file in sorted(Path(folder).iterdir()):  # the data before the index, which says that they are there
            os.replace(file, prefix.parent / file.name)


def _variables(source: Source) -> dict[str, Tensor]:
    """Slim's variables of a source's tensors; the background class is what the file had."""
    stem = source.options.get("stem", "separable")
    tensors = source.tensors
    result: dict[str, Tensor] = {}
    used: set[str] = set()

    def take(key: str) -> Tensor:
        used.add(key)
        return for_numpy(tensors[key])

    for layer in layers(source.model, stem):
        path, bn = normalised(layer)
        scope = _scope(source.model, layer)
        if layer.kind == "separable":
            depthwise = take(f"{path}.depthwise.weight")  # [cin * multiplier, 1, kh, kw]
            cin = take(f"{path}.pointwise.weight").shape[1] // 8
            depthwise = depthwise.reshape(cin, 8, *depthwise.shape[2:]).permute(2, 3, 0, 1)
            result[f"{scope}/depthwise_weights"] = depthwise
            result[f"{scope}/pointwise_weights"] = take(f"{path}.pointwise.weight").permute(2, 3, 1, 0)
            result[f"{scope}/biases"] = take(f"{path}.pointwise.bias")
            continue
        if f"{path}.weight" not in tensors:
            if layer.aux or layer.kind.startswith("linear"):
                continue
            raise WeightsError(f"{source.origin}: {path}.weight of {source.model} is missing")
        if bn and f"{bn}.weight" not in tensors:
            missing = f"{source.origin}: {bn}.weight of {source.model} is missing"
            raise WeightsError(f"{missing}; allowed: nets with batch norm, as all of TF-slim's are")
        weight = take(f"{path}.weight")
        if weight.ndim == 4:
            weight = weight.permute(2, 3, 1, 0)
        else:
            # The logits of v1 to v3 are 1x1 convolutions, known by their scopes.
            weight = weight.T[None, None] if "Conv2d" in layer.scope else weight.T
        result[f"{scope}/weights"] = weight
        if not bn:
            result[f"{scope}/biases"] = take(f"{path}.bias")
            continue
        factor = take(f"{bn}.weight")
        if bool((factor != 1).any()):
            result[f"{scope}/BatchNorm/gamma"] = factor
        result[f"{scope}/BatchNorm/beta"] = take(f"{bn}.bias")
        result[f"{scope}/BatchNorm/moving_mean"] = take(f"{bn}.running_mean")
        result[f"{scope}/BatchNorm/moving_variance"] = take(f"{bn}.running_var")
    for key in tensors:
        if key not in used and not key.endswith(".num_batches_tracked"):
            raise WeightsError(f"{source.origin}: TF-slim's {ROOTS[source.model]} has no place for {key}")
    return result


def _scope(model: str, layer: Layer) -> str:
    return layer.scope[1:] if layer.scope.startswith("/") else f"{ROOTS[model]}/{layer.scope}"


def _check_name(prefix: Path) -> None:
    if set(str(prefix)) & set("[\\"):
        raise WeightsError(
            f"{prefix}: TensorFlow takes such a name for a pattern and finds no checkpoint; allowed: names and folders "
            "without [ and \\"
        )


def _check_parts(prefix: Path) -> None:
    if prefix.is_file():
        return
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise FileNotFoundError(f"no checkpoint at {prefix}: looked for {prefix} (V1) and {index} (V2)")
    if not list(prefix.parent.glob(f"{prefix.name}.data-*")):
        raise FileNotFoundError(f"checkpoint {index} has no data: looked for {prefix}.data-00000-of-00001")


def _tensorflow(prefix: Path) -> Any:
    try:
        return load_tensorflow()
    except ImportError as error:
        raise ImportError(
            f"{prefix} is a TensorFlow checkpoint; it needs TensorFlow: pip install inception-fast[tensorflow]"
        ) from error


def _open(prefix: Path) -> Any:
    tensorflow = _tensorflow(prefix)
    try:
        return tensorflow.train.load_checkpoint(str(prefix))
    except Exception as error:
        raise WeightsError(f"{prefix} is not a readable TensorFlow checkpoint: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _recognise(origin: str, shapes: dict[str, list[int]], asked: str | None) -> str:
    held = {root: model for model, root in ROOTS.items()}
    for name in sorted(shapes):
        model = held.get(name.partition("/")[0])
        if model is not None:
            if asked is not None and model != asked:
                raise model_mismatch(origin, name, model, asked)
            return model
    first = min(shapes, default="(nothing)")
    allowed = ROOTS[asked] if asked else ", ".join(held)
    raise WeightsError(
        f"{origin}: {first} is no variable of an Inception net; allowed: names that begin with {allowed}"
    )


def _convert(origin: str, model: str, stem: str, names: set[str], tensor: Read) -> tuple[dict[str, Tensor], set[str]]:
    """Our tensors and the names that they came from."""
    table = layers(model, stem)
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    optional = {layer.path for layer in table if layer.aux} | {CLASSIFIERS[model][0]}
    roots = {layer.path: _scope(model, layer) for layer in table}

    def held(path: str) -> bool:
        return any(name.startswith(f"{roots[path]}/") for name in names)

    if not held(CLASSIFIERS[model][0]):  # a net without it may end in the trunk: the bottleneck goes with it
        optional |= {layer.path for layer in table if layer.kind == "linear_bn"}

    def get(scope: str, leaf: str, *ranks: int) -> Tensor:
        name = f"{scope}/{leaf}"
        if name not in names:
            raise WeightsError(f"{origin}: {name} of TF-slim's {ROOTS[model]} is missing")
        used.add(name)
        value = tensor(name)
        if ranks and value.ndim not in ranks:
            allowed = " or ".join(map(str, ranks))
            raise WeightsError(f"{origin}: {name} has shape {tuple(value.shape)}; allowed: rank {allowed}")
        return value

    for layer in table:
        if layer.path in optional and not held(layer.path):
            continue
        for key, value in _layer(layer, roots[layer.path], names, get).items():
            result[key] = value
    return result, used


def _layer(layer: Layer, scope: str, names: set[str], get: Callable[..., Tensor]) -> dict[str, Tensor]:
    if layer.kind == "separable":
        depthwise = get(scope, "depthwise_weights", 4).permute(2, 3, 0, 1)  # [cin, multiplier, kh, kw]
        return {
            f"{layer.path}.depthwise.weight": depthwise.reshape(-1, 1, *depthwise.shape[2:]),
            f"{layer.path}.pointwise.weight": get(scope, "pointwise_weights", 4).permute(3, 2, 0, 1),
            f"{layer.path}.pointwise.bias": get(scope, "biases"),
        }
    weight, bn = normalised(layer)
    linear = layer.kind.startswith("linear")
    result = {f"{weight}.weight": _weight(get(scope, "weights", *((2, 4) if linear else (4,))), linear)}
    if not bn:
        result[f"{weight}.bias"] = get(scope, "biases")
        return result
    norm = f"{scope}/BatchNorm"
    beta = get(norm, "beta")
    result[f"{bn}.weight"] = get(norm, "gamma") if f"{norm}/gamma" in names else torch.ones_like(beta)
    result[f"{bn}.bias"] = beta
    result[f"{bn}.running_mean"] = get(norm, "moving_mean")
    result[f"{bn}.running_var"] = get(norm, "moving_variance")
    return result


def _weight(value: Tensor, linear: bool) -> Tensor:
    if not linear:
        return value.permute(3, 2, 0, 1)
    return value.reshape(value.shape[-2:]).T if value.ndim == 4 and value.shape[:2] == (1, 1) else value.T


def _source(origin: str, model: str, stem: str, tensors: dict[str, Tensor]) -> Source:
    classes = head_classes(origin, model, tensors)
    options: dict[str, Any] = {
        "num_classes": classes - 1 if classes == BACKGROUND_CLASSES and model != "inception_resnet_v1" else classes,
        "convention": "tf",
        "bn_eps": 1e-3,
    }
    if model in AUX:
        options["aux_logits"] = has_aux(model, tensors)
    if model == "inception_v2":
        options["stem"] = stem
    if model == "inception_resnet_v1":
        bottleneck = tensors.get("last_linear.weight")
        options["embedding_size"] = None if bottleneck is None else bottleneck.shape[0]
    options |= image_channels(tensors)
    return Source("slim", model, options, data_config("slim", model, options.get("in_chans", 3)), tensors, origin)
