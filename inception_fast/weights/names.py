"""TF-slim scopes and our state-dict names of every layer, generated from the kernels of each branch.

A branch is a line of kernels. Slim letters them in order ("1x1 3x3" is Conv2d_0a_1x1, Conv2d_0b_3x3; a pool takes a
letter too) and calls a final strided or VALID one Conv2d_1a, marked `*` here. `1x3|3x1` are two convolutions on the
same input. The order of the layers is the order in which slim and Keras create them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

ROOTS = {
    "inception_v1": "InceptionV1",
    "inception_v2": "InceptionV2",
    "inception_v3": "InceptionV3",
    "inception_v4": "InceptionV4",
    "inception_resnet_v1": "InceptionResnetV1",
    "inception_resnet_v2": "InceptionResnetV2",
}
AUX = {
    "inception_v1": ("aux1", "aux2"),
    "inception_v3": ("AuxLogits",),
    "inception_v4": ("AuxLogits",),
    "inception_resnet_v2": ("AuxLogits",),
}
CLASSIFIERS = {
    "inception_v1": ("fc", "aux1.fc2", "aux2.fc2"),
    "inception_v2": ("fc",),
    "inception_v3": ("fc", "AuxLogits.fc"),
    "inception_v4": ("last_linear", "AuxLogits.fc"),
    "inception_resnet_v1": ("logits",),
    "inception_resnet_v2": ("classif", "AuxLogits.fc"),
}
"""Layers as wide as the number of classes, the main one first."""


@dataclass(frozen=True)
class Layer:
    """One layer: `scope` under slim's root (a leading "/" marks a scope outside it), `path` in our state dict.

    kind "bn": convolution, `path`.conv, with batch norm, `path`.bn. "bias": convolution with bias. "linear": fully
    connected, with bias. "linear_bn": fully connected without bias, `path`, its batch norm at `bn`. "separable":
    `path`.depthwise and `path`.pointwise.
    """

    scope: str
    path: str
    kind: str = "bn"
    bn: str = ""

    @property
    def aux(self) -> bool:
        return self.scope.startswith("AuxLogits/")


Block = Mapping[str, str]
"""Module name of each branch -> its kernels. After "." or "_" at the end follows the number of the convolution."""

_A: Block = {"branch0": "1x1", "branch1.": "1x1 3x3", "branch2.": "1x1 3x3 3x3", "branch3.": "pool 1x1"}
_REDUCE: Block = {"branch0.": "1x1 3x3*", "branch1.": "1x1 3x3 3x3*"}

_V1: Block = {"branch1": "1x1", "branch2.": "1x1 3x3", "branch3.": "1x1 3x3", "branch4.": "pool 1x1"}

_V3_A: Block = {"branch1x1": "1x1", "branch5x5_": "1x1 5x5", "branch3x3dbl_": "1x1 3x3 3x3", "branch_pool": "pool 1x1"}
_V3_6A: Block = {"branch3x3": "3x3*", "branch3x3dbl_": "1x1 3x3 3x3*"}
_V3_C: Block = {
    "branch1x1": "1x1",
    "branch7x7_": "1x1 1x7 7x1",
    "branch7x7dbl_": "1x1 7x1 1x7 7x1 1x7",
    "branch_pool": "pool 1x1",
}
_V3_7A: Block = {"branch3x3_": "1x1 3x3*", "branch7x7x3_": "1x1 1x7 7x1 3x3*"}
_V3_E: Block = {
    "branch1x1": "1x1",
    "branch3x3_": "1x1 1x3|3x1",
    "branch3x3dbl_": "1x1 3x3 1x3|3x1",
    "branch_pool": "pool 1x1",
}

_V4_4A: Block = {"branch0.": "1x1 3x3*", "branch1.": "1x1 1x7 7x1 3x3*"}
_V4_6A: Block = {"branch0": "3x3*", "branch1.": "1x1 3x3 3x3*"}
_V4_B: Block = {"branch0": "1x1", "branch1.": "1x1 1x7 7x1", "branch2.": "1x1 7x1 1x7 7x1 1x7", "branch3.": "pool 1x1"}
_V4_C: Block = {"branch0": "1x1", "branch1_": "1x1 1x3|3x1", "branch2_": "1x1 3x1 1x3 1x3|3x1", "branch3.": "pool 1x1"}

_IR_5B: Block = {"branch0": "only 1x1", "branch1.": "1x1 5x5", "branch2.": "1x1 3x3 3x3", "branch3.": "pool 1x1"}
_IR_35: Block = {"branch0": "only 1x1", "branch1.": "1x1 3x3", "branch2.": "1x1 3x3 3x3"}
_IR_17: Block = {"branch0": "only 1x1", "branch1.": "1x1 1x7 7x1"}
_IR_8: Block = {"branch0": "only 1x1", "branch1.": "1x1 1x3 3x1"}
_IR_7A: Block = {"branch0.": "1x1 3x3*", "branch1.": "1x1 3x3*", "branch2.": "1x1 3x3 3x3*"}

# Slips in slim's own scopes; released checkpoints carry them.
_V1_SLIPS = {"Mixed_5b/Branch_2/Conv2d_0b_3x3": "Mixed_5b/Branch_2/Conv2d_0a_3x3"}
_V3_SLIPS = {
    "Mixed_5c/Branch_1/Conv2d_0a_1x1": "Mixed_5c/Branch_1/Conv2d_0b_1x1",
    "Mixed_5c/Branch_1/Conv2d_0b_5x5": "Mixed_5c/Branch_1/Conv_1_0c_5x5",
    "Mixed_6a/Branch_0/Conv2d_1a_3x3": "Mixed_6a/Branch_0/Conv2d_1a_1x1",
    "Mixed_6a/Branch_1/Conv2d_1a_3x3": "Mixed_6a/Branch_1/Conv2d_1a_1x1",
    "Mixed_7b/Branch_1/Conv2d_0c_3x1": "Mixed_7b/Branch_1/Conv2d_0b_3x1",
}


def _branch(scope: str, path: str, kernels: str, first: int) -> Iterator[Layer]:
    """The layers of one branch; `first` is the number of the first convolution in a numbered name."""
    tokens = kernels.split()
    if tokens[0] == "only":
        yield Layer(f"{scope}/Conv2d_{tokens[1]}", path)
        return
    letter = ord("a")
    for number, token in enumerate(tokens, first):
        if token == "pool":
            letter += 1
            continue
        pair = token.split("|")
        for side, kernel in zip("ab", pair, strict=False):
            stem = "Conv2d_1a" if kernel.endswith("*") else f"Conv2d_0{chr(letter)}"
            suffix = f"{number}{side if len(pair) == 2 else ''}" if path[-1] in "._" else ""
            yield Layer(f"{scope}/{stem}_{kernel.rstrip('*')}", path + suffix)
            letter += 1


def _block(scope: str, path: str, block: Block, first: int = 0, start: int = 0) -> Iterator[Layer]:
    """The layers of a block; slim's first branch with a convolution is Branch_`start`."""
    for index, (name, kernels) in enumerate(block.items(), start):
        yield from _branch(f"{scope}/Branch_{index}", f"{path}.{name}", kernels, first)


def _residual(scope: str, path: str, block: Block) -> Iterator[Layer]:
    yield from _block(scope, path, block)
    yield Layer(f"{scope}/Conv2d_1x1", f"{path}.conv2d", "bias")


def _aux(conv1: str, fc: str) -> Iterator[Layer]:
    yield Layer("AuxLogits/Conv2d_1b_1x1", "AuxLogits.conv0")
    yield Layer(f"AuxLogits/{conv1}", "AuxLogits.conv1")
    yield Layer(f"AuxLogits/{fc}", "AuxLogits.fc", "linear")


def _inception_v1() -> Iterator[Layer]:
    for index, scope in enumerate(("Conv2d_1a_7x7", "Conv2d_2b_1x1", "Conv2d_2c_3x3"), 1):
        yield Layer(scope, f"conv{index}")
    for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"):
        yield from _block(f"Mixed_{name}", f"inception{name[0]}{chr(ord(name[1]) - 1)}", _V1)
    yield Layer("Logits/Conv2d_0c_1x1", "fc", "linear")


def _inception_v2(stem: str) -> Iterator[Layer]:
    yield Layer("Conv2d_1a_7x7", "Conv2d_1a_7x7", "separable" if stem == "separable" else "bn")
    for name in ("Conv2d_2b_1x1", "Conv2d_2c_3x3"):
        yield Layer(name, name)
    for name in ("3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b", "5c"):
        yield from _block(f"Mixed_{name}", f"Mixed_{name}", _REDUCE if name in ("4a", "5a") else _A)
    yield Layer("Logits/Conv2d_1c_1x1", "fc", "linear")


def _inception_v3() -> Iterator[Layer]:
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        yield Layer(name, name)
    blocks = {"5b": _V3_A, "5c": _V3_A, "5d": _V3_A, "6a": _V3_6A, "6b": _V3_C, "6c": _V3_C, "6d": _V3_C, "6e": _V3_C}
    for name, block in (blocks | {"7a": _V3_7A, "7b": _V3_E, "7c": _V3_E}).items():
        yield from _block(f"Mixed_{name}", f"Mixed_{name}", block, first=1)
    yield from _aux("Conv2d_2a_5x5", "Conv2d_2b_1x1")
    yield Layer("Logits/Conv2d_1c_1x1", "fc", "linear")


def _inception_v4() -> Iterator[Layer]:
    for index, scope in enumerate(("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")):
        yield Layer(scope, f"features.{index}")
    yield from _block("Mixed_3a", "features.3", {"conv": "3x3"}, start=1)
    yield from _block("Mixed_4a", "features.4", _V4_4A)
    yield from _block("Mixed_5a", "features.5", {"conv": "3x3*"})
    blocks = {f"5{letter}": _A for letter in "bcde"} | {"6a": _V4_6A} | {f"6{letter}": _V4_B for letter in "bcdefgh"}
    for index, (name, block) in enumerate((blocks | {"7a": _V4_4A} | {f"7{c}": _V4_C for c in "bcd"}).items(), 6):
        yield from _block(f"Mixed_{name}", f"features.{index}", block)
    yield from _aux("Conv2d_2a", "Aux_logits")
    yield Layer("Logits/Logits", "last_linear", "linear")


def _resnet_trunk(repeats: tuple[str, str, str], counts: tuple[int, int, int]) -> Iterator[Layer]:
    blocks = (("Repeat", 35, _IR_35), ("Repeat_1", 17, _IR_17), ("Repeat_2", 8, _IR_8))
    for (scope, size, block), path, count in zip(blocks, repeats, counts, strict=True):
        for index in range(count):
            yield from _residual(f"{scope}/block{size}_{index + 1}", f"{path}.{index}", block)
        if size == 35:
            yield from _block("Mixed_6a", "mixed_6a", _V4_6A)
        elif size == 17:
            yield from _block("Mixed_7a", "mixed_7a", _IR_7A)
    yield from _residual("Block8", "block8", _IR_8)


def _resnet_stem() -> Iterator[Layer]:
    for name in ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"):
        yield Layer(f"Conv2d_{name}", f"conv2d_{name[:2]}")


def _inception_resnet_v1() -> Iterator[Layer]:
    yield from _resnet_stem()
    yield Layer("Conv2d_4b_3x3", "conv2d_4b")
    yield from _resnet_trunk(("repeat_1", "repeat_2", "repeat_3"), (5, 10, 5))
    yield Layer("Bottleneck", "last_linear", "linear_bn", "last_bn")
    yield Layer("/Logits", "logits", "linear")


def _inception_resnet_v2() -> Iterator[Layer]:
    yield from _resnet_stem()
    yield from _block("Mixed_5b", "mixed_5b", _IR_5B)
    yield from _resnet_trunk(("repeat", "repeat_1", "repeat_2"), (10, 20, 9))
    yield Layer("Conv2d_7b_1x1", "conv2d_7b")
    yield from _aux("Conv2d_2a_5x5", "Logits")
    yield Layer("Logits/Logits", "classif", "linear")


@cache
def layers(model: str, stem: str = "separable") -> tuple[Layer, ...]:
    """All layers of the variant in slim's creation order, auxiliary before the logits. `stem` is for v2 alone."""
    if model == "inception_v1":
        return _mend(_inception_v1(), _V1_SLIPS)
    if model == "inception_v2":
        return tuple(_inception_v2(stem))
    if model == "inception_v3":
        return _mend(_inception_v3(), _V3_SLIPS)
    others = {
        "inception_v4": _inception_v4,
        "inception_resnet_v1": _inception_resnet_v1,
        "inception_resnet_v2": _inception_resnet_v2,
    }
    return tuple(others[model]())


def _mend(table: Iterator[Layer], slips: Mapping[str, str]) -> tuple[Layer, ...]:
    return tuple(Layer(slips.get(layer.scope, layer.scope), layer.path, layer.kind, layer.bn) for layer in table)


def normalised(layer: Layer) -> tuple[str, str]:
    """(path of the weight's module, path of its batch norm or "")."""
    if layer.kind == "bn":
        return f"{layer.path}.conv", f"{layer.path}.bn"
    return layer.path, layer.bn
