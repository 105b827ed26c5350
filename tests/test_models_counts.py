"""Parameters, multiply-adds and endpoint shapes of every variant against the published counts, on the meta device."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from inception_fast.models import create_model

VARIANTS = {
    "v1": "inception_v1",
    "v2": "inception_v2",
    "v3": "inception_v3",
    "v4": "inception_v4",
    "irv1": "inception_resnet_v1",
    "irv2": "inception_resnet_v2",
}


@functools.cache
def built(variant: str, options: tuple[tuple[str, object], ...]) -> nn.Module:
    with torch.device("meta"):
        return create_model(VARIANTS[variant], **dict(options))


def meta(variant: str, **options: object) -> nn.Module:
    """A net without memory, shared between the tests."""
    return built(variant, tuple(sorted(options.items()))).eval()


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def gammas(net: nn.Module) -> int:
    return sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))


def macs(net: nn.Module, size: int) -> int:
    """Multiply-adds of convolutions and linear layers for one image, taps on padding counted in."""
    total = 0

    def count(module: nn.Module, _inputs: object, out: torch.Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel()

    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    net(torch.empty(2, 3, size, size, device="meta"))  # batch norm refuses one value per channel in training
    for hook in hooks:
        hook.remove()
    return total // 2


# (variant, options): parameters with gamma, without (None where the net has no batch norm or the count is unpublished).
COUNTS = [
    ("v1", {}, 6_624_904, 6_617_624),
    ("v1", {"num_classes": 1001}, 6_625_929, 6_618_649),
    ("v1", {"aux_logits": True}, 13_004_888, None),
    ("v1", {"aux_logits": True, "num_classes": 1001}, 13_007_963, None),
    ("v1", {"classic": True}, 6_998_552, 6_998_552),
    ("v1", {"classic": True, "aux_logits": True}, 13_378_280, 13_378_280),
    ("v2", {}, 11_188_224, 11_178_336),
    ("v2", {"num_classes": 1001}, 11_189_249, 11_179_361),
    ("v2", {"stem": "plain"}, 11_194_984, 11_185_032),
    ("v3", {}, 23_834_568, 23_817_352),
    ("v3", {"num_classes": 1001}, 23_836_617, 23_819_401),
    ("v3", {"aux_logits": True}, 27_161_264, 23_817_352 + 3_325_800),
    ("v3", {"aux_logits": True, "num_classes": 1001}, 27_164_082, 23_819_401 + 3_326_569),
    ("v3", {"fid": True}, 23_850_960, None),
    ("v4", {}, 42_679_816, 42_648_232),
    ("v4", {"num_classes": 1001}, 42_681_353, 42_649_769),
    ("v4", {"aux_logits": True}, 46_039_280, 42_648_232 + 3_358_568),
    ("v4", {"aux_logits": True, "num_classes": 1001}, 46_041_586, 42_649_769 + 3_359_337),
    ("irv2", {}, 55_843_464, 55_813_192),
    ("irv2", {"num_classes": 1001}, 55_845_001, 55_814_729),
    ("irv2", {"aux_logits": True}, 59_211_120, 55_813_192 + 3_366_760),
    ("irv2", {"aux_logits": True, "num_classes": 1001}, 59_213_426, 55_814_729 + 3_367_529),
    ("irv1", {"num_classes": 0}, 23_482_624, 23_467_824),
    ("irv1", {"num_classes": 0, "embedding_size": 128}, 22_793_728, 22_779_312),
    ("irv1", {"num_classes": 8631}, 27_910_327, None),
]


@pytest.mark.parametrize(("variant", "options", "with_gamma", "without"), COUNTS, ids=lambda value: str(value))
def test_parameter_count(variant: str, options: dict[str, object], with_gamma: int, without: int | None) -> None:
    net = meta(variant, **options)
    assert parameters(net) == with_gamma
    if without is not None:
        assert with_gamma - gammas(net) == without


MACS = [
    ("v1", {}, 224, 1_498_376_192, 57),
    ("v1", {"convention": "tf"}, 224, 1_498_376_192, 57),
    ("v1", {"classic": True}, 224, 1_582_671_872, 57),
    ("v2", {}, 224, 1_934_857_216, 70),
    ("v2", {"stem": "plain"}, 224, 2_018_851_840, 69),
    ("v2", {"stem": "plain", "convention": "torch"}, 224, 2_018_851_840, 69),
    ("v3", {}, 299, 5_713_216_096, 94),
    ("v4", {}, 299, 12_253_974_624, 149),
    ("irv2", {}, 299, 13_155_794_016, 244),
    ("irv1", {"num_classes": 0}, 160, 1_417_662_304, 132),
    ("irv1", {"num_classes": 0}, 299, 6_307_723_360, 132),
]


@pytest.mark.parametrize(("variant", "options", "size", "expected", "convolutions"), MACS, ids=lambda value: str(value))
def test_multiply_adds(variant: str, options: dict[str, object], size: int, expected: int, convolutions: int) -> None:
    net = meta(variant, **options).eval()
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == convolutions
    assert macs(net, size) == expected


@pytest.mark.parametrize(
    ("variant", "size", "expected"),
    [("v1", 224, 8_372_224), ("v3", 299, 5_683_200), ("v4", 299, 6_502_400), ("irv2", 299, 6_707_200)],
)
def test_multiply_adds_of_auxiliary_heads(variant: str, size: int, expected: int) -> None:
    assert macs(meta(variant, aux_logits=True).train(), size) - macs(meta(variant), size) == expected


def shapes(text: str) -> dict[str, tuple[int, int, int]]:
    """Lines "endpoint[,endpoint] height channels" of square maps."""
    table = {}
    for line in text.strip().splitlines():
        names, side, channels = line.split()
        table |= {name: (int(channels), int(side), int(side)) for name in names.split(",")}
    return table


V1 = """
    Conv2d_1a_7x7 112 64
    MaxPool_2a_3x3,Conv2d_2b_1x1 56 64
    Conv2d_2c_3x3 56 192
    MaxPool_3a_3x3 28 192
    Mixed_3b 28 256
    Mixed_3c 28 480
    MaxPool_4a_3x3 14 480
    Mixed_4b,Mixed_4c,Mixed_4d 14 512
    Mixed_4e 14 528
    Mixed_4f 14 832
    MaxPool_5a_2x2,Mixed_5b 7 832
    Mixed_5c 7 1024
"""
V2 = """
    Conv2d_1a_7x7 112 64
    MaxPool_2a_3x3,Conv2d_2b_1x1 56 64
    Conv2d_2c_3x3 56 192
    MaxPool_3a_3x3 28 192
    Mixed_3b 28 256
    Mixed_3c 28 320
    Mixed_4a,Mixed_4b,Mixed_4c,Mixed_4d,Mixed_4e 14 576
    Mixed_5a,Mixed_5b,Mixed_5c 7 1024
"""
V3 = """
    Conv2d_1a_3x3 149 32
    Conv2d_2a_3x3 147 32
    Conv2d_2b_3x3 147 64
    MaxPool_3a_3x3 73 64
    Conv2d_3b_1x1 73 80
    Conv2d_4a_3x3 71 192
    MaxPool_5a_3x3 35 192
    Mixed_5b 35 256
    Mixed_5c,Mixed_5d 35 288
    Mixed_6a,Mixed_6b,Mixed_6c,Mixed_6d,Mixed_6e 17 768
    Mixed_7a 8 1280
    Mixed_7b,Mixed_7c 8 2048
"""
V4 = """
    Conv2d_1a_3x3 149 32
    Conv2d_2a_3x3 147 32
    Conv2d_2b_3x3 147 64
    Mixed_3a 73 160
    Mixed_4a 71 192
    Mixed_5a,Mixed_5b,Mixed_5c,Mixed_5d,Mixed_5e 35 384
    Mixed_6a,Mixed_6b,Mixed_6c,Mixed_6d,Mixed_6e,Mixed_6f,Mixed_6g,Mixed_6h 17 1024
    Mixed_7a,Mixed_7b,Mixed_7c,Mixed_7d 8 1536
"""
IRV2 = """
    Conv2d_1a_3x3 149 32
    Conv2d_2a_3x3 147 32
    Conv2d_2b_3x3 147 64
    MaxPool_3a_3x3 73 64
    Conv2d_3b_1x1 73 80
    Conv2d_4a_3x3 71 192
    MaxPool_5a_3x3 35 192
    Mixed_5b,Repeat 35 320
    Mixed_6a,PreAuxLogits 17 1088
    Mixed_7a,Repeat_2,Block8 8 2080
    Conv2d_7b_1x1 8 1536
"""
IRV1_160 = """
    Conv2d_1a_3x3 79 32
    Conv2d_2a_3x3 77 32
    Conv2d_2b_3x3 77 64
    MaxPool_3a_3x3 38 64
    Conv2d_3b_1x1 38 80
    Conv2d_4a_3x3 36 192
    Conv2d_4b_3x3,Mixed_5a 17 256
    Mixed_6a,Mixed_6b 8 896
    Mixed_7a,Mixed_8a,Mixed_8b 3 1792
"""
IRV1_299 = """
    Conv2d_1a_3x3 149 32
    Conv2d_2a_3x3 147 32
    Conv2d_2b_3x3 147 64
    MaxPool_3a_3x3 73 64
    Conv2d_3b_1x1 73 80
    Conv2d_4a_3x3 71 192
    Conv2d_4b_3x3,Mixed_5a 35 256
    Mixed_6a,Mixed_6b 17 896
    Mixed_7a,Mixed_8a,Mixed_8b 8 1792
"""
IRV2_PAPER = """
    Conv2d_1a_3x3 149 32
    Conv2d_2a_3x3 147 32
    Conv2d_2b_3x3 147 64
    Mixed_3a 73 160
    Mixed_4a 71 192
    Mixed_5a,Repeat 35 384
    Mixed_6a,PreAuxLogits 17 1152
    Mixed_7a,Repeat_2 8 2144
"""


@pytest.mark.parametrize(
    ("variant", "options", "size", "expected"),
    [
        ("v1", {}, 224, V1),
        ("v1", {"convention": "tf"}, 224, V1),
        ("v1", {"classic": True}, 224, V1),
        ("v2", {}, 224, V2),
        ("v2", {"convention": "torch", "stem": "plain"}, 224, V2),
        ("v3", {}, 299, V3),
        ("v3", {"fid": True}, 299, V3),
        ("v4", {}, 299, V4),
        ("irv2", {}, 299, IRV2),
        ("irv2", {"widths": "paper"}, 299, IRV2_PAPER),
        ("irv1", {}, 160, IRV1_160),
        ("irv1", {}, 299, IRV1_299),
    ],
    ids=lambda value: str(value) if not isinstance(value, str) or "\n" not in value else "",
)
def test_endpoint_shapes(variant: str, options: dict[str, object], size: int, expected: str) -> None:
    maps = meta(variant, **options).eval().forward_endpoints(torch.empty(2, 3, size, size, device="meta"))
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == shapes(expected)
    assert list(maps) == list(shapes(expected))
    assert {x.shape[0] for x in maps.values()} == {2}


@pytest.mark.parametrize(
    ("variant", "size", "side"), [("v1", 112, 4), ("v2", 112, 4), ("v3", 150, 3), ("v4", 150, 3), ("irv2", 150, 3)]
)
def test_last_map_of_half_size(variant: str, size: int, side: int) -> None:
    assert meta(variant).forward_features(torch.empty(1, 3, size, size, device="meta")).shape[2:] == (side, side)


# v4 and the residual nets have no layer that the convention changes.
@pytest.mark.parametrize(
    ("variant", "convention"),
    [
        ("v1", "tf"),
        ("v1", "torch"),
        ("v2", "tf"),
        ("v2", "torch"),
        ("v3", "tf"),
        ("v4", None),
        ("irv1", None),
        ("irv2", None),
    ],
)
@pytest.mark.parametrize("size", [(75, 76), (131, 98), (600, 331)], ids=str)
def test_other_sizes_give_logits(variant: str, convention: str | None, size: tuple[int, int]) -> None:
    options = {} if convention is None else {"convention": convention}
    assert meta(variant, **options)(torch.empty(2, 3, *size, device="meta")).shape == (2, 1000)
