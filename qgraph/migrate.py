"""migrate(gm, group, d): the values of a group times d, the constants around them divided by it; what the graph computes stays.

    output side     W -> D W, b -> D b;   norm weight g -> d g, b -> d b
    input side      W -> W D^-1
    constants       c added to a scaled value -> d c;   y = x c with factors d_x, d_y -> c d_y / d_x

Constants are computed in float64 and rounded once. A constant that others read too stays theirs: this reader gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.diagonal import Group, Member
from qgraph.edit import erase, named_targets
from qgraph.errors import QGraphError
from qgraph.moments import MOMENTS
from qgraph.onnx_ops import OnnxOp, op
from qgraph.rewriter import Rewriter
from qgraph.slots import with_operands
from qgraph.types import type_of
from qgraph.views import BatchNorm, Conv, Elementwise, Linear, Norm, const_value, is_const, view_any
from qgraph.weights import Weight, constant_weight

aten = torch.ops.aten


def migrate(gm: GraphModule, group: Group, d: Tensor, *, by: str = "migrate") -> int:
    """Scales the group's values by d [size], positive and finite; returns how many operations have new constants.

    Nodes keep their names; the constants they read are new. Raises QGraphError for another d, or for a constant that does not fit its type."""
    d = d.detach().double()
    if tuple(d.shape) != (group.size,) or not bool((d.isfinite() & (d > 0)).all()):
        raise QGraphError(f"a group of {group.size} channels takes as many positive, finite factors, got {list(d.shape)}")
    padded = torch.cat([d, torch.ones(1, dtype=d.dtype)])  # -1 stands for factor 1
    members = (*group.producers, *group.consumers, *group.shifts)
    for member in members:
        _rewrite(member, padded[member.channels], Rewriter(gm, member.node, by=by))
    for node, channels in group.values.items():
        if (kept := node.meta.get(MOMENTS)) is not None:
            node.meta[MOMENTS] = kept.times(padded[channels])
    gm.recompile()
    return len({m.node for m in members})


def misfit(group: Group, d: Tensor) -> str | None:
    """Which 16-bit constant would leave its type when the group's values are scaled by d, as a sentence; None where all fit."""
    padded = torch.cat([d.detach().double(), torch.ones(1, dtype=torch.float64)])
    for member in (*group.producers, *group.consumers, *group.shifts):
        for constant, fn in _changes(member, padded[member.channels]).values():
            value = const_value(constant)
            if value is not None and value.dtype == torch.float16 and not _fits(fn(value), value):
                return f"@{constant.target} would not fit float16 with its factors"
    return None


def magnitudes(members: Iterable[Member], size: int) -> Tensor:
    """Largest magnitude of weights per factor, on the members' sides of linears and convolutions [size]; 0 where no weight is met."""
    found = torch.zeros(size + 1)
    for m in members:
        v: Linear | Conv | None = view_any((Linear, Conv), m.node)
        if v is not None and (weight := constant_weight(v)) is not None:
            largest = weight.absmax(v.in_axis if m.side == "input" else v.out_axis)
            found.scatter_reduce_(0, m.channels % (size + 1), largest, "amax")  # -1 goes to the place behind the last
    return found[:size]


def multiply(gm: GraphModule, value: Node, readers: Sequence[Node], d: Tensor, *, by: str = "migrate") -> Node:
    """x -> x d for these linears and convolutions that read the value x, with weights W D^-1: for what no constant can take in.

    Returns the new product, which all of them share. Raises QGraphError for a constant that does not fit its type."""
    d = d.detach().double()
    for node in readers:
        _rewrite(Member(node, "input", torch.arange(len(d))), d, Rewriter(gm, node, by=by))
    chosen = set(readers)
    first = next(n for n in gm.graph.nodes if n in chosen)
    layer: Linear | Conv = view_any((Linear, Conv), first)
    axis = layer.x_axis if isinstance(layer, Linear) else -1 - len(layer.stride)
    rw = Rewriter(gm, first, by=by)
    kind = type_of(value)
    dtype = getattr(torch, (kind and kind.dtype) or "float32")
    factors = rw.const(d.to(dtype).reshape((-1,) + (1,) * (-1 - axis)), name=f"{value.name}_factors")
    target = op("Mul", version=first.target.version) if isinstance(first.target, OnnxOp) else aten.mul.Tensor
    product = rw.call(target, value, factors, like=value, origin=value)
    for node in readers:
        node.replace_input_with(value, product)
    gm.recompile()
    return product


def _rewrite(member: Member, d: Tensor, rw: Rewriter) -> None:
    node, old = member.node, list(member.node.all_input_nodes)
    changes = _changes(member, d)
    new = {role: _new(rw, constant, fn) for role, (constant, fn) in changes.items()}
    if "" in new:
        node.replace_input_with(changes[""][0], new[""])
    else:
        v = view_any((Linear, Conv, Norm, BatchNorm), node)
        _set(node, **(new if "weight" in new else {"weight": _ones(rw, v, d), **new}))
    drop_constants(rw.gm, old)


def _changes(member: Member, d: Tensor) -> dict[str, tuple[Node, Callable[[Tensor], Tensor]]]:
    """Role -> (the constant that has it, what becomes of that); the role is "" where the constant is any operand."""
    v: Any = view_any((Linear, Conv, Norm, BatchNorm, Elementwise), member.node)
    if member.operand is not None:
        return {"": (member.operand, lambda c: _broadcast(c, d))}
    if isinstance(v, Elementwise):
        constant = next(x for x in v.inputs if isinstance(x, Node) and is_const(x))
        inverted = (member.side == "input") != (v.kind == "div")
        return {"": (constant, lambda c: _times(c, 1 / d if inverted else d))}
    if member.side == "input":
        return {"weight": (v.weight, lambda w: Weight(v, w).scaled(1 / d, v.in_axis))}
    weight = {} if v.weight is None else {"weight": (v.weight, lambda w: _outputs_times(v, w, d))}
    return weight if v.bias is None else {**weight, "bias": (v.bias, lambda b: _times(b, d))}


def _outputs_times(v: Linear | Conv | Norm | BatchNorm, weight: Tensor, d: Tensor) -> Tensor:
    return Weight(v, weight).scaled(d, v.out_axis) if isinstance(v, Linear | Conv) else _times(weight, d)


def _times(constant: Tensor, d: Tensor) -> Tensor:
    """One element per channel, or one for all, times d."""
    return constant.double() * (d if constant.numel() == 1 else d.reshape(constant.shape))


def _broadcast(constant: Tensor, d: Tensor) -> Tensor:
    """constant * d with no more leading axes than needed."""
    found: Tensor = constant.double() * d
    while found.ndim > constant.ndim and found.shape[0] == 1:
        found = found[0]
    return found


def _new(rw: Rewriter, old: Node, fn: Callable[[Tensor], Tensor]) -> Node:
    value = const_value(old)
    if value is None:
        raise QGraphError(f"%{old.name}, which %{rw.root.name} reads, is no constant any more")
    new = fn(value).to(value.dtype)
    if not _fits(new, value):
        raise QGraphError(f"@{old.target} does not fit {value.dtype} when it takes in factors")
    return rw.const(new, name=str(old.target))


def _fits(new: Tensor, old: Tensor) -> bool:
    """What was finite is so in its own type."""
    return bool(new.to(old.dtype).isfinite().all()) or not bool(old.isfinite().all())


def _ones(rw: Rewriter, v: Norm, d: Tensor) -> Node:
    """The weight of a norm that has none, with the factors taken in."""
    kind = type_of(v.x)
    if kind is None or kind.shape is None or kind.dtype is None:
        raise QGraphError(f"the type of %{v.x.name} is not known")
    sizes = [kind.shape[a] for a in (v.axes if v.kind in ("layer", "rms") else (1,))]
    return rw.const(d.to(getattr(torch, kind.dtype)).reshape([int(n or 1) for n in sizes]), name=f"{rw.root.name}_weight")


def _set(node: Node, **roles: Node) -> None:
    found = with_operands(node, **roles)
    if found is None:
        raise QGraphError(f"%{node.name} has no place for {' and '.join(roles)}")
    node.args, node.kwargs = found


def drop_constants(gm: GraphModule, old: list[Node]) -> None:
    """Removes constants that nothing reads any more."""
    dead = [node for node in old if node.op == "get_attr" and not node.users]
    for node in dead:
        erase(node)
    used = named_targets(gm) if dead else set()
    for owner, _, name in {str(node.target).rpartition(".") for node in dead}:
        target = f"{owner}.{name}" if owner else name
        if target not in used and owner not in used:  # a called module needs its parameters
            delattr(gm.get_submodule(owner), name)
