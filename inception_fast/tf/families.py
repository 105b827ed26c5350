"""The trunks of the six variants: image -> last map. Branches are written in slim's order of creation.

The layers of v3 and Inception-ResNet-v2 bear the names that Keras' applications give them, those of the others slim's
scopes; see `endpoints` for slim's names of the maps.
"""

from __future__ import annotations

from typing import Any

from .blocks import Net


def inception_v1(net: Net, x: Any, stem: str) -> Any:
    """[n, 224, 224, 3] -> [n, 7, 7, 1024]."""
    x = net.halving_pool(net.halve(x, 64, 7), "MaxPool_2a_3x3")  # [n, 56, 56, 64]
    x = net.conv(net.conv(x, 64, 1), 192, 3)
    x = net.halving_pool(x, "MaxPool_3a_3x3")  # [n, 28, 28, 192]
    x = v1_block(net, x, "3b", 64, (96, 128), (16, 32), 32)
    x = v1_block(net, x, "3c", 128, (128, 192), (32, 96), 64)
    x = net.halving_pool(x, "MaxPool_4a_3x3")  # [n, 14, 14, 480]
    x = v1_block(net, x, "4b", 192, (96, 208), (16, 48), 64)
    x = v1_block(net, x, "4c", 160, (112, 224), (24, 64), 64)
    x = v1_block(net, x, "4d", 128, (128, 256), (24, 64), 64)
    x = v1_block(net, x, "4e", 112, (144, 288), (32, 64), 64)
    x = v1_block(net, x, "4f", 256, (160, 320), (32, 128), 128)
    x = net.halving_pool(x, "MaxPool_5a_2x2", 2)  # [n, 7, 7, 832]
    x = v1_block(net, x, "5b", 256, (160, 320), (32, 128), 128)
    return v1_block(net, x, "5c", 384, (192, 384), (48, 128), 128)


def v1_block(net: Net, x: Any, name: str, c1: int, c3: tuple[int, int], c5: tuple[int, int], project: int) -> Any:
    branches = [
        net.conv(x, c1, 1),
        net.line(x, (c3[0], 1), (c3[1], 3)),
        net.line(x, (c5[0], 1), (c5[1], 3)),
        net.conv(net.branch_max(x), project, 1),
    ]
    return net.join(branches, f"Mixed_{name}")


def inception_v2(net: Net, x: Any, stem: str) -> Any:
    """[n, 224, 224, 3] -> [n, 7, 7, 1024]."""
    x = net.separable(x, 64, 7, 8) if stem == "separable" else net.halve(x, 64, 7)
    x = net.halving_pool(x, "MaxPool_2a_3x3")  # [n, 56, 56, 64]
    x = net.conv(net.conv(x, 64, 1), 192, 3)
    x = net.halving_pool(x, "MaxPool_3a_3x3")  # [n, 28, 28, 192]
    x = v2_block(net, x, "3b", 64, (64, 64), (64, 96), 32)
    x = v2_block(net, x, "3c", 64, (64, 96), (64, 96), 64)
    x = v2_reduction(net, x, "4a", (128, 160), (64, 96))  # [n, 14, 14, 576]
    x = v2_block(net, x, "4b", 224, (64, 96), (96, 128), 128)
    x = v2_block(net, x, "4c", 192, (96, 128), (96, 128), 128)
    x = v2_block(net, x, "4d", 160, (128, 160), (128, 160), 96)
    x = v2_block(net, x, "4e", 96, (128, 192), (160, 192), 96)
    x = v2_reduction(net, x, "5a", (128, 192), (192, 256))  # [n, 7, 7, 1024]
    x = v2_block(net, x, "5b", 352, (192, 320), (160, 224), 128)
    return v2_block(net, x, "5c", 352, (192, 320), (192, 224), 128, last=True)


def v2_block(
    net: Net,
    x: Any,
    name: str,
    c1: int,
    c3: tuple[int, int],
    double: tuple[int, int],
    project: int,
    last: bool = False,
) -> Any:
    reduced, out = double
    branches = [
        net.conv(x, c1, 1),
        net.line(x, (c3[0], 1), (c3[1], 3)),
        net.line(x, (reduced, 1), (out, 3), (out, 3)),
        net.conv(net.branch_max(x) if last else net.average(x), project, 1),
    ]
    return net.join(branches, f"Mixed_{name}")


def v2_reduction(net: Net, x: Any, name: str, c3: tuple[int, int], double: tuple[int, int]) -> Any:
    reduced, out = double
    branches = [
        net.halve(net.conv(x, c3[0], 1), c3[1], 3),
        net.halve(net.line(x, (reduced, 1), (out, 3)), out, 3),
        net.same_pool(x),
    ]
    return net.join(branches, f"Mixed_{name}")


def v3_stem(net: Net, x: Any) -> Any:
    """[n, 299, 299, 3] -> [n, 71, 71, 192], of v3 and, to there, of the Inception-ResNets."""
    x = net.conv(net.valid(net.valid(x, 32, 3, 2), 32, 3), 64, 3)  # [n, 147, 147, 64]
    x = net.max_pool(x, "MaxPool_3a_3x3")  # [n, 73, 73, 64]
    return net.valid(net.valid(x, 80, 1), 192, 3)


def inception_v3(net: Net, x: Any, stem: str) -> Any:
    """[n, 299, 299, 3] -> [n, 8, 8, 2048]."""
    x = net.max_pool(v3_stem(net, x), "MaxPool_5a_3x3")  # [n, 35, 35, 192]
    for index, project in enumerate((32, 64, 64)):
        branches = [net.conv(x, 64, 1), net.line(x, (48, 1), (64, 5)), net.line(x, (64, 1), (96, 3), (96, 3))]
        x = net.join([*branches, net.conv(net.average(x), project, 1)], f"mixed{index}")
    branches = [net.valid(x, 384, 3, 2), net.valid(net.line(x, (64, 1), (96, 3)), 96, 3, 2)]
    x = net.join([*branches, net.max_pool(x)], "mixed3")  # [n, 17, 17, 768]
    for index, c in enumerate((128, 160, 160, 192), 4):
        branches = [
            net.conv(x, 192, 1),
            net.line(x, (c, 1), (c, (1, 7)), (192, (7, 1))),
            net.line(x, (c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))),
        ]
        x = net.join([*branches, net.conv(net.average(x), 192, 1)], f"mixed{index}")
    branches = [
        net.valid(net.conv(x, 192, 1), 320, 3, 2),
        net.valid(net.line(x, (192, 1), (192, (1, 7)), (192, (7, 1))), 192, 3, 2),
    ]
    x = net.join([*branches, net.max_pool(x)], "mixed8")  # [n, 8, 8, 1280]
    for index in (9, 10):
        one = net.conv(x, 320, 1)
        three = split(net, net.conv(x, 384, 1), 384, f"mixed9_{index - 9}")
        double = split(net, net.line(x, (448, 1), (384, 3)), 384)
        x = net.join([one, three, double, net.conv(net.average(x), 192, 1)], f"mixed{index}")
    return x


def split(net: Net, x: Any, filters: int, name: str | None = None) -> Any:
    """1x3 beside 3x1."""
    return net.join([net.conv(x, filters, (1, 3)), net.conv(x, filters, (3, 1))], name)


def inception_v4(net: Net, x: Any, stem: str) -> Any:
    """[n, 299, 299, 3] -> [n, 8, 8, 1536]."""
    x = net.conv(net.valid(net.valid(x, 32, 3, 2), 32, 3), 64, 3)  # [n, 147, 147, 64]
    x = net.join([net.max_pool(x), net.valid(x, 96, 3, 2)], "Mixed_3a")  # [n, 73, 73, 160]
    branches = [
        net.valid(net.conv(x, 64, 1), 96, 3),
        net.valid(net.line(x, (64, 1), (64, (1, 7)), (64, (7, 1))), 96, 3),
    ]
    x = net.join(branches, "Mixed_4a")  # [n, 71, 71, 192]
    x = net.join([net.valid(x, 192, 3, 2), net.max_pool(x)], "Mixed_5a")  # [n, 35, 35, 384]
    for letter in "bcde":
        branches = [net.conv(x, 96, 1), net.line(x, (64, 1), (96, 3)), net.line(x, (64, 1), (96, 3), (96, 3))]
        x = net.join([*branches, net.conv(net.average(x), 96, 1)], f"Mixed_5{letter}")
    x = reduction_a(net, x, "Mixed_6a", 192, 224, 256, 384)  # [n, 17, 17, 1024]
    for letter in "bcdefgh":
        branches = [
            net.conv(x, 384, 1),
            net.line(x, (192, 1), (224, (1, 7)), (256, (7, 1))),
            net.line(x, (192, 1), (192, (7, 1)), (224, (1, 7)), (224, (7, 1)), (256, (1, 7))),
        ]
        x = net.join([*branches, net.conv(net.average(x), 128, 1)], f"Mixed_6{letter}")
    branches = [
        net.valid(net.conv(x, 192, 1), 192, 3, 2),
        net.valid(net.line(x, (256, 1), (256, (1, 7)), (320, (7, 1))), 320, 3, 2),
    ]
    x = net.join([*branches, net.max_pool(x)], "Mixed_7a")  # [n, 8, 8, 1536]
    for letter in "bcd":
        one = net.conv(x, 256, 1)
        two = split(net, net.conv(x, 384, 1), 256)
        three = split(net, net.line(x, (384, 1), (448, (3, 1)), (512, (1, 3))), 256)
        x = net.join([one, two, three, net.conv(net.average(x), 256, 1)], f"Mixed_7{letter}")
    return x


def reduction_a(net: Net, x: Any, name: str, k: int, l: int, m: int, n: int) -> Any:  # noqa: E741
    """35x35 to 17x17, with the paper's widths k, l, m and n."""
    branches = [net.valid(x, n, 3, 2), net.valid(net.line(x, (k, 1), (l, 3)), m, 3, 2)]
    return net.join([*branches, net.max_pool(x)], name)


def reduction_7a(net: Net, x: Any, name: str, second: int, third: tuple[int, int]) -> Any:
    """17x17 to 8x8 of the Inception-ResNets."""
    branches = [
        net.valid(net.conv(x, 256, 1), 384, 3, 2),
        net.valid(net.conv(x, 256, 1), second, 3, 2),
        net.valid(net.line(x, (256, 1), (third[0], 3)), third[1], 3, 2),
    ]
    return net.join([*branches, net.max_pool(x)], name)


def block35(net: Net, x: Any, name: str, widths: tuple[int, int, int]) -> Any:
    a, b, c = widths
    branches = [net.conv(x, 32, 1), net.line(x, (32, 1), (32, 3)), net.line(x, (a, 1), (b, 3), (c, 3))]
    return net.residual(x, branches, name, 0.17)


def block17(net: Net, x: Any, name: str, width: int, widths: tuple[int, int, int]) -> Any:
    a, b, c = widths
    branches = [net.conv(x, width, 1), net.line(x, (a, 1), (b, (1, 7)), (c, (7, 1)))]
    return net.residual(x, branches, name, 0.10)


def block8(net: Net, x: Any, name: str, widths: tuple[int, int, int], scale: float = 0.20, relu: bool = True) -> Any:
    a, b, c = widths
    branches = [net.conv(x, 192, 1), net.line(x, (a, 1), (b, (1, 3)), (c, (3, 1)))]
    return net.residual(x, branches, name, scale, relu)


def inception_resnet_v1(net: Net, x: Any, stem: str) -> Any:
    """facenet's net, [n, 160, 160, 3] -> [n, 3, 3, 1792]."""
    x = net.valid(v3_stem(net, x), 256, 3, 2)  # [n, 17, 17, 256]
    for index in range(1, 6):
        x = block35(net, x, f"Repeat_block35_{index}", (32, 32, 32))
    x = reduction_a(net, x, "Mixed_6a", 192, 192, 256, 384)  # [n, 8, 8, 896]
    for index in range(1, 11):
        x = block17(net, x, f"Repeat_1_block17_{index}", 128, (128, 128, 128))
    x = reduction_7a(net, x, "Mixed_7a", 256, (256, 256))  # [n, 3, 3, 1792]
    for index in range(1, 6):
        x = block8(net, x, f"Repeat_2_block8_{index}", (192, 192, 192))
    return block8(net, x, "Block8", (192, 192, 192), scale=1.0, relu=False)


def inception_resnet_v2(net: Net, x: Any, stem: str) -> Any:
    """[n, 299, 299, 3] -> [n, 8, 8, 1536]."""
    x = net.max_pool(v3_stem(net, x), "MaxPool_5a_3x3")  # [n, 35, 35, 192]
    branches = [net.conv(x, 96, 1), net.line(x, (48, 1), (64, 5)), net.line(x, (64, 1), (96, 3), (96, 3))]
    x = net.join([*branches, net.conv(net.average(x), 64, 1)], "mixed_5b")  # [n, 35, 35, 320]
    for index in range(1, 11):
        x = block35(net, x, f"block35_{index}", (32, 48, 64))
    x = reduction_a(net, x, "mixed_6a", 256, 256, 384, 384)  # [n, 17, 17, 1088]
    for index in range(1, 21):
        x = block17(net, x, f"block17_{index}", 192, (128, 160, 192))
    x = reduction_7a(net, x, "mixed_7a", 288, (288, 320))  # [n, 8, 8, 2080]
    for index in range(1, 10):
        x = block8(net, x, f"block8_{index}", (192, 224, 256))
    x = block8(net, x, "block8_10", (192, 224, 256), scale=1.0, relu=False)
    return net.conv(x, 1536, 1)


TRUNKS = {
    trunk.__name__: trunk
    for trunk in (inception_v1, inception_v2, inception_v3, inception_v4, inception_resnet_v1, inception_resnet_v2)
}
AUX_ENDPOINTS = {"inception_v3": "mixed7", "inception_v4": "Mixed_6h", "inception_resnet_v2": "block17_20_ac"}
"""The layer that the auxiliary head reads."""

_MIXED = "5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c".split()
_STEM = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3".split()
_ACTIVATIONS = {name: f"activation_{i}" if i else "activation" for i, name in enumerate(_STEM)}
ENDPOINTS = {
    "inception_v3": _ACTIVATIONS | {f"Mixed_{name}": f"mixed{index}" for index, name in enumerate(_MIXED)},
    "inception_resnet_v1": {
        "Mixed_5a": "Repeat_block35_5_ac",
        "Mixed_6b": "Repeat_1_block17_10_ac",
        "Mixed_8a": "Repeat_2_block8_5_ac",
        "Mixed_8b": "Block8",
    },
    "inception_resnet_v2": _ACTIVATIONS
    | {
        "Mixed_5b": "mixed_5b",
        "Repeat": "block35_10_ac",
        "Mixed_6a": "mixed_6a",
        "PreAuxLogits": "block17_20_ac",
        "Mixed_7a": "mixed_7a",
        "Repeat_2": "block8_9_ac",
        "Block8": "block8_10",
        "Conv2d_7b_1x1": "conv_7b_ac",
    },
}
"""Slim's endpoints whose layer is not called after them, nor after them with "_ac" behind."""
