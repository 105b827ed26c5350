"""`optimize` and the module it returns: the same results as the original in fresh memory, and clear refusals."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from inception_fast.kernels import cpu
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import numerics
from engine_nets import Function, randomised, relative
from inception_fast import backend_status, dispatch, optimize, use_backend
from inception_fast.engine import runner
from inception_fast.engine.program import same_weights
from inception_fast.engine.session import KEPT_CAPTURES, KEPT_PROGRAMS, checksum

X = numerics.random(2, 3, 12, 12, seed=2)


class Small(nn.Module):
    """A branch, a residual, an auxiliary result in a dict, and dropout that training would notice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.bn = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 4, 1)
        self.b = nn.Conv2d(8, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: float = 1.0, *, features: bool = False) -> Any:
        y = self.bn(self.stem(x)).relu()
        y = torch.cat([self.a(y), self.b(y)], 1) + y * scale
        logits = self.fc(self.drop(y).mean((2, 3)))
        return {"logits": logits, "map": y} if features else logits


def small() -> Small:
    module = Small()
    randomised(module)
    return module


@pytest.fixture(scope="module")
def module() -> Small:
    return small()


@pytest.fixture(scope="module")
def fast(module: Small) -> Any:
    return optimize(module, X)


def eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(*args, **kwargs)


@pytest.mark.parametrize("layout", numerics.LAYOUTS)
def test_any_memory_format(layout: str, module: Small, fast: Any) -> None:
    y = fast(numerics.as_layout(X, layout))
    assert relative(y, eager(module, X)) <= numerics.NET_MAX
    assert torch.equal(y, fast(X))


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_other_batches_come_on_demand(batch: int, module: Small, fast: Any) -> None:
    x = numerics.random(batch, 3, 12, 12, seed=batch)
    assert relative(fast(x), eager(module, x)) <= numerics.NET_MAX


@pytest.mark.parametrize("size", [(13, 12), (9, 20)])
def test_other_sizes_come_on_demand(size: tuple[int, int], module: Small, fast: Any) -> None:
    x = numerics.random(2, 3, *size, seed=1)
    assert relative(fast(x), eager(module, x)) <= numerics.NET_MAX


def test_batch_sizes_are_planned_at_once(module: Small) -> None:
    assert optimize(module, X, batch_sizes=[1, 4, 2]).batch_sizes == [1, 2, 4]
    assert optimize(module, X).batch_sizes == [2]


def test_programs_on_demand_are_few(module: Small) -> None:
    fast = optimize(module, X, batch_sizes=[2])
    for batch in range(3, 3 + KEPT_PROGRAMS + 4):
        fast(numerics.random(batch, 3, 12, 12))
    assert len(fast.batch_sizes) == KEPT_PROGRAMS + 1 and 2 in fast.batch_sizes


def test_captures_are_few(module: Small) -> None:
    """Those of kept programs stay, and those asked for last; what went comes again."""
    fast = optimize(module, X)
    example = fast._session.executable([X])[1]
    for height in range(6, 6 + KEPT_CAPTURES + 3):
        fast(numerics.random(2, 3, height, 6))
    captured = fast._session._captured
    assert len(captured) == KEPT_CAPTURES and example in captured.values()
    x = numerics.random(2, 3, 6, 6)
    assert relative(fast(x), eager(module, x)) <= numerics.NET_MAX
    assert len(captured) == KEPT_CAPTURES and fast._session.executable([X])[1] is example


def test_results_are_fresh(module: Small) -> None:
    fast = optimize(module, (X, 1.0), batch_sizes=[2])
    first = fast(X, 1.0)
    kept = first.clone()
    second = fast(X * 2, 1.0)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, kept) and not torch.equal(second, kept)
    second.zero_()
    assert torch.equal(fast(X, 1.0), kept)


def test_structure_and_dtype_of_the_result(module: Small) -> None:
    fast = optimize(module, {"x": X, "features": True})
    found, wanted = fast(X, features=True), eager(module, X, features=True)
    assert list(found) == list(wanted)
    for key in wanted:
        assert found[key].dtype == torch.float32 and not found[key].requires_grad
        assert relative(found[key], wanted[key]) <= numerics.NET_MAX
    assert found["map"].is_contiguous(memory_format=torch.channels_last)


def test_one_spelling_of_a_call_is_as_good_as_another(module: Small, fast: Any) -> None:
    assert torch.equal(fast(x=X), fast(X))


def test_inputs_and_parameters_as_results() -> None:
    net = randomised(Function(lambda m, x: (x, m.conv.weight, m.conv(x), 3, None), conv=nn.Conv2d(3, 4, 1)))
    fast = optimize(net, X)
    x, weight, _, number, nothing = fast(X)
    assert torch.equal(x, X) and torch.equal(weight, net.conv.weight) and (number, nothing) == (3, None)
    assert x.data_ptr() != X.data_ptr() and weight.data_ptr() != net.conv.weight.data_ptr()


def test_several_inputs() -> None:
    net = randomised(Function(lambda m, x, y: m.conv(x) + y, conv=nn.Conv2d(3, 4, 3, padding=1)))
    y = numerics.random(2, 4, 12, 12)
    fast = optimize(net, (X, y))
    assert relative(fast(X, y), eager(net, X, y)) <= numerics.NET_MAX
    with pytest.raises(ValueError, match="input 1: batch of 3; allowed: 2"):
        fast(X, numerics.random(3, 4, 12, 12))


def test_the_original_stays_as_it_is() -> None:
    module = small()
    module.train()
    module.a.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    versions = [p._version for p in module.parameters()]
    y = optimize(module, X)(X)
    assert module.training and not module.a.training and module.drop.training
    assert [p._version for p in module.parameters()] == versions
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert relative(y, eager(module.eval(), X)) <= numerics.NET_MAX, (
        "a module in training mode is captured in eval mode"
    )


def test_changed_parameters_are_noticed() -> None:
    module = small()
    fast = optimize(module, X)
    before = fast(X)
    with torch.no_grad():
        module.fc.weight.mul_(2)
    assert torch.equal(fast(X), before), "the plan holds the parameters it was made of"
    with pytest.raises(RuntimeError, match="parameters of Small changed"):
        fast(X[:1])


@pytest.mark.parametrize("name", ["fc.weight", "a.weight", "bn.bias", "bn.running_var"])
def test_changes_that_torch_does_not_count_are_noticed(name: str) -> None:
    """What is read again for another size is never of another time, and programs that are made stay what they are."""
    module = small()
    fast = optimize(module, X)
    before = fast(X)
    module.state_dict()[name].numpy()[...] += 0.5
    with pytest.raises(RuntimeError, match="parameters of Small changed"):
        fast(X[:, :, 1:])
    assert torch.equal(fast(X), before)
    assert torch.equal(fast(torch.cat([X, X]))[: len(X)], before), "packed weights serve other batches, unread"


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_at_the_same_time(threads: int, module: Small) -> None:
    torch.set_num_threads(threads)
    fast = optimize(module, X)
    inputs = [numerics.random(1 + i % 3, 3, 12, 12, seed=i) for i in range(24)]
    wanted = [eager(module, x) for x in inputs]
    worst = [0.0] * 4

    def work(part: int) -> None:
        for x, expected in list(zip(inputs, wanted, strict=True))[part::4] * 5:
            worst[part] = max(worst[part], relative(fast(x), expected))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert 0 < max(worst) <= numerics.NET_MAX


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: X[0], r"shape \(3, 12, 12\); allowed: \(n, 3, h, w\)"),
    "channels": (lambda: X[:, :2], r"shape \(2, 2, 12, 12\); allowed: \(n, 3, h, w\)"),
    "empty batch": (lambda: X[:0], r"shape \(0, 3, 12, 12\); allowed: .* at least 1"),
    "empty map": (lambda: X[:, :, :0], r"shape \(2, 3, 0, 12\)"),
    "too small": (lambda: X[:, :, :2, :2], r"inputs of \(2, 3, 2, 2\)"),
    "double": (lambda: X.double(), r"dtype torch.float64; allowed: torch.float32"),
    "half": (lambda: X.half(), r"dtype torch.float16; allowed: torch.float32"),
    "bytes": (lambda: X.byte(), r"dtype torch.uint8; allowed: torch.float32"),
    "device": (lambda: X.to("meta"), r"on meta; allowed: torch.strided on cpu"),
    "sparse": (lambda: X.to_sparse(), r"torch.sparse_coo on cpu; allowed: torch.strided on cpu"),
    "no tensor": (lambda: X.numpy(), r"ndarray; allowed: a torch.Tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name: str, fast: Any) -> None:
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        fast(make())


def test_wrong_arguments(fast: Any) -> None:
    with pytest.raises(TypeError, match="missing a required argument"):
        fast()
    with pytest.raises(TypeError, match=r"\(Tensor, float, int\): too many positional.*; allowed: \(x"):
        fast(X, 1.0, 2)
    with pytest.raises(ValueError, match="structure"):
        fast(X, 2.0)
    with pytest.raises(ValueError, match="structure"):
        fast([X])


def test_other_numbers_than_the_example(module: Small) -> None:
    fast = optimize(module, (X, 0.5))
    with pytest.raises(ValueError, match=r"input 1: 2.0; allowed: 0.5"):
        fast(X, 2.0)
    with pytest.raises(ValueError, match=r"input 0: 0.5; allowed: a torch.Tensor|input 0: float"):
        fast(0.5, X)


def test_gradients_are_refused_where_they_are_asked_for(fast: Any) -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="requires gradients"):
        fast(x)
    with torch.no_grad():
        assert torch.equal(fast(x), fast(X))


def test_inference_mode_leaves_nothing_behind() -> None:
    """Arenas are pooled: one that was made in inference mode serves later calls too."""
    net = randomised(Function(lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3)))
    fast = optimize(net, X)
    with torch.inference_mode():
        assert relative(fast(X.clone()), eager(net, X)) <= numerics.NET_MAX
    y = fast(X)
    assert relative(y.add_(1), eager(net, X) + 1) <= numerics.NET_MAX


def test_default_dtype_and_device_change_nothing(module: Small, fast: Any) -> None:
    wanted = fast(X)
    with torch.device("meta"):
        assert torch.equal(fast(X), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fast.cpu()(X), wanted)
        assert torch.equal(optimize(module, X)(X), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_module_is_for_inference_on_the_cpu(fast: Any) -> None:
    assert fast.eval() is fast and fast.to("cpu") is fast and fast.float() is fast and not list(fast.parameters())
    for change in (fast.half, fast.double, lambda: fast.to("meta"), lambda: fast.to(torch.bfloat16)):
        with pytest.raises(RuntimeError, match=r"stay at torch.float32 on cpu"):
            change()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(fast)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tracers_are_told_to_take_the_original(module: Small) -> None:
    """They pass tensors without values, of which native code would read whatever lies there."""
    fast = optimize(module, (X, 0.5))
    with pytest.raises(RuntimeError, match="cannot be traced; trace the original module"):
        torch.jit.trace(lambda x: fast(x, 0.5), X)
    with pytest.raises(RuntimeError, match="cannot be exported: export the original module"):
        torch.export.export(fast, (X, 0.5))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(RuntimeError, match="FakeTensor as input"):
        fast(mode.from_tensor(X), 0.5)
    tagged = torch.Tensor._make_subclass(type("Tagged", (torch.Tensor,), {}), X)
    assert torch.equal(fast(tagged, 0.5), fast(X, 0.5))


def test_a_copy_is_independent(fast: Any) -> None:
    twin = copy.deepcopy(fast)
    assert torch.equal(twin(X), fast(X))
    twin(numerics.random(11, 3, 12, 12))
    assert 11 in twin.batch_sizes and 11 not in fast.batch_sizes
    assert nn.Sequential(fast, nn.ReLU())(X).min() == 0


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: optimize(torch.relu, X), TypeError, "builtin_function_or_method; allowed: torch.nn.Module"),
    "TorchScript": (
        lambda: optimize(torch.jit.trace(nn.Identity(), X), X),
        TypeError,
        "TorchScript .*the module that it",
    ),
    "twice": (lambda: optimize(optimize(small(), X), X), ValueError, "optimised already"),
    "dtype": (lambda: optimize(small(), X, dtype=torch.float16), ValueError, "dtype torch.float16; .* torch.bfloat16"),
    "name of a dtype": (lambda: optimize(small(), X, dtype="bfloat16"), ValueError, "dtype 'bfloat16'; .*bfloat16"),
    "no dtype": (lambda: optimize(small(), X, dtype=""), ValueError, "dtype ''; backend 'cpu' runs torch.float32"),
    "backend": (lambda: optimize(small(), X, backend="tpu"), ValueError, "unknown backend 'tpu'; allowed: .*cpu"),
    "a number": (lambda: optimize(small(), X, batch_sizes=4), TypeError, "batch_sizes 4; allowed: None, or a sequence"),
    "no batch": (lambda: optimize(small(), X, batch_sizes=[]), ValueError, "one or more"),
    "batch of 0": (lambda: optimize(small(), X, batch_sizes=[1, 0]), ValueError, r"\[1, 0\]; allowed: integers"),
    "empty example": (lambda: optimize(small(), X[:0]), ValueError, "at least 1"),
    "example of a list": (lambda: optimize(small(), "x"), ValueError, "no tensor"),
    "half parameters": (lambda: optimize(small().half(), X), ValueError, "is torch.float16 on cpu; allowed"),
    "meta parameters": (lambda: optimize(small().to("meta"), X), ValueError, "on meta; allowed"),
    "lazy": (lambda: optimize(nn.LazyConv2d(3, 1), X), ValueError, "not initialised"),
    "shape": (lambda: optimize(small(), X[:, :2]), ValueError, "torch.export cannot capture Small"),
}


def test_what_shares_out_gradients_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"DistributedDataParallel.*allowed: its \.module"):
            optimize(nn.parallel.DistributedDataParallel(small()), X)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_optimised(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_absent_backends_say_why(name: str) -> None:
    status = backend_status()[name]
    if status:
        pytest.skip(f"{name} can run here")
    with pytest.raises(RuntimeError, match=f"'{name}' cannot run here: {status.reason}"):
        optimize(small(), X, backend=name)


def test_triton_runs_where_its_inputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU a CPU example is refused, and no dtype is served that its kernels lack."""
    monkeypatch.setattr(dispatch, "backend_status", lambda: {n: dispatch.Available("") for n in dispatch.BACKENDS})
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"example inputs on cpu; backend '{name}' runs cuda tensors"):
            optimize(small(), X, backend=name)
        assert runner._checked_backend(name, torch.device("cuda:0")) == (name, True)
    meta = X.to("meta")
    assert runner._checked_backend(None, torch.device("cuda:0")) == ("triton", False)
    assert runner._checked_backend(None, X.device) == runner._checked_backend(None, meta.device) == ("cpu", False)
    monkeypatch.setattr(runner, "_device_of", lambda example: torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"dtype torch\.float32; backend 'cuda' runs torch\.bfloat16, torch\.float16"):
        optimize(small(), X, backend="cuda")


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_backends_of_torch(name: str, module: Small) -> None:
    fast = optimize(module, (X, 0.5), backend=name)
    y = fast(X, 0.5)
    exact = eager(copy.deepcopy(module).double(), X.double(), 0.5)
    assert y.dtype == torch.float32 and fast.backend == name
    assert relative(y, exact) <= (2**-24 if name == "reference" else numerics.NET_MAX)


def test_the_named_backend_is_used(module: Small) -> None:
    with use_backend("reference"):
        assert optimize(module, X).backend == "reference"
    assert optimize(module, X, dtype=torch.float32).backend == "cpu"


class Config:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_bytes_are_normalised_as_the_module_says(padding: int, layout: str) -> None:
    module = randomised(nn.Sequential(nn.Conv2d(3, 8, 3, padding=padding), nn.ReLU()))
    module.data_config = Config()
    fast = optimize(module, X)
    image = torch.randint(0, 256, X.shape, dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (Config.mean, Config.std))
    wanted = eager(module, (image / 255 - mean) / std)
    assert relative(fast(numerics.as_layout(image, layout)), wanted) <= numerics.NET_MAX
    assert relative(fast(X), eager(module, X)) <= numerics.NET_MAX
    kinds = [s.kind for s in fast.report(image).steps]
    assert kinds == ["import", "conv"], "the normalisation costs no step of its own"


def test_a_module_that_takes_bytes_itself() -> None:
    net = randomised(Function(lambda m, x: m.conv(x.float() / 255 - 0.5), conv=nn.Conv2d(3, 8, 3)))
    image = torch.randint(0, 256, X.shape, dtype=torch.uint8)
    fast = optimize(net, image)
    assert relative(fast(image), eager(net, image)) <= numerics.NET_MAX
    assert not fast.report().fallbacks
    with pytest.raises(ValueError, match=r"dtype torch.float32; allowed: torch.uint8"):
        fast(X)


def test_a_batch_of_one_may_be_another_network() -> None:
    """torch.export takes a size of one for a constant, so what a module does for one image is captured apart."""

    def net(m: Function, x: Tensor) -> Tensor:
        return m.conv(x) * 2 if x.shape[0] == 1 else m.conv(x).squeeze()

    module = randomised(Function(net, conv=nn.Conv2d(3, 1, 3)))
    for example in (X, X[:1]):
        fast = optimize(module, example)
        for x in (X, X[:1], torch.cat([X, X])):
            assert relative(fast(x), eager(module, x)) <= numerics.NET_MAX


def test_a_batch_that_the_module_fixes_is_captured_again() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        n = int(x.shape[0])
        return m.conv(x).reshape(n, -1) + torch.arange(n).view(n, 1)

    module = randomised(Function(net, conv=nn.Conv2d(3, 2, 3)))
    fast = optimize(module, X)
    for batch in (2, 3, 4):
        x = numerics.random(batch, 3, 12, 12)
        assert relative(fast(x), eager(module, x)) <= numerics.NET_MAX


def test_steps_can_be_timed(fast: Any) -> None:
    times = fast.time_steps(X)
    assert [name for name, _ in times] == [s.name for s in fast.report().steps] and all(t >= 0 for _, t in times)


def test_torch_calls_see_no_half_finished_memory(module: Small) -> None:
    net = randomised(Function(lambda m, x: F.gelu(m.conv(x)).flip(1), conv=nn.Conv2d(3, 8, 3)))
    fast = optimize(net, X)
    with numerics.poisoned_memory():
        assert relative(fast(X), eager(net, X)) <= numerics.NET_MAX


def test_all_sizes_share_their_weights(module: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, compiled = optimize(module, X), cpu.compile
    donors: list[Any] = []
    monkeypatch.setattr(cpu, "compile", lambda *args, like=None: donors.append(like) or compiled(*args, like=like))
    for x in (X[:1], X[:, :, 1:], numerics.random(5, 3, 20, 9), X):
        assert relative(fast(x), eager(module, x)) <= numerics.NET_MAX
    assert len(donors) == 3 and None not in donors


def test_other_weights_are_not_shared(module: Small) -> None:
    """Whatever differs in the packed numbers keeps two programs apart."""
    first, other = optimize(module, X), copy.deepcopy(module)
    with torch.no_grad():
        other.bn.bias[3] += 1e-3
    programs = [next(iter(f._session.programs().values()))[0].program for f in (first, optimize(other, X))]
    assert same_weights(programs[0], programs[0]) and not same_weights(*programs)


class OnDevice(Tensor):
    """A tensor whose values NumPy cannot read until they are fetched, as on a GPU."""

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.as_subclass(Tensor)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def test_checksums_are_of_what_lies_on_a_gpu_too() -> None:
    here = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    there = here.as_subclass(OnDevice)
    with pytest.raises(TypeError, match="cuda:0"):
        there.numpy()
    assert checksum(there) == checksum(here) != checksum(here + 1)


def test_checksums_are_of_values_that_are_stored_as_their_negatives() -> None:
    there = torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag
    assert there.is_neg() and checksum(there) == checksum(-torch.arange(3.0))
