"""A captured graph -> one flat functional aten graph: wrappers inlined, in-place ops replaced, asserts and dropout gone."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen

from qgraph.errors import CaptureError
from qgraph.origin import source_line

aten = torch.ops.aten
hop = torch.ops.higher_order

# Run-time checks of what export assumed about shapes and types; they compute nothing.
_ASSERTS = {
    "aten._assert_async",
    "aten._assert_scalar",
    "aten._assert_tensor_metadata",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
}
_DROPOUTS = {f"aten.{feature}{alpha}dropout{end}" for feature in ("", "feature_") for alpha in ("", "alpha_") for end in ("", "_")}
# Copies of the constants that export makes for `torch.tensor(...)` inside forward().
_LIFTS = {"aten.lift_fresh_copy", "aten.lift_fresh", "aten.detach_"}


class Entangled(Exception):
    """A tensor is written in place while views of it exist, or autocast is on: only torch's functionalization resolves that."""


def flatten(source: GraphModule) -> tuple[GraphModule, tuple[tuple[str, ...], ...]]:
    """A new GraphModule with the inputs, outputs and tensors (shared, not copied) of `source`; and the module paths that
    are tied: one tuple for every tensor with several paths, the first of which is its get_attr target.

    Raises CaptureError for writes into parameters or buffers, Entangled where only torch can help."""
    work = _Flattener(source)
    env: dict[Node, Any] = {n: work.graph.node_copy(n) for n in source.graph.find_nodes(op="placeholder")}
    result = work.inline(source, env)
    output = source.graph.output_node()
    work.graph.output(result).meta = dict(output.meta)
    work.graph.eliminate_dead_code()
    for node in work.graph.nodes:
        # What export writes for nodes of its own that belong to no module.
        if any(path == "_empty_nn_module_stack_from_metadata_hook" for path, *_ in node.meta.get("nn_module_stack", {}).values()):
            del node.meta["nn_module_stack"]
    gm = GraphModule(work.attributes, work.graph, "GraphModule")
    used = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
    return gm.eval(), tuple(tuple(p) for p in work.paths.values() if len(p) > 1 and p[0] in used)


def _identity(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same memory, seen the same way."""
    address = 0 if torch._subclasses.fake_tensor.is_fake(tensor) or tensor.is_meta else tensor.data_ptr()
    return (address, tensor.dtype, tensor.shape, tensor.stride()) if address and tensor.numel() else id(tensor)


def _packet(node: Node) -> str:
    return str(node.target.overloadpacket) if isinstance(node.target, OpOverload) else ""


def _aliases(target: OpOverload) -> list[Any]:
    """What the schema says of arguments whose memory is written, or may be shared with the result."""
    return [a.alias_info for a in target._schema.arguments if a.alias_info is not None]


def _whole(node: Node) -> tuple[OpOverload, tuple[Any, ...]] | None:
    """Inference norms in the spelling with several results, of which one is read: the plain op of one result, and its arguments."""
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return None
    match _packet(node):
        case "aten._native_batch_norm_legit_no_training":
            *tensors, momentum, eps = node.args
        case "aten.native_batch_norm" | "aten.cudnn_batch_norm" if len(node.args) == 8 and not node.args[5]:
            *tensors, _, momentum, eps = node.args
        case "aten.native_layer_norm":
            return aten.layer_norm.default, (*node.args, False)
        case _:
            return None
    return aten.batch_norm.default, (*tensors, False, momentum, eps, False)


def _promotes(node: Node) -> bool:
    """True when the functional op may have another type than the tensor that is written in place keeps."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    dtypes = [v.dtype for v in values if isinstance(v, torch.Tensor)]
    return any(d != dtypes[0] and d != torch.bool for d in dtypes)


class _Structure(_PyTreeCodeGen):
    """The module's own arguments and results around the flat graph. Copies share the description: torch's, copied, warns."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Structure:
        return _Structure(self.pytree_info)


class _Flattener:
    """State of one copy: the new graph, its tensors, and which values share memory."""

    def __init__(self, source: GraphModule) -> None:
        self.graph = Graph()
        codegen = source.graph._codegen
        self.graph.set_codegen(_Structure(codegen.pytree_info) if isinstance(codegen, _PyTreeCodeGen) else codegen)
        self.attributes: dict[str, Any] = {}
        self.constants: dict[Any, Node] = {}
        self.paths: dict[Any, list[str]] = {}
        for named in (source.named_parameters(remove_duplicate=False), source.named_buffers(remove_duplicate=False)):
            for path, tensor in named:
                self.paths.setdefault(_identity(tensor), []).append(path)
        # Per value of the new graph: the value whose memory it may share, and its content after in-place writes.
        self.memory: dict[Node, Node] = {}
        self.written: dict[Node, Node] = {}
        self.viewed: set[Node] = set()

    def inline(self, owner: GraphModule, env: dict[Node, Any]) -> Any:
        """Copies the nodes of `owner`, whose placeholders are in `env`; returns its output in terms of the new graph."""
        for node in owner.graph.nodes:
            if node.op == "output":
                return self.mapped(node.args[0], env)
            if node.op == "get_attr":
                env[node] = self.attribute(owner, node)
            elif node.op != "placeholder" and _packet(node) not in _ASSERTS:
                env[node] = self.call(owner, node, env)
        return None

    def mapped(self, value: Any, env: dict[Node, Any]) -> Any:
        return torch.fx.map_arg(value, lambda n: self.newest(env[n]))

    def newest(self, value: Any) -> Any:
        while isinstance(value, Node) and value in self.written:
            value = self.written[value]
        return value

    def attribute(self, owner: GraphModule, node: Node) -> Node:
        value: Any = owner
        for part in str(node.target).split("."):
            value = getattr(value, part)
        key = _identity(value) if isinstance(value, torch.Tensor) else id(value)
        if key not in self.constants:
            name = self.paths.get(key, [str(node.target)])[0]
            while name in self.attributes:
                name += "_"
            self.attributes[name] = value
            self.constants[key] = self.graph.create_node("get_attr", name)
            self.constants[key].meta = dict(node.meta)
        return self.constants[key]

    def call(self, owner: GraphModule, node: Node, env: dict[Node, Any]) -> Any:
        packet = _packet(node)
        if packet in _LIFTS or (packet in _DROPOUTS and not node.args[2]):
            return env[node.all_input_nodes[0]]
        if node.target is hop.wrap_with_set_grad_enabled:
            return self.body(owner, node, 1, env)
        if node.target is hop.wrap_with_autocast:
            if node.args[2]:
                raise Entangled
            return self.body(owner, node, 4, env)
        if node.target is operator.getitem and isinstance(env[node.args[0]], tuple):  # type: ignore[index]
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        if (whole := _whole(node)) is not None:
            return (self.named(whole[0], self.mapped(whole[1], env), {}, node), None, None)
        if isinstance(node.target, OpOverload) and any(a.is_write for a in _aliases(node.target)):
            return self.write(node, env)
        return self.share(node, self.graph.node_copy(node, lambda n: self.newest(env[n])))

    def body(self, owner: GraphModule, node: Node, at: int, env: dict[Node, Any]) -> Any:
        """Inlines a higher-order op that only sets a mode around the nested graph `node.args[at]`."""
        inner = getattr(owner, str(node.args[at].target))  # type: ignore[union-attr]
        formal = inner.graph.find_nodes(op="placeholder")
        return self.inline(inner, env | dict(zip(formal, self.mapped(node.args[at + 1 :], env), strict=True)))

    def named(self, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], node: Node) -> Node:
        """A call that stands for `node`, called after its own target."""
        new = self.graph.create_node("call_function", target, args, kwargs, name=str(target.overloadpacket).removeprefix("aten."))
        new.meta = dict(node.meta)
        if isinstance(new.meta.get("val"), tuple | list):
            new.meta["val"] = new.meta["val"][0]
        return new

    def share(self, node: Node, new: Node) -> Node:
        """Notes that `new` may be a view of its first input."""
        viewing = isinstance(node.target, OpOverload) and _aliases(node.target)
        if (viewing or node.target is operator.getitem) and new.all_input_nodes:
            self.memory[new] = self.base(new.all_input_nodes[0])
            self.viewed.add(self.memory[new])
        return new

    def base(self, value: Node) -> Node:
        return self.memory.get(value, value)

    def write(self, node: Node, env: dict[Node, Any]) -> Node:
        """x.op_(y): the functional op, whose result stands for x from here on.

        A write into an input changes the result but no longer the caller's tensor."""
        target = env[node.args[0]]  # type: ignore[index]
        base = self.base(self.newest(target))
        if base.op == "get_attr":
            raise CaptureError(
                f"forward() writes into {base.target!r} at {source_line(node) or node}: a graph keeps no state between calls; "
                "return the new value as an output and pass it in as an input"
            )
        name = _packet(node).removeprefix("aten.").removesuffix("_")
        functional = getattr(getattr(aten, name, None), node.target._overloadname, None)  # type: ignore[union-attr]
        if functional is None or base in self.viewed or _promotes(node):
            raise Entangled
        new = self.named(functional, self.mapped(node.args, env), self.mapped(node.kwargs, env), node)
        self.memory[new] = base
        self.written[self.newest(target)] = new
        return new
