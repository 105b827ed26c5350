"""Which backend runs what: reasons instead of silence, names that are obeyed, packed weights that are never stale."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import loader
from inception_fast.kernels.spec import ConvSpec, PairSpec, PoolSpec
from torch import Tensor

import inception_fast as fast
import numerics
from inception_fast import dispatch, ops
from inception_fast.backends import hopper_gpu, native_cpu

SPEC = ConvSpec(1, 8, 8, 16, 24, 1, 1)


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Forgets what was probed, chosen and warned about, before and after."""

    def forget() -> None:
        dispatch._probe.cache_clear()
        dispatch.choose.cache_clear()
        dispatch._warned.clear()

    forget()
    yield
    forget()


def call(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, **options: Any) -> Tensor:
    return ops.conv_bn_relu(x, weight, scale, shift, stride=1, padding=0, **options)


def arguments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draws = [numerics.random(2, 16, 5, 5, dtype=dtype), numerics.random(24, 16, 1, 1, seed=1, dtype=dtype)]
    return [*draws, numerics.random(24, seed=2, low=0.5), numerics.random(24, seed=3)]


def test_status_values_are_truthy_or_falsy_frozen_and_read_as_written() -> None:
    yes, no = fast.Available("amx_bf16"), fast.Unavailable("no NVIDIA driver")
    assert yes and not no
    assert repr(yes) == 'Available("amx_bf16")' and repr(no) == 'Unavailable("no NVIDIA driver")'
    assert yes == fast.Available("amx_bf16") and yes != fast.Available("avx2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        no.reason = "x"  # type: ignore[misc]


def test_backend_status_names_every_backend() -> None:
    status = fast.backend_status()
    assert list(status) == ["cpu", "cuda", "triton", "torch", "reference"]
    assert status["torch"] == fast.Available(torch.__version__) and status["reference"] and status["cpu"]
    status.clear()
    assert fast.backend_status(), "the caller's copy is its own"


@pytest.mark.parametrize(
    ("files", "cuda", "expected"),
    [
        ((), "13.0", "no NVIDIA driver"),
        ((__file__,), None, f"torch {torch.__version__} is built without CUDA"),
        (
            (__file__,),
            "13.0",
            f"the CUDA kernels were not built: no _hopper.so beside nowhere/__init__.py; {loader.BUILD}",
        ),
    ],
)
def test_gpu_status_says_what_is_missing(
    files: tuple[str, ...], cuda: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, fresh_choice: None
) -> None:
    monkeypatch.setattr(dispatch, "DRIVER_FILES", files)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(loader, "FILE", Path("nowhere/_hopper.so"))
    assert fast.backend_status()["cuda"] == fast.Unavailable(expected)


def test_triton_is_available_beside_a_driver(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setattr(dispatch, "DRIVER_FILES", (__file__,))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    status = fast.backend_status()["triton"]
    assert status and status.detail.startswith("triton 3.")
    spec = ConvSpec(1, 8, 8, 32, 32, 3, 3, dtype="float64")
    assert "dtype float64" in dispatch.explain(spec, "cuda")["triton"][0]
    grouped = ConvSpec(1, 8, 8, 32, 32, 3, 3, groups=2)
    assert "groups 2 of 32 channels" in dispatch.explain(grouped, "cuda")["triton"][0]
    assert dispatch.choose(ConvSpec(1, 8, 8, 32, 32, 3, 3), "cuda") == "triton"


def test_status_neither_loads_triton_nor_touches_cuda() -> None:
    program = (
        "import sys, torch, inception_fast as fast; fast.backend_status()\n"
        "assert not torch.cuda.is_initialized() and not {'triton', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_instruction_set_that_cannot_run_raises() -> None:
    program = "import inception_fast as fast; fast.backend_status()"
    environment = {"PATH": "/usr/bin", "INCEPTION_FAST_ISA": "mmx"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode != 0 and "ValueError: INCEPTION_FAST_ISA=mmx" in ran.stderr and "generic" in ran.stderr


def test_explain_covers_every_backend_and_kind_of_spec() -> None:
    pool = PoolSpec(1, 8, 8, 16, 3, 3, padding=(1, 1, 1, 1), kind="avg")
    pair = PairSpec(
        ConvSpec(1, 8, 8, 4, 4, 1, 3, padding=(0, 0, 1, 1)), ConvSpec(1, 8, 8, 4, 4, 3, 1, padding=(1, 1, 0, 0))
    )
    for spec in (SPEC, pool, pair, dispatch.PoolProjectSpec(pool, SPEC, False)):
        found = dispatch.explain(spec)
        assert list(found) == list(fast.backend_status())
        assert found["cpu"] == found["torch"] == found["reference"] == [] and found["cuda"] and found["triton"]
        half = dispatch.explain(spec, dtype=torch.float16)
        assert "float16" in half["cpu"][0] and "float32" in half["cpu"][0] and half["torch"] == []
        assert "not on cuda" in dispatch.explain(spec, "cuda")["cpu"][0]


@pytest.mark.parametrize("change", [{"stride": (1, 2**32)}, {"padding": (2**32, 0, 0, 0)}], ids=str)
def test_numbers_beyond_the_kernels_are_a_reason(change: dict[str, tuple[int, ...]]) -> None:
    spec: ConvSpec = dataclasses.replace(SPEC, **change)  # type: ignore[arg-type]
    assert dispatch.explain(spec)["cpu"] == [f"a size of {2**32}; the CPU kernels take sizes below 2^20"]


def test_choice_follows_the_order() -> None:
    assert dispatch.choose(SPEC, "cpu") == "cpu"
    assert dispatch.choose(dispatch.with_dtype(SPEC, "bfloat16"), "cpu") == "cpu"
    assert dispatch.choose(dispatch.with_dtype(SPEC, "float16"), "cpu") == "torch"
    assert dispatch.choose(SPEC, "cpu", "reference") == "reference"


def test_a_named_backend_that_cannot_run_raises_with_all_reasons() -> None:
    for named in (lambda: call(*arguments(), backend="cuda"), in_context("cuda")):
        with pytest.raises(RuntimeError) as caught:
            named()
        message = str(caught.value)
        assert "'cuda' cannot run" in message
        assert all(f"\n  {name}: " in message for name in dispatch.BACKENDS)
    with pytest.raises(RuntimeError, match="dtype float16"):
        call(*arguments(torch.float16), backend="cpu")


def in_context(name: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with fast.use_backend(name):
            return call(*arguments())

    return run


def test_an_unknown_name_raises_naming_the_allowed() -> None:
    unknown: tuple[Any, ...] = ("tpu", ["cpu"], 0)
    for name in unknown:
        for named in (lambda name: fast.use_backend(name), lambda name: call(*arguments(), backend=name)):
            with pytest.raises(ValueError, match=rf"{re.escape(repr(name))}; allowed: cpu, cuda, triton, torch, ref"):
                named(name)


def test_use_backend_nests_and_ends_also_on_an_error() -> None:
    assert dispatch.current_backend() is None
    with fast.use_backend("torch"):
        with fast.use_backend("reference"):
            assert dispatch.current_backend() == "reference"
            with fast.use_backend(None):
                assert dispatch.current_backend() is None
        assert dispatch.current_backend() == "torch"
        with pytest.raises(KeyError), fast.use_backend("cpu"):
            raise KeyError
        assert dispatch.current_backend() == "torch"
    assert dispatch.current_backend() is None


def test_use_backend_may_be_kept_and_entered_again() -> None:
    library, named = fast.use_backend("torch"), fast.use_backend("reference")
    for _ in range(2):
        with library:
            with named, library:
                assert dispatch.current_backend() == "torch"
            assert dispatch.current_backend() == "torch"
            assert named(dispatch.current_backend)() == "reference"  # type: ignore[operator]
        assert dispatch.current_backend() is None


def test_use_backend_is_obeyed_and_an_argument_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("cpu", "torch", "reference"):
        adapter = dispatch.adapter(name)
        monkeypatch.setattr(adapter, "run", record(ran, name, adapter.run))
    call(*arguments())
    with fast.use_backend("reference"):
        call(*arguments())
        call(*arguments(), backend="torch")
    assert ran == ["cpu", "reference", "torch"]


def record(ran: list[str], name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def recorded(*args: Any) -> Tensor:
        ran.append(name)
        return run(*args)

    return recorded


def test_use_backend_reaches_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made inside the operation, so a compiled graph does not keep the one it was traced under."""
    ran: list[str] = []
    monkeypatch.setattr(
        dispatch.adapter("reference"), "run", record(ran, "reference", dispatch.adapter("reference").run)
    )
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    compiled(*arguments())
    with fast.use_backend("reference"):
        compiled(*arguments())
    assert ran == ["reference"]


def test_use_backend_of_one_thread_is_unseen_by_another() -> None:
    seen: list[str | None] = []
    with fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.current_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_leaving_the_native_kernels_warns_once_for_each_reason(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None
) -> None:
    monkeypatch.setattr(dispatch, "_probe_cpu", lambda: fast.Unavailable("the kernels are not built"))
    with pytest.warns(RuntimeWarning, match="conv through torch.*the kernels are not built"):
        assert dispatch.choose(SPEC, "cpu") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.choose(dataclasses.replace(SPEC, h=9), "cpu")
        dispatch.choose(SPEC, "cpu", "torch")
    assert "the kernels are not built" in dispatch.explain(SPEC)["cpu"]


def test_a_dtype_that_only_torch_has_does_not_warn(fresh_choice: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(dispatch.with_dtype(SPEC, "float64"), "cpu") == "torch"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An empty plan cache, and the plans compiled since."""
    plans: list[Any] = []
    compile_plan = native_cpu.cpu.compile
    monkeypatch.setattr(native_cpu, "plans", native_cpu.PlanCache())
    monkeypatch.setattr(native_cpu.cpu, "compile", lambda plan: plans.append(plan) or compile_plan(plan))
    return plans


def test_weights_are_packed_once(compiled: list[Any]) -> None:
    x, *params = arguments()
    for _ in range(3):
        call(x, *params)
        call(x.clone(), *params)
    assert len(compiled) == 1
    call(x.contiguous(memory_format=torch.channels_last), *params)
    call(x[:1], *params)
    assert len(compiled) == 3, "another layout or size is another plan"


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda t: t.mul_(2),
    "one element in place": lambda t: t.view(-1)[-1].fill_(9.0),
    "through data": lambda t: t.data.mul_(2),
    "through NumPy": lambda t: t.numpy().__imul__(2),
    "other storage": lambda t: t.set_(t.clone().mul_(2)),
}


@pytest.mark.parametrize("place", [1, 2, 3], ids=["weight", "scale", "shift"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_never_stale(change: str, place: int, compiled: list[Any]) -> None:
    values = arguments()
    before = call(*values)
    CHANGES[change](values[place])
    after = call(*values)
    assert not torch.equal(before, after) and len(compiled) == 2
    assert torch.equal(after, call(*[value.clone() for value in values]))


def test_a_large_weight_written_through_data_is_noticed(compiled: list[Any]) -> None:
    """Of more than 4096 elements only 64 are looked at: an optimiser's step or an average changes them all."""
    x, weight = numerics.random(1, 96, 3, 3), numerics.random(96, 96, 1, 1, seed=1)
    one, zero = torch.ones(96), torch.zeros(96)
    before = call(x, weight, one, zero)
    weight.data.mul_(1.001)
    assert not torch.equal(before, call(x, weight, one, zero)) and len(compiled) == 2


def test_plans_leave_with_their_weights(compiled: list[Any]) -> None:
    values = arguments()
    call(*values)
    call(*[value.detach() for value in values])
    assert len(native_cpu.plans) == len(compiled) == 1, "another tensor of the same memory has the same plan"
    compiled.clear()  # they hold arrays of the weights' memory
    del values
    gc.collect()
    assert len(native_cpu.plans) == 0 and native_cpu.plans._bytes == 0


def test_the_cache_keeps_to_its_limit(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, *params = arguments()
    call(x, *params)
    one = native_cpu.plans._bytes
    assert one >= params[0].numel() * 4
    monkeypatch.setattr(native_cpu, "plans", native_cpu.PlanCache(limit=2 * one))
    for h in (5, 4, 3):
        call(x[:, :, :h], *params)
    assert len(native_cpu.plans) == 2
    compiled.clear()
    call(x[:, :, :3], *params)
    call(x[:, :, :5], *params)
    assert len(compiled) == 1, "the newest stayed, the least recently used left"


def negate_a_row(weight: Tensor) -> None:
    weight[5].neg_()


def change_one_value(weight: Tensor) -> None:
    weight[7, 11, 0, 0] += 1e-3


def exchange_two_rows(weight: Tensor) -> None:
    weight[[1, 2]] = weight[[2, 1]]


@pytest.mark.parametrize("change", [negate_a_row, change_one_value, exchange_two_rows])
@pytest.mark.parametrize("oc", [8, 96], ids=["few values", "many values"])
def test_every_change_of_an_inference_tensor_is_noticed(
    oc: int, change: Callable[[Tensor], None], compiled: list[Any]
) -> None:
    """They count no versions, and code that runs in inference mode from the start has no other weights."""
    with torch.inference_mode():
        x, weight = numerics.random(1, 96, 3, 3), numerics.random(oc, 96, 1, 1, seed=1)
        one, zero = torch.ones(oc), torch.zeros(oc)
        before = call(x, weight, one, zero)
        assert torch.equal(call(x, weight, one, zero), before) and len(compiled) == 1, "kept"
        change(weight)
        after = call(x, weight, one, zero)
        assert not torch.equal(before, after) and len(compiled) == 2
        assert torch.equal(after, call(x, weight.clone(), one, zero))


def test_threads_share_the_cache_and_agree() -> None:
    values = arguments()
    expected = call(*values)
    wrong: list[int] = []

    def work(seed: int) -> None:
        own = copy.deepcopy(values)
        for turn in range(30):
            if not (torch.equal(call(*values), expected) and torch.equal(call(*own), expected)):
                wrong.append(seed)
            if turn % 10 == 9:
                own = copy.deepcopy(values)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_image_alone_or_in_a_batch_and_any_thread_count_give_the_same_bits() -> None:
    x, *params = numerics.random(3, 16, 9, 9), *arguments()[1:]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = call(x, *params, backend="cpu")
        torch.set_num_threads(2)
        assert torch.equal(call(x, *params, backend="cpu"), together)
        assert torch.equal(call(x[1:2], *params, backend="cpu"), together[1:2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wins", [False, True])
def test_kernels_are_not_run_to_be_left_out(wins: bool, fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the CUDA kernels can run is found out by running them: only where a measurement or a name wants that."""
    asked: list[str] = []

    def adapter(name: str) -> Any:
        return SimpleNamespace(reasons=lambda spec: asked.append(name) or [], wins=lambda spec: wins)

    status = {**dispatch.backend_status(), "cuda": fast.Available("sm_90a"), "triton": fast.Available("3.6")}
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    monkeypatch.setattr(dispatch, "adapter", adapter)
    chosen = "cuda" if wins else "triton"
    assert dispatch.choose(SPEC, "cuda") == chosen and asked == [chosen]
    assert dispatch.choose(SPEC, "cuda", "cuda") == "cuda" and asked == [chosen, "cuda"]


def test_each_of_several_gpus_is_asked_about_itself(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old one beside a new one, whichever of them is the current device and is asked first."""
    current = [0]

    @contextlib.contextmanager
    def device(there: torch.device) -> Iterator[None]:
        before, current[0] = current[0], there.index
        yield
        current[0] = before

    old = ["GPU of compute capability 7.5; allowed: 8.0 and up"]
    triton = SimpleNamespace(reasons=lambda spec: old if current[0] else [])
    torchs = SimpleNamespace(reasons=lambda spec: [])
    status = {"cuda": fast.Unavailable("not built"), "triton": fast.Available("3.6"), "torch": fast.Available("2.13")}
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    monkeypatch.setattr(dispatch, "adapter", {"triton": triton, "torch": torchs}.__getitem__)
    monkeypatch.setattr(dispatch, "_warn_of_library_path", lambda spec, kind: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    assert [dispatch.explain(SPEC, f"cuda:{i}")["triton"] for i in (1, 0)] == [old, []]
    chosen = [dispatch.choose(SPEC, f"cuda:{i}") for i in (0, 1, 0)]
    assert chosen == ["triton", "torch", "triton"] and current == [0]


def test_only_convolutions_in_half_precision_win_by_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no row of measurements is not looked up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hopper_gpu, "measured", lambda device: pytest.fail("looked up"))
    for spec in (SPEC, PairSpec(SPEC, SPEC, "split"), PoolSpec(1, 8, 8, 16, 3, 3)):
        assert not hopper_gpu.wins(spec)
    with pytest.raises(pytest.fail.Exception, match="looked up"):
        hopper_gpu.wins(dataclasses.replace(SPEC, dtype="bfloat16"))
