"""Swaps the Conv-BN-ReLU blocks of a model for the drop-in layers, keeping its parameters and state-dict keys.

A block is swapped only when its `forward`, traced, is exactly convolution, batch norm, ReLU, and its children are named
`conv` and `bn`: torchvision's, timm's, facenet-pytorch's and our own blocks, and any like them. A run of Conv2d,
BatchNorm2d, ReLU inside an `nn.Sequential` is swapped too, and so are a 1xn and an nx1 block that follow each other
there. Blocks that a model chains in its own `forward` stay two layers: only the engine sees that nothing else reads
what runs between them. A residual block stays what it is in training; in inference its 1x1 convolution, its sum and its
ReLU are one operation (`_residual.py`). Torch's pools become their own subclasses, which run natively and are not
listed.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, fx, nn

from ._block_graph import Shallow, residual_form, step
from ._checks import check_flag
from ._conv_bn_relu import conv_bn_relu
from ._fold import Fold
from ._inferred_layer import WINOGRAD
from ._plain import are_pair, conv_problem, has_hooks
from ._residual import ResidualSum
from .layers import AsymmetricPair, AvgPool2d, ConvBNReLU, MaxPool2d, PoolProject, _Two, run_pair

__all__ = ["Replacement", "ReplacementReport", "replace_layers"]

SUMMED = "torch's in training; in inference one operation with the sum of its block"
POOLS: dict[type[nn.Module], type[nn.Module]] = {nn.MaxPool2d: MaxPool2d, nn.AvgPool2d: AvgPool2d}


@dataclass(frozen=True)
class Replacement:
    """One module: `name` in the model, its class `was`, and the class it `became`, or None and the `reason`."""

    name: str
    was: str
    became: str | None
    reason: str = ""


class ReplacementReport(tuple[Replacement, ...]):
    """What was swapped, and for every convolution that was not, why."""

    @property
    def swapped(self) -> list[Replacement]:
        return [row for row in self if row.became is not None]

    @property
    def left(self) -> list[Replacement]:
        return [row for row in self if row.became is None]

    def __str__(self) -> str:
        lines = [f"{row.name or '(model)'}: {row.was} -> {row.became or 'left: ' + row.reason}" for row in self]
        return "\n".join([f"{len(self.swapped)} swapped, {len(self.left)} left", *lines])


def replace_layers(module: nn.Module, *, winograd: bool = False) -> nn.Module:
    """Swaps blocks of `module` in place and returns it, with `module.replacement_report`.

    Parameters, buffers, attributes, state-dict keys, training mode and hooks stay. When `module` itself is such a
    block, the layer in its place is returned.

    Args:
        winograd: on the CPU, convolutions of these layers at stride 1 may take every tile of Winograd's algorithm where
            it pays: in inference as `optimize` does, in training in float32, forward and in both gradients, as
            `ops.convolution` says.

    Example:
        model = replace_layers(torchvision.models.inception_v3())
        print(model.replacement_report)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; allowed: torch.nn.Module")
    winograd = check_flag("winograd", winograd)
    swap = _Swap()
    replaced = swap.module("", module)
    for conv in _taken(replaced):
        setattr(conv, WINOGRAD, winograd)
    swap.rows += _left_convolutions(replaced, swap.why)
    replaced.replacement_report = ReplacementReport(swap.rows)  # type: ignore[assignment]
    return replaced


class _Swap:
    """One pass over a model. A module that the model holds twice is swapped once."""

    def __init__(self) -> None:
        self.rows: list[Replacement] = []
        self.why: dict[str, str] = {}
        self._done: dict[nn.Module, nn.Module] = {}

    def module(self, name: str, module: nn.Module) -> nn.Module:
        if module not in self._done:
            self._done[module] = self._swapped(name, module)
        return self._done[module]

    def _swapped(self, name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, (ConvBNReLU, PoolProject, _Two, FusedSequential)):
            return module
        if isinstance(module, ResidualSum):
            self.why[_below(name, module._form.conv)] = SUMMED
            return self._inside(name, module)
        if type(module) in POOLS:
            return module if _own_call(module) else _pool(module)
        block = _block(module)
        if isinstance(block, ConvBNReLU):
            return self._became(name, module, block)
        if block is not None:
            self.why[name] = block
        self._inside(name, module)
        form = residual_form(module)
        if form is not None and _own_call(module) is None:
            self.why[_below(name, form.conv)] = SUMMED
            self.rows.append(Replacement(name, type(module).__name__, ResidualSum.__name__))
            ResidualSum.take(module, form)
            return module
        if type(module) is nn.Sequential:
            problem = _own_call(module)
            if problem:
                self.why[name] = problem
            fused = None if problem else _sequential(module)
            if fused is not None:
                return self._became(name, module, fused)
        return module

    def _inside(self, name: str, module: nn.Module) -> nn.Module:
        for key, child in list(module._modules.items()):
            if child is not None:
                module._modules[key] = self.module(_below(name, key), child)
        return module

    def _became(self, name: str, old: nn.Module, new: nn.Module) -> nn.Module:
        _take_over(old, new)
        became = type(new).__mro__[1] if isinstance(new, (_SequentialBlock, _SequentialPair)) else type(new)
        self.rows.append(Replacement(name, type(old).__name__, became.__name__))
        return new


def _below(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _taken(model: nn.Module) -> set[nn.Module]:
    """The convolutions of the swapped layers."""
    taken: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, (ConvBNReLU, PoolProject)):
            taken.add(module.conv)
        elif isinstance(module, FusedSequential):
            taken.update(run.modules[0] for run in module.runs() if run.kind == "block")
    return taken


def _left_convolutions(model: nn.Module, why: dict[str, str]) -> Iterator[Replacement]:
    """A row for each convolution outside the swapped layers."""
    taken = _taken(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module not in taken:
            parent = name.rpartition(".")[0]
            reason = why.get(name) or why.get(parent) or "no batch norm and ReLU follow in a block or nn.Sequential"
            yield Replacement(name, type(module).__name__, None, conv_problem(module) or reason)


def _pool(module: nn.Module) -> nn.Module:
    """The pool that takes the place of one of torch's: the same module, its forward ours."""
    pool: Any = object.__new__(POOLS[type(module)])
    pool.__dict__.update(module.__dict__)
    _rebind_hooks(module, pool)
    return pool  # type: ignore[no-any-return]


def _own_call(module: nn.Module) -> str | None:
    """What a call of the module does beside its class's `forward`, which is lost with the class; None for nothing."""
    if "forward" in vars(module):
        return "its forward was set on the instance"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class overrides __call__"
    return "it was compiled in place" if getattr(module, "_compiled_call_impl", None) is not None else None


def _block(module: nn.Module) -> ConvBNReLU | str | None:
    """The layer equal to a block, why there is none, or None when nothing asks for one."""
    children = dict(module.named_children())
    convs = [child for child in children.values() if isinstance(child, nn.Conv2d)]
    norms = [child for child in children.values() if isinstance(child, nn.BatchNorm2d)]
    if isinstance(module, nn.Sequential) or len(convs) != 1 or len(norms) != 1:
        return None
    conv, bn = convs[0], norms[0]
    if children.get("conv") is not conv or children.get("bn") is not bn:
        return "its children are not named conv and bn"
    problem = conv_problem(conv) or _norm_problem(bn) or _own_call(module) or _forward_problem(module, conv, bn)
    if problem:
        return problem
    if any(has_hooks(part) for part in module.modules() if part not in (module, conv, bn)):
        return "a child beside conv and bn has hooks"
    layer = _empty(ConvBNReLU, {"conv": conv, "bn": _plain_norm(bn)})
    own, held = ({*m.state_dict(), *dict(m.named_buffers())} for m in (layer, module))
    if own != held:
        return "it has parameters or buffers beside those of conv and bn"
    return layer


def _is_norm_act(bn: nn.Module) -> bool:
    """timm's batch norm with the activation inside, told by name so that timm need not be there."""
    return type(bn).__name__ == "BatchNormAct2d" and type(bn).__module__.startswith("timm.")


def _norm_problem(bn: nn.BatchNorm2d) -> str | None:
    if _is_norm_act(bn):
        act, drop = getattr(bn, "act", None), getattr(bn, "drop", None)
        if type(act) is not nn.ReLU or type(drop) is not nn.Identity:
            return f"activation {type(act).__name__} and drop {type(drop).__name__} in bn; allowed: ReLU and none"
        if has_hooks(bn):
            return "bn, with its activation inside, has hooks, which would see what is before the activation"
    elif type(bn) is not nn.BatchNorm2d:
        return f"batch norm of class {type(bn).__name__}; allowed: torch.nn.BatchNorm2d"
    return None if bn.track_running_stats else "batch norm without running statistics"


def _forward_problem(block: nn.Module, conv: nn.Module, bn: nn.Module) -> str | None:
    """Why the block is not exactly conv, bn, ReLU in training and in evaluation; None when it is."""
    was_training = block.training
    try:
        for mode in (True, False):
            block.training = mode
            try:
                graph = Shallow().trace(block)
            except Exception as error:  # whatever the block's own code raises on a proxy: told in the report
                return f"its forward cannot be traced: {error}"
            expected: list[Any] = [conv, bn] if _is_norm_act(bn) else [conv, bn, "relu"]
            if _chain(block, graph) != expected:
                return "its forward is not just convolution, batch norm and ReLU"
    finally:
        block.training = was_training
    return None


def _chain(block: nn.Module, graph: fx.Graph) -> list[Any] | None:
    """The modules and ReLUs that the input goes through, if nothing branches off; identities left out."""
    nodes = list(graph.nodes)
    if [node.op for node in nodes].count("placeholder") != 1 or nodes[0].op != "placeholder":
        return None
    chain: list[Any] = []
    for before, node in itertools.pairwise(nodes):
        if node.args[:1] != (before,) or len(before.users) != 1 or (len(node.args) > 1 and node.op != "call_function"):
            return None
        if node.op == "output":
            return chain
        found = step(block, node)
        if found is None:
            return None
        chain += [] if type(found) is nn.Identity else ["relu"] if type(found) is nn.ReLU else [found]
    return None


def _plain_norm(bn: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """`bn`, or a plain batch norm on the same tensors in the place of timm's."""
    if type(bn) is nn.BatchNorm2d:
        return bn
    plain = nn.BatchNorm2d(bn.num_features, bn.eps, bn.momentum, bn.affine, device="meta")
    _take_over(bn, plain)
    return plain


def _empty(kind: type[Any], children: dict[str, Any]) -> Any:
    """A layer of class `kind` holding these children, made without drawing parameters."""
    layer: Any = object.__new__(kind)
    nn.Module.__init__(layer)
    layer._modules.update(children)
    layer._fold = Fold()
    return layer


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """All but the children: parameters, buffers, mode, attributes and hooks, the very dictionaries, so that handles
    given out before still remove their hook.
    """
    new.__dict__.update({name: value for name, value in vars(old).items() if name not in ("_modules", "_fold")})
    _rebind_hooks(old, new)


def _rebind_hooks(old: nn.Module, new: nn.Module) -> None:
    """Torch binds the hooks that see a state dict before it is loaded to their module, by a weak reference."""
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False) and hook.module() is old:  # type: ignore[attr-defined]
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]


class Run(NamedTuple):
    """Children of a Sequential that run together: kind "block" (conv, bn, ReLU), "pair" (two layers) or "one"."""

    kind: str
    modules: tuple[Any, ...]
    fold: Fold


def _runs(children: list[nn.Module]) -> list[Run]:
    runs: list[Run] = []
    place = 0
    while place < len(children):
        kind, length = "one", 1
        if _is_block(children[place : place + 3]):
            kind, length = "block", 3
        elif _is_pair(children[place : place + 2]):
            kind, length = "pair", 2
        runs.append(Run(kind, tuple(children[place : place + length]), Fold()))
        place += length
    return runs


def _is_block(modules: list[nn.Module]) -> bool:
    if [type(module) for module in modules] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
        return False
    return conv_problem(modules[0]) is None and bool(modules[1].track_running_stats)


def _is_pair(modules: list[nn.Module]) -> bool:
    """Two blocks, 1xn and nx1 in either order, n odd and at least 3, stride 1, padded SAME."""
    if len(modules) != 2 or not all(type(module) is ConvBNReLU for module in modules):
        return False
    (a, b) = (module.conv for module in modules if isinstance(module, ConvBNReLU))
    return conv_problem(a) is conv_problem(b) is None and max(a.kernel_size) >= 3 and are_pair(a, b)


def _sequential(module: nn.Sequential) -> nn.Module | None:
    """What takes the place of a Sequential with runs to fuse."""
    kinds = [run.kind for run in _runs(list(module))]
    if set(kinds) <= {"one"}:
        return None
    classes: dict[tuple[str, ...], type[nn.Module]] = {("block",): _SequentialBlock, ("pair",): _SequentialPair}
    return _empty(classes.get(tuple(kinds), FusedSequential), dict(module._modules))


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs Conv2d, BatchNorm2d, ReLU, and a 1xn and an nx1 layer, as one operation each."""

    _cached: tuple[list[nn.Module], list[Run]] | None = None

    def runs(self) -> list[Run]:
        """The children by what runs together; found again when a child was added, removed or exchanged."""
        children = list(self._modules.values())
        if self._cached is None or self._cached[0] != children:
            object.__setattr__(self, "_cached", (children, _runs(children)))  # type: ignore[arg-type]
        assert self._cached is not None
        return self._cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cached"}

    def forward(self, input: Tensor) -> Tensor:
        for run in self.runs():
            input = _run(run, input)
        return input


def _run(run: Run, x: Tensor) -> Tensor:
    modules = run.modules
    if run.kind == "block" and not has_hooks(modules[2]):
        return conv_bn_relu(x, modules[0], modules[1], run.fold)
    if run.kind == "pair" and (y := run_pair("chain", x, modules[0], modules[1], run.fold)) is not None:
        return y
    for module in modules:
        x = module(x)
    return x


class _Places(nn.Sequential):
    """A Sequential that became one layer. With other children than those of the layer, it runs what it holds."""

    names: ClassVar[tuple[str, ...]]

    def __setattr__(self, name: str, value: Any) -> None:
        """A module that is set by the name of one of the layer's children takes that one's place."""
        if name in self.names and isinstance(value, nn.Module):
            self[self.names.index(name)] = value
        else:
            super().__setattr__(name, value)

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return FusedSequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)

    def run(self, x: Tensor) -> Tensor:
        for run in _runs(list(self)):
            x = _run(run, x)
        return x


class _SequentialBlock(ConvBNReLU, _Places):  # type: ignore[misc]
    """A ConvBNReLU whose children keep their places in the Sequential that it was."""

    names = ("conv", "bn")
    conv = property(lambda self: self[0])  # type: ignore[assignment]
    bn = property(lambda self: self[1])  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        whole = _is_block(list(self)) and not has_hooks(self[2])
        return ConvBNReLU.forward(self, x) if whole else self.run(x)


class _SequentialPair(AsymmetricPair, _Places):  # type: ignore[misc]
    """An AsymmetricPair whose children keep their places in the Sequential that it was."""

    names = ("first", "second")
    first = property(lambda self: self[0])  # type: ignore[assignment]
    second = property(lambda self: self[1])  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return AsymmetricPair.forward(self, x) if _is_pair(list(self)) else self.run(x)
