"""Inception v4, arXiv:1602.07261. State-dict names and layers of timm's `inception_v4`, which equals TF-slim's.

All strided operations are VALID, and the torch ports leave padding out of averages as slim does: both conventions are
the same net.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._data_config import inception_config
from ._base import InceptionNet
from ._options import Options
from .blocks import AuxHead, Branches, ConvBlock, branch_avg_pool


def stem(conv: ConvBlock, in_chans: int) -> list[nn.Module]:
    """The stem that v4 and the paper's Inception-ResNet-v2 share: [n, in_chans, 299, 299] -> [n, 384, 35, 35]."""
    return [
        conv(in_chans, 32, 3, stride=2),  # [n, 32, 149, 149]
        conv(32, 32, 3),
        conv(32, 64, 3, padding=1),  # [n, 64, 147, 147]
        Branches(maxpool=nn.MaxPool2d(3, 2), conv=conv(64, 96, 3, stride=2)),  # [n, 160, 73, 73]
        Branches(
            branch0=nn.Sequential(conv(160, 64, 1), conv(64, 96, 3)),
            branch1=nn.Sequential(
                conv(160, 64, 1),
                conv(64, 64, (1, 7), padding=(0, 3)),
                conv(64, 64, (7, 1), padding=(3, 0)),
                conv(64, 96, 3),
            ),
        ),  # [n, 192, 71, 71]
        Branches(conv=conv(192, 192, 3, stride=2), maxpool=nn.MaxPool2d(3, 2)),
    ]


class InceptionA(Branches):
    """35x35: [n, 384, h, w] -> [n, 384, h, w]."""

    def __init__(self, conv: ConvBlock) -> None:
        super().__init__(
            branch0=conv(384, 96, 1),
            branch1=nn.Sequential(conv(384, 64, 1), conv(64, 96, 3, padding=1)),
            branch2=nn.Sequential(conv(384, 64, 1), conv(64, 96, 3, padding=1), conv(96, 96, 3, padding=1)),
            branch3=nn.Sequential(branch_avg_pool("tf"), conv(384, 96, 1)),
        )


class ReductionA(Branches):
    """35x35 to 17x17: [n, cin, h, w] -> [n, cin + n + m, h / 2, w / 2], with the paper's widths k, l, m and n."""

    def __init__(self, conv: ConvBlock, cin: int, k: int, l: int, m: int, n: int) -> None:  # noqa: E741
        super().__init__(
            branch0=conv(cin, n, 3, stride=2),
            branch1=nn.Sequential(conv(cin, k, 1), conv(k, l, 3, padding=1), conv(l, m, 3, stride=2)),
            branch2=nn.MaxPool2d(3, 2),
        )


class InceptionB(Branches):
    """17x17: [n, 1024, h, w] -> [n, 1024, h, w]."""

    def __init__(self, conv: ConvBlock) -> None:
        super().__init__(
            branch0=conv(1024, 384, 1),
            branch1=nn.Sequential(
                conv(1024, 192, 1), conv(192, 224, (1, 7), padding=(0, 3)), conv(224, 256, (7, 1), padding=(3, 0))
            ),
            branch2=nn.Sequential(
                conv(1024, 192, 1),
                conv(192, 192, (7, 1), padding=(3, 0)),
                conv(192, 224, (1, 7), padding=(0, 3)),
                conv(224, 224, (7, 1), padding=(3, 0)),
                conv(224, 256, (1, 7), padding=(0, 3)),
            ),
            branch3=nn.Sequential(branch_avg_pool("tf"), conv(1024, 128, 1)),
        )


class ReductionB(Branches):
    """17x17 to 8x8: [n, 1024, h, w] -> [n, 1536, h / 2, w / 2]."""

    def __init__(self, conv: ConvBlock) -> None:
        super().__init__(
            branch0=nn.Sequential(conv(1024, 192, 1), conv(192, 192, 3, stride=2)),
            branch1=nn.Sequential(
                conv(1024, 256, 1),
                conv(256, 256, (1, 7), padding=(0, 3)),
                conv(256, 320, (7, 1), padding=(3, 0)),
                conv(320, 320, 3, stride=2),
            ),
            branch2=nn.MaxPool2d(3, 2),
        )


class InceptionC(nn.Module):
    """8x8, 1x3 beside 3x1: [n, 1536, h, w] -> [n, 1536, h, w]."""

    def __init__(self, conv: ConvBlock) -> None:
        super().__init__()
        self.branch0 = conv(1536, 256, 1)
        self.branch1_0 = conv(1536, 384, 1)
        self.branch1_1a = conv(384, 256, (1, 3), padding=(0, 1))
        self.branch1_1b = conv(384, 256, (3, 1), padding=(1, 0))
        self.branch2_0 = conv(1536, 384, 1)
        self.branch2_1 = conv(384, 448, (3, 1), padding=(1, 0))
        self.branch2_2 = conv(448, 512, (1, 3), padding=(0, 1))
        self.branch2_3a = conv(512, 256, (1, 3), padding=(0, 1))
        self.branch2_3b = conv(512, 256, (3, 1), padding=(1, 0))
        self.branch3 = nn.Sequential(branch_avg_pool("tf"), conv(1536, 256, 1))

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1_0(x)
        one = torch.cat([self.branch1_1a(one), self.branch1_1b(one)], 1)
        two = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        two = torch.cat([self.branch2_3a(two), self.branch2_3b(two)], 1)
        return torch.cat([self.branch0(x), one, two, self.branch3(x)], 1)


class InceptionV4(InceptionNet):
    """Inception v4: [n, 3, 299, 299] -> [n, num_classes]."""

    variant = "inception_v4"
    options_class = Options
    smallest = 75
    first_layer = "features.0"
    classifier = "last_linear"
    aux_heads: ClassVar[dict[str, str]] = {"Mixed_6h": "AuxLogits"}

    def __init__(self, **options: Any) -> None:
        o = Options(**options)
        super().__init__(o)
        conv = o.conv()
        blocks = stem(conv, o.in_chans)
        blocks += [InceptionA(conv) for _ in range(4)]
        blocks += [ReductionA(conv, 384, 192, 224, 256, 384)]  # [n, 1024, 17, 17]
        blocks += [InceptionB(conv) for _ in range(7)]
        blocks += [ReductionB(conv)]  # [n, 1536, 8, 8]
        blocks += [InceptionC(conv) for _ in range(3)]
        self.features = nn.Sequential(*blocks)
        self.AuxLogits = AuxHead(1024, o.classes, conv) if o.aux_logits else None
        names = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3".split()
        names += [f"Mixed_{stage}" for stage in "3a 4a 5a 5b 5c 5d 5e 6a 6b 6c 6d 6e 6f 6g 6h 7a 7b 7c 7d".split()]
        ends = ((64, 2, 2), (160, 4, 3), (384, 8, 9), (1024, 16, 17), (1536, 32, 21))
        self.finish(
            tuple((name, f"features.{i}") for i, name in enumerate(names)),
            tuple((channels, reduction, f"features.{i}") for channels, reduction, i in ends),
            inception_config(299),
        )
