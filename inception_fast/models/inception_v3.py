"""Inception v3, arXiv:1512.00567, under torchvision's state-dict names; `fid=True` is the network behind FID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._data_config import inception_config
from ._base import InceptionNet
from ._options import Options, check, check_choice
from ._trunk import table
from .blocks import AuxHead, ConvBlock, branch_avg_pool, branch_max_pool


@dataclass(frozen=True, kw_only=True)
class InceptionV3Options(Options):
    """convention defaults to "torch" (averages count the padding: torchvision, timm); "tf" does not (TF-slim, Keras).

    fid: the graph of 2015-12-05 behind the FID score: 1008 classes by default, "tf", a max pool in the last block.
    transform_input: the input is normalised by ImageNet's statistics, the net turns it into x / 127.5 - 1.
    drop_rate defaults to 0.5.
    """

    fid: bool = False
    transform_input: bool = False

    def __post_init__(self) -> None:
        check_choice("fid", self.fid, (False, True))
        check_choice("transform_input", self.transform_input, (False, True))
        if self.fid:
            check(not self.aux_logits, "aux_logits=True with fid=True", "False, the FID graph has no auxiliary head")
            check(self.convention != "torch", "convention='torch' with fid=True", "'tf'")
            self.default("num_classes", 1008)
        self.default("convention", "tf" if self.fid else "torch")
        self.default("drop_rate", 0.5)
        super().__post_init__()


class InceptionA(nn.Module):
    """35x35: [n, cin, h, w] -> [n, 224 + pooled, h, w]."""

    def __init__(self, conv: ConvBlock, cin: int, pooled: int, pool: nn.Module) -> None:
        super().__init__()
        self.branch1x1 = conv(cin, 64, 1)
        self.branch5x5_1 = conv(cin, 48, 1)
        self.branch5x5_2 = conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = conv(cin, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, 3, padding=1)
        self.pool = pool
        self.branch_pool = conv(cin, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(self.pool(x))], 1)


class InceptionB(nn.Module):
    """35x35 to 17x17: [n, cin, h, w] -> [n, 480 + cin, h / 2, w / 2]."""

    def __init__(self, conv: ConvBlock, cin: int) -> None:
        super().__init__()
        self.branch3x3 = conv(cin, 384, 3, stride=2)
        self.branch3x3dbl_1 = conv(cin, 64, 1)
        self.branch3x3dbl_2 = conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, self.pool(x)], 1)


class InceptionC(nn.Module):
    """17x17, factorised 7x7 of width c7: [n, 768, h, w] -> [n, 768, h, w]."""

    def __init__(self, conv: ConvBlock, c7: int, pool: nn.Module) -> None:
        super().__init__()
        self.branch1x1 = conv(768, 192, 1)
        self.branch7x7_1 = conv(768, c7, 1)
        self.branch7x7_2 = conv(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7_3 = conv(c7, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = conv(768, c7, 1)
        self.branch7x7dbl_2 = conv(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = conv(c7, c7, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = conv(c7, c7, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = conv(c7, 192, (1, 7), padding=(0, 3))
        self.pool = pool
        self.branch_pool = conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(self.pool(x))], 1)


class InceptionD(nn.Module):
    """17x17 to 8x8: [n, 768, h, w] -> [n, 1280, h / 2, w / 2]."""

    def __init__(self, conv: ConvBlock) -> None:
        super().__init__()
        self.branch3x3_1 = conv(768, 192, 1)
        self.branch3x3_2 = conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = conv(768, 192, 1)
        self.branch7x7x3_2 = conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = conv(192, 192, 3, stride=2)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([three, seven, self.pool(x)], 1)


class InceptionE(nn.Module):
    """8x8, 3x3 split into 1x3 beside 3x1: [n, cin, h, w] -> [n, 2048, h, w]."""

    def __init__(self, conv: ConvBlock, cin: int, pool: nn.Module) -> None:
        super().__init__()
        self.branch1x1 = conv(cin, 320, 1)
        self.branch3x3_1 = conv(cin, 384, 1)
        self.branch3x3_2a = conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = conv(cin, 448, 1)
        self.branch3x3dbl_2 = conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = conv(384, 384, (3, 1), padding=(1, 0))
        self.pool = pool
        self.branch_pool = conv(cin, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        three = torch.cat([self.branch3x3_2a(three), self.branch3x3_2b(three)], 1)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        double = torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1)
        return torch.cat([self.branch1x1(x), three, double, self.branch_pool(self.pool(x))], 1)


STEPS = table("""
    Conv2d_1a_3x3
    Conv2d_2a_3x3
    Conv2d_2b_3x3
    MaxPool_3a_3x3 maxpool1
    Conv2d_3b_1x1
    Conv2d_4a_3x3
    MaxPool_5a_3x3 maxpool2
    Mixed_5b
    Mixed_5c
    Mixed_5d
    Mixed_6a
    Mixed_6b
    Mixed_6c
    Mixed_6d
    Mixed_6e
    Mixed_7a
    Mixed_7b
    Mixed_7c
""")


class InceptionV3(InceptionNet):
    """Inception v3: [n, 3, 299, 299] -> [n, num_classes]."""

    variant = "inception_v3"
    options_class = InceptionV3Options
    smallest = 75
    first_layer = "Conv2d_1a_3x3"
    aux_heads: ClassVar[dict[str, str]] = {"Mixed_6e": "AuxLogits"}

    def __init__(self, **options: Any) -> None:
        o = InceptionV3Options(**options)
        super().__init__(o, o.transform_input)
        conv = o.conv()

        def average() -> nn.Module:
            return branch_avg_pool(o.padding)

        self.Conv2d_1a_3x3 = conv(o.in_chans, 32, 3, stride=2)  # [n, 32, 149, 149]
        self.Conv2d_2a_3x3 = conv(32, 32, 3)
        self.Conv2d_2b_3x3 = conv(32, 64, 3, padding=1)  # [n, 64, 147, 147]
        self.maxpool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)  # [n, 80, 73, 73]
        self.Conv2d_4a_3x3 = conv(80, 192, 3)  # [n, 192, 71, 71]
        self.maxpool2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b = InceptionA(conv, 192, 32, average())  # [n, 256, 35, 35]
        self.Mixed_5c = InceptionA(conv, 256, 64, average())
        self.Mixed_5d = InceptionA(conv, 288, 64, average())  # [n, 288, 35, 35]
        self.Mixed_6a = InceptionB(conv, 288)
        self.Mixed_6b = InceptionC(conv, 128, average())  # [n, 768, 17, 17]
        self.Mixed_6c = InceptionC(conv, 160, average())
        self.Mixed_6d = InceptionC(conv, 160, average())
        self.Mixed_6e = InceptionC(conv, 192, average())
        self.AuxLogits = AuxHead(768, o.classes, conv) if o.aux_logits else None
        self.Mixed_7a = InceptionD(conv)
        self.Mixed_7b = InceptionE(conv, 1280, average())  # [n, 2048, 8, 8]
        self.Mixed_7c = InceptionE(conv, 2048, branch_max_pool() if o.fid else average())
        self.finish(
            STEPS,
            (
                (64, 2, "Conv2d_2b_3x3"),
                (192, 4, "Conv2d_4a_3x3"),
                (288, 8, "Mixed_5d"),
                (768, 16, "Mixed_6e"),
                (2048, 32, "Mixed_7c"),
            ),
            inception_config(299),
        )
