"""The network behind FID as a module: uint8 images in, 2048 features out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..features.batching import LARGEST_BATCH, fingerprint
from ..features.placed import Placed, device_of
from ..models import create_model
from .resize import PREPROCESSING, SIZE, prepare

FEATURES = 2048


class InceptionFeatures(nn.Module):
    """uint8 images [n, 3, h, w] -> float32 features [n, 2048] of Inception-v3 in its FID form, through the engine.

    An image's features have the same bits alone and in any batch. `torchmetrics` takes the module as it is, in
    `FrechetInceptionDistance(feature=...)`; for torch-fidelity see `register_with_torch_fidelity`.

    Args:
        weights: a file in the layout of pytorch-fid or torch-fidelity (the same one), or converted from it.
        dtype: of the arithmetic, None for float32; whatever `optimize` takes. Features are float32 always.
        preprocessing: "tensorflow" as in the original graph and torch-fidelity, "pytorch-fid", or "clean-fid".
        device: where the network runs, "cpu" or "cuda". Images of either may come there, prepared on the CPU; their
            features are where they are.
        winograd: on the CPU alone, as in `optimize`: faster, and in float32 a few times the rounding error.

    Raises FileNotFoundError or WeightsError for files that cannot be used, ValueError for another network's weights or
    a device that is not here, and ValueError or TypeError for images of another shape or dtype.

    >>> features = InceptionFeatures("pt_inception-2015-12-05-6726825d.pth")    # doctest: +SKIP
    >>> features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape            # doctest: +SKIP
    torch.Size([1, 2048])
    """

    num_features = FEATURES

    def __init__(
        self,
        weights: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        *,
        preprocessing: str = "tensorflow",
        device: str | torch.device = "cpu",
        winograd: bool = False,
    ) -> None:
        super().__init__()
        if preprocessing not in PREPROCESSING:
            raise ValueError(f"preprocessing {preprocessing!r}; allowed: {', '.join(map(repr, PREPROCESSING))}")
        self.dtype, self.preprocessing, self.device, self.winograd = dtype, preprocessing, device_of(device), winograd
        net: Any = create_model("inception_v3", weights=weights)
        if not net.options.fid or net.in_chans != 3:
            seen = f"{os.fspath(weights)} is of an Inception-v3 with {net.num_classes} classes, not of the FID network"
            raise ValueError(f"{seen}; allowed: the layout of pytorch-fid and torch-fidelity, 1008 classes")
        self._keep(net.eval())

    def _keep(self, net: Any) -> None:
        """Neither the network nor its plan is registered: a metric that holds this must not save or cast them."""
        classifier = net.get_classifier()
        weight = classifier.weight.detach().clone() if net.num_classes else None
        net.reset_classifier(0)
        self.__dict__["_net"] = net
        self.__dict__["classifier_weight"] = weight
        self.__dict__["_plan"] = self._placed(net)

    def _placed(self, net: nn.Module) -> Placed:
        return Placed(net, (3, SIZE, SIZE), self.dtype, self.device, winograd=self.winograd)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, h, w], RGB, any size -> float32 [n, 2048], on the images' device."""
        check_images(images, tuple(dict.fromkeys(("cpu", self.device.type))))
        result = torch.empty(len(images), FEATURES)
        pixels = images.detach().cpu().numpy()
        for start in range(0, len(pixels), LARGEST_BATCH):
            block = [prepare(image, self.preprocessing) for image in pixels[start : start + LARGEST_BATCH]]
            result[start : start + len(block)] = self.from_prepared(torch.from_numpy(np.stack(block)))
        return result.to(images.device)

    def from_prepared(self, x: Tensor) -> Tensor:
        """float32 [n, 3, 299, 299], each image through `fid.resize.prepare` -> float32 [n, 2048]."""
        return self.placed(x)

    @property
    def placed(self) -> Placed:
        """The network on its device."""
        return self.__dict__["_plan"]  # type: ignore[no-any-return]

    @property
    def fingerprint(self) -> str:
        """A digest of the weights: other weights, other features."""
        return fingerprint(self.__dict__["_net"])

    def report(self) -> Any:
        """The engine's report of the network: every node and what it was fused into."""
        return self.placed.plan.report()

    def extra_repr(self) -> str:
        device = "" if self.device.type == "cpu" else f", device='{self.device}'"
        tiles = ", winograd=True" if self.winograd else ""
        return f"dtype={self.dtype or torch.float32}, preprocessing={self.preprocessing!r}{device}{tiles}"

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan, which is native code and made anew where the pickle is loaded."""
        return {key: value for key, value in self.__dict__.items() if key != "_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_plan"] = self._placed(state["_net"])

    def __deepcopy__(self, memo: dict[int, Any]) -> InceptionFeatures:
        """Nothing in it ever changes, so a copy shares all of it."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin


def check_images(images: Any, devices: Sequence[str] = ("cpu",)) -> None:
    """Raises TypeError or ValueError unless `images` is a uint8 tensor [n, 3, h, w] on one of the devices, n > 0."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images of type {type(images).__name__}; allowed: a torch.Tensor, uint8 [n, 3, h, w]")
    if images.dtype != torch.uint8:
        hint = ", from floats in [0, 1]: (x * 255).round().to(torch.uint8)" if images.is_floating_point() else ""
        raise TypeError(f"images of dtype {images.dtype}; allowed: torch.uint8{hint}")
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images of shape {tuple(images.shape)}; allowed: [n, 3, h, w] with n, h and w at least 1")
    if images.device.type not in devices:
        raise ValueError(f"images on {images.device}; allowed: {', '.join(devices)}")
