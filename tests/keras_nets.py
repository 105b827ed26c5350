"""The torch nets and images that the tests of the Keras nets share, also with processes that never load TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import inception_fast as fast

SIZE = 81
"""Odd, and even after a halving: paddings differ there."""
CLASSES = 7


def torch_net(name: str, **options: Any) -> Any:
    """A torch model with random statistics; factors of batch norm stay one, as in slim and Keras."""
    net = fast.create_model(name, **options).eval()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return net


def seeded(name: str) -> Any:
    """The same net in every process; facenet's without classes, so that its output is the normalised embedding."""
    torch.manual_seed(len(name))
    return torch_net(name, num_classes=0 if name == "inception_resnet_v1" else CLASSES, convention="tf")


def image(size: int = 107, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def nhwc(x: Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def nchw(y: Any) -> Tensor:
    y = torch.from_numpy(np.array(y))
    return y.permute(0, 3, 1, 2) if y.ndim == 4 else y
