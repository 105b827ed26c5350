"""Large batches run a few images at a time: the same bits, the same weights, the same report."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from inception_fast import create_model, optimize
from inception_fast.engine import slices
from inception_fast.engine.runner import OptimizedModule


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


class Shrinking(nn.Module):
    """Maps get smaller and weights more, as in every network here, with a residual and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.left, self.right = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.grow = nn.Conv2d(16, 16, 3, padding=1)
        self.tail = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 40, 3), nn.ReLU(), nn.Conv2d(40, 24, 1))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = torch.cat((self.left(x), self.right(x)), 1)
        x = self.tail((x + 0.5 * self.grow(x)).relu())
        return self.head(x.mean((2, 3))), x


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


def assert_bits_of_single_images(fast: OptimizedModule, model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    one = optimize(model, x[:1], dtype=dtype)
    for y, parts in zip(fast(x), zip(*(one(image[None]) for image in x), strict=True), strict=True):
        assert torch.equal(y, torch.cat(parts))
    assert [name for name, _ in fast.time_steps(x)] == [step.name for step in fast.report().steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [2, 3, 7, 8])
def test_slices_change_no_bit(small_cache: None, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(batch, 3, 20, 20)
    fast = optimize(model, x, dtype=dtype)
    assert_bits_of_single_images(fast, model, x, dtype)
    assert batch < 7 or fast.report().counts["slices"] > 1


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


@pytest.fixture
def weights_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for one of the test's images or two, and none for weights."""
    monkeypatch.setattr(slices, "ARENA_LIMIT", 20_000)
    monkeypatch.setattr(slices, "WEIGHTS_LIMIT", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [5, 8, 16, 27])
def test_later_steps_run_more_images_at_a_time(weights_stream: None, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Shrinking().eval(), torch.randn(batch, 3, 20, 20)
    fast = optimize(model, x, dtype=dtype)
    plan = images_of(fast, x)
    assert len(set(plan)) >= 2 and list(plan) == sorted(plan)
    (native,) = optimize(model, x, dtype=dtype).native_plans()
    assert native.inputs[0][0] == plan[-1] and native.images[-1] == plan[-1] > native.images[0]
    assert_bits_of_single_images(fast, model, x, dtype)


def images_of(fast: OptimizedModule, x: Tensor) -> tuple[int, ...]:
    """How many images of x each step of its program runs at a time."""
    executable, _ = fast._session.executable([x])
    plan = slices.plan_in_slices(executable.program)
    assert plan is not None
    return slices.images_at_a_time(plan)


def test_the_report_of_slices_is_of_the_whole_batch(weights_stream: None) -> None:
    model, x = Shrinking().eval(), torch.randn(27, 3, 20, 20)
    report, one = optimize(model, x).report(), optimize(model, x[:1]).report()
    assert report.counts["slices"] > 1 and report.counts["flops"] == 27 * one.counts["flops"]
    assert {step.shape[0] for step in report.steps if step.shape} == {27}


def test_slices_of_a_network_whose_weights_leave_the_cache() -> None:
    """At the limits as they ship: stages grow to the whole batch, and take less memory than all images at once."""
    torch.manual_seed(0)
    model, x = create_model("inception_v1", num_classes=10).eval(), torch.randn(16, 3, 224, 224)
    fast, one = optimize(model, x), optimize(model, x[:1])
    plan = images_of(fast, x)
    assert plan[0] < plan[-1] == 16
    executable, _ = fast._session.executable([x])
    assert executable.arena_bytes < 0.6 * executable.program.arena_bytes
    y = fast(x)
    assert all(torch.equal(y[i : i + 1], one(x[i : i + 1])) for i in (0, 7, 15))


def test_batch_invariance_may_be_asked_for_where_it_holds_anyway() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval(), torch.randn(3, 3, 20, 20)
    fast = optimize(model, x, batch_invariant=True)
    assert torch.equal(fast(x), optimize(model, x)(x)) and torch.equal(fast(x[:1]), fast(x)[:1])
    with pytest.raises(TypeError, match="batch_invariant of type str; allowed: bool"):
        optimize(model, x, batch_invariant="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_invariant=True on backend 'torch'; allowed: cpu, cuda, triton"):
        optimize(model, x, batch_invariant=True, backend="torch")


class ByTorch(nn.Module):
    """A product of matrices that no kernel has, behind one that has a kernel and a gelu of single elements."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(3, 8, 3), nn.Bilinear(8, 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.conv(x)).mean((2, 3))
        return self.twice(y, y)


def test_what_torch_runs_on_the_cpu_is_named_once() -> None:
    model, x = ByTorch().eval(), torch.randn(3, 3, 20, 20)
    with pytest.warns(
        RuntimeWarning, match=r"batch_invariant=True, but torch runs \w+ \(1 in all\), whose bits may be"
    ):
        fast = optimize(model, x, batch_invariant=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x[:1])
        optimize(model, x)
        optimize(model.conv, x, batch_invariant=True)


@pytest.mark.parametrize("channels", [3, 15, 17, 31])
def test_a_pair_of_few_channels_fused_for_many_images_and_not_for_one(channels: int) -> None:
    """In bfloat16 the taps of its first kernel are joined, in either form, as long as they are fewer than 16."""
    net = nn.Sequential(nn.Conv2d(channels, 8, (1, 3)), nn.ReLU(), nn.Conv2d(8, 4, (3, 1))).eval()
    images = torch.rand(64, channels, 5, 6)
    fast = optimize(net, images, dtype=torch.bfloat16)
    together = fast(images)
    for batch in (1, 64, 1, 32):
        assert torch.equal(fast(images[:batch]), together[:batch])


def test_a_pair_with_few_channels_between_fused_for_many_images_and_not_for_one() -> None:
    """The result is float32, so that all bits of the sums show."""
    net = nn.Sequential(nn.Conv2d(32, 7, (3, 1)), nn.ReLU(), nn.Conv2d(7, 64, (1, 3))).eval()
    images = torch.randn(4, 32, 30, 30)
    fast = optimize(net, images, dtype=torch.bfloat16)
    together = fast(images)
    assert all(torch.equal(fast(images[i : i + 1])[0], together[i]) for i in range(4))
