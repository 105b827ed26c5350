"""What a weight file turns into: tensors under our names, the options that fit them, and a strict load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._data_config import DataConfig, facenet_config, inception_config
from .names import AUX, CLASSIFIERS

BACKGROUND_CLASSES = 1001
"""Classes of TF-slim's ImageNet nets: index 0 is the background, label i sits at i + 1."""


class WeightsError(ValueError):
    """A weight file that cannot be used: truncated, foreign, of another architecture, or one that would run code."""


@dataclass(frozen=True)
class Source:
    """Weights of one file, under our state-dict names.

    layout: "slim", "keras", "torchvision", "timm", "facenet-pytorch", "pytorch-fid" or "inception_fast".
    options: arguments for `create_model` that make the network these weights were trained in.
    data_config: how the images were prepared, where the layout tells.
    labels: the names of the classes as a JSON list, where the file has them.
    """

    layout: str
    model: str
    options: dict[str, Any]
    data_config: DataConfig | None
    tensors: Mapping[str, Tensor] = field(repr=False)
    origin: str = ""
    labels: str | None = None

    @property
    def file_classes(self) -> int:
        """Width of the classifier in the file, the background class included; 0 where it has none."""
        return head_classes(self.origin, self.model, self.tensors)

    def state_dict(self, num_classes: int | None = None, aux: bool = True) -> dict[str, Tensor]:
        """The tensors for a net of `num_classes` classes: by default the file's own, without the background.

        Another number leaves the classifiers out. `aux=False` leaves out the auxiliary heads.
        """
        wanted = self.options["num_classes"] if num_classes is None else num_classes
        heads = CLASSIFIERS[self.model]
        result = {}
        for key, tensor in self.tensors.items():
            if not aux and key.startswith(tuple(f"{head}." for head in AUX.get(self.model, ()))):
                continue
            if key.rpartition(".")[0] in heads and wanted != self.file_classes:
                if wanted == self.options["num_classes"] == self.file_classes - 1:
                    result[key] = tensor[1:]
                continue
            result[key] = tensor
        return result

    def load(self, model: nn.Module) -> None:
        """Copies the weights into `model`; where its number of classes differs, all but the classifiers.

        Raises WeightsError naming the first key, shape or kind of tensor that differs; the model is untouched then.
        """
        target, variant = model.state_dict(), getattr(model, "variant", self.model)
        if variant != self.model:
            raise model_mismatch(self.origin, next(iter(self.tensors), "no key"), self.model, str(variant))
        classes, aux = int(model.num_classes), bool(getattr(model, "aux_logits", False))  # type: ignore[arg-type]
        tensors = self.state_dict(classes, aux)
        kept = classes in (self.file_classes, self.options["num_classes"])
        self.check(target, tensors, () if kept else CLASSIFIERS[self.model])
        with torch.no_grad():
            for key, tensor in tensors.items():
                target[key].copy_(tensor)

    def check(self, target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], free: tuple[str, ...] = ()) -> None:
        """Raises WeightsError at the first key of `target` that `tensors` lacks or has otherwise, then at one left.

        The layers in `free` may be absent, and so may BN's batch counters, which only training without momentum reads.
        """
        for key, value in target.items():
            if key in tensors:
                seen, allowed = tuple(tensors[key].shape), tuple(value.shape)
                if seen != allowed:
                    raise WeightsError(f"{self.origin}: {key} has shape {seen}; allowed for {self.model}: {allowed}")
                if odd := _odd(tensors[key], value):
                    raise WeightsError(f"{self.origin}: {key} has {odd}")
            elif not key.endswith(".num_batches_tracked") and key.rpartition(".")[0] not in free:
                hint = ""
                if key.startswith(tuple(f"{head}." for head in AUX.get(self.model, ()))):
                    hint = " (the file has no auxiliary heads: aux_logits=False loads it)"
                raise WeightsError(
                    f"{self.origin}: {key}, shape {tuple(value.shape)}, of {self.model} is missing{hint}"
                )
        head = f"{CLASSIFIERS[self.model][0]}.weight"
        for key in tensors:
            if key not in target:
                if key.rpartition(".")[0] in CLASSIFIERS[self.model] and head not in self.tensors:
                    missing = f"{self.origin}: {head} of {self.model} is missing, {key} is there"
                    raise WeightsError(f"{missing}; allowed: both, or num_classes=N for new classifiers")
                raise WeightsError(
                    f"{self.origin}: {key} does not belong to {self.model}; its first key is {next(iter(target))}"
                )


def _odd(tensor: Tensor, target: Tensor) -> str:
    """What keeps a tensor's values from being copied into `target` as they are, with what is allowed; "" for none."""
    if tensor.is_meta:
        return "no values, device meta; allowed: a device that holds them"
    if tensor.layout != torch.strided:
        return f"layout {tensor.layout}; allowed: torch.strided"
    if target.is_floating_point() and not tensor.is_floating_point():
        return f"dtype {tensor.dtype}; allowed: a floating point dtype"
    if tensor.is_complex():
        return f"dtype {tensor.dtype}; allowed: {target.dtype}"
    return ""


def for_numpy(value: Tensor) -> Tensor:
    """A tensor of floats that NumPy can hold, on the CPU: bfloat16 and float8 become float32, exactly."""
    value = value.detach().cpu()
    return value if value.dtype in (torch.float16, torch.float32, torch.float64) else value.float()


def head_classes(origin: str, model: str, tensors: Mapping[str, Tensor]) -> int:
    """Width of the main classifier, 0 where there is none. Raises WeightsError for one that is no matrix."""
    key = f"{CLASSIFIERS[model][0]}.weight"
    return width(origin, model, key, tensors[key], "classes") if key in tensors else 0


def width(origin: str, model: str, key: str, weight: Tensor, name: str) -> int:
    """Rows of a linear layer's weight. Raises WeightsError for one that is no matrix."""
    shape = tuple(weight.shape)
    if len(shape) != 2 or not shape[0]:
        raise WeightsError(f"{origin}: {key} has shape {shape}; allowed for {model}: ({name}, features)")
    return shape[0]


def has_aux(model: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors hold auxiliary heads."""
    return any(key.startswith(f"{head}.") for head in AUX.get(model, ()) for key in tensors)


def image_channels(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The option for the channels of the image, by the first layer that can tell them; none for 3, the default."""
    depthwise = tensors.get("Conv2d_1a_7x7.depthwise.weight")
    if depthwise is not None:
        channels = (depthwise.shape[0] // 8 if depthwise.ndim == 4 else 0) or 3
    else:
        firsts = ("conv1", "Conv2d_1a_7x7", "Conv2d_1a_3x3", "features.0", "conv2d_1a", "stem.0")
        weights = (tensors.get(f"{first}.conv.weight") for first in firsts)
        channels = next((weight.shape[1] for weight in weights if weight is not None and weight.ndim == 4), 3)
    return {} if channels == 3 else {"in_chans": channels}


def data_config(layout: str, model: str, channels: int = 3) -> DataConfig | None:
    """How the images of a layout's weights were prepared; None where the family's own habit is the answer.

    torchvision's weights expect ImageNet statistics with `transform_input` in front of the net; without it, as here, x
    / 127.5 - 1.
    """
    size = 224 if model in ("inception_v1", "inception_v2") else 299
    half = (0.5, 0.5, 0.5)
    config = None
    if model == "inception_resnet_v1":
        config = facenet_config() if layout in ("slim", "facenet-pytorch") else None
    elif layout == "timm":
        config = inception_config(size, 0.8975 if model == "inception_resnet_v2" else 0.875)
    elif layout in ("slim", "keras", "torchvision"):
        # torchvision's v3 resizes to 342, not to floor(299 / 0.875).
        crop = 299 / 342 if (layout, size) == ("torchvision", 299) else 0.875
        config = DataConfig(half, half, (3, size, size), crop, "bilinear")
    elif layout == "pytorch-fid":
        config = DataConfig(half, half, (3, size, size), 1.0, "bilinear")
    return config and config.with_channels(channels)


def model_mismatch(origin: str, key: str, held: str, asked: str) -> WeightsError:
    """The error for a file that holds another variant than the one asked for, shown by `key`."""
    return WeightsError(f"{origin} holds {held}, as {key} shows; allowed: weights of {asked}")
