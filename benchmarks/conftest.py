"""One timer for every suite: outputs proved first, backends interleaved in one run, caches flushed outside the window.

pytest-benchmark keeps and compares the results; what it records are the samples of our own timer, replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from operands import device_of
from torch import Tensor

import inception_fast as fast
from inception_fast.measure.compare import BUDGET, relative_error
from inception_fast.measure.machine import provenance
from inception_fast.measure.timer import Flush, Plan, contrasts, interleave, noise_floor, summarise

EMPTY = 5  # times what timing nothing takes, below which a time says nothing
SKIPPED = ("reference",)  # float64 in ten slow lines: the truth, not a contestant
BASE = "torch"  # the backend that the others' times are put over
Call = Callable[[], Tensor]


def available() -> list[str]:
    """The backends that this machine has."""
    return [name for name, status in fast.backend_status().items() if status and name not in SKIPPED]


def pytest_configure(config: pytest.Config) -> None:
    """The project's tests switch pytest-benchmark off; here it is what runs, unless it was switched off by hand."""
    if "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_disable = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--warm", action="store_true", help="leave the caches as the call before left them")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    arguments = ["benchmarks", *map(str, config.invocation_params.args)]
    output_json["provenance"] = provenance(torch.get_num_threads(), arguments) | {
        "command": "pytest " + " ".join(map(str, config.invocation_params.args))
    }


class Replay:
    """A clock that tells the samples of another timer: each pair of readings is one of them apart."""

    __name__ = "interleaved"

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.now, self.odd = 0.0, False

    def __call__(self) -> float:
        if self.odd:
            self.now += self.samples.pop(0)
        self.odd = not self.odd
        return self.now


REPLAY = Replay()


class Contests:
    """The samples of every subject, taken when the first of its tests asks, of the backends that were selected."""

    def __init__(self, session: pytest.Session) -> None:
        self.session = session
        self.found: dict[Any, Mapping[str, list[float]]] = {}
        self.flush = None if session.config.option.warm else Flush()
        self.empty = summarise(interleave({"": lambda: None}, Plan(1e-6, 101, 101))[""]).median

    def selected(self, item: pytest.Item) -> list[str]:
        """The backends among the tests of the same subject that this run will make."""

        def subject(one: Any) -> Any:
            return one.originalname, {k: v for k, v in one.callspec.params.items() if k != "backend"}

        same = [one for one in self.session.items if hasattr(one, "callspec") and subject(one) == subject(item)]
        return [one.callspec.params["backend"] for one in same]

    def samples(
        self, item: pytest.Item, make: Callable[[str], Call], truth: Callable[[], Tensor]
    ) -> Mapping[str, list[float]]:
        key = item.originalname, str(sorted((k, str(v)) for k, v in item.callspec.params.items() if k != "backend"))
        if key not in self.found:
            calls = {name: make(name) for name in self.selected(item)}
            exact = truth()
            for name, call in calls.items():
                error = relative_error(call().cpu(), exact)
                if not error <= BUDGET["float32"]:
                    pytest.fail(f"{name} is off by {error:.1e}, more than {BUDGET['float32']:.0e}: not timed")
            option = self.session.config.option
            rounds = max(2, int(option.benchmark_min_rounds))  # of one there is no noise
            plan = Plan(float(option.benchmark_max_time), rounds, 1000)
            timed = {name: _synchronised(name, call) for name, call in calls.items()}
            samples = interleave(timed, plan, before=self.flush)
            for name, taken in samples.items():
                if summarise(taken).median < EMPTY * self.empty:
                    pytest.fail(f"{name} takes no longer than the clock's noise, {self.empty:.1e} s: not told")
            self.found[key] = samples
        return self.found[key]


def _synchronised(backend: str, call: Call) -> Callable[[], object]:
    if device_of(backend) == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


@pytest.fixture(scope="session")
def contests(request: pytest.FixtureRequest) -> Contests:
    return Contests(request.session)


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, contests: Contests, benchmark: Any, backend: str
) -> Iterator[Callable[..., None]]:
    """measure(make, truth, **extra): times make(backend)() beside the other backends and records it with `extra`."""

    def run(make: Callable[[str], Call], truth: Callable[[], Tensor], **extra: Any) -> None:
        if benchmark.disabled:
            assert relative_error(make(backend)().cpu(), truth()) <= BUDGET["float32"]
            benchmark.pedantic(lambda: None)
            return
        with torch.inference_mode():
            every = contests.samples(request.node, make, truth)
        samples = list(every[backend])
        benchmark.group = request.node.name.replace(f"[{backend}-", "[").replace(f"-{backend}]", "]")
        benchmark.extra_info |= extra | {"backend": backend, "noise_floor": noise_floor(samples)}
        if BASE in every and backend != BASE:
            found = contrasts(every, BASE)[backend]
            benchmark.extra_info |= {"ratio": found.ratio, "established": found.established}
        REPLAY.samples, REPLAY.odd = list(samples), False
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1, warmup_rounds=0)

    with torch.inference_mode():
        yield run
