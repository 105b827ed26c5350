"""The trunk of a network as a table of named steps: checks of the input, endpoints, a net that returns maps only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._checks import not_scripted
from .._data_config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from .._numbers import is_integer, plain

Steps = tuple[tuple[str | None, str], ...]
"""(endpoint name or None, module path) in execution order."""


def table(text: str) -> Steps:
    """Steps from lines of "endpoint module", one word where both are the same, "-" for a step without endpoint."""
    rows = [line.split() for line in text.strip().splitlines()]
    return tuple((None if row[0] == "-" else row[0], row[-1]) for row in rows)


class FeatureInfo(list[dict[str, Any]]):
    """One dict per stride with `num_chs`, `reduction` and `module`: a list, with timm's accessors."""

    def channels(self) -> list[int]:
        return [row["num_chs"] for row in self]

    def reduction(self) -> list[int]:
        return [row["reduction"] for row in self]

    def module_name(self) -> list[str]:
        return [row["module"] for row in self]


def check_input(x: Any, name: str, in_chans: int, min_size: int, weight: Tensor | None) -> None:
    """Raises ValueError where `x` is not [n, in_chans, h, w] of at least min_size, TypeError for what its type is.

    `weight` is one of those that will meet the image: their dtypes are the same, or autocast sees to it.
    Sizes that a tracer left symbolic are not looked at: they would become guards, or constants, of the graph.
    """
    if isinstance(x, fx.Proxy):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} got {type(x).__name__}; allowed: a torch.Tensor [n, {in_chans}, h, w]")
    if x.dim() != 4:
        raise ValueError(f"{name} got a tensor of shape {tuple(x.shape)}; allowed: rank 4, [n, {in_chans}, h, w]")
    if not x.dtype.is_floating_point and not x.is_quantized:
        raise TypeError(f"{name} got a tensor of dtype {x.dtype}; allowed: a floating point dtype")
    if weight is not None and x.dtype != weight.dtype and not _autocasts(x.device.type):
        raise TypeError(f"{name} got a tensor of dtype {x.dtype}; allowed: {weight.dtype}, that of its weights")
    if x.layout != torch.strided:
        raise ValueError(f"{name} got a tensor of layout {x.layout}; allowed: torch.strided")
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return
    if x.shape[1] != in_chans:
        raise ValueError(f"{name} got {x.shape[1]} channels, shape {tuple(x.shape)}; allowed: [n, {in_chans}, h, w]")
    h, w = x.shape[2:]
    if any(isinstance(size, int) and size < min_size for size in (h, w)):
        raise ValueError(f"{name} got an image of {h}x{w}; allowed: {min_size}x{min_size} or larger")
    if not torch.compiler.is_compiling() and x.shape[0] == 0:
        raise ValueError(f"{name} got an empty batch of shape {tuple(x.shape)}; allowed: at least one image")


def check_map(x: Any, name: str, channels: int, classifier: nn.Module) -> None:
    """Raises TypeError or ValueError where `x` is not the trunk's last map, [n, channels, h, w]."""
    if isinstance(x, fx.Proxy):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}'s head got {type(x).__name__}; allowed: a torch.Tensor [n, {channels}, h, w]")
    if not x.dtype.is_floating_point and not x.is_quantized:
        raise TypeError(f"{name}'s head got a map of dtype {x.dtype}; allowed: a floating point dtype")
    if type(classifier) is nn.Linear and not classifier._forward_pre_hooks:  # another one, or a hook, may cast
        wanted = classifier.weight.dtype
        if x.dtype != wanted and not _autocasts(x.device.type):
            raise TypeError(f"{name}'s head got a map of dtype {x.dtype}; allowed: {wanted}, the classifier's")
    if x.layout != torch.strided:
        raise ValueError(f"{name}'s head got a map of layout {x.layout}; allowed: torch.strided")
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return
    if x.dim() != 4 or x.shape[1] != channels or (not torch.compiler.is_compiling() and 0 in x.shape):
        raise ValueError(f"{name}'s head got a map of shape {tuple(x.shape)}; allowed: [n, {channels}, h, w], n >= 1")


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class InputTransform(nn.Module):
    """Turns an image normalised by ImageNet's statistics into x / 127.5 - 1, as torchvision's models do."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.empty(1, 3, 1, 1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
                self.scale[:, channel] = std / 0.5
                self.shift[:, channel] = (mean - 0.5) / 0.5

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputTransform:
        """Writes the constants again: a new dtype has them rounded once, and new memory (`to_empty`) not at all.

        Into tensors that went through `fn` too, which may be `share_memory_`.
        """
        super()._apply(fn, recurse)
        self.scale, self.shift = fn(torch.empty_like(self.scale)), fn(torch.empty_like(self.shift))
        self.reset_parameters()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def _constants_beside_weights(net: nn.Module, keys: Any) -> None:
    """Takes the constants off "meta" when the weights are: a state dict that is assigned has no entry for them."""
    transform, weight = net.get_submodule("input_transform"), next(net.parameters())
    if any(constant.is_meta for constant in transform.buffers()):
        transform.to_empty(device=weight.device)


class TrunkNet(nn.Module):
    """Runs `steps` one after the other on a checked input and can keep the maps of named endpoints."""

    data_config: DataConfig
    __prepare_scriptable__ = not_scripted

    def __init__(self, name: str, in_chans: int, min_size: int, transform: nn.Module | None = None) -> None:
        super().__init__()
        self.name = name
        self.in_chans = in_chans
        self.min_size = min_size
        self.input_transform = transform
        if transform is not None:
            self.register_load_state_dict_post_hook(_constants_beside_weights)
        self.steps: Steps = ()

    def run(self, x: Tensor, keep: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """The last map of the trunk, and those of the endpoints or module paths in `keep`."""
        check_input(x, self.name, self.in_chans, self.min_size, next(self.parameters(), None))
        if self.input_transform is not None:
            x = self.input_transform(x)
        kept: dict[str, Tensor] = {}
        for endpoint, path in self.steps:
            x = self.get_submodule(path)(x)
            if endpoint in keep:
                kept[str(endpoint)] = x
            elif path in keep:
                kept[path] = x
        return x, kept


class FeatureNet(TrunkNet):
    """[n, c, h, w] -> the maps of the chosen strides. Shares the trunk of `net`, under the same names.

    Raises ValueError for indices outside the net's feature maps.
    """

    def __init__(self, net: TrunkNet, info: FeatureInfo, out_indices: Sequence[int] | None = None) -> None:
        super().__init__(net.name, net.in_chans, net.min_size, net.input_transform)
        count = len(info)
        if out_indices is not None and not isinstance(out_indices, Sequence):
            raise ValueError(f"out_indices={out_indices!r} of {self.name}; allowed: a sequence of integers")
        chosen = range(count) if out_indices is None else [plain(index) for index in out_indices]
        seen = f"out_indices {tuple(chosen)} of {self.name}"
        if not all(is_integer(index) and -count <= index < count for index in chosen):
            raise ValueError(f"{seen}; allowed: integers from {-count} to {count - 1}")
        self.out_indices = tuple(index % count for index in chosen)
        if not self.out_indices or list(self.out_indices) != sorted(set(self.out_indices)):
            raise ValueError(f"{seen}; allowed: at least one, each once, in rising order")
        self.feature_info = FeatureInfo(info[index] for index in self.out_indices)
        self.data_config = net.data_config
        paths = [path for _, path in net.steps]
        self.steps = net.steps[: paths.index(self.feature_info[-1]["module"]) + 1]
        for _, path in self.steps:
            self._adopt(path, net.get_submodule(path))

    def _adopt(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *parents, leaf = path.split(".")
        for name in parents:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        parent.add_module(leaf, module)

    def forward(self, x: Tensor) -> list[Tensor]:
        paths = self.feature_info.module_name()
        _, kept = self.run(x, paths)
        return [kept[path] for path in paths]
