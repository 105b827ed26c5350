"""The reference nets with random weights: torchvision, timm, facenet-pytorch, Keras and TF-slim (see `slim_graphs`).

`import references` loads none of them; a missing package raises ImportError at the first use, so tests call
`pytest.importorskip`.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SLIM_PROGRAM = Path(__file__).with_name("slim_graphs.py")


@cache
def torchvision() -> Any:
    """torchvision, also where its compiled operators do not load: model code needs two of their schemas at most."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    module = importlib.import_module("torchvision")
    module.schemas_of_tests = library  # the schemas live as long as their library
    return module


def torchvision_net(name: str, *, aux: bool = False, classes: int = 1000, seed: int = 0) -> nn.Module:
    """torchvision's "googlenet" or "inception_v3" in eval mode."""
    build = getattr(torchvision().models, name)
    net = build(weights=None, aux_logits=aux, num_classes=classes, init_weights=False)
    return randomise(net, seed)


def fid_net(*, seed: int = 0) -> nn.Module:
    """The FID graph of 2015-12-05 on torchvision's modules: 1008 classes, averages without padding, a last max pool."""
    net = torchvision_net("inception_v3", classes=1008, seed=seed)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        _replace_pool(getattr(net, f"Mixed_{name}"), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    _replace_pool(net.Mixed_7c, nn.MaxPool2d(3, 1, 1))
    return net


def _replace_pool(block: nn.Module, pool: nn.Module) -> None:
    """The pooled branch of a torchvision block gets the block's input through `pool`, not its own average."""
    inputs: list[Tensor] = []
    convolve = block.branch_pool.forward
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.branch_pool.forward = lambda _: convolve(pool(inputs.pop()))


def timm_net(name: str, *, seed: int = 0, **options: Any) -> nn.Module:
    """timm's "inception_v3", "inception_v4" or "inception_resnet_v2" in eval mode."""
    torchvision()
    return randomise(importlib.import_module("timm").create_model(name, **options), seed)


def facenet_net(classes: int | None = None, *, seed: int = 0) -> nn.Module:
    """facenet-pytorch's InceptionResnetV1 in eval mode: a classifier, or without classes L2-normalised embeddings."""
    torchvision()
    build = importlib.import_module("facenet_pytorch").InceptionResnetV1
    return randomise(build(classify=classes is not None, num_classes=classes), seed)


def randomise(net: nn.Module, seed: int) -> nn.Module:
    """Draws all parameters and BN statistics such that activations stay of order one; the net, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if value.dtype.is_floating_point:
                value.copy_(draw(key, value.shape, generator))
    return net.eval()


def draw(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A random value for the tensor of that name: He's variance for weights, BN scale and variance in [0.5, 1.5]."""
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
    if key.endswith(("running_var", "weight")):
        return torch.rand(shape, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) * 0.1


def images(size: int, batch: int = 2, seed: int = 7) -> Tensor:
    """[batch, 3, size, size] in [-1, 1]."""
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return net(x)


def relative(y: Any, reference: Any) -> float:
    """max |y - reference| / max |reference|."""
    y, reference = (np.asarray(value, dtype=np.float64) for value in (y, reference))
    assert y.shape == reference.shape, (y.shape, reference.shape)
    assert np.abs(reference).max() > 1e-3, "the reference is all but zero, so nothing would be compared"
    return float(np.abs(y - reference).max() / np.abs(reference).max())


def keras_net(name: str, size: int, *, after: int = 0, seed: int = 0, **options: Any) -> Any:
    """Keras' "InceptionV3" or "InceptionResNetV2" with logits, in a session that made `after` convolutions before."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    keras = importlib.import_module("keras")
    keras.backend.clear_session()
    for _ in range(after):
        keras.layers.Conv2D(1, 1)
    options.setdefault("classifier_activation", None)
    net = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), **options)
    rng = np.random.default_rng(seed)
    for variable in net.variables:
        shape = tuple(variable.shape)
        if variable.name == "moving_variance":
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) < 2:
            value = rng.normal(0, 0.1, shape)
        else:
            value = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
        variable.assign(value.astype(np.float32))
    return net


def run_keras(net: Any, x: Tensor) -> np.ndarray:
    return np.asarray(net(x.permute(0, 2, 3, 1).numpy(), training=False))


def write_slim_graphs(folder: Path) -> None:
    """Runs `slim_graphs` in a process of its own; `folder` then has the checkpoints, inputs and logits it describes."""
    done = subprocess.run([sys.executable, str(SLIM_PROGRAM), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"slim_graphs.py failed with {done.returncode}:\n{done.stderr[-2000:]}")


def write_checkpoint(prefix: Path, variables: dict[str, np.ndarray]) -> None:
    """A real V2 checkpoint of those names, without a graph."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf = importlib.import_module("tensorflow")
    values = [tf.constant(value) for value in variables.values()]
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=list(variables), shape_and_slices=[""] * len(values), tensors=values
    )


# The scopes of the nets that tf_slim has no graph for, in creation order, as the programs of Google and facenet write
# them. {a,b} are alternatives; a trailing + is a convolution with bias, = a fully connected layer with bias, & one with
# batch norm.
_BLOCK35 = "Branch_0/Conv2d_1x1 Branch_1/Conv2d_{0a_1x1,0b_3x3} Branch_2/Conv2d_{0a_1x1,0b_3x3,0c_3x3} Conv2d_1x1+"
_BLOCK17 = "Branch_0/Conv2d_1x1 Branch_1/Conv2d_{0a_1x1,0b_1x7,0c_7x1} Conv2d_1x1+"
_BLOCK8 = "Branch_0/Conv2d_1x1 Branch_1/Conv2d_{0a_1x1,0b_1x3,0c_3x1} Conv2d_1x1+"
_STEM = "Conv2d_{1a_3x3,2a_3x3,2b_3x3,3b_1x1,4a_3x3}"
_MIXED_6A = "Mixed_6a/{Branch_0/Conv2d_1a_3x3,Branch_1/Conv2d_0a_1x1,Branch_1/Conv2d_0b_3x3,Branch_1/Conv2d_1a_3x3}"
_MIXED_7A = (
    "Mixed_7a/Branch_0/Conv2d_{0a_1x1,1a_3x3} Mixed_7a/Branch_1/Conv2d_{0a_1x1,1a_3x3} "
    "Mixed_7a/Branch_2/Conv2d_{0a_1x1,0b_3x3,1a_3x3}"
)


def _each(prefixes: str, block: str) -> str:
    """`block` once under every prefix."""
    return " ".join(f"{prefix}/{scope}" for prefix in _expand(prefixes) for scope in block.split())


def _expand(text: str) -> list[str]:
    result: list[str] = []
    for word in text.split():
        match = re.search(r"\{([^}]*)\}", word)
        if match is None:
            result.append(word)
            continue
        for choice in match[1].split(","):
            result += _expand(word[: match.start()] + choice + word[match.end() :])
    return result


def _numbers(count: int) -> str:
    return "{" + ",".join(str(i + 1) for i in range(count)) + "}"


def _residual(counts: tuple[int, int, int]) -> str:
    n35, n17, n8 = map(_numbers, counts)
    return " ".join(
        (
            _each(f"Repeat/block35_{n35}", _BLOCK35),
            _MIXED_6A,
            _each(f"Repeat_1/block17_{n17}", _BLOCK17),
            _MIXED_7A,
            _each(f"Repeat_2/block8_{n8}", _BLOCK8),
            _each("Block8", _BLOCK8),
        )
    )


_V4_17 = (
    "Branch_0/Conv2d_0a_1x1 Branch_1/Conv2d_{0a_1x1,0b_1x7,0c_7x1} "
    "Branch_2/Conv2d_{0a_1x1,0b_7x1,0c_1x7,0d_7x1,0e_1x7} Branch_3/Conv2d_0b_1x1"
)
_V4_8 = (
    "Branch_0/Conv2d_0a_1x1 Branch_1/Conv2d_{0a_1x1,0b_1x3,0c_3x1} "
    "Branch_2/Conv2d_{0a_1x1,0b_3x1,0c_1x3,0d_1x3,0e_3x1} Branch_3/Conv2d_0b_1x1"
)
_V4_35 = (
    "Branch_0/Conv2d_0a_1x1 Branch_1/Conv2d_{0a_1x1,0b_3x3} Branch_2/Conv2d_{0a_1x1,0b_3x3,0c_3x3} "
    "Branch_3/Conv2d_0b_1x1"
)

SLIM_SCOPES: dict[str, tuple[str, str]] = {
    "inception_v4": (
        "InceptionV4",
        " ".join(
            (
                "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Mixed_3a/Branch_1/Conv2d_0a_3x3",
                "Mixed_4a/Branch_0/Conv2d_{0a_1x1,1a_3x3} Mixed_4a/Branch_1/Conv2d_{0a_1x1,0b_1x7,0c_7x1,1a_3x3}",
                "Mixed_5a/Branch_0/Conv2d_1a_3x3",
                _each("Mixed_5{b,c,d,e}", _V4_35),
                _MIXED_6A,
                _each("Mixed_6{b,c,d,e,f,g,h}", _V4_17),
                "Mixed_7a/Branch_0/Conv2d_{0a_1x1,1a_3x3} Mixed_7a/Branch_1/Conv2d_{0a_1x1,0b_1x7,0c_7x1,1a_3x3}",
                _each("Mixed_7{b,c,d}", _V4_8),
                "AuxLogits/Conv2d_1b_1x1 AuxLogits/Conv2d_2a AuxLogits/Aux_logits= Logits/Logits=",
            )
        ),
    ),
    "inception_resnet_v1": (
        "InceptionResnetV1",
        f"{_STEM} Conv2d_4b_3x3 {_residual((5, 10, 5))} Bottleneck& /Logits=",
    ),
    "inception_resnet_v2": (
        "InceptionResnetV2",
        f"{_STEM} Mixed_5b/Branch_0/Conv2d_1x1 Mixed_5b/Branch_1/Conv2d_{{0a_1x1,0b_5x5}} "
        f"Mixed_5b/Branch_2/Conv2d_{{0a_1x1,0b_3x3,0c_3x3}} Mixed_5b/Branch_3/Conv2d_0b_1x1 {_residual((10, 20, 9))} "
        "Conv2d_7b_1x1 AuxLogits/Conv2d_1b_1x1 AuxLogits/Conv2d_2a_5x5 AuxLogits/Logits= Logits/Logits=",
    ),
}


def slim_variables(name: str, net: nn.Module) -> dict[str, np.ndarray]:
    """What slim would have written for our `net`: its layers, heads last, paired with the scopes by order alone.

    A slim net has no BN scales, so those of `net` are set to one.
    """
    root, text = SLIM_SCOPES[name]
    layers = [(path, m) for path, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    layers.sort(key=lambda row: 2 * (row[0] in (net.classifier, "logits")) + row[0].startswith("AuxLogits"))
    norms = {path: m for path, m in net.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)}
    scopes = _expand(text)
    assert len(scopes) == len(layers)
    result: dict[str, np.ndarray] = {"global_step": np.array(17, np.int64)}
    for marked, (path, layer) in zip(scopes, layers, strict=True):
        scope = marked.rstrip("+=&")
        scope = scope[1:] if scope.startswith("/") else f"{root}/{scope}"
        weight = layer.weight.detach()
        order = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
        result[f"{scope}/weights"] = weight.permute(order).contiguous().numpy()
        if marked.endswith(("+", "=")):
            result[f"{scope}/biases"] = layer.bias.detach().numpy()
            continue
        bn = norms["last_bn" if marked.endswith("&") else path.removesuffix(".conv") + ".bn"]
        nn.init.ones_(bn.weight)
        parts = {"beta": bn.bias.detach(), "moving_mean": bn.running_mean, "moving_variance": bn.running_var}
        result |= {f"{scope}/BatchNorm/{part}": value.numpy() for part, value in parts.items()}
    return result
