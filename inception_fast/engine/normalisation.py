"""uint8 images into a module that takes normalised floats: the module's own data configuration says how."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import graph as ir


def image_affine(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), float64 [c], with scale * byte + shift = (byte / 255 - mean) / std; None where it is not known.

    Read from `module.data_config`, or from `module.pretrained_cfg` where timm keeps it.
    """
    for name in ("data_config", "pretrained_cfg"):
        config: Any = getattr(module, name, None)
        mean, std = (config.get(k) if isinstance(config, dict) else getattr(config, k, None) for k in ("mean", "std"))
        if mean is not None and std is not None:
            deviation = torch.as_tensor(std, dtype=torch.float64)
            return 1 / (255 * deviation), -torch.as_tensor(mean, dtype=torch.float64) / deviation
    return None


def take_bytes(graph: ir.Graph, affine: tuple[Tensor, Tensor]) -> ir.Graph:
    """A copy whose four-dimensional float inputs are uint8 images of the affine's channels, normalised first."""
    result = graph.copy()
    scale, shift = affine
    for node in result.inputs:
        if node.shape is None or len(node.shape) != 4 or node.shape[1] != len(scale) or node.dtype == torch.uint8:
            continue
        cast = ir.Node(f"{node.name}_float", ir.Cast(torch.float32), [node], shape=node.shape, dtype=torch.float32)
        image = ir.Node(f"{node.name}_image", ir.Affine(scale, shift), [cast], shape=node.shape, dtype=torch.float32)
        for user in list(node.users):
            if user is not cast:
                result.set(user, user.op, (image if i is node else i for i in user.inputs))
        node.dtype = torch.uint8
        result.insert_after(node, cast)
        result.insert_after(cast, image)
    return result
