"""BN-Inception, arXiv:1502.03167, TF-slim's inception_v2. State-dict names are slim's scopes in torch's habits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._data_config import inception_config
from ._base import InceptionNet
from ._options import Options, check_choice
from ._trunk import table
from .blocks import (
    Branches,
    ConvBlock,
    SameMaxPool2d,
    SamePad2d,
    branch_avg_pool,
    branch_max_pool,
    chain,
    strided_conv,
    strided_max_pool,
)


@dataclass(frozen=True, kw_only=True)
class InceptionV2Options(Options):
    """convention defaults to "tf" (TF-slim); "torch" pads symmetrically and averages over padding, as Caffe's nets do.

    stem: "separable", slim's depthwise 7x7 with a biased 1x1 behind it and no batch norm, or "plain", the paper's 7x7.
    """

    stem: str = "separable"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("stem", self.stem, ("separable", "plain"))


class SeparableStem(nn.Module):
    """Depthwise 7x7 of stride 2, multiplier 8, then a biased 1x1 and ReLU: [n, cin, h, w] -> [n, 64, h / 2, w / 2]."""

    def __init__(self, cin: int, padding: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(cin, 8 * cin, 7, 2, padding, groups=cin, bias=False)
        self.pointwise = nn.Conv2d(8 * cin, 64, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.pointwise(self.depthwise(x)))


class Mixed(Branches):
    """1x1, 3x3, double 3x3 and pooled branches; `c3` and `double` are (reduced, out), `project` is the pooled width."""

    def __init__(
        self,
        conv: ConvBlock,
        cin: int,
        c1: int,
        c3: tuple[int, int],
        double: tuple[int, int],
        pool: nn.Module,
        project: int,
    ) -> None:
        reduced, out = double
        super().__init__(
            branch0=conv(cin, c1, 1),
            branch1=nn.Sequential(conv(cin, c3[0], 1), conv(*c3, 3, padding=1)),
            branch2=nn.Sequential(
                conv(cin, reduced, 1), conv(reduced, out, 3, padding=1), conv(out, out, 3, padding=1)
            ),
            branch3=nn.Sequential(pool, conv(cin, project, 1)),
        )


class Reduction(Branches):
    """Halves the map: a 3x3, a double 3x3 and a max pool, all of stride 2."""

    def __init__(
        self, conv: ConvBlock, cin: int, c3: tuple[int, int], double: tuple[int, int], convention: str
    ) -> None:
        reduced, out = double
        super().__init__(
            branch0=chain(conv(cin, c3[0], 1), *strided_conv(conv, *c3, 3, convention)),
            branch1=chain(
                conv(cin, reduced, 1), conv(reduced, out, 3, padding=1), *strided_conv(conv, out, out, 3, convention)
            ),
            # At odd sizes only this pool meets the padded convolutions; at even ones both conventions agree.
            branch2=SameMaxPool2d(3, 2),
        )


STEPS = table("""
    - pad1
    Conv2d_1a_7x7
    MaxPool_2a_3x3
    Conv2d_2b_1x1
    Conv2d_2c_3x3
    MaxPool_3a_3x3
    Mixed_3b
    Mixed_3c
    Mixed_4a
    Mixed_4b
    Mixed_4c
    Mixed_4d
    Mixed_4e
    Mixed_5a
    Mixed_5b
    Mixed_5c
""")


class InceptionV2(InceptionNet):
    """BN-Inception: [n, 3, 224, 224] -> [n, num_classes]."""

    variant = "inception_v2"
    options_class = InceptionV2Options
    smallest = 15
    first_layer = "Conv2d_1a_7x7"

    def __init__(self, **options: Any) -> None:
        o = InceptionV2Options(**options)
        super().__init__(o)
        conv, convention = o.conv(), o.padding
        self._add_stem(o, conv)

        def mixed(
            cin: int, c1: int, c3: tuple[int, int], double: tuple[int, int], project: int, last: bool = False
        ) -> Mixed:
            pool = branch_max_pool() if last else branch_avg_pool(convention)
            return Mixed(conv, cin, c1, c3, double, pool, project)

        self.Mixed_3b = mixed(192, 64, (64, 64), (64, 96), 32)  # [n, 256, 28, 28]
        self.Mixed_3c = mixed(256, 64, (64, 96), (64, 96), 64)
        self.Mixed_4a = Reduction(conv, 320, (128, 160), (64, 96), convention)  # [n, 576, 14, 14]
        self.Mixed_4b = mixed(576, 224, (64, 96), (96, 128), 128)
        self.Mixed_4c = mixed(576, 192, (96, 128), (96, 128), 128)
        self.Mixed_4d = mixed(576, 160, (128, 160), (128, 160), 96)
        self.Mixed_4e = mixed(576, 96, (128, 192), (160, 192), 96)
        self.Mixed_5a = Reduction(conv, 576, (128, 192), (192, 256), convention)  # [n, 1024, 7, 7]
        self.Mixed_5b = mixed(1024, 352, (192, 320), (160, 224), 128)
        self.Mixed_5c = mixed(1024, 352, (192, 320), (192, 224), 128, last=True)
        self.finish(
            STEPS,
            (
                (64, 2, "Conv2d_1a_7x7"),
                (192, 4, "Conv2d_2c_3x3"),
                (320, 8, "Mixed_3c"),
                (576, 16, "Mixed_4e"),
                (1024, 32, "Mixed_5c"),
            ),
            inception_config(224),
        )

    def _add_stem(self, o: InceptionV2Options, conv: ConvBlock) -> None:
        tf = o.padding == "tf"
        self.pad1 = SamePad2d(7, 2) if tf else None
        padding = 0 if tf else 3
        separable = o.stem == "separable"
        self.Conv2d_1a_7x7 = (
            SeparableStem(o.in_chans, padding) if separable else conv(o.in_chans, 64, 7, stride=2, padding=padding)
        )
        self.MaxPool_2a_3x3 = strided_max_pool(o.padding)  # [n, 64, 56, 56]
        self.Conv2d_2b_1x1 = conv(64, 64, 1)
        self.Conv2d_2c_3x3 = conv(64, 192, 3, padding=1)
        self.MaxPool_3a_3x3 = strided_max_pool(o.padding)  # [n, 192, 28, 28]
