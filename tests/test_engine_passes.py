"""Every rewrite on small graphs: it fires where it is exact, and only there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine_nets
import numerics
from engine_nets import Function, randomised, relative
from inception_fast.engine import graph as ir
from inception_fast.engine import interpret
from inception_fast.engine.passes import PIPELINE, optimise


def conv(cin: int, cout: int, kernel: object, **options: object) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, **options)  # type: ignore[arg-type]


def image(channels: int = 4, size: int = 9, batch: int = 2) -> Tensor:
    return numerics.random(batch, channels, size, size, seed=3)


def rewritten(
    function: Callable[..., object], *inputs: Tensor, **modules: nn.Module
) -> tuple[ir.Graph, dict[str, int]]:
    """The rewritten graph of a small network and how often each pass fired; all outputs are checked to be the same."""
    module = randomised(Function(function, **modules))
    raw = engine_nets.capture(module, *inputs)
    graph, fired = optimise(raw)
    with torch.no_grad():
        before, after = (interpret.run(g, inputs, torch.float64) for g in (raw, graph))
        exact = copy.deepcopy(module).double()(*(x.double() for x in inputs))
    flat = exact if isinstance(exact, (tuple, list)) else [exact]
    for b, a, e in zip(before, after, flat, strict=True):
        assert relative(a, b) <= numerics.REWRITE_MAX
        assert relative(b, e) <= numerics.REWRITE_MAX
    return graph, fired


def kinds(graph: ir.Graph) -> list[str]:
    return [type(n.op).__name__ for n in graph.nodes if not isinstance(n.op, ir.Input)]


def only(graph: ir.Graph, kind: type[ir.Op]) -> ir.Op:
    (node,) = [n for n in graph.nodes if isinstance(n.op, kind)]
    return node.op


def test_batch_norm_joins_the_epilogue_and_leaves_the_weights() -> None:
    graph, fired = rewritten(lambda m, x: m.bn(m.conv(x)).relu(), image(), conv=conv(4, 5, 3), bn=nn.BatchNorm2d(5))
    op = only(graph, ir.Conv)
    assert isinstance(op, ir.Conv) and kinds(graph) == ["Conv"]
    assert op.weight.dtype == torch.float32 and op.scale is not None and op.shift is not None and op.relu
    assert (fired["fold_affine"], fired["fold_relu"]) == (1, 1)


FAR: dict[str, Callable[..., Tensor]] = {  # folded, inf * (y + b) would be inf * y + inf * b, which may be no number
    "a factor behind a bias": lambda m, x: m.conv(x) * float("inf"),
    "behind a sum": lambda m, x: (m.plain(x) + 1.5) / 0.0,
    "a product beyond float32": lambda m, x: (m.plain(x) + 1.5) * 1e30 * 1e30,
    "behind a linear layer": lambda m, x: m.fc(x.mean((2, 3))) * float("inf"),
    "of a branch of a sum": lambda m, x: m.plain(x) + m.conv(x) * float("inf"),
    "of single channels": lambda m, x: torch.cat([(x[:, c : c + 1] + 0.5) / 0.0 for c in range(4)], 1) + 0.0,
}


@pytest.mark.parametrize("function", FAR.values(), ids=FAR.keys())
def test_what_is_not_finite_is_not_folded(function: Callable[..., Tensor]) -> None:
    layers = {"conv": conv(4, 6, 1), "plain": conv(4, 6, 1, bias=False), "fc": nn.Linear(4, 6)}
    module = randomised(Function(function, **layers))
    graph, _ = optimise(engine_nets.capture(module, image()))
    (got,) = interpret.run(graph, [image()], torch.float32)
    with torch.no_grad():
        assert torch.equal(got, module(image()))  # both infinities, and no NaN


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_behind_linear(affine: bool) -> None:
    modules = {"fc": nn.Linear(4, 6, bias=affine), "bn": nn.BatchNorm1d(6, affine=affine)}
    graph, _ = rewritten(lambda m, x: m.bn(m.fc(x.mean((2, 3)))), image(), **modules)
    assert kinds(graph) == ["Pool", "Linear"]


def test_what_is_read_twice_is_not_folded() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) * 2 + y

    graph, _ = rewritten(net, image(), conv=conv(4, 5, 3), bn=nn.BatchNorm2d(5))
    assert kinds(graph) == ["Conv", "Affine"], "the batch norm, its factor and the sum are one step"


def test_an_output_is_not_folded() -> None:
    def net(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x)
        return y, y.relu()

    assert kinds(rewritten(net, image(), conv=conv(4, 5, 3))[0]) == ["Conv", "Affine"]


def test_batch_norm_behind_relu_stays() -> None:
    graph, _ = rewritten(lambda m, x: m.bn(m.conv(x).relu()), image(), conv=conv(4, 5, 3), bn=nn.BatchNorm2d(5))
    assert kinds(graph) == ["Conv", "Affine"]


@pytest.mark.parametrize("scale", [1.0, 0.17])
def test_residual(scale: float) -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        return F.relu(x + scale * m.up(m.down(x).relu()))

    graph, fired = rewritten(net, image(), down=conv(4, 3, 1), up=conv(3, 4, 1))
    assert kinds(graph) == ["Conv", "Conv"] and fired["fold_residual"] == 1
    assert len(graph.nodes[-1].inputs) == 2


def test_residual_of_two_convolutions_takes_one() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        return m.a(x) + m.b(x)

    assert kinds(rewritten(net, image(), a=conv(4, 4, 3), b=conv(4, 4, 3))[0]) == ["Conv", "Conv"]


def test_residual_of_itself_and_of_a_relu_stay_apart() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = m.a(x)
        return (y + y) + m.b(x).relu()

    graph, _ = rewritten(net, image(), a=conv(4, 4, 3), b=conv(4, 4, 3))
    assert kinds(graph).count("Conv") == 2 and "Affine" in kinds(graph)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_padding_before_a_convolution(value: float) -> None:
    graph, fired = rewritten(
        lambda m, x: m.conv(F.pad(x, (1, 2, 0, 1), value=value)), image(), conv=conv(4, 5, 3, padding=1)
    )
    assert fired["fold_padding"] == (value == 0)
    if value == 0:
        op = only(graph, ir.Conv)
        assert isinstance(op, ir.Conv) and op.padding == (1, 2, 2, 3)


# (padding value, ReLU before it, pool, whether the fold is exact)
POOL_PADDING = [
    (float("-inf"), False, nn.MaxPool2d(3, 2), True),
    (0.0, True, nn.MaxPool2d(3, 2), True),
    (0.0, False, nn.MaxPool2d(3, 2), False),
    (-1.0, True, nn.MaxPool2d(3, 2), False),
    (0.0, True, nn.MaxPool2d(2, 2), True),
    (0.0, False, nn.AvgPool2d(3, 2), True),
    (0.0, False, nn.AvgPool2d(3, 2, padding=1), True),
    (0.0, False, nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), False),
    (0.0, True, nn.MaxPool2d(3, 2, ceil_mode=True), False),
    (0.0, True, nn.MaxPool2d(1, 1), False),
]


@pytest.mark.parametrize(("value", "relu", "pool", "exact"), POOL_PADDING)
def test_padding_before_a_pool(value: float, relu: bool, pool: nn.Module, exact: bool) -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.pool(F.pad(y.relu() if relu else y, (0, 1, 0, 1), value=value))

    _, fired = rewritten(net, image(), conv=conv(4, 5, 1), pool=pool)
    assert bool(fired["fold_padding"]) == exact


@pytest.mark.parametrize("include", [True, False])
def test_average_pool_commutes(include: bool) -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=include)
        return torch.cat([m.a(x).relu(), m.bn(m.b(y)).relu()], 1)

    graph, fired = rewritten(net, image(), a=conv(4, 3, 1), b=conv(4, 6, 1), bn=nn.BatchNorm2d(6))
    assert (fired["commute_average_pool"], fired["merge_siblings"]) == (1, 1)
    pool = only(graph, ir.Pool)
    assert isinstance(pool, ir.Pool) and pool.shift is not None and pool.relu, "shift and ReLU stay behind the pool"


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 0),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.ReLU()),
    ],
    ids=["max", "strided", "shrinking", "relu between"],
)
def test_other_pools_do_not_commute(pool: nn.Module) -> None:
    _, fired = rewritten(lambda m, x: (m.a(x), m.b(m.pool(x))), image(), a=conv(4, 3, 1), b=conv(4, 3, 1), pool=pool)
    assert fired["commute_average_pool"] == 0


def test_average_pool_read_twice_does_not_commute() -> None:
    def net(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.avg_pool2d(x, 3, 1, 1)
        return m.a(y), y

    assert rewritten(net, image(), a=conv(4, 3, 1))[1]["commute_average_pool"] == 0


def test_siblings_merge() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        return torch.cat([m.a(x).relu(), m.c(m.b(x)), m.d(x)], 1)

    modules = {"a": conv(4, 3, 1, bias=False), "b": conv(4, 2, 1), "c": conv(2, 3, 3, padding=1), "d": conv(4, 5, 1)}
    graph, fired = rewritten(net, image(), **modules)
    assert fired["merge_siblings"] == 2
    merged = graph.nodes[1].op
    assert isinstance(merged, ir.Conv)
    assert [(c.channels, c.relu) for c in merged.columns] == [(3, True), (2, False), (5, False)]


def test_strangers_do_not_merge() -> None:
    """Other strides, groups, kernels and inputs are no siblings."""

    def net(m: Function, x: Tensor) -> tuple[Tensor, ...]:
        return m.a(x), m.b(x), m.c(x), m.d(x), m.e(x.relu())

    modules = {
        "a": conv(4, 4, 1),
        "b": conv(4, 4, 1, stride=2),
        "c": conv(4, 4, 1, groups=2),
        "d": conv(4, 4, 3),
        "e": conv(4, 4, 1),
    }
    assert rewritten(net, image(), **modules)[1]["merge_siblings"] == 0


@pytest.mark.parametrize("order", ["1xn_nx1", "nx1_1xn"])
def test_chains(order: str) -> None:
    first, second = (conv(4, 3, (1, 5), padding=(0, 2)), conv(3, 6, (5, 1), padding=(2, 0)))
    if order == "nx1_1xn":
        first, second = conv(4, 3, (7, 1), padding=(3, 0)), conv(3, 6, (1, 3), padding=(0, 1))
    graph, fired = rewritten(lambda m, x: m.b(m.a(x).relu()).relu(), image(), a=first, b=second)
    assert fired["form_chains"] == 1 and kinds(graph) == ["Pair"] and ir.convolutions(graph) == 2


def test_no_chain_of_one_direction_or_with_a_second_reader() -> None:
    row, column = conv(4, 4, (1, 3), padding=(0, 1)), conv(4, 4, (3, 1), padding=(1, 0))
    assert rewritten(lambda m, x: m.b(m.a(x)), image(), a=row, b=row)[1]["form_chains"] == 0

    def read_twice(m: Function, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) + y.relu()

    assert rewritten(read_twice, image(), a=row, b=column)[1]["form_chains"] == 0


@pytest.mark.parametrize("nested", [True, False])
def test_splits(nested: bool) -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        y = torch.cat([m.a(x).relu(), m.b(x).relu()], 1)
        return torch.cat([m.c(x), y], 1) if nested else y

    modules = {
        "a": conv(4, 3, (1, 3), padding=(0, 1)),
        "b": conv(4, 5, (3, 1), padding=(1, 0)),
        "c": conv(4, 2, 3, padding=1),
    }
    graph, fired = rewritten(net, image(), **modules)
    assert fired["form_splits"] == 1 and fired["flatten_concats"] == nested
    assert kinds(graph) == (["Pair", "Conv", "Concat"] if nested else ["Pair"])


def test_no_split_where_the_halves_are_not_neighbours() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        return torch.cat([m.a(x), x, m.b(x)], 1)

    modules = {"a": conv(4, 3, (1, 3), padding=(0, 1)), "b": conv(4, 5, (3, 1), padding=(1, 0))}
    assert rewritten(net, image(), **modules)[1]["form_splits"] == 0


def test_a_linear_layer_reads_the_map_it_flattens() -> None:
    graph, _ = rewritten(lambda m, x: m.fc(F.adaptive_avg_pool2d(x, 3).flatten(1)), image(), fc=nn.Linear(36, 5))
    assert kinds(graph) == ["Pool", "Linear"]


def test_dropout_and_clones_go() -> None:
    def net(m: Function, x: Tensor) -> Tensor:
        return F.dropout(m.conv(x).clone().contiguous(), 0.5, False).detach()

    graph, fired = rewritten(net, image(), conv=conv(4, 5, 3))
    assert kinds(graph) == ["Conv"] and fired["drop_identity"] >= 3


@pytest.mark.parametrize("padding", [0, 1])
def test_input_scaling(padding: int) -> None:
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    module = conv(3, 5, 3, padding=padding)
    graph, fired = rewritten(lambda m, x: m.conv((x - mean.to(x)) / std.to(x)).relu(), image(3), conv=module)
    assert fired["fold_input_affine"] == (padding == 0), "zeros of padding enter after the scaling"
    assert kinds(graph) == (["Conv"] if padding == 0 else ["Affine", "Conv"])


def test_input_scaling_stays_where_another_reads_it() -> None:
    def net(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2 - 1
        return m.conv(y), F.max_pool2d(y, 2)

    assert rewritten(net, image(3), conv=conv(3, 5, 3))[1]["fold_input_affine"] == 0


def transform(channels: list[int]) -> Callable[[Function, Tensor], Tensor]:
    def net(m: Function, x: Tensor) -> Tensor:
        parts = [x[:, c].unsqueeze(1) * (c + 1.5) + 0.25 * c for c in channels]
        return m.conv(torch.cat(parts, 1))

    return net


@pytest.mark.parametrize(
    ("channels", "fires"), [([0, 1, 2], 1), ([0, 2, 1], 0), ([0, 1], 0), ([1, 2], 0), ([0, 1, 2, 2], 0)]
)
def test_per_channel_transform(channels: list[int], fires: int) -> None:
    graph, fired = rewritten(transform(channels), image(3), conv=conv(len(channels), 5, 3, padding=1))
    assert fired["gather_channels"] == fires
    if fires:
        assert kinds(graph) == ["Affine", "Conv"]


@pytest.mark.parametrize("size", [3, 4, 5])
def test_local_response_norm(size: int) -> None:
    graph, fired = rewritten(lambda m, x: m.lrn(x), image(7), lrn=nn.LocalResponseNorm(size, 0.02, 0.6, 1.5))
    assert fired["find_lrn"] == 1 and kinds(graph) == ["Lrn"]
    op = only(graph, ir.Lrn)
    assert isinstance(op, ir.Lrn)
    assert (op.size, op.beta) == (size, 0.6) and op.alpha == pytest.approx(0.02) and op.k == pytest.approx(1.5)


@pytest.mark.parametrize("vector", [True, False])
def test_normalize(vector: bool) -> None:
    graph, fired = rewritten(lambda m, x: F.normalize(x.mean((2, 3)) if vector else x), image(7))
    assert fired["find_normalize"] == 1 and kinds(graph)[-1] == "Normalize"


def test_other_norms_stay() -> None:
    graph, fired = rewritten(lambda m, x: (F.normalize(x, p=1), F.normalize(x, dim=2)), image(7))
    assert fired["find_normalize"] == 0 and "Normalize" not in kinds(graph)


NORM = torch.linalg.vector_norm
NOT_NORMALIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "one norm": lambda x: NORM(x),
    "one norm of rank four": lambda x: NORM(x, keepdim=True),
    "norms in float64": lambda x: NORM(x, 2, 1, True, dtype=torch.float64),
}


@pytest.mark.parametrize("name", NOT_NORMALIZE)
def test_division_by_other_norms_stays(name: str) -> None:
    norm = NOT_NORMALIZE[name]
    graph, fired = rewritten(lambda m, x: x / norm(x).clamp_min(1e-6).expand_as(x), image(7))
    assert fired["find_normalize"] == 0 and "Normalize" not in kinds(graph)


def test_division_by_pools_that_do_not_overlap_stays() -> None:
    def by_mean_square(_: nn.Module, x: Tensor) -> Tensor:
        squares = F.pad((x * x).unsqueeze(1), (0, 0, 0, 0, 1, 0))
        return x / (1 + F.avg_pool3d(squares, (5, 1, 1)).squeeze(1)) ** 0.5

    graph, fired = rewritten(by_mean_square, image(4))
    assert fired["find_lrn"] == 0 and "Lrn" not in kinds(graph)


def test_passes_leave_their_input_alone() -> None:
    raw = engine_nets.capture(Function(lambda m, x: m.conv(x).relu(), conv=conv(4, 5, 3)), image())
    before = [(n.name, type(n.op), tuple(n.inputs)) for n in raw.nodes]
    optimise(raw)
    assert [(n.name, type(n.op), tuple(n.inputs)) for n in raw.nodes] == before


def test_no_pass_fires_twice() -> None:
    """What comes out is final: a second run finds nothing to do."""
    graph, _ = optimise(engine_nets.graphs("inception_v3")[0])
    fired = {p.__name__: p(graph) for p in PIPELINE}
    assert not any(fired.values()), fired
