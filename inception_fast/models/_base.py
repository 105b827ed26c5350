"""What every family has in common: options, head, auxiliary heads and timm's habits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._data_config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from ._options import Options, check, check_choice, check_count
from ._trunk import FeatureInfo, InputTransform, Steps, TrunkNet, check_map
from .blocks import GLOBAL_POOLS, global_pool, linear


class InceptionOutputs(NamedTuple):
    """What v3, v4 and Inception-ResNet-v2 return in training with an auxiliary head."""

    logits: Tensor
    aux_logits: Tensor


class GoogLeNetOutputs(NamedTuple):
    """What v1 returns in training with its auxiliary heads: the later head comes first, as in torchvision."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class InceptionNet(TrunkNet):
    """Base of the families: [n, c, h, w] -> [n, num_classes], in training with auxiliary heads a named tuple.

    A family's constructor creates the modules under the names of its checkpoints and ends with `finish`.
    """

    variant: ClassVar[str]
    options_class: ClassVar[type[Options]]
    smallest: ClassVar[int]
    first_layer: str
    classifier: ClassVar[str] = "fc"
    aux_heads: ClassVar[dict[str, str]] = {}
    aux_outputs: ClassVar[type[InceptionOutputs] | type[GoogLeNetOutputs]] = InceptionOutputs

    feature_info: FeatureInfo
    num_features: int

    def __init__(self, options: Options, transform_input: bool = False) -> None:
        check(
            not options.aux_logits or bool(self.aux_heads),
            f"aux_logits=True for {self.variant}",
            "False, this variant is built without auxiliary heads",
        )
        check(
            not transform_input or options.in_chans == 3,
            f"transform_input=True with in_chans={options.in_chans}",
            "in_chans=3, statistics of RGB",
        )
        super().__init__(self.variant, options.in_chans, self.smallest, InputTransform() if transform_input else None)
        self.options = options
        self.transform_input = transform_input
        self.convention = options.padding
        self.num_classes = options.classes
        self.global_pool = options.global_pool
        self.drop_rate = options.dropout
        self.aux_logits = options.aux_logits

    def finish(self, steps: Steps, features: Sequence[tuple[int, int, str]], data_config: DataConfig) -> None:
        """Ends construction, when all modules but the classifier exist.

        Steps whose module the options left out are dropped. `features` are (channels, reduction, module path) of the
        five strides.
        """
        present = {path for path, _ in self.named_modules()}
        self.steps = tuple(step for step in steps if step[1] in present)
        self.feature_info = FeatureInfo({"num_chs": c, "reduction": r, "module": m} for c, r, m in features)
        self.num_features = features[-1][0]
        self.set_data_config(data_config)
        self.add_module(self.classifier, linear(self.head_hidden_size, self.num_classes))

    def set_data_config(self, config: DataConfig) -> None:
        """How images are prepared; where the net itself undoes ImageNet's statistics, it must be by these."""
        config = config.with_channels(self.in_chans)
        self.data_config = replace(config, mean=IMAGENET_MEAN, std=IMAGENET_STD) if self.transform_input else config

    @property
    def head_hidden_size(self) -> int:
        """Number of features that the classifier sees."""
        return self.num_features

    def forward(self, x: Tensor) -> Tensor | InceptionOutputs | GoogLeNetOutputs:
        if not (self.training and self.aux_logits):
            return self.forward_head(self.forward_features(x))
        x, taps = self.run(x, self.aux_heads)
        logits = self.forward_head(x)
        return self.aux_outputs(logits, *(self.get_submodule(head)(taps[at]) for at, head in self.aux_heads.items()))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [n, num_features, h, w]."""
        return self.run(x)[0]

    def forward_endpoints(self, x: Tensor) -> dict[str, Tensor]:
        """Every endpoint of the trunk under its TF-slim name, in execution order."""
        return self.run(x, [endpoint for endpoint, _ in self.steps if endpoint])[1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[n, num_features, h, w] -> [n, num_classes], or the features before the classifier."""
        classifier = self.get_classifier()
        check_map(x, self.name, self.num_features, nn.Identity() if pre_logits else classifier)
        x = self.embed(global_pool(x, self.global_pool))
        return x if pre_logits else classifier(x)

    def embed(self, x: Tensor) -> Tensor:
        """What stands between pool and classifier: dropout, in training."""
        # Only a training graph shows the dropout node: an engine that reads the eval graph has nothing to remove.
        return F.dropout(x, self.drop_rate) if self.training and self.drop_rate else x

    def get_classifier(self) -> nn.Module:
        """The last linear layer; an identity without classes."""
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifiers, auxiliary ones too, by new ones of `num_classes` classes on the same device.

        Raises ValueError for a negative number and for an unknown pool.
        """
        num_classes = check_count("num_classes", num_classes, 0)
        pool = self.global_pool if global_pool is None else global_pool
        check_choice("global_pool", pool, GLOBAL_POOLS)
        check(pool != "" or num_classes == 0, "global_pool='' with a classifier", "with num_classes=0 only")
        like = next(self.parameters())
        new = linear(self.head_hidden_size, num_classes).to(like.device, like.dtype).train(self.training)
        setattr(self, self.classifier, new)
        if self.aux_logits:
            for head in self.aux_heads.values():
                self.get_submodule(head).reset_classifier(num_classes)  # type: ignore[operator]
        self.num_classes = num_classes
        self.global_pool = pool
        self.options = replace(self.options, num_classes=num_classes, global_pool=pool)

    def adapt_in_chans(self, in_chans: int) -> None:
        """Turns the first convolution into one of `in_chans` channels, the response to a grey image kept.

        One channel gets the sum of the old weights; more get the old ones in turn, scaled by old / new (timm's rule).
        """
        in_chans = check_count("in_chans", in_chans, 1)
        if in_chans == self.in_chans:
            return
        check(not self.transform_input, f"in_chans={in_chans} with transform_input=True", "3, statistics of RGB")
        layer = self.get_submodule(self.first_layer)
        conv = getattr(layer, "conv", None)
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
            seen = f"in_chans={in_chans} for a first layer {type(layer).__name__}"
            raise ValueError(f"{seen}; allowed: {self.in_chans}, only a plain convolution can change its channels")
        old = conv.weight.detach()
        if in_chans == 1:
            new = old.sum(1, keepdim=True)
        else:
            new = old[:, torch.arange(in_chans) % self.in_chans] * (self.in_chans / in_chans)
        conv.weight = nn.Parameter(new)
        conv.in_channels = in_chans
        self.in_chans = in_chans
        self.options = replace(self.options, in_chans=in_chans)
        self.data_config = self.data_config.with_channels(in_chans)
