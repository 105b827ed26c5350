"""GoogLeNet, arXiv:1409.4842, under torchvision's state-dict names; `classic=True` is the network of 2014.

torchvision's net is a port of TF-slim's: batch norm in place of biases and LRN, a 3x3 in the "5x5" branch, a 2x2 last
pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .._data_config import inception_config
from ._base import GoogLeNetOutputs, InceptionNet
from ._options import Options, check, check_choice, check_rate
from ._trunk import table
from .blocks import BiasConv2d, Branches, ConvBlock, branch_max_pool, linear, strided_conv, strided_max_pool


@dataclass(frozen=True, kw_only=True)
class InceptionV1Options(Options):
    """convention defaults to "torch" (symmetric padding, torchvision); "tf" is TF-slim's.

    classic: the network as published and as BVLC trained it in Caffe: no batch norm, biases, local response
        normalisation, a true 5x5, a 3x3 last pool. Its names are those of the other network, without `.bn`.
    transform_input: the input is normalised by ImageNet's statistics, the net turns it into x / 127.5 - 1.
    aux_drop_rate: dropout in the auxiliary heads.
    drop_rate defaults to 0.2, classic 0.4.
    """

    classic: bool = False
    transform_input: bool = False
    aux_drop_rate: float = 0.7

    def __post_init__(self) -> None:
        check_choice("classic", self.classic, (False, True))
        check_choice("transform_input", self.transform_input, (False, True))
        self.default("convention", "torch")
        self.default("drop_rate", 0.4 if self.classic else 0.2)
        super().__post_init__()
        check_rate("aux_drop_rate", self.aux_drop_rate)
        check(
            not self.classic or self.conv_block is None,
            "conv_block with classic=True",
            "one of the two, classic has no batch norm",
        )

    def conv(self) -> ConvBlock:
        return BiasConv2d if self.classic else super().conv()


class Inception(Branches):
    """1x1, 3x3, 5x5 and pooled branches, concatenated; `c3` and `c5` are (reduced, out)."""

    def __init__(
        self, cin: int, c1: int, c3: tuple[int, int], c5: tuple[int, int], pool: int, *, conv: ConvBlock, kernel: int
    ) -> None:
        super().__init__(
            branch1=conv(cin, c1, 1),
            branch2=nn.Sequential(conv(cin, c3[0], 1), conv(*c3, 3, padding=1)),
            branch3=nn.Sequential(conv(cin, c5[0], 1), conv(*c5, kernel, padding=kernel // 2)),
            branch4=nn.Sequential(branch_max_pool(), conv(cin, pool, 1)),
        )


class GoogLeNetAux(nn.Module):
    """Auxiliary classifier: [n, cin, 14, 14] -> [n, num_classes]; other maps are pooled to 4x4 all the same."""

    def __init__(self, cin: int, num_classes: int, *, conv: ConvBlock, drop_rate: float, classic: bool) -> None:
        super().__init__()
        self.conv = conv(cin, 128, 1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = linear(1024, num_classes)
        self.drop_rate = drop_rate
        self.classic = classic

    def forward(self, x: Tensor) -> Tensor:
        # The published head averages 5x5 windows 3 apart, torchvision's an adaptive grid: on 14x14 they differ.
        if self.classic and x.shape[2:] == (14, 14):
            x = F.avg_pool2d(x, 5, 3)
        else:
            x = F.adaptive_avg_pool2d(x, 4)  # [n, cin, 4, 4]
        x = F.relu(self.fc1(self.conv(x).flatten(1)))
        return self.fc2(F.dropout(x, self.drop_rate, self.training))

    def reset_classifier(self, num_classes: int) -> None:
        like = self.fc1.weight
        self.fc2 = linear(1024, num_classes).to(like.device, like.dtype)


STEPS = table("""
    - pad1
    Conv2d_1a_7x7 conv1
    MaxPool_2a_3x3 maxpool1
    - norm1
    Conv2d_2b_1x1 conv2
    Conv2d_2c_3x3 conv3
    - norm2
    MaxPool_3a_3x3 maxpool2
    Mixed_3b inception3a
    Mixed_3c inception3b
    MaxPool_4a_3x3 maxpool3
    Mixed_4b inception4a
    Mixed_4c inception4b
    Mixed_4d inception4c
    Mixed_4e inception4d
    Mixed_4f inception4e
    MaxPool_5a_2x2 maxpool4
    Mixed_5b inception5a
    Mixed_5c inception5b
""")


class InceptionV1(InceptionNet):
    """GoogLeNet: [n, 3, 224, 224] -> [n, num_classes]."""

    variant = "inception_v1"
    options_class = InceptionV1Options
    smallest = 15
    first_layer = "conv1"
    aux_heads: ClassVar[dict[str, str]] = {"Mixed_4e": "aux2", "Mixed_4b": "aux1"}
    aux_outputs = GoogLeNetOutputs

    def __init__(self, **options: Any) -> None:
        o = InceptionV1Options(**options)
        super().__init__(o, o.transform_input)
        conv = o.conv()
        block = partial(Inception, conv=conv, kernel=5 if o.classic else 3)
        *pad, self.conv1 = strided_conv(conv, o.in_chans, 64, 7, o.padding)  # [n, 64, 112, 112]
        self.pad1 = pad[0] if pad else None
        self.maxpool1 = strided_max_pool(o.padding)  # [n, 64, 56, 56]
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3, padding=1)
        self.norm1, self.norm2 = (nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0) if o.classic else None for _ in range(2))
        self.maxpool2 = strided_max_pool(o.padding)  # [n, 192, 28, 28]
        self.inception3a = block(192, 64, (96, 128), (16, 32), 32)
        self.inception3b = block(256, 128, (128, 192), (32, 96), 64)
        self.maxpool3 = strided_max_pool(o.padding)  # [n, 480, 14, 14]
        self.inception4a = block(480, 192, (96, 208), (16, 48), 64)
        self.inception4b = block(512, 160, (112, 224), (24, 64), 64)
        self.inception4c = block(512, 128, (128, 256), (24, 64), 64)
        self.inception4d = block(512, 112, (144, 288), (32, 64), 64)
        self.inception4e = block(528, 256, (160, 320), (32, 128), 128)
        self.maxpool4 = strided_max_pool(o.padding, 3 if o.classic else 2)  # [n, 832, 7, 7]
        self.inception5a = block(832, 256, (160, 320), (32, 128), 128)
        self.inception5b = block(832, 384, (192, 384), (48, 128), 128)  # [n, 1024, 7, 7]
        aux = partial(GoogLeNetAux, num_classes=o.classes, conv=conv, drop_rate=o.aux_drop_rate, classic=o.classic)
        self.aux1 = aux(512) if o.aux_logits else None
        self.aux2 = aux(528) if o.aux_logits else None
        self.finish(
            STEPS,
            (
                (64, 2, "conv1"),
                (192, 4, "conv3"),
                (480, 8, "inception3b"),
                (832, 16, "inception4e"),
                (1024, 32, "inception5b"),
            ),
            inception_config(224),
        )
