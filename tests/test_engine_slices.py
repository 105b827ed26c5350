"""Large batches run a few images at a time: the same bits, the same weights, the same report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inception_fast import optimize
from inception_fast.engine import slices


class Net(nn.Module):
    """Two outputs, a concatenation, a pair: all native."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Sequential(
            nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(8, 8, (3, 1)), nn.ReLU()
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(self.first(x).relu())
        return self.head(y.mean((2, 3))), y


class Meeting(nn.Module):
    """Images meet: no slice may run alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - self.first(x).mean(0, keepdim=True)


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that two or three of the test's images fill."""
    monkeypatch.setattr(slices, "ARENA_LIMIT", 60_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [2, 3, 7, 8])
def test_slices_change_no_bit(small_cache: None, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(batch, 3, 20, 20)
    fast = optimize(model, x, dtype=dtype)
    one = optimize(model, x[:1], dtype=dtype)
    found = fast(x)
    for y, parts in zip(found, zip(*(one(image[None]) for image in x), strict=True), strict=True):
        assert torch.equal(y, torch.cat(parts))
    counts = fast.report().counts
    assert batch < 7 or counts["slices"] > 1
    names = [name for name, _ in fast.time_steps(x)]
    assert names == [step.name for step in fast.report().steps]


def test_sizes_share_one_copy_of_the_weights(small_cache: None) -> None:
    model, x = Net().eval(), torch.randn(7, 3, 20, 20)
    fast = optimize(model, x)
    fast(x[:5]), fast(x[:1])
    natives = [n for e, _ in fast._session.programs().values() for n in e.native.values()]
    assert len(natives) == 3 and len({n.packed_bytes for n in natives}) == 1


def test_images_that_meet_stay_together(small_cache: None) -> None:
    torch.manual_seed(0)
    model, x = Meeting().eval(), torch.randn(8, 3, 20, 20)
    fast = optimize(model, x)
    assert "slices" not in fast.report().counts
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
