"""From captured calls to the engine's ops. A translator raises `Unsupported` where no op says exactly the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import graph as ir
from .call import Call, hint_shape, require, sizes_of
from .own_ops import OWN


def conv2d(call: Call) -> ir.Node:
    if call.has("transposed"):
        require(not call["transposed"], "transposed convolution")
    x = call.map("input", 4)
    weight, bias = call.constant("weight"), call.constant("bias")
    assert weight is not None
    require(weight.dim() == 4, f"convolution over {weight.dim() - 2} axes; native ones have 2")
    require(call.numbers("dilation") == (1, 1), f"dilation {call['dilation']}; native convolutions have 1")
    stride = call.numbers("stride")
    padding = call["padding"]
    kernel = weight.shape[2:]
    if isinstance(padding, str):
        total = [k - 1 if padding == "same" else 0 for k in kernel]
        sides = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        ph, pw = call.numbers("padding")
        sides = (ph, ph, pw, pw)
    columns = (ir.Column(weight.shape[0], False),)
    op = ir.Conv(weight, columns, None, bias, (stride[0], stride[1]), sides, call["groups"])
    return call.node(op, x)


def linear(call: Call) -> ir.Node:
    x = call.map("input", 2)
    weight, bias = call.constant("weight"), call.constant("bias")
    assert weight is not None
    return call.node(ir.Linear(weight, None, bias), x)


def batch_norm(call: Call) -> Any:
    x = call.map("input", 2, 4)
    if call.has("training"):
        require(not call["training"], "batch norm over the batch's own statistics")
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    require(mean is not None and variance is not None, "batch norm without running statistics")
    assert mean is not None and variance is not None
    weight, bias = call.constant("weight"), call.constant("bias")
    scale = (variance.double() + call["eps"]).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    if isinstance(call.value, Tensor):
        return call.node(ir.Affine(scale, shift), x)
    require(call.read <= {0}, "batch norm whose statistics are read")
    return call.node(ir.Affine(scale, shift), x, like=call.value[0]), None, None


def relu(call: Call) -> ir.Node:
    if call.has("min"):
        bounded = call.has("max") and call["max"] is not None
        require(call["min"] == 0 and not bounded, "clamp to other bounds than ReLU's")
    return call.node(ir.Relu(), call.map("self", 2, 4))


def dropout(call: Call) -> ir.Node:
    require(not call["train"] or call["p"] == 0, "dropout that drops in inference")
    return call.node(ir.Identity("dropout"), call["input"])


def identity(call: Call) -> ir.Node:
    x = call.args[0]
    require(isinstance(x, ir.Node), "argument is not a tensor")
    return call.node(ir.Identity(call.target._opname), x)


def cast(call: Call) -> ir.Node:
    x = call.args[0]
    require(isinstance(x, ir.Node) and isinstance(call.value, Tensor), "argument is not a tensor")
    if x.dtype == call.value.dtype:
        return call.node(ir.Identity("cast"), x)
    require(x.dtype == torch.uint8 and call.value.dtype.is_floating_point, f"cast from {x.dtype} to {call.value.dtype}")
    return call.node(ir.Cast(call.value.dtype), x)


def _overhang(out: int, size: int, kernel: int, stride: int, padding: int) -> int:
    """How far torch's ceil_mode lets the last window reach beyond the padded map."""
    return max(0, (out - 1) * stride + kernel - size - 2 * padding)


def _pool(call: Call, kind: str, include_pad: bool) -> ir.Node:
    x = call.map("self", 4)
    assert x.shape is not None
    kernel = call.numbers("kernel_size")
    stride = call.numbers("stride") if call["stride"] else kernel
    ph, pw = call.numbers("padding")
    require(
        max(ph, pw) == 0 or (ph < kernel[0] and pw < kernel[1]), f"padding {(ph, pw)} as large as the kernel {kernel}"
    )
    like = call.value if isinstance(call.value, Tensor) else call.value[0]
    out = hint_shape(like)
    reach = [_overhang(out[2 + i], x.shape[2 + i], kernel[i], stride[i], (ph, pw)[i]) for i in range(2)]
    sides = (ph, ph, pw, pw)
    op = ir.Pool(kind, (kernel[0], kernel[1]), (stride[0], stride[1]), sides, include_pad, (reach[0], reach[1]))
    return call.node(op, x, like=like)


def max_pool2d(call: Call) -> Any:
    require(call.numbers("dilation") == (1, 1), f"dilation {call['dilation']}; native pools have 1")
    require(call.read <= {0}, "pool whose indices are read")
    node = _pool(call, "max", False)
    return node if isinstance(call.value, Tensor) else (node, None)


def avg_pool2d(call: Call) -> ir.Node:
    require(call["divisor_override"] is None, "average pool with a divisor of its own")
    return _pool(call, "avg", bool(call["count_include_pad"]))


def adaptive_avg_pool2d(call: Call) -> ir.Node:
    x = call.map("self", 4)
    assert x.shape is not None
    size, out = x.shape[2:], hint_shape(call.value)[2:]
    require(
        all(o and s % o == 0 for s, o in zip(size, out, strict=True)),
        f"adaptive pool {size} -> {out}: windows of unequal size",
    )
    kernel = (size[0] // out[0], size[1] // out[1])
    return call.node(ir.Pool("avg", kernel, kernel), x)


def mean(call: Call) -> ir.Node:
    x = call.map("self", 4)
    assert x.shape is not None
    dims = sorted(d % 4 for d in call["dim"] or range(4))
    require(dims == [2, 3], f"mean over dimensions {dims}; native pools average over 2 and 3")
    require(call["dtype"] in (None, x.dtype), "mean in another dtype")
    pool = ir.Pool("avg", (x.shape[2], x.shape[3]))
    if call["keepdim"]:
        return call.node(pool, x)
    pooled = call.node(pool, x, name=f"{call.name}_pool", shape=(*x.shape[:2], 1, 1))
    return call.node(ir.Reshape((x.shape[1],)), pooled)


def cat(call: Call) -> ir.Node:
    values = list(call["tensors"])
    ranks = {len(v.shape) if isinstance(v, ir.Node) and v.shape else 0 for v in values}
    require(ranks in ({2}, {4}), f"concatenation of ranks {sorted(ranks)}; native ones join maps, or vectors")
    require(call["dim"] % ranks.pop() == 1, f"concatenation along dimension {call['dim']}; native ones join channels")
    require(not any(isinstance(v.op, ir.Constant) for v in values), "concatenation with a parameter")
    require(
        {v.dtype for v in values} == {call.value.dtype} and call.value.dtype.is_floating_point,
        "concatenation of mixed dtypes",
    )
    return call.node(ir.Concat(), *values) if len(values) > 1 else call.node(ir.Identity("cat of one"), values[0])


def pad(call: Call) -> ir.Node:
    x = call.map("self", 4)
    sides = [*call["pad"]]
    require(all(isinstance(s, int) for s in sides), "padding depends on the input size")
    require(not call.has("mode") or call["mode"] == "constant", "padding by other than a constant")
    require(len(sides) <= 4 or not any(sides[4:]), "padding beyond height and width")
    left, right, top, bottom = (sides + [0] * 4)[:4]
    require(min(left, right, top, bottom) >= 0, "padding below zero")
    return call.node(ir.Pad((top, bottom, left, right), float(call["value"] or 0.0)), x)


def channel_vector(value: Any, x: ir.Node) -> Tensor | None:
    """A number or a parameter as one float64 for each channel of `x`, None where it is neither."""
    if isinstance(value, ir.Node) and isinstance(value.op, ir.Constant):
        value = value.op.value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((x.channels,), float(value), dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor) or x.shape is None or value.dim() > len(x.shape):
        return None
    aligned = (1,) * (len(x.shape) - value.dim()) + tuple(value.shape)
    if any(s != 1 for i, s in enumerate(aligned) if i != 1) or aligned[1] not in (1, x.channels):
        return None
    return value.detach().double().reshape(-1).expand(x.channels).contiguous()


def _operands(call: Call) -> tuple[ir.Node, Any, bool]:
    """The run-time operand, the other one, and whether they stand in swapped order."""
    a, b = call.args[0], call.args[1]
    swapped = not isinstance(a, ir.Node) or isinstance(a.op, ir.Constant)
    x, other = (b, a) if swapped else (a, b)
    require(
        isinstance(x, ir.Node) and x.shape is not None and len(x.shape) in (2, 4), "operands are not maps or vectors"
    )
    require(
        isinstance(call.value, Tensor) and x.dtype == call.value.dtype and x.dtype.is_floating_point, f"dtype {x.dtype}"
    )
    return x, other, swapped


def add(call: Call) -> ir.Node:
    """a + alpha * b, a - alpha * b, and the reversed subtraction."""
    x, other, swapped = _operands(call)
    name = call.target._opname
    alpha = float(call["alpha"]) if call.has("alpha") else 1.0
    first, second = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[name]
    mine, others = (second, first) if swapped else (first, second)
    vector = channel_vector(other, x)
    if vector is not None:
        require(call.shape == x.shape, "sum that widens its operand")
        scale = None if mine == 1.0 else channel_vector(mine, x)
        return call.node(ir.Affine(scale, vector * others), x)
    same = isinstance(other, ir.Node) and other.shape == x.shape and other.dtype == x.dtype
    require(same and not isinstance(other.op, ir.Constant), "sum of tensors of different shapes")
    require((mine, others) == (1.0, 1.0), "difference of two tensors")
    return call.node(ir.Add(), x, other)


def mul(call: Call) -> ir.Node:
    x, other, swapped = _operands(call)
    vector = channel_vector(other, x)
    require(vector is not None, "product of two tensors")
    assert vector is not None
    require(call.shape == x.shape, "product that widens its operand")
    if call.target._opname == "div":
        require(not swapped, "division by a tensor")
        divisor, vector = vector, vector.reciprocal()
        finite = vector.float().isfinite() | (divisor == 0)
        require(bool(finite.all()), "division by a number that has no finite reciprocal")
    return call.node(ir.Affine(vector, None), x)


def same_size(a: Any, b: Any) -> bool:
    """Whether two captured sizes are one, for every size the program serves."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def move(call: Call) -> Any:
    """view, reshape, flatten, squeeze, unsqueeze, select of a size of one: the same elements in the same order."""
    x = call.args[0]
    value = call.value
    require(isinstance(x, ir.Node) and x.shape is not None and isinstance(value, Tensor), "argument is not a tensor")
    index = _channel_of(x, call)
    if index is not None:
        return index
    before = call.sizes.get(x, ())
    after = sizes_of(value)
    require(len(after) >= 2 and len(before) >= 2, "not a map or a vector")
    require(same_size(before[0], after[0]), "the batch dimension changes")
    tail = after[1:]
    require(all(isinstance(d, int) for d in (*before[1:], *tail)), "sizes that depend on the batch")
    require(math.prod(tail) == math.prod(before[1:]), "elements are dropped or repeated")
    require(
        call.graph.dynamic is False or call.target._opname != "squeeze" or len(call.args) > 1,
        "squeeze of unnamed dimensions",
    )
    return call.node(ir.Reshape(tuple(int(d) for d in tail)), x)


def _channel_of(x: ir.Node, call: Call) -> ir.Node | None:
    """unsqueeze(select(map, 1, i), 1) as a slice of one channel."""
    select = x.op
    if call.target._opname != "unsqueeze" or call["dim"] != 1 or not isinstance(select, ir.Torch):
        return None
    if str(select.target) != "aten.select.int" or select.args[1] != 1 or len(x.inputs) != 1:
        return None
    whole = x.inputs[0]
    if whole.shape is None or len(whole.shape) != 4:
        return None
    made = call.node(ir.Slice(int(select.args[2]) % whole.channels, 1), whole)
    made.sources = (*x.sources, call.name)
    return made


def slice_tensor(call: Call) -> ir.Node:
    x = call.args[0]
    require(isinstance(x, ir.Node) and x.shape is not None, "argument is not a tensor")
    assert isinstance(call.value, Tensor)
    require(call["step"] == 1, "slice with a step")
    dim = call["dim"] % len(x.shape)
    before = call.sizes.get(x)
    if before is not None and same_size(before[dim], sizes_of(call.value)[dim]):
        return call.node(ir.Identity("slice of everything"), x)
    require(dim == 1 and len(x.shape) in (2, 4), f"slice of dimension {dim}; native ones take channels")
    start = call["start"] or 0
    require(isinstance(start, int), "slice from a size that depends on the input")
    require(call.shape[1] > 0, "slice of no channels")
    return call.node(ir.Slice(_index(start, x.channels), call.shape[1]), x)


def _index(value: int, size: int) -> int:
    return min(max(value + size if value < 0 else value, 0), size)


def split(call: Call) -> tuple[ir.Node, ...]:
    """chunk, split and split_with_sizes along the channels."""
    x = call.map("self", 2, 4)
    assert x.shape is not None
    require(call["dim"] % len(x.shape) == 1, "split along another dimension than the channels")
    require(all(hint_shape(value)[1] > 0 for value in call.value), "split into a part of no channels")
    parts, offset = [], 0
    for i, value in enumerate(call.value):
        channels = hint_shape(value)[1]
        parts.append(call.node(ir.Slice(offset, channels), x, name=f"{call.name}_{i}", like=value))
        offset += channels
    return tuple(parts)


def _table(entries: dict[Callable[[Call], Any], str]) -> dict[str, Callable[[Call], Any]]:
    return {f"aten.{name}": function for function, names in entries.items() for name in names.split()}


DROPOUTS = tuple(f"aten.{kind}dropout.default" for kind in ("", "feature_", "alpha_", "feature_alpha_"))

TRANSLATORS = _table(
    {
        conv2d: "conv2d.default conv2d.padding convolution.default",
        linear: "linear.default",
        batch_norm: "batch_norm.default _native_batch_norm_legit_no_training.default",
        relu: "relu.default clamp_min.default clamp.default",
        dropout: " ".join(DROPOUTS).replace("aten.", ""),
        identity: "detach.default alias.default clone.default contiguous.default lift_fresh_copy.default "
        "positive.default",
        cast: "to.dtype to.device to.other _to_copy.default type_as.default",
        max_pool2d: "max_pool2d.default max_pool2d_with_indices.default",
        avg_pool2d: "avg_pool2d.default",
        adaptive_avg_pool2d: "adaptive_avg_pool2d.default _adaptive_avg_pool2d.default",
        mean: "mean.dim",
        cat: "cat.default concat.default concatenate.default",
        pad: "pad.default constant_pad_nd.default",
        add: "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor",
        mul: "mul.Tensor mul.Scalar div.Tensor div.Scalar",
        move: "view.default reshape.default flatten.using_ints squeeze.default squeeze.dim squeeze.dims "
        "unsqueeze.default select.int _unsafe_view.default",
        slice_tensor: "slice.Tensor",
        split: "chunk.default split.Tensor split_with_sizes.default split.sizes",
    }
) | {f"inception_fast.{name}.default": function for name, function in OWN.items()}
