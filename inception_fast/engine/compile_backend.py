"""torch.compile(module, backend="inception_fast"): the engine behind the habit users have."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._guards import tracing
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..backends.stamp import Stamp, can_stamp
from .call import known
from .inputs import Misfit
from .operands import Order, laid_out, strides_order
from .runner import check_winograd
from .session import Session, version

# What an input of Dynamo's graph may be, besides a size of another.
PARAMETER, INPUT, NUMBER = "parameter", "input", "number"
HALVES = (torch.bfloat16, torch.float16)
KEPT_SESSIONS = 8  # for sizes that only Dynamo has free


def compile_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, **others: Any
) -> Callable[..., Any]:
    """The callable that Dynamo runs in place of `gm`: inference only, on the CPU, for any batch that Dynamo hands over.

    Parameters arrive as attributes of `gm` or among its inputs. `options` is torch.compile's: {"winograd": True} as in
    `optimize`. Where gradients are asked for torch runs `gm`, with a warning. Results lie in memory of their own, also
    those that are views of an argument or of one another in `gm`: what is written to one stays there.
    """
    options = options or {}
    unknown = sorted({*options, *others} - {"winograd"})
    if unknown or "winograd" in others:
        raise ValueError(f"{', '.join(unknown or others)}; backend 'inception_fast' takes options={{'winograd': bool}}")
    winograd = check_winograd(options.get("winograd", False), "cpu")
    tensors = [*(x for x in example_inputs if isinstance(x, Tensor)), *gm.parameters(), *gm.buffers()]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        warnings.warn(
            "backend 'inception_fast' only infers, and gradients are asked for, so torch runs this: call "
            "module.eval() and run it under torch.no_grad() or torch.inference_mode()",
            stacklevel=2,
        )
        return gm.forward
    if any(isinstance(x, FakeTensor) for x in tensors):
        raise RuntimeError("backend 'inception_fast' plans for real tensors; fake ones came")
    run = _Replanned(gm, example_inputs, winograd)
    if not any(place == INPUT and x.dim() for place, x in zip(run.places, example_inputs, strict=True)):
        return gm.forward  # a part between graph breaks without a map or a vector: nothing here is for a kernel
    if run.autocast and run.halves:
        return gm.forward  # nor where autocast meets parameters of half precision, and two formats may meet anywhere
    # A capture inside a compilation must not leave its own guards in it.
    with _disable_current_modes(), tracing(None):
        run.prepare(example_inputs)
    return torch.compiler.disable(run)


class _Replanned:
    """Keeps a session for the parameters of the last call, and makes a new one when they were written or replaced.

    Writes that torch does not count, as through `.data`, are found by samples of the values (`Stamp`). Sizes that are
    free for Dynamo and fixed for a session, as lengths of sequences, get sessions of their own; the last few are kept.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], winograd: bool) -> None:
        self.gm, self.winograd = _plainly(gm), winograd
        self.announced = _announced(gm)
        self.places = _places(gm, example_inputs)
        self.fixed = [i for i, place in enumerate(self.places) if place == PARAMETER]
        self.inputs = _batched_first(gm, [i for i, place in enumerate(self.places) if place == INPUT])
        self.numbers = [i for i, place in enumerate(self.places) if place == NUMBER]
        held = [*(example_inputs[i] for i in self.fixed), *gm.parameters(), *gm.buffers()]
        self.autocast, self.halves = torch._C._is_any_autocast_enabled(), any(t.dtype in HALVES for t in held)
        self.lock = threading.Lock()
        self.session: Session | None = None
        self.others: list[Session] = []
        self.state: list[tuple[Tensor, Callable[[Tensor], bool]]] = []
        self.values: list[float] = []
        # Free by `mark_unbacked` or a spec: torch tells then that any map is contiguous.
        if any(known(value.shape) is None for value in _results(gm) if isinstance(value, Tensor)):
            self.announced = self._looked_at(example_inputs)

    def __call__(self, *args: Any) -> Any:
        session = self.session
        if session is None or not self._current(args):
            session = self.prepare(args)
        maps = self._maps(args)
        try:
            results = session(maps, {})
        except Misfit:
            results = self._other(args, maps)(maps, {})
        leaves, tree = pytree.tree_flatten(results)
        return pytree.tree_unflatten(list(map(_as_announced, leaves, self.announced)), tree)

    def _looked_at(self, args: Sequence[Any]) -> list[tuple[torch.dtype, Order | None] | None]:
        """The dtypes that Dynamo told, and the orders that maps of these sizes and orders lead to."""
        bound = self._bound(args, [args[i].item() for i in self.numbers])
        with torch.no_grad():
            orders = _orders_of(bound, self._maps(args)) or [None] * len(self.announced)
        return [told and (told[0], order) for told, order in zip(self.announced, orders, strict=True)]

    def _maps(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What the session takes; in the parameters' float32 where the caller's autocast would meet two formats."""
        maps = (args[i] for i in self.inputs)
        return tuple(x.float() if self.autocast and isinstance(x, Tensor) and x.dtype in HALVES else x for x in maps)

    def _current(self, args: Sequence[Any]) -> bool:
        """Whether the session was made of these very parameters and numbers."""
        same = all(args[i] is t for i, (t, _) in zip(self.fixed, self.state, strict=False))
        written = not all(unchanged(t) for t, unchanged in self.state)
        return same and not written and [args[i].item() for i in self.numbers] == self.values

    def prepare(self, args: Sequence[Any]) -> Session:
        with self.lock:
            tensors = [*(args[i] for i in self.fixed), *self.gm.parameters(), *self.gm.buffers()]
            state = [(t, _unchanged(t)) for t in tensors]
            values = [args[i].item() for i in self.numbers]
            session = self._made(args, values)
            self.others = []
            self.state, self.values, self.session = state, values, session  # of one another, whatever is raised above
            return session

    def _other(self, args: Sequence[Any], maps: Sequence[Any]) -> Session:
        """A session that these sizes fit."""
        with self.lock:
            found = next((session for session in self.others if _fits(session, maps)), None)
            if found is None:
                found = self._made(args, self.values)
            self.others = [found, *(session for session in self.others if session is not found)][:KEPT_SESSIONS]
            return found

    def _made(self, args: Sequence[Any], values: Sequence[float]) -> Session:
        session = Session(self._bound(args, values), self._maps(args), {}, "cpu", "float32", self.winograd)
        session.plan(session.signature.example)
        return session

    def _bound(self, args: Sequence[Any], values: Sequence[float]) -> _Bound:
        return _Bound(self.gm, self.places, self.inputs, [args[i] for i in self.fixed], values)


def _fits(session: Session, maps: Sequence[Any]) -> bool:
    try:
        session.signature.check(maps)
    except Misfit:
        return False
    return True


def _plainly(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` as torch.export can follow it: autocast regions are entered as contexts, for of the calls it takes notes and
    casts nothing; a checkpointed part is called, as without gradients there is nothing to keep or to compute again.
    """
    parts = {name: part for name, part in gm.named_children() if isinstance(part, fx.GraphModule)}
    instead = {name: made for name, part in parts.items() if (made := _plainly(part)) is not part}
    if not instead and not any(node.target in PLAIN for node in gm.graph.nodes):
        return gm
    graph = copy.deepcopy(gm.graph)
    for node in graph.nodes:
        node.target = PLAIN.get(node.target, node.target)
    made = fx.GraphModule(gm, graph)
    for name, part in instead.items():
        setattr(made, name, part)
    return made


def _part(part: fx.GraphModule, *args: Any, **settings: Any) -> Any:
    return part(*args)


def _enter(*args: Any) -> torch.autocast:
    region = torch.autocast(*args)
    region.__enter__()
    return region


def _exit(region: torch.autocast) -> None:
    region.__exit__(None, None, None)


PLAIN = {_enter_autocast: _enter, _exit_autocast: _exit, tag_activation_checkpoint: _part}


def _announced(gm: fx.GraphModule) -> list[tuple[torch.dtype, Order | None] | None]:
    """The dtypes that Dynamo told the code behind `gm` of its results: the caller's autocast is in them. And the
    order in which it said that they lie, for views behind; they are dense, parts of a map too.
    """
    return [(value.dtype, _told_order(value)) if isinstance(value, Tensor) else None for value in _results(gm)]


def _results(gm: fx.GraphModule) -> list[Any]:
    """Dynamo's stand-ins of what `gm` returns."""
    (output,) = gm.graph.find_nodes(op="output")
    results = pytree.tree_leaves(output.args[0])
    return [result.meta.get("example_value") if isinstance(result, fx.Node) else None for result in results]


def _told_order(value: Tensor) -> Order | None:
    strides = known(value.stride()) if value.layout is torch.strided else None
    return strides_order(value) if strides is not None and 0 not in strides else None


def _orders_of(module: nn.Module, maps: Sequence[Tensor]) -> list[Order | None]:
    """The orders of the module's results for maps of these sizes, found on stand-ins; none where values decide."""
    try:
        with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True) as mode:
            results = pytree.tree_leaves(module(*map(mode.from_tensor, maps)))
    except RuntimeError:
        return []
    return [_told_order(result) if isinstance(result, Tensor) else None for result in results]


def _as_announced(result: Any, told: tuple[torch.dtype, Order | None] | None) -> Any:
    if told is None or not isinstance(result, Tensor):
        return result
    dtype, order = told
    return result.to(dtype) if order is None else laid_out(result.to(dtype), order)


def _unchanged(tensor: Tensor) -> Callable[[Tensor], bool]:
    """A question for later: whether the tensor still holds what it holds now."""
    if can_stamp(tensor):
        return Stamp(tensor).holds
    then = version(tensor)
    return lambda t: version(t) == then


class _Number:
    """Stands for a tensor of one number that the graph only asks for that number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def item(self) -> float:
        return self.value


class _Bound(nn.Module):
    """`gm` with its parameters and numbers in place, as a module of its true inputs alone, in the order of `inputs`."""

    def __init__(
        self,
        gm: fx.GraphModule,
        places: Sequence[Any],
        inputs: Sequence[int],
        parameters: Sequence[Tensor],
        numbers: Sequence[float],
    ) -> None:
        super().__init__()
        self.gm, self.places, self.inputs, self.numbers = gm, list(places), list(inputs), list(numbers)
        for i, value in enumerate(parameters):
            if isinstance(value, nn.Parameter):
                self.register_parameter(f"parameter{i}", value)
            else:
                self.register_buffer(f"parameter{i}", value)

    def forward(self, *inputs: Tensor) -> Any:
        maps = dict(zip(self.inputs, inputs, strict=True))
        queues: dict[str, Any] = {
            PARAMETER: (getattr(self, f"parameter{i}") for i in range(self.places.count(PARAMETER))),
            NUMBER: map(_Number, self.numbers),
            INPUT: (maps[i] for i in sorted(maps)),
        }
        args: list[Any] = []
        for place in self.places:
            if isinstance(place, str):
                args.append(next(queues[place]))
            else:
                args.append(maps[place[0]].shape[place[1]] if isinstance(place, tuple) else place.value)
        return self.gm(*args)


class _Literal:
    """A number that Dynamo hands over and that is no size of an input."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _places(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """For each of the graph's inputs: PARAMETER, INPUT, NUMBER, (which, dimension) of a size, or a literal."""
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    places: list[Any] = []
    sizes: dict[str, tuple[int, int]] = {}
    for node, example in zip(nodes, example_inputs, strict=True):
        places.append(_place(node, example))
        if places[-1] == INPUT:
            number = len(places) - 1
            sizes.update({str(d.node.expr): (number, i) for i, d in enumerate(_sizes(node)) if isinstance(d, SymInt)})
    for i, place in enumerate(places):
        if isinstance(place, SymInt):
            places[i] = sizes.get(str(place.node.expr)) or _Literal(int(place))
    return places


def _sizes(node: fx.Node) -> Sequence[Any]:
    """Those of one of the graph's inputs, symbols where Dynamo has them free."""
    return node.meta["example_value"].shape if "example_value" in node.meta else ()


def _batched_first(gm: fx.GraphModule, inputs: Sequence[int]) -> list[int]:
    """The inputs whose first size is free, before others, as weights may be: a session's batch is that of its first."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return sorted(inputs, key=lambda i: not any(isinstance(size, SymInt) for size in _sizes(nodes[i])[:1]))


def _place(node: fx.Node, example: Any) -> Any:
    if isinstance(example, SymInt):
        return example
    if not isinstance(example, Tensor):
        return _Literal(example)
    if isinstance(example, nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):
        return PARAMETER
    return NUMBER if not example.dim() and node.users and _is_only_asked(node) else INPUT


def _is_only_asked(node: fx.Node) -> bool:
    """Whether the graph, checkpointed parts included, wants no more of a tensor than its one number."""
    asked = (
        user.target is tag_activation_checkpoint or (user.op, user.target) == ("call_method", "item")
        for user in node.users
    )
    return all(asked) and all(map(_is_only_asked, _inside(node)))


def _inside(node: fx.Node) -> list[fx.Node]:
    """What a node is in the checkpointed parts that it is handed to."""
    found = []
    for user in node.users:
        if user.target is tag_activation_checkpoint:
            named, *given = user.args
            whole = node.graph.owning_module
            assert whole is not None and isinstance(named, fx.Node)
            part = whole.get_submodule(str(named.target))
            assert isinstance(part, fx.GraphModule)
            places = part.graph.find_nodes(op="placeholder")
            found += [place for place, one in zip(places, given, strict=True) if one is node]
    return found
