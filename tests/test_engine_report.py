"""The report: complete, readable and JSON-able."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine_nets
import numerics
from engine_nets import NETS, Function, randomised
from inception_fast import optimize
from inception_fast.engine import Report

X = numerics.random(2, 3, 12, 12, seed=2)


@pytest.fixture(scope="module")
def mixed() -> Report:
    """A network with something of everything: fused, in place, dropped, computed once, unused and through torch."""

    def net(m: Function, x: Tensor) -> Tensor:
        y = m.bn(m.a(x)).relu()
        y.square()
        y = torch.cat([m.b(y) * m.factor.exp(), m.c(y)], 1)
        return F.dropout(F.gelu(y), 0.5, False).flatten(2)

    modules = {"a": nn.Conv2d(3, 8, 3), "bn": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 4, 1), "c": nn.Conv2d(8, 5, 1)}
    module = Function(net, **modules)
    module.register_buffer("factor", torch.ones(()))
    return optimize(randomised(module), X).report()


def test_every_kind_of_node(mixed: Report) -> None:
    found = {n.name: n for n in mixed.nodes}
    assert found["conv2d"].steps == found["batch_norm"].steps == found["relu"].steps == ("a",)
    assert found["conv2d_1"].steps == found["conv2d_2"].steps == found["mul"].steps == ("{b,c}",)
    assert found["gelu"].backend == "torch" and "no native step for aten.gelu" in found["gelu"].reason
    for name, why in {
        "cat": "in place",
        "dropout": "computes nothing in inference",
        "exp": "from parameters alone",
        "square": "nothing that an output needs",
    }.items():
        assert not found[name].steps and found[name].backend == "none" and why in found[name].reason


def test_fallbacks_say_why(mixed: Report) -> None:
    assert [f.kind for f in mixed.fallbacks] == ["aten.gelu.default", "reshape"]
    assert all(f.reason and f.backend == "torch" for f in mixed.fallbacks)
    assert mixed.counts["torch_fallbacks"] == 2


def test_steps_have_shapes_and_work(mixed: Report) -> None:
    steps = {s.name: s for s in mixed.steps}
    assert steps["a"].shape == (2, 8, 10, 10) and steps["a"].flops == 2 * 2 * 100 * 8 * 27
    assert steps["{b,c}"].shape == (2, 9, 10, 10) and steps["{b,c}"].flops == 2 * 2 * 100 * 9 * 8
    assert mixed.counts["flops"] >= steps["a"].flops + steps["{b,c}"].flops


def test_counts(mixed: Report) -> None:
    assert mixed.counts["captured_nodes"] == len(mixed.nodes)
    assert (mixed.counts["convolutions_before"], mixed.counts["convolutions"]) == (3, 2)
    assert mixed.counts["launches"] == len(mixed.steps) and mixed.counts["native_calls"] == 1


def test_it_prints_as_an_aligned_table(mixed: Report) -> None:
    lines = str(mixed).splitlines()
    header = next(line for line in lines if "MFLOP" in line)
    rows = lines[lines.index(header) + 1 : lines.index(header) + 1 + len(mixed.steps)]
    assert all(row[header.index("kind") - 1] == " " != row[header.index("kind")] for row in rows)
    assert lines[0] == "Function on cpu, input 2x3x12x12"
    for word in ("captured nodes without a step:", "through torch:", "aten.gelu", "passes that fired"):
        assert word in str(mixed)


def test_it_goes_through_json(mixed: Report) -> None:
    back = json.loads(json.dumps(mixed.to_dict()))
    assert back["model"] == "Function" and len(back["nodes"]) == len(mixed.nodes)
    assert [f["kind"] for f in back["fallbacks"]] == [f.kind for f in mixed.fallbacks]


@pytest.mark.parametrize("name", NETS, scope="module")
def test_complete_for_every_network(name: str) -> None:
    """Each captured call is in a step, or has a reason for having none; steps but the import say what they compute."""
    report = engine_nets.optimised(name).report()
    raw, _, _ = engine_nets.graphs(name)
    assert [n.name for n in report.nodes] == list(raw.captured)
    assert all(n.steps or n.reason for n in report.nodes)
    names = {s.name for s in report.steps}
    assert all(set(n.steps) <= names for n in report.nodes)
    assert all(s.nodes for s in report.steps if s.kind != "import")


def test_another_size() -> None:
    fast = optimize(randomised(nn.Sequential(nn.Conv2d(3, 4, 3))), X)
    assert fast.report().inputs == ((2, 3, 12, 12),)
    report = fast.report(X[:1, :, :8])
    assert report.inputs == ((1, 3, 8, 12),) and report.steps[-1].shape == (1, 4, 6, 10)


def test_backends_of_torch() -> None:
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.GELU()))
    report = optimize(module, X, backend="reference").report()
    assert [s.backend for s in report.steps] == ["reference"] * 2
    assert [f.kind for f in report.fallbacks] == ["aten.gelu.default"]
    assert "Sequential on reference" in str(report)
