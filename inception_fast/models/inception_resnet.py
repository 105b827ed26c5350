"""Inception-ResNet v1 and v2, arXiv:1602.07261, under the state-dict names of facenet-pytorch and timm.

The nets people have weights for are not those of the paper's figures. `widths="slim"` is what was implemented, v1 by
facenet and v2 by TF-slim; `widths="paper"` follows the figures:

- v2 has the stem of v4 (384 channels), 5, 10 and 5 blocks on 384, 1152 and 2144 channels, all with a ReLU, and no
  convolution after them. Figures 17 and 19 print 1154 and 2048 channels; the concatenations before them give
  384 + 384 + 384 = 1152 and 1152 + 384 + 288 + 320 = 2144, which is what can be added.
- v1 has neither facenet's sixth Block8, without ReLU, nor its bottleneck.

The paper gives residual scales as a range, 0.1 to 0.3; both widths use slim's 0.17, 0.10 and 0.20. All strided
operations are VALID and the torch ports leave padding out of averages: both conventions are the same net.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._data_config import facenet_config, inception_config
from ._base import InceptionNet
from ._options import Options, check, check_choice, check_count
from ._trunk import table
from .blocks import AuxHead, Branches, ConvBlock, branch_avg_pool
from .inception_v4 import ReductionA, stem


@dataclass(frozen=True, kw_only=True)
class InceptionResnetV1Options(Options):
    """widths: "slim" (facenet's net, with bottleneck) or "paper".

    embedding_size: width of the bottleneck, 512 by default, "slim" only. Without classes the net returns L2-normalised
        embeddings of this size.
    drop_rate defaults to 0.6 (facenet-pytorch), "paper" 0.2.
    """

    widths: str = "slim"
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("widths", self.widths, ("slim", "paper"))
        if self.widths == "slim":
            self.default("embedding_size", 512)
            self.default("drop_rate", 0.6)
            check_count("embedding_size", self.embedding_size, 1)
            check_choice("global_pool of the net with a bottleneck", self.global_pool, ("avg", "max"))
        else:
            check(
                self.embedding_size is None,
                f"embedding_size={self.embedding_size} with widths='paper'",
                "widths='slim' only",
            )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class InceptionResnetV2Options(Options):
    """widths: "slim" (TF-slim, Keras, timm) or "paper"."""

    widths: str = "slim"

    def __post_init__(self) -> None:
        check_choice("widths", self.widths, ("slim", "paper"))
        super().__post_init__()


class ResidualBlock(nn.Module):
    """relu(x + scale * conv1x1(concat(branches(x)))), the 1x1 biased and linear: [n, c, h, w] -> [n, c, h, w]."""

    def __init__(self, c: int, joined: int, scale: float, relu: bool, **branches: nn.Module) -> None:
        super().__init__()
        self.names = tuple(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)
        self.conv2d = nn.Conv2d(joined, c, 1)
        self.scale = scale
        self.relu = nn.ReLU(inplace=True) if relu else None

    def forward(self, x: Tensor) -> Tensor:
        up = self.conv2d(torch.cat([self.get_submodule(name)(x) for name in self.names], 1))
        x = x + self.scale * up
        return x if self.relu is None else self.relu(x)


class Block35(ResidualBlock):
    """35x35; `widths` of the double 3x3 branch."""

    def __init__(self, conv: ConvBlock, c: int, widths: tuple[int, int, int], scale: float = 0.17) -> None:
        a, b, d = widths
        super().__init__(
            c,
            64 + d,
            scale,
            True,
            branch0=conv(c, 32, 1),
            branch1=nn.Sequential(conv(c, 32, 1), conv(32, 32, 3, padding=1)),
            branch2=nn.Sequential(conv(c, a, 1), conv(a, b, 3, padding=1), conv(b, d, 3, padding=1)),
        )


class Block17(ResidualBlock):
    """17x17; `width` of the 1x1 branch, `widths` of the 1x7, 7x1 branch."""

    def __init__(self, conv: ConvBlock, c: int, width: int, widths: tuple[int, int, int], scale: float = 0.10) -> None:
        a, b, d = widths
        super().__init__(
            c,
            width + d,
            scale,
            True,
            branch0=conv(c, width, 1),
            branch1=nn.Sequential(
                conv(c, a, 1), conv(a, b, (1, 7), padding=(0, 3)), conv(b, d, (7, 1), padding=(3, 0))
            ),
        )


class Block8(ResidualBlock):
    """8x8; `widths` of the 1x3, 3x1 branch."""

    def __init__(
        self, conv: ConvBlock, c: int, widths: tuple[int, int, int], scale: float = 0.20, relu: bool = True
    ) -> None:
        a, b, d = widths
        super().__init__(
            c,
            192 + d,
            scale,
            relu,
            branch0=conv(c, 192, 1),
            branch1=nn.Sequential(
                conv(c, a, 1), conv(a, b, (1, 3), padding=(0, 1)), conv(b, d, (3, 1), padding=(1, 0))
            ),
        )


class Mixed7a(Branches):
    """17x17 to 8x8: [n, c, h, w] -> [n, c + 384 + second + third[1], h / 2, w / 2]."""

    def __init__(self, conv: ConvBlock, c: int, second: int, third: tuple[int, int]) -> None:
        super().__init__(
            branch0=nn.Sequential(conv(c, 256, 1), conv(256, 384, 3, stride=2)),
            branch1=nn.Sequential(conv(c, 256, 1), conv(256, second, 3, stride=2)),
            branch2=nn.Sequential(conv(c, 256, 1), conv(256, third[0], 3, padding=1), conv(*third, 3, stride=2)),
            branch3=nn.MaxPool2d(3, 2),
        )


class Mixed5b(Branches):
    """35x35: [n, 192, h, w] -> [n, 320, h, w]."""

    def __init__(self, conv: ConvBlock) -> None:
        super().__init__(
            branch0=conv(192, 96, 1),
            branch1=nn.Sequential(conv(192, 48, 1), conv(48, 64, 5, padding=2)),
            branch2=nn.Sequential(conv(192, 64, 1), conv(64, 96, 3, padding=1), conv(96, 96, 3, padding=1)),
            branch3=nn.Sequential(branch_avg_pool("tf"), conv(192, 64, 1)),
        )


V1_STEPS = table("""
    Conv2d_1a_3x3 conv2d_1a
    Conv2d_2a_3x3 conv2d_2a
    Conv2d_2b_3x3 conv2d_2b
    MaxPool_3a_3x3 maxpool_3a
    Conv2d_3b_1x1 conv2d_3b
    Conv2d_4a_3x3 conv2d_4a
    Conv2d_4b_3x3 conv2d_4b
    Mixed_5a repeat_1
    Mixed_6a mixed_6a
    Mixed_6b repeat_2
    Mixed_7a mixed_7a
    Mixed_8a repeat_3
    Mixed_8b block8
""")

V2_STEPS = table("""
    Conv2d_1a_3x3 conv2d_1a
    Conv2d_2a_3x3 conv2d_2a
    Conv2d_2b_3x3 conv2d_2b
    MaxPool_3a_3x3 maxpool_3a
    Conv2d_3b_1x1 conv2d_3b
    Conv2d_4a_3x3 conv2d_4a
    MaxPool_5a_3x3 maxpool_5a
    Mixed_5b mixed_5b
    Conv2d_1a_3x3 stem.0
    Conv2d_2a_3x3 stem.1
    Conv2d_2b_3x3 stem.2
    Mixed_3a stem.3
    Mixed_4a stem.4
    Mixed_5a stem.5
    Repeat repeat
    Mixed_6a mixed_6a
    PreAuxLogits repeat_1
    Mixed_7a mixed_7a
    Repeat_2 repeat_2
    Block8 block8
    Conv2d_7b_1x1 conv2d_7b
""")


class InceptionResnetV1(InceptionNet):
    """Inception-ResNet-v1: [n, 3, 160, 160] -> [n, num_classes], or L2-normalised embeddings with num_classes=0."""

    variant = "inception_resnet_v1"
    options_class = InceptionResnetV1Options
    smallest = 75
    first_layer = "conv2d_1a"
    classifier = "logits"

    def __init__(self, **options: Any) -> None:
        o = InceptionResnetV1Options(**options)
        super().__init__(o)
        conv = o.conv()
        self.embedding_size = o.embedding_size
        self.conv2d_1a = conv(o.in_chans, 32, 3, stride=2)  # [n, 32, 79, 79]
        self.conv2d_2a = conv(32, 32, 3)
        self.conv2d_2b = conv(32, 64, 3, padding=1)  # [n, 64, 77, 77]
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = conv(64, 80, 1)  # [n, 80, 38, 38]
        self.conv2d_4a = conv(80, 192, 3)
        self.conv2d_4b = conv(192, 256, 3, stride=2)  # [n, 256, 17, 17]
        self.repeat_1 = nn.Sequential(*(Block35(conv, 256, (32, 32, 32)) for _ in range(5)))
        self.mixed_6a = ReductionA(conv, 256, 192, 192, 256, 384)  # [n, 896, 8, 8]
        self.repeat_2 = nn.Sequential(*(Block17(conv, 896, 128, (128, 128, 128)) for _ in range(10)))
        self.mixed_7a = Mixed7a(conv, 896, 256, (256, 256))  # [n, 1792, 3, 3]
        self.repeat_3 = nn.Sequential(*(Block8(conv, 1792, (192, 192, 192)) for _ in range(5)))
        last = "repeat_3"
        if o.embedding_size is not None:
            self.block8 = Block8(conv, 1792, (192, 192, 192), scale=1.0, relu=False)
            self.last_linear = nn.Linear(1792, o.embedding_size, bias=False)
            self.last_bn = nn.BatchNorm1d(o.embedding_size, eps=o.bn_eps, momentum=o.bn_momentum)
            last = "block8"
        self.finish(
            V1_STEPS,
            (
                (64, 2, "conv2d_2b"),
                (192, 4, "conv2d_4a"),
                (256, 8, "repeat_1"),
                (896, 16, "repeat_2"),
                (1792, 32, last),
            ),
            inception_config(299) if o.embedding_size is None else facenet_config(160),
        )

    @property
    def head_hidden_size(self) -> int:
        return self.num_features if self.embedding_size is None else self.embedding_size

    def embed(self, x: Tensor) -> Tensor:
        x = super().embed(x)
        return x if self.embedding_size is None else self.last_bn(self.last_linear(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As the base; without classes the embedding is normalised, which a classifier must not see."""
        x = super().forward_head(x, pre_logits)
        embedding = self.embedding_size is not None and self.num_classes == 0 and not pre_logits
        return F.normalize(x, p=2.0, dim=1) if embedding else x

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if self.embedding_size is not None and global_pool is not None:
            check_choice("global_pool of the net with a bottleneck", global_pool, ("avg", "max"))
        super().reset_classifier(num_classes, global_pool)


class InceptionResnetV2(InceptionNet):
    """Inception-ResNet-v2: [n, 3, 299, 299] -> [n, num_classes]."""

    variant = "inception_resnet_v2"
    options_class = InceptionResnetV2Options
    smallest = 75
    first_layer = "conv2d_1a"
    classifier = "classif"
    aux_heads: ClassVar[dict[str, str]] = {"PreAuxLogits": "AuxLogits"}

    def __init__(self, **options: Any) -> None:
        o = InceptionResnetV2Options(**options)
        super().__init__(o)
        conv = o.conv()
        paper = o.widths == "paper"
        a, b, c = (384, 1152, 2144) if paper else (320, 1088, 2080)
        repeats = (5, 10, 5) if paper else (10, 20, 9)
        early = self._add_paper_stem(conv, o.in_chans) if paper else self._add_slim_stem(conv, o.in_chans)
        self.repeat = nn.Sequential(*(Block35(conv, a, (32, 48, 64)) for _ in range(repeats[0])))  # [n, a, 35, 35]
        self.mixed_6a = ReductionA(conv, a, 256, 256, 384, 384)
        self.repeat_1 = nn.Sequential(*(Block17(conv, b, 192, (128, 160, 192)) for _ in range(repeats[1])))
        self.AuxLogits = AuxHead(b, o.classes, conv) if o.aux_logits else None  # from [n, b, 17, 17]
        self.mixed_7a = Mixed7a(conv, b, 288, (288, 320))
        self.repeat_2 = nn.Sequential(*(Block8(conv, c, (192, 224, 256)) for _ in range(repeats[2])))  # [n, c, 8, 8]
        last = (c, 32, "repeat_2")
        if not paper:
            self.block8 = Block8(conv, c, (192, 224, 256), scale=1.0, relu=False)
            self.conv2d_7b = conv(c, 1536, 1)  # [n, 1536, 8, 8]
            last = (1536, 32, "conv2d_7b")
        features = (*early, (a, 8, "repeat"), (b, 16, "repeat_1"), last)
        self.finish(V2_STEPS, features, inception_config(299, 0.8975))

    def _add_slim_stem(self, conv: ConvBlock, in_chans: int) -> tuple[tuple[int, int, str], ...]:
        self.conv2d_1a = conv(in_chans, 32, 3, stride=2)  # [n, 32, 149, 149]
        self.conv2d_2a = conv(32, 32, 3)
        self.conv2d_2b = conv(32, 64, 3, padding=1)  # [n, 64, 147, 147]
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = conv(64, 80, 1)  # [n, 80, 73, 73]
        self.conv2d_4a = conv(80, 192, 3)  # [n, 192, 71, 71]
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = Mixed5b(conv)  # [n, 320, 35, 35]
        return (64, 2, "conv2d_2b"), (192, 4, "conv2d_4a")

    def _add_paper_stem(self, conv: ConvBlock, in_chans: int) -> tuple[tuple[int, int, str], ...]:
        self.first_layer = "stem.0"
        self.stem = nn.Sequential(*stem(conv, in_chans))  # [n, 384, 35, 35]
        return (64, 2, "stem.2"), (160, 4, "stem.3")
