"""How the arguments of a call may be spelled: as any call of the module may."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from inception_fast import optimize

X, BIAS = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, bias: Tensor | None = None, relu: bool = True, *, double: bool = False) -> Tensor:
        y = self.conv(x) if bias is None else self.conv(x) + bias
        y = y.relu() if relu else y
        return 2 * y if double else y


CALLS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "all defaults": [((X,), {}), ((X, None), {}), ((X, None, True), {"double": False}), ((), {"relu": True, "x": X})],
    "one in the middle": [((X, None, False), {}), ((X,), {"relu": False}), ((), {"x": X, "bias": None, "relu": False})],
    "a keyword alone": [((X,), {"double": True}), ((X, None, True), {"double": True})],
    "a tensor": [((X, BIAS), {}), ((X,), {"bias": BIAS, "double": False}), ((X, BIAS, True), {})],
}


@pytest.mark.parametrize("name", CALLS)
def test_defaults_may_be_spelled_out(name: str) -> None:
    model = Optional().eval()
    for args, kwargs in CALLS[name]:
        fast = optimize(model, {"x": X, **dict(zip(("x", "bias", "relu"), args, strict=False)), **kwargs})
        for other, keywords in CALLS[name]:
            with torch.no_grad():
                torch.testing.assert_close(fast(*other, **keywords), model(*other, **keywords))
    with pytest.raises(ValueError, match=r"structure|in the example"):
        fast(X, BIAS if name != "a tensor" else None, False)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return self.conv(maps["left"]) - self.conv(maps["right"]).relu()


def test_dictionaries_may_come_in_another_order() -> None:
    model, maps = Named().eval(), {"left": X, "right": torch.randn_like(X)}
    fast = optimize(model, (maps,))
    with torch.no_grad():
        wanted = model(maps)
        for call in (maps, dict(reversed(maps.items()))):
            torch.testing.assert_close(fast(call), wanted)
    with pytest.raises(ValueError, match="structure"):
        fast({"left": X, "middle": X})
    with pytest.raises(ValueError, match="structure"):
        fast({"left": X, "right": [X]})


def test_shapes_and_arrays_are_no_examples() -> None:
    module, x = nn.Conv2d(3, 4, 1), torch.zeros(2, 3, 8, 8)
    for shape in (tuple(x.shape), x.shape):
        with pytest.raises(TypeError, match=r"arguments \(int, int, int, int\): .*; allowed: \(input: "):
            optimize(module, shape)
    with pytest.raises(ValueError, match="among the inputs, ndarray; allowed: at least one"):
        optimize(module, x.numpy())


class Pictures(nn.Sequential):
    data_config: ClassVar = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_example_may_be_bytes(backend: str) -> None:
    """They are normalised as in later calls, and floats are taken as well; a module that takes bytes is left to it."""
    model, pixels = Pictures(nn.Conv2d(3, 4, 3, padding=1)).eval(), torch.randint(0, 256, (2, 3, 8, 9)).byte()
    mean, std = (torch.tensor(model.data_config[key])[:, None, None] for key in ("mean", "std"))
    fast = optimize(model, pixels, backend=backend, batch_sizes=[1, 2])
    assert fast.batch_sizes == [1, 2]
    for x in (pixels, pixels[:1], pixels[:, :, :5]):
        wanted = model((x / 255 - mean) / std).detach()
        torch.testing.assert_close(fast(x), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fast((x / 255 - mean) / std), wanted, rtol=1e-5, atol=1e-5)
    assert fast.report().counts["captured_nodes"] == 1
    with pytest.raises(ValueError, match=r"dtype torch\.int64; allowed: torch\.float32 or torch\.uint8"):
        fast(pixels.long())
    with pytest.raises(ValueError, match="Input type"):
        optimize(nn.Sequential(model), pixels, backend=backend)


class Halves(Pictures):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 2)


def test_a_module_with_a_configuration_may_take_bytes_itself() -> None:
    model, pixels = Halves(nn.Conv2d(3, 4, 3)).eval(), torch.randint(0, 256, (2, 3, 8, 8)).byte()
    torch.testing.assert_close(optimize(model, pixels)(pixels), model(pixels).detach(), rtol=1e-5, atol=1e-3)
