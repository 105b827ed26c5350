"""From any module that torch.export takes to the engine's graph."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.fx.config
import torch.fx.experimental.proxy_tensor as proxies
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from . import graph as ir
from .call import Call, Unsupported, hint_shape, known_shape, sizes_of
from .interpret import evaluate
from .operands import Order, is_layout_bound, order_of
from .translate import DROPOUTS, TRANSLATORS

_ASSERTIONS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)
# Calls whose results may be views, though their schemas do not say so and stand-ins of tensors may not show it.
MAYBE_VIEWS = ("reshape", "flatten", "contiguous", "to", "type_as", "expand_as", "chunk", "dropout")
AS_VIEWS = {
    torch.ops.aten.unsafe_chunk.default: torch.ops.aten.chunk.default,
    torch.ops.aten.unsafe_split.Tensor: torch.ops.aten.split.Tensor,
    torch.ops.aten.unsafe_split_with_sizes.default: torch.ops.aten.split_with_sizes.default,
}
_TRANSFORMS = "torch._functorch.predispatch"
_VMAP = {
    "lazy_load_decompositions",
    "_vmap_increment_nesting",
    "_vmap_decrement_nesting",
    "_add_batch_dim",
    "_remove_batch_dim",
}
_TRACING = threading.RLock()


class CaptureError(ValueError):
    """The module, or the module at these input sizes, cannot be turned into a graph."""


class _Mutates(Exception):
    """An in-place call whose target has other names too: the program needs torch's functionalisation first."""


def snapshot(module: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode that shares every parameter and buffer with `module`."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        twin: nn.Module = copy.deepcopy(module, shared | without_histories(module))
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__} cannot be copied ({error}); allowed: modules that copy.deepcopy takes"
        ) from error
    return twin.eval()


def without_histories(module: nn.Module) -> dict[int, Tensor]:
    """For `copy.deepcopy`, which refuses them, copies of what modules made of parameters and keep with its history, as
    old weight norm and pruning do; by the originals' `id`.
    """
    attributes = (value for part in module.modules() for value in vars(part).values())
    return {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}


def batch_of(leaves: Sequence[Any]) -> int:
    """Size of the first dimension of the first tensor with at least one dimension."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    seen = ", ".join("Tensor []" if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves) or "nothing"
    raise CaptureError(f"no tensor with a batch dimension among the inputs, {seen}; allowed: at least one")


def capture(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool, mixed: bool = False
) -> tuple[ir.Graph, pytree.TreeSpec]:
    """The graph of `module(*args, **kwargs)` in eval mode, and its result's structure.

    With `dynamic` the graph serves every batch of two and more for which its guards hold. Where the module does not
    allow a free batch size, or torch.export none for its `**kwargs`, the graph is of the example's alone, and says so
    in `dynamic`. `mixed`: a convolution's map and weights may differ in dtype, as under an autocast of the caller's.
    Raises CaptureError where torch.export does not take the module.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    # Without their bases, for which torch.export asks views.
    apart = {id(leaf): leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)}
    leaves = [apart.get(id(leaf), leaf) for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    shapes: ShapesCollection | None = None
    if dynamic and _are_parameters(module, kwargs):
        leaves = _batch_of_two(leaves)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        shapes = ShapesCollection()
        for leaf in {
            id(x): x for x in leaves if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch_of(leaves)
        }.values():
            shapes[leaf] = {0: Dim.AUTO}
    with _alone(), _mode_of(module):
        program = _without_vmap(_export(module, args, kwargs, shapes))
        try:
            graph = _translate(program, mixed)
        except _Mutates:
            graph = _translate(_functional(program), mixed)
        _empty(program)
    tree = program.call_spec.out_spec
    assert tree is not None
    return graph, tree


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One capture at a time, for torch.export keeps what it is at in globals.

    Nothing here reads where in Python each call was made, a sixth of a capture's time, nor the source that torch.fx
    writes for each of its graphs and keeps for good, half a megabyte: neither is made or kept. Nor is the last graph,
    of which torch keeps the nodes to look for tensors that leak out of it, nor what operators gave for stand-ins, which
    torch knows by the sizes: no later capture has the same free ones.
    """
    with _TRACING:
        before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
        sources, thread = torch.fx.graph_module._loader, threading.get_ident()
        keep, known_results = sources.cache, set(FakeTensorMode.cache)

        def cache(*args: Any, **options: Any) -> str:
            return "<captured>" if threading.get_ident() == thread else keep(*args, **options)

        torch.fx.config.do_not_emit_stack_traces = True
        sources.cache = cache  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            torch.fx.config.do_not_emit_stack_traces = before
            sources.cache = keep  # type: ignore[method-assign]
            getattr(proxies, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()
            for key in set(FakeTensorMode.cache) - known_results:
                FakeTensorMode.cache.pop(key, None)


def _mode_of(module: nn.Module) -> AbstractContextManager[Any]:
    """Inference mode where a parameter was made in it: torch.export marks what has gradients, which it lets alone."""
    made_there = any(value.is_inference() for value in module.parameters())
    return torch.inference_mode() if made_there else torch.no_grad()


def _are_parameters(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether `forward` has each of the names, and takes none of them into its `**kwargs`."""
    return set(names) <= set(inspect.signature(module.forward).parameters)


def _batch_of_two(leaves: list[Any]) -> list[Any]:
    """The leaves with a batch of one doubled: torch.export takes a size of one for a constant."""
    if batch_of(leaves) != 1:
        return leaves
    return [torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 else x for x in leaves]


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        return export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CaptureError(f"torch.export cannot capture {type(module).__name__}: {cause}") from error


def _without_vmap(program: ExportedProgram) -> ExportedProgram:
    """The program with what torch.vmap maps as plain calls. Raises CaptureError for torch.func's other transforms."""
    graphs = (m.graph for m in program.graph_module.modules() if isinstance(m, GraphModule))
    targets = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    found = {t.__name__ for t in targets if getattr(t, "__module__", "") == _TRANSFORMS}  # type: ignore[union-attr]
    if found - _VMAP:
        raise CaptureError(f"transforms of functions ({', '.join(sorted(found - _VMAP))}); allowed: torch.vmap")
    return program.run_decompositions({}) if found else program


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program without writes in place. Raises CaptureError where torch cannot tell what one reaches."""
    _name_views(program)
    try:
        return program.run_decompositions(_hidden_views(program))
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0]
        raise CaptureError(f"a write in place that torch cannot follow: {cause}") from error


def _name_views(program: ExportedProgram) -> None:
    """Calls views what functionalisation would copy, so that writes would stay there: dropouts that are off, parts."""
    for node in program.graph_module.graph.nodes:
        if str(node.target) in DROPOUTS and not (node.args[1] and node.args[2]):
            node.target, node.args = torch.ops.aten.alias.default, node.args[:1]
        node.target = AS_VIEWS.get(node.target, node.target)


def _hidden_views(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """What writes out the calls that make views and do not say so, as some of einsum do."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function" and _shares_memory(node)}
    calls = [call for call in targets if isinstance(call, torch._ops.OpOverload) and not _names_views(call._schema)]
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    written_out = [call for call in calls if torch._C._dispatch_has_kernel_for_dispatch_key(call.name(), key)]
    return {call: partial(call._op_dk, key) for call in written_out}


def _translate(program: ExportedProgram, mixed: bool) -> ir.Graph:
    builder = _Builder(program, mixed)
    for node in program.graph.nodes:
        builder.add(node)
    graph = builder.graph
    if graph.dynamic:
        graph.guards = _guards(program)
    return graph


def _empty(program: ExportedProgram) -> None:
    """Frees the stand-ins of tensors, megabytes that would wait for the garbage collector with the graph's cycles."""
    for node in program.graph.nodes:
        node.meta.clear()


def _guards(program: ExportedProgram) -> tuple[Any, ...]:
    """What the module's own code asked about free sizes on its way, as it was answered."""
    values = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    environment = next((mode.shape_env for mode in modes if mode.shape_env is not None), None)
    return () if environment is None else tuple(guard.expr for guard in environment.guards)


class _Builder:
    """Walks a captured program once; `values` maps its nodes to ours, to tuples of ours, or to plain Python values."""

    def __init__(self, program: ExportedProgram, mixed: bool) -> None:
        self.program, self.mixed = program, mixed
        self.graph = ir.Graph()
        self.values: dict[FxNode, Any] = {}
        self.sizes: dict[ir.Node, tuple[Any, ...]] = {}
        self.seen: set[FxNode] = set()
        self.same: dict[FxNode, list[FxNode]] = {}  # nodes whose results in-place calls made one tensor
        signature = program.graph_signature
        self.specs = {s.arg.name: s for s in signature.input_specs}
        users = [s for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
        self.positions = {s.arg.name: i for i, s in enumerate(users)}
        for out in signature.output_specs:
            if out.kind not in (OutputKind.USER_OUTPUT,):
                raise CaptureError(
                    f"the module writes to {out.target!r}, as batch norm in training mode does; allowed: inference "
                    "in eval mode, without changes to inputs or buffers"
                )

    def add(self, node: FxNode) -> None:
        if node.op == "placeholder":
            self.values[node] = self._placeholder(node)
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.program.graph_module)
            self.values[node] = self._constant(node.name, value) if isinstance(value, Tensor) else value
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "output":
            self.graph.outputs = list(self._resolve(node.args[0]))
        else:
            raise CaptureError(f"captured node {node.format_node()}; allowed: calls of functions")
        self.seen.add(node)

    def _constant(self, name: str, value: Tensor) -> ir.Node:
        op = ir.Constant(value.detach(), value.dtype)
        return self.graph.append(ir.Node(name, op, shape=tuple(value.shape), dtype=value.dtype))

    def _placeholder(self, node: FxNode) -> Any:
        spec = self.specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            value = node.meta["val"]
            if not isinstance(value, Tensor):
                return value
            shape = hint_shape(value)
            sizes = sizes_of(value)
            self.graph.dynamic |= bool(sizes) and not isinstance(sizes[0], int)
            op = ir.Input(self.positions[node.name])
            made = self.graph.append(ir.Node(node.name, op, shape=shape, dtype=value.dtype))
            self.graph.inputs.append(made)
            self.sizes[made] = sizes
            return made
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            state = self.program.state_dict if spec.target in self.program.state_dict else self.program.constants
            return self._constant(node.name, state[spec.target])
        raise CaptureError(f"captured input of kind {spec.kind.name}; allowed: tensors, parameters and buffers")

    def _resolve(self, value: Any) -> Any:
        return pytree.tree_map_only(FxNode, lambda n: self.values[n], value)

    def _call(self, node: FxNode) -> None:
        target, mutated = self._out_of_place(node)
        value = node.meta.get("val")
        path = _module_path(node)
        shape = known_shape(value)
        self.graph.captured[node.name] = ir.Captured(node.name, str(node.target), path, shape)
        args, kwargs = self._resolve((node.args, node.kwargs))
        if getattr(target, "_opname", "") in _ASSERTIONS:
            self.graph.notes[node.name] = "a check made at capture"
            self.values[node] = None
            return
        if target is operator.getitem and isinstance(args[0], (tuple, list)):
            result = args[0][args[1]]
            self.graph.notes[node.name] = "part of a captured result"
        else:
            call = Call(self.graph, self.sizes, node.name, target, (args, kwargs), value, path, _read(node))
            if not self.mixed:
                _check_dtypes(call)
            result = self._make(call, node)
        self.values[node] = result
        for other in mutated:
            self.values[other] = result

    def _out_of_place(self, node: FxNode) -> tuple[Any, list[FxNode]]:
        """The call's out-of-place form, and the nodes whose later readers must see its result.

        Raises _Mutates where a captured view could see the change too, or the result would be of another dtype.
        """
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            return target, []
        name = target._schema.name.split("::")[1]
        packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
        pure = getattr(packet, target._overloadname, None)
        base = node.args[0] if node.args else None
        if pure is None or not isinstance(base, FxNode) or base.op != "call_function" or _aliases(base):
            raise _Mutates
        if not _takes_alike(pure, target) or not _keeps_dtype(pure, node):
            raise _Mutates
        group = self.same.setdefault(base, [base])
        if any(_aliases(user) for member in group for user in member.users if user in self.seen):
            raise _Mutates
        self.same[node] = group
        group.append(node)
        return pure, group

    def _make(self, call: Call, node: FxNode) -> Any:
        used = [a for a in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(a, ir.Node)]
        try:
            if used and all(isinstance(a.op, ir.Constant) for a in used):
                raise Unsupported("arithmetic on parameters that gives no tensor")
            made = [sizes_of(value) for value in pytree.tree_leaves(call.value) if isinstance(value, Tensor)]
            if not all(isinstance(size, int) for sizes in (*map(self._sizes, used), *made) for size in sizes[1:]):
                raise Unsupported("sizes behind the first that depend on the batch")
            translate = TRANSLATORS.get(str(call.target))
            if translate is None:
                raise Unsupported(f"no native step for {call.target}")
            return translate(call)
        except Unsupported as reason:
            return self._torch(call, str(reason), node)

    def _sizes(self, node: ir.Node) -> tuple[Any, ...]:
        return self.sizes.get(node, ())

    def _torch(self, call: Call, reason: str, node: FxNode) -> ir.Node:
        inputs: list[ir.Node] = []

        def hold(node: ir.Node) -> ir.Ref:
            inputs.append(node)
            return ir.Ref(len(inputs) - 1)

        args, kwargs = pytree.tree_map_only(ir.Node, hold, (call.args, call.kwargs))
        op = ir.Torch(call.target, args, kwargs, reason, self._orders(node) if is_layout_bound(call.target) else None)
        folded = None
        if all(isinstance(i.op, ir.Constant) for i in inputs) and _repeatable(call.target):
            folded = evaluate(op, [evaluate(i.op, []) for i in inputs])
        if isinstance(folded, Tensor) and isinstance(call.value, Tensor):
            self.graph.notes[call.name] = "computed from parameters alone, once"
            return call.node(ir.Constant(folded, call.value.dtype))
        return call.node(op, *inputs)

    def _orders(self, node: FxNode) -> tuple[Order | None, ...]:
        """How the call's operands lie at capture. Raises CaptureError where what it reads cannot be brought back."""
        leaves: list[Any] = pytree.tree_leaves((node.args, node.kwargs))
        values = [n.meta["val"] for n in leaves if isinstance(n, FxNode) and isinstance(self.values[n], ir.Node)]
        orders = tuple(order_of(value) if isinstance(value, Tensor) else None for value in values)
        strided = node.target in (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)
        if strided and (orders[0] is None or values[0].storage_offset()):
            raise CaptureError(f"{node.name}: as_strided of a part of a tensor; allowed: of a whole, dense one")
        return orders


def _check_dtypes(call: Call) -> None:
    """Raises CaptureError for a convolution of two dtypes: torch runs none, but export's stand-ins do."""
    if "conv" not in getattr(call.target, "_opname", "") or not (call.has("input") and call.has("weight")):
        return
    x, weight = call["input"].dtype, call["weight"].dtype
    if x != weight:
        raise CaptureError(f"{call.path or call.name} got a map of dtype {x}; allowed: {weight}, that of its weights")


def _takes_alike(pure: Any, target: Any) -> bool:
    """Whether two overloads of one name take the same: `pow_.Scalar` takes its exponent, `pow.Scalar` its base."""
    taken, others = ([str(argument.type) for argument in call._schema.arguments] for call in (pure, target))
    return taken == others


def _keeps_dtype(pure: Any, node: FxNode) -> bool:
    """Whether an in-place call's other form has the result's dtype too: comparisons and mixed operands give others."""
    args, kwargs = pytree.tree_map_only(FxNode, lambda n: n.meta["val"], (node.args, node.kwargs))
    with enable_python_dispatcher():  # for free sizes
        return bool(pure(*args, **kwargs).dtype == node.meta["val"].dtype)


def _read(node: FxNode) -> frozenset[int]:
    """The positions of a tuple of results that anything reads."""
    parts = [user for user in node.users if user.target is operator.getitem]
    return frozenset(part.args[1] for part in parts if part.users)  # type: ignore[misc]


def _repeatable(target: Any) -> bool:
    """Whether a call gives the same result every time."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags


def _module_path(node: FxNode) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _aliases(node: FxNode) -> bool:
    """Whether the node's result may share memory with its inputs."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema, name = node.target._schema, node.target._opname
    if schema.is_mutable:
        return False
    return _names_views(schema) or name in MAYBE_VIEWS or node.target in AS_VIEWS or _shares_memory(node)


def _names_views(schema: Any) -> bool:
    return any(result.alias_info for result in schema.returns)


def _shares_memory(node: FxNode) -> bool:
    """Whether the result and an operand lay in one memory at capture."""
    return any(_memory(node) & _memory(source) for source in node.all_input_nodes)


def _memory(node: FxNode) -> set[int]:
    values = (v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor))
    return {v.untyped_storage()._cdata for v in values if v.layout is torch.strided}
