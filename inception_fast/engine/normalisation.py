"""uint8 images into a module that takes normalised floats: the module's own data configuration says how."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from . import graph as ir


def image_affine(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), float64 [c], with scale * byte + shift = (byte / 255 - mean) / std.

    None where it is not known, which is also where there is no finite mean and deviation for each channel.

    Read from `module.data_config`, or from `module.pretrained_cfg` where timm keeps it.
    """
    for name in ("data_config", "pretrained_cfg"):
        config: Any = getattr(module, name, None)
        mean, std = (config.get(k) if isinstance(config, dict) else getattr(config, k, None) for k in ("mean", "std"))
        if mean is not None and std is not None:
            centre, deviation = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (mean, std))
            known = centre.dim() == 1 and centre.shape == deviation.shape and deviation.all()
            if known and torch.cat([centre, deviation]).isfinite().all():
                return 1 / (255 * deviation), -centre / deviation
    return None


def take_bytes(graph: ir.Graph, affine: tuple[Tensor, Tensor], images: Collection[int]) -> ir.Graph:
    """A copy whose inputs at the positions `images` are uint8 images of the affine's channels, normalised first."""
    result = graph.copy()
    scale, shift = affine
    for node in result.inputs:
        if not isinstance(node.op, ir.Input) or node.op.index not in images:
            continue
        cast = ir.Node(f"{node.name}_float", ir.Cast(torch.float32), [node], shape=node.shape, dtype=torch.float32)
        image = ir.Node(f"{node.name}_image", ir.Affine(scale, shift), [cast], shape=node.shape, dtype=torch.float32)
        for user in list(node.users):
            if user is not cast:
                result.set(user, user.op, (image if i is node else i for i in user.inputs))
        result.outputs = [image if o is node else o for o in result.outputs]
        node.dtype = torch.uint8
        result.insert_after(node, cast)
        result.insert_after(cast, image)
    return result
