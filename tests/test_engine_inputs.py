"""How the arguments of a call may be spelled: as any call of the module may."""

from __future__ import annotations

from typing import Any

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
