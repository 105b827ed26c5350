"""The engine on whole networks: the six variants, timm's and torchvision's own modules."""

from __future__ import annotations

import pytest
import torch
from inception_fast.kernels import cpu
from inception_fast.kernels.plan import EltwiseStep, PairStep

import engine_nets
import numerics
from checkout import ROOT
from engine_nets import NETS, images, relative
from inception_fast.claims.engine import SIBLINGS
from inception_fast.engine import graph as ir
from inception_fast.engine import interpret
from inception_fast.engine.program import ArenaPool, Compiled
from plan_oracle import run_plan

OURS = [name for name in NETS if name.startswith("inception")]


@pytest.mark.parametrize("name", NETS, scope="module")
def test_rewrites_are_exact(name: str) -> None:
    raw, graph, _ = engine_nets.graphs(name)
    with torch.no_grad():
        (before,), (after,) = (interpret.run(g, [images(name, 1)], torch.float64) for g in (raw, graph))
    assert relative(after, before) <= numerics.REWRITE_MAX


@pytest.mark.parametrize("name", NETS, scope="module")
def test_convolutions_left(name: str) -> None:
    raw, graph, _ = engine_nets.graphs(name)
    assert (ir.convolutions(raw), ir.convolutions(graph)) == NETS[name].convolutions


def test_the_report_of_claims_and_the_readme_state_these_convolutions() -> None:
    stated = {name: NETS[name].convolutions for name in SIBLINGS}
    assert stated == SIBLINGS
    prose = " ".join((ROOT / "README.md").read_text().split())
    for before, after in stated.values():
        assert f"{after} instead of {before}" in prose or f"{after} convolutions instead of {before}" in prose


# How often each pass must fire: (batch norms, ReLUs, residuals, pools commuted, pairs chained, splits).
FIRED = {
    "inception_v1": (57, 57, 0, 0, 0, 0),
    "inception_v2": (68, 69, 0, 7, 0, 0),
    "inception_v3": (94, 94, 0, 9, 13, 4),
    "inception_v4": (149, 149, 0, 14, 26, 6),
    "inception_resnet_v1": (112, 131, 21, 0, 16, 0),
    "inception_resnet_v2": (204, 243, 40, 1, 30, 0),
    "timm_v3": (94, 94, 0, 9, 13, 4),
    "timm_v4": (149, 149, 0, 14, 26, 6),
    "timm_resnet_v2": (204, 243, 40, 1, 30, 0),
    "torchvision_v3": (94, 94, 0, 9, 13, 4),
    "torchvision_googlenet": (57, 57, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", NETS, scope="module")
def test_passes_fire(name: str) -> None:
    fired = engine_nets.graphs(name)[2]
    norms, relus, residuals, pools, chains, splits = FIRED[name]
    assert fired["fold_affine"] >= norms
    assert (fired["fold_relu"], fired["fold_residual"]) == (relus, residuals)
    assert (fired["commute_average_pool"], fired["form_chains"], fired["form_splits"]) == (pools, chains, splits)


def test_input_scaling_goes_where_it_is_exact() -> None:
    assert engine_nets.graphs("torchvision_v3")[2]["fold_input_affine"] == 1, "v3's first convolution has no padding"
    _, graph, fired = engine_nets.graphs("torchvision_googlenet")
    assert fired["fold_input_affine"] == 0, "googlenet's first convolution pads after the scaling"
    assert sum(isinstance(n.op, ir.Affine) for n in graph.nodes) == 1
    report = engine_nets.optimised("torchvision_googlenet").report()
    assert [s.kind for s in report.steps].count("import") == 1, "the scaling happens while the image is read"


@pytest.mark.parametrize("name", NETS, scope="module")
def test_all_native(name: str) -> None:
    report = engine_nets.optimised(name).report()
    assert not report.fallbacks
    assert report.counts["native_calls"] == 1
    assert all(n.backend in ("cpu", "none") for n in report.nodes)


@pytest.mark.parametrize("name", NETS, scope="module")
def test_equals_eager(name: str) -> None:
    net, fast, x = engine_nets.built(name), engine_nets.optimised(name), images(name, 3)
    with torch.no_grad():
        expected, two = net(x), fast(x[:2])
        three = fast(x)
    assert relative(three, expected) <= numerics.NET_MAX
    assert torch.equal(three[:2], two), "an image's numbers depend on its batch"


@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2"])
def test_bits_depend_on_neither_batch_nor_threads(name: str) -> None:
    fast, x = engine_nets.optimised(name), images(name, 2)
    torch.set_num_threads(1)
    one = fast(x)
    torch.set_num_threads(2)
    assert torch.equal(fast(x), one)
    assert torch.equal(fast(x[1:]), one[1:])
    assert len({id(c) for c in fast._session._captured.values()}) == 1, "the batch of one came out another graph"


@pytest.mark.parametrize("name", OURS, scope="module")
def test_plan_means_the_graph(name: str) -> None:
    """The lowered plan, run by the oracle in float64, against the graph: only the rounding of parameters differs."""
    fast, x = engine_nets.optimised(name), images(name, 2)
    executable, captured = fast._session.executable([x])
    (item,) = executable.program.items
    (y,) = run_plan(item.plan, [x])
    with torch.no_grad():
        (expected,) = interpret.run(captured.graph, [x], torch.float64)
    assert relative(y.reshape(expected.shape), expected) <= numerics.NET_MAX / 10


@pytest.mark.parametrize("name", OURS, scope="module")
def test_memory(name: str) -> None:
    """Concatenations are written in place, and the arena is far smaller than the sum of what passes through it."""
    fast = engine_nets.optimised(name)
    report = fast.report()
    assert report.counts["copies"] == 0
    assert report.counts["arena_bytes"] <= 0.35 * report.counts["buffer_bytes"]
    executable, _ = fast._session.executable([images(name)])
    steps = [s for item in executable.program.items for s in item.plan.steps]
    assert not any(isinstance(s, EltwiseStep) for s in steps)
    assert sum(isinstance(s, PairStep) for s in steps) == sum(FIRED[name][4:])


def test_residual_blocks_update_in_place() -> None:
    executable, _ = engine_nets.optimised("inception_resnet_v2")._session.executable([images("inception_resnet_v2")])
    (item,) = executable.program.items
    residuals = [s for s in item.plan.steps if getattr(s, "residual", None) is not None]
    in_place = [s for s in residuals if s.residual == s.outputs[0].view]
    assert len(residuals) == 40
    assert len(in_place) >= 37, "a block's sum replaces its input, but for the first of a resolution"


@pytest.mark.parametrize("tier", cpu.tiers())
def test_every_tier(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCEPTION_FAST_ISA", tier)
    fast, x = engine_nets.optimised("inception_v1"), images("inception_v1")
    compiled = Compiled(fast._session.executable([x])[0].program, ArenaPool())
    assert {c.tier for c in compiled.native.values()} == {tier}
    (y,) = compiled.run([x])
    assert relative(y, engine_nets.eager(engine_nets.built("inception_v1"), x)) <= numerics.NET_MAX


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("inception_v1", {"convention": "tf"}),
        ("inception_v3", {"convention": "tf", "num_classes": 7, "in_chans": 1}),
        ("inception_v3", {"features_only": True}),
        ("inception_resnet_v1", {"num_classes": 0}),
    ],
)
def test_options(name: str, options: dict[str, object]) -> None:
    net = engine_nets.ours(name, **options)
    x = references_images(75, 2, options.get("in_chans", 3))
    fast = engine_nets.optimize(net, x)
    assert not fast.report().fallbacks
    with torch.no_grad():
        found, expected = fast(x), net(x)
    pairs = zip(found, expected, strict=True) if isinstance(expected, (list, tuple)) else [(found, expected)]
    assert max(relative(y, e) for y, e in pairs) <= numerics.NET_MAX


def references_images(size: int, batch: int, channels: object) -> torch.Tensor:
    assert isinstance(channels, int)
    return engine_nets.references.images(size, batch)[:, :channels]
