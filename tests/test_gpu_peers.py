"""The peers of the measuring queue on the CPU: JAX's form of a plan gives the network's numbers, and what fails, or is
wrong, is a row that says so.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import choices
from torch import Tensor, nn
from torch.nn import functional as F

import engine_nets
import inception_fast as fast
import numerics
from inception_fast.engine import gpu_walk
from queue_modules import loaded

pytest.importorskip("jax", reason="jax is a peer of the benchmarks, not a dependency")


@pytest.fixture(scope="module")
def queue() -> Iterator[dict[str, Any]]:
    with loaded("xla", "measure", "networks") as modules:
        yield modules


class Block(nn.Module):
    """Siblings with scattered columns, a pair, a residual in place, both kinds of average, LRN, unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 12, 3, 2, padding=1), nn.Conv2d(12, 8, 1)
        self.two, self.wide = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, (1, 7), padding=(0, 3))
        self.tall, self.up = nn.Conv2d(12, 8, (7, 1), padding=(3, 0)), nn.Conv2d(28, 28, 1)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.local_response_norm(F.relu(self.norm(self.stem(2 * x - 1))), 5)
        pair = F.relu(self.tall(F.relu(self.wide(F.relu(self.two(x))))))
        x = torch.cat((F.relu(self.one(x)), pair, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)), 1)
        x = F.relu(x + 0.2 * self.up(x))
        x = F.avg_pool2d(F.max_pool2d(x, 3, 2, ceil_mode=True), 3, 1, 1)
        return F.normalize(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_a_plan_in_jax_is_the_network(queue: dict[str, Any]) -> None:
    module, x = engine_nets.randomised(Block()).eval(), numerics.random(2, 3, 17, 19)
    plan = queue["networks"].plan_of(module, x, "float32")
    y = queue["measure"].as_tensor(queue["xla"].network(plan, [x], "float32")())
    assert engine_nets.relative(y, engine_nets.eager(module, x)) <= numerics.NET_MAX


def test_a_layer_in_jax_is_the_convolution(queue: dict[str, Any]) -> None:
    xla, measure = queue["xla"], queue["measure"]
    x, weight = numerics.random(2, 5, 9, 8), numerics.random(7, 5, 3, 1, seed=1)
    spec = measure.ConvSpec(2, 9, 8, 5, 7, 3, 1, (2, 1), (1, 1, 0, 0))
    y = measure.as_tensor(xla.layer(spec, x, weight, torch.ones(7))())
    numerics.assert_close_budget(y, (F.conv2d(x.double(), weight.double(), None, (2, 1), (1, 0)) + 1).relu())


def test_what_is_wrong_or_fails_is_not_timed(queue: dict[str, Any]) -> None:
    wanted = torch.ones(2, 3, dtype=torch.float64)

    def missing() -> Any:
        raise ImportError("no such peer")

    makers = {
        "ours": lambda: lambda: torch.ones(4, 3),
        "wrong": lambda: lambda: torch.full((4, 3), 1.5),
        "nan": lambda: lambda: torch.full((4, 3), float("nan")),
        "broken": lambda: lambda: torch.ones(4, 3) @ torch.ones(4, 3),
        "missing": missing,
    }
    rows, calls = queue["measure"].checked(makers, {"batch": 4}, wanted, lambda runtime: 1e-3)
    status = {name: row["status"] for name, row in rows.items()}
    assert status == dict(ours="ok", wrong="wrong", nan="wrong", broken="failed", missing="unavailable")
    assert list(calls) == ["ours"] and rows["nan"]["rel_error"] is None
    assert all(row["batch"] == 4 for row in rows.values()) and "no such peer" in rows["missing"]["note"]


class Small(nn.Module):
    """A network with what the job asks of one: batch norms to calibrate, and the size of its images."""

    data_config = types.SimpleNamespace(input_size=(3, 16, 16))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pair = fast.ConvBNReLU(3, 16, 3, 2), fast.AsymmetricPair(16, 16, 24, 3)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(self.stem(x)).mean((2, 3)))


def test_a_network_is_timed_beside_its_peers(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that the job goes, on the CPU and with a small network; Inductor, which takes minutes, stands aside."""
    networks, modes = queue["networks"], list[tuple[str, bool]]()

    def compiled(peer: nn.Module, x: Tensor, mode: str, *, freezing: bool = True) -> Any:
        modes.append((mode, freezing))
        wrong = frozen_wrong and freezing
        return lambda: peer(x) + 1 if wrong else peer(x).clone()

    frozen_wrong = False
    monkeypatch.setattr(networks, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(networks, "compiled", compiled)
    monkeypatch.setattr(networks.fast, "create_model", lambda name: Small())
    first, second, third, *_, last = (
        [dict(row) for row in rows] for rows in networks.peer_rows("inception_v1", 2, "bfloat16", 7)
    )
    assert [row["runtime"] for row in first] == ["ours"] and not any("median_ms" in row for row in second)
    assert [row["runtime"] for row in third] == ["ours", "eager"] and all("median_ms" in row for row in third)
    assert [row["runtime"] for row in last] == ["ours", "eager", "xla", "compile"]
    *_, quick = networks.network_rows("inception_v1", 2, "bfloat16")
    assert [row["runtime"] for row in quick] == ["ours", "graphs"]
    *_, alike = networks.peer_rows("inception_v1", 2, "bfloat16", 7, "invariant")
    assert [row["runtime"] for row in alike] == ["ours", "invariant"]
    for row in [*last, *quick, *alike]:
        assert row["status"] == "ok" and row["median_ms"] > 0 and row["ratio"] > 0, row
        assert row["rel_error"] < 5e-2 and row["batch"] == 2
    frozen_wrong = True
    *_, other = networks.network_rows("inception_v1", 2, "bfloat16")
    assert [(row["runtime"], row["status"]) for row in other] == [
        ("ours", "ok"),
        ("graphs", "wrong"),
        ("unfrozen", "ok"),
    ]
    assert "median_ms" in other[2] and "median_ms" not in other[1] and other[1]["ratio"] is None
    *_, known = networks.network_rows(networks.FROZEN_WRONG[0], 2, "bfloat16")
    assert [row["runtime"] for row in known] == ["ours", "unfrozen"], "nobody waits for what is known to be wrong"
    frozen_wrong = False
    monkeypatch.setattr(networks.fast, "backend_status", lambda: {"cuda": True})
    *_, before, made_last, whole = networks.network_rows("inception_v1", 2, "bfloat16", cuda=True)
    assert [row["runtime"] for row in before] == ["ours", "graphs", "triton"] and len(whole) == 4
    assert [row["runtime"] for row in made_last][3:] == ["cuda"]
    status = {row["runtime"]: row["status"] for row in whole}
    assert status == dict(ours="ok", graphs="ok", triton="failed", cuda="failed"), "no GPU is here"
    made_with = dict[str | None, list[bool]]()
    right = networks.fast.optimize

    def optimize(net: nn.Module, x: Tensor, dtype: torch.dtype, backend: str | None, **others: bool) -> Any:
        made_with.setdefault(backend, []).append(gpu_walk._disabled.get())
        return right(net, x, dtype=dtype)

    with monkeypatch.context() as at_one:
        at_one.setattr(networks.fast, "optimize", optimize)
        *_, timed, one, both, whole = networks.network_rows("inception_v1", 1, "bfloat16", cuda=True)
    assert [row["runtime"] for row in timed] == ["ours", "graphs", "triton"] and "median_ms" in timed[2]
    assert [len(rows) for rows in (one, both, whole)] == [4, 5, 5]
    assert [row["runtime"] for row in whole][3:] == ["separate", "cuda"] and {row["status"] for row in whole} == {"ok"}
    assert made_with == {None: [False], "triton": [False], "cuda": [True, False]}, "without walks, then with them"
    assert {row["tiles"] for row in last} == {7} and {row["tiles"] for row in quick} == {0}
    assert modes[0] == ("max-autotune", True)
    assert modes.count(("reduce-overhead", False)) == 2 and len(modes) == 7


def test_a_network_with_walks_is_a_choice(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the fastest of ours that has none, whichever that is; ours may have some by a row measured before."""
    networks, walks = queue["networks"], {"cuda": (9, 3), "ours": (12,)}
    task = types.SimpleNamespace

    def tasks_of(made: Any, x: Tensor) -> list[tuple[Any, Any]]:
        found = [task(walk=task(members=range(jobs))) for jobs in walks.get(made.name, ())]
        return [(None, one) for one in (task(walk=None), *found)]

    monkeypatch.setattr(networks, "tasks_of", tasks_of)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    milliseconds = {"ours": 0.3, "triton": 0.8, "separate": 0.6, "cuda": 0.4, "eager": 0.1}
    rows = {name: {"median_ms": ms, "dtype": "bfloat16", "batch": 1} for name, ms in milliseconds.items()}
    made = {name: task(name=name, backend="triton" if name == "ours" else name) for name in milliseconds}
    made["separate"].backend = "cuda"
    calls = {name: networks.Network(made[name], torch.zeros(1)) for name in milliseconds if name != "eager"}
    choice = networks.walk_choice(rows, {**calls, "eager": lambda: None})
    assert choice == ["a GPU", "walk", "half", 1, 12, 1, 1, "walk", 1, 0.4e-3, 0.6e-3]
    assert choices.row_of(choice).shape == gpu_walk.shape_of("float16", 1, 12)
    del walks["ours"]
    assert networks.walk_choice(rows, calls)[-1] == 0.3e-3
    assert networks.walk_choice(rows, {name: calls[name] for name in ("triton", "ours")}) is None
    walks.clear()
    assert networks.walk_choice(rows, calls) is None
