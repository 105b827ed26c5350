"""Models under export, compile, trace, copies, other memory formats and dtypes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from inception_fast.engine import optimize
from inception_fast.models import create_model, list_models
from inception_fast.models.blocks import BasicConv2d
from inception_fast.replace import replace_layers

PLAIN_OPS = {
    "adaptive_avg_pool2d",
    "add",
    "avg_pool2d",
    "batch_norm",
    "cat",
    "conv2d",
    "flatten",
    "linear",
    "max_pool2d",
    "mul",
    "pad",
    "relu_",
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# "tf" where the paddings depend on the image, aux heads where there are some: eval must not show them.
@pytest.mark.parametrize(
    ("name", "options", "blocks"),
    [
        ("inception_v1", {"convention": "tf", "aux_logits": True}, 0),
        ("inception_v2", {}, 0),
        ("inception_v3", {"aux_logits": True}, 0),
        ("inception_v4", {"aux_logits": True}, 0),
        ("inception_resnet_v1", {}, 5 + 10 + 5 + 1),
        ("inception_resnet_v2", {"aux_logits": True}, 10 + 20 + 9 + 1),
    ],
)
def test_export_with_dynamic_batch(name: str, options: dict[str, object], blocks: int) -> None:
    net = create_model(name, num_classes=5, **options).eval()
    x = torch.randn(2, 3, 75, 75)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    ops = {
        node.target._schema.name.removeprefix("aten::") for node in program.graph.nodes if node.op == "call_function"
    }
    assert ops <= PLAIN_OPS
    assert residuals(program) == blocks
    y = program.module()(x[:1])
    assert type(y) is Tensor and relative(y, net(x[:1])) < 1e-5


def residuals(program: torch.export.ExportedProgram) -> int:
    """Number of additions, each of the form x + scale * convolution, which an engine can put into the convolution."""
    additions = [node for node in program.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    for node in additions:
        x, scaled = node.args
        assert scaled.target is torch.ops.aten.mul.Tensor and scaled.args[0].target is torch.ops.aten.conv2d.default
        assert x.target is not torch.ops.aten.mul.Tensor
    return len(additions)


def test_compile_without_graph_breaks_for_any_batch() -> None:
    net = create_model("inception_v1", num_classes=5, convention="tf", transform_input=True).eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for batch in (3, 4):
        x = torch.randn(batch, 3, 33, 32)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), net(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compiled_training_step_with_auxiliary_heads() -> None:
    net = create_model("inception_v1", num_classes=5, aux_logits=True, drop_rate=0.0, aux_drop_rate=0.0).train()
    torch._dynamo.reset()
    with torch.enable_grad():
        out = torch.compile(net, fullgraph=True, backend="eager")(torch.randn(2, 3, 32, 32))
        sum(y.sum() for y in out).backward()
    torch._dynamo.reset()
    assert {y.shape for y in out} == {(2, 5)}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_trace() -> None:
    net = create_model("inception_v1", num_classes=5, aux_logits=True, convention="tf").eval()
    x = torch.randn(2, 3, 33, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, x)
    assert relative(traced(x[:1]), net(x[:1])) < 1e-5


@pytest.mark.parametrize("name", list_models())
def test_symbolic_trace(name: str) -> None:
    """What torchvision's feature extractors stand on; of the model, and of one with our layers in it."""
    net, x = create_model(name, num_classes=3).eval(), torch.randn(1, 3, 83, 90)
    with torch.no_grad():
        wanted = net(x)
        assert torch.equal(torch.fx.symbolic_trace(net)(x), wanted)
        traced = torch.fx.symbolic_trace(replace_layers(net))
        assert relative(traced(x), wanted) < 1e-5


@pytest.mark.parametrize("name", ["inception_v1", "inception_v3", "inception_v4", "inception_resnet_v2"])
def test_symbolic_trace_in_training(name: str) -> None:
    """Feature extractors and quantisation trace the training graph too, with its auxiliary heads."""
    with torch.device("meta"):
        traced = torch.fx.symbolic_trace(create_model(name, num_classes=3, aux_logits=True).train())
        logits = traced(torch.empty(2, 3, 299, 299))
    assert len(logits) > 1 and all(y.shape == (2, 3) for y in logits)


@pytest.mark.parametrize("name", ["inception_v1", "inception_resnet_v1"])
def test_copies_and_pickles(name: str) -> None:
    net = create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 75, 75)
    y = net(x)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), y)
    twin.get_classifier().weight.add_(1)
    assert torch.equal(net(x), y), "a copy must own its parameters"
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)


@pytest.mark.parametrize("name", ["inception_v2", "inception_v3", "inception_resnet_v1"])
def test_channels_last_gives_the_same_logits(name: str) -> None:
    net = create_model(name, num_classes=3, convention="tf").eval()
    x = torch.randn(2, 3, 75, 75)
    y = net(x)
    net = net.to(memory_format=torch.channels_last)
    assert net.forward_features(x.to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )
    assert relative(net(x.to(memory_format=torch.channels_last)), y) < 1e-5


@pytest.mark.parametrize(("dtype", "budget"), [(torch.bfloat16, 0.1), (torch.float64, 1e-5)])
def test_other_dtypes(dtype: torch.dtype, budget: float) -> None:
    net = create_model("inception_v1", num_classes=3, transform_input=True, convention="tf").eval()
    x = torch.randn(2, 3, 64, 64)
    y = net(x)
    out = net.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and relative(out.float(), y) < budget


def test_an_image_that_needs_gradients_gets_them() -> None:
    net = create_model("inception_resnet_v1", num_classes=0).eval()
    x = torch.randn(1, 3, 75, 75, requires_grad=True)
    with torch.enable_grad():
        net(x)[0, 0].backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("way", ["empty memory", "assigned", "double"])
def test_constants_of_the_input_are_in_no_state_dict_and_come_along(way: str, features_only: bool) -> None:
    options: Any = {"transform_input": True, "features_only": features_only, "aux_logits": False}
    trained = create_model("inception_v1", **options).eval()
    with torch.device("cpu" if way == "double" else "meta"):
        net = create_model("inception_v1", **options).eval()
    if way == "empty memory":
        net.to_empty(device="cpu")
    net.load_state_dict(trained.state_dict(), assign=way == "assigned")
    x = torch.rand(1, 3, 64, 64)
    if way != "double":
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(maps(net(x)), maps(trained(x)), strict=True))
    scale = net.double().input_transform.scale
    assert torch.equal(scale.flatten(), torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64) / 0.5)


def maps(result: Tensor | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else result


@pytest.mark.parametrize("features_only", [False, True])
def test_bytes_are_normalised_as_the_input_transform_expects(features_only: bool) -> None:
    options: Any = {"transform_input": True, "features_only": features_only, "aux_logits": False}
    net = create_model("inception_v1", **options).eval()
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (pixels / 255 - mean) / std
    seen, wanted = optimize(net, (x,))(pixels), net(x)
    for a, b in zip(seen, wanted, strict=True):
        assert relative(a, b) < 1e-5


def test_a_net_converted_to_integers_takes_quantised_images() -> None:
    quantization, net = torch.ao.quantization, create_model("inception_v1", num_classes=5).eval()
    x = torch.randn(2, 3, 48, 48)
    wanted = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives eager quantisation up one day
        for block in [m for m in net.modules() if isinstance(m, BasicConv2d)]:
            quantization.fuse_modules(block, ["conv", "bn", "relu"], inplace=True)
        net.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
        prepared = quantization.prepare(quantization.QuantWrapper(net).eval())
        prepared(x)
        quantised = quantization.convert(prepared)
        assert relative(quantised(x), wanted) < 0.2


def test_all_of_a_shared_network_is_shared() -> None:
    """The constants of `transform_input` are written anew with each conversion, and were left behind in own memory."""
    net = create_model("inception_v1", num_classes=3, transform_input=True).share_memory()
    constants = dict(net.input_transform.named_buffers())
    assert all(tensor.is_shared() for tensor in (*net.parameters(), *net.buffers()))
    assert constants["scale"].flatten().tolist() == pytest.approx([0.458, 0.448, 0.45])
