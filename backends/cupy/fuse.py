"""What comes before a quantization joins it, so that the float values never travel: norms (with the residual sum before them), and
activations (with the product behind them).

    quantize(norm(x + residual) * weight + bias)      norm_quantize
    quantize(silu(gate) * up), quantize(gelu(x))      act_quantize

quantize is static with one scale, or dynamic per token. Sums of a norm run in another order than torch's, exp and erf are not torch's to the
last bit: an integer may differ by one where the value lies on the border of two.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph import chains
from qgraph.backends.cupy import act_quantize, norm_quantize  # noqa: F401  (register their ops)
from qgraph.backends.cupy.act_quantize import ACTS
from qgraph.backends.cupy.claim import static_parameters
from qgraph.backends.cupy.launch import TYPES
from qgraph.backends.cupy.ops import K
from qgraph.edit import erase, graph_modules, redirect
from qgraph.pattern import Match, OneOf, Op
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import BISECTION, Decline, Rewriter, rule
from qgraph.text import path_of
from qgraph.types import storage, type_of
from qgraph.views import Activation, DynamicQuantize, Elementwise, Norm, Quantize, const_value, view

ONE_STEP = EQUIVALENT(0.05)


@dataclass(frozen=True)
class _Format:
    """How x becomes integers: static with scale and zero point, or per token with neither."""

    x: Node
    dtype: str
    scale: Node | None = None
    zero_point: Node | None = None
    symmetric: bool = False


def _format(node: Node) -> _Format | None:
    """What the row kernels can do of quantize and dynamic_quantize."""
    static, dynamic = view(Quantize, node), view(DynamicQuantize, node)
    if static is not None and static.axis is None and _constant(static.scale) and _constant(static.zero_point):
        found = _Format(static.x, static.dtype, static.scale, static.zero_point)
    elif dynamic is not None and dynamic.group == -1:
        found = _Format(dynamic.x, dynamic.dtype, symmetric=dynamic.symmetric)
    else:
        return None
    kind = type_of(found.x)
    real = kind is not None and kind.dtype is not None and getattr(torch, kind.dtype, None) in TYPES
    return found if real and storage(found.dtype).itemsize == 1 else None


def _constant(node: Node | None) -> bool:
    return node is None or const_value(node) is not None


# Norms


@dataclass(frozen=True)
class _Normal:
    """Over the last axis of x; `nodes` are all that compute it."""

    layer: bool
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float
    nodes: tuple[Node, ...]


def _normal(node: Node) -> _Normal | None:
    """The node as a norm with stored parameters, written as one op or, where ONNX has none, as a chain."""
    found = _bare(node) or _with_parameter(node)
    kind = None if found is None else type_of(found.x)
    if found is None or kind is None or not kind.shape:
        return None
    if (made := type_of(node)) is None or made.dtype != kind.dtype:
        return None
    values = [const_value(p) for p in (found.weight, found.bias) if p is not None]
    return found if all(v is not None and tuple(v.shape) == tuple(kind.shape[-1:]) for v in values) else None


def _bare(node: Node) -> _Normal | None:
    norm, chain = view(Norm, node), chains.normal(node)
    if norm is not None and norm.kind in ("layer", "rms") and norm.axes == (-1,):
        return _Normal(norm.kind == "layer", norm.x, norm.weight, norm.bias, norm.eps, (node,))
    if chain is None or isinstance(chain, str):
        return None
    return _Normal(chain.kind == "layer", chain.x, chain.weight, None, chain.eps, chain.nodes)


def _with_parameter(node: Node) -> _Normal | None:
    """norm(x) * weight, norm(x) + bias"""
    op = view(Elementwise, node)
    if op is None or len(op.inputs) != 2:
        return None
    for inner, parameter in itertools.permutations(op.inputs):
        if isinstance(inner, Node) and isinstance(parameter, Node) and len(inner.users) == 1 and const_value(parameter) is not None:
            norm = _normal(inner)
            if norm is None or norm.bias is not None:
                continue
            if op.kind == "mul" and norm.weight is None:
                return replace(norm, weight=parameter, nodes=(*norm.nodes, node))
            if op.kind == "add" and norm.layer:
                return replace(norm, bias=parameter, nodes=(*norm.nodes, node))
    return None


@dataclass(frozen=True)
class FuseNormQuantize(Pass):
    """Both dialects. The float result of the norm and the residual sum are written too where something else reads them."""

    contract: ClassVar[Contract] = ONE_STEP

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(self._run(part, ctx) for part in graph_modules(gm))

    def _run(self, gm: GraphModule, ctx: Context) -> int:
        count = 0
        for node in list(gm.graph.nodes):
            asked = _format(node)
            norm = None if asked is None else _normal(asked.x)
            if asked is not None and norm is None and (v := view(Norm, asked.x)) is not None:
                reason = f"the kernel normalises rows with stored parameters of their length; this is a {v.kind} norm over axes {v.axes}"
                ctx.declines.append(Decline(self.name, node.name, path_of(node), reason))
            elif asked is not None and norm is not None and BISECTION.allows(self.name, node):
                self._fuse(gm, node, asked, norm)
                count += 1
        if count:
            gm.graph.lint()
            gm.recompile()
        return count

    def _fuse(self, gm: GraphModule, node: Node, asked: _Format, norm: _Normal) -> None:
        root = asked.x
        kept = any(u is not node for u in root.users)
        total = _residual_sum(norm)
        rw = Rewriter(gm, root.next, by=self.name)
        x, residual = (norm.x, None) if total is None else total.inputs
        scale, zero = (None, None) if asked.scale is None else static_parameters(rw, asked.scale, asked.zero_point)
        found = rw.call(
            K.norm_quantize.default, x, residual, norm.weight, norm.bias, norm.eps, norm.layer, scale, zero, asked.dtype, asked.symmetric,
            False, kept, origin=root,
        )  # fmt: skip
        outputs = [rw.call(operator.getitem, found, i, origin=root) for i in range(6)]
        redirect(node, outputs[0] if asked.scale is not None else (outputs[0], outputs[1], outputs[2]))
        erase(node)  # and the norm with it, where nothing else reads it
        if kept:
            redirect(root, outputs[5])
            erase(root)
        if total is not None and (readers := list(norm.x.users)):
            for reader in readers:
                reader.replace_input_with(norm.x, outputs[4])
            erase(norm.x)
        for unread in (o for o in outputs if not o.users):
            gm.graph.erase_node(unread)


def _residual_sum(norm: _Normal) -> Any:
    """The sum before a norm, seen as Elementwise, where both terms have its shape and its other readers come after the norm."""
    add, kind = view(Elementwise, norm.x), type_of(norm.x)
    if add is None or add.kind != "add" or len(add.inputs) != 2 or kind is None:
        return None
    same = all(isinstance(term, Node) and type_of(term) == kind for term in add.inputs)
    last = norm.nodes[-1]
    later = all(u in norm.nodes or _follows(u, last) for u in norm.x.users)
    return add if same and later and kind.shape is not None and None not in kind.shape else None


def _follows(node: Node, other: Node) -> bool:
    return other < node


# Activations


def _gate(node: Any) -> tuple[str, Node] | None:
    """(kind, x) of an activation that the kernel has, written as one op or as a chain."""
    if not isinstance(node, Node):
        return None
    found: Any = view(Activation, node) or chains.pointwise(node)
    return None if found is None or isinstance(found, str) or found.kind not in ACTS else (found.kind, found.x)


def _gated(x: Node) -> tuple[str, Node, Node | None] | None:
    """(kind, gate, up): x as act(gate) * up, or act(gate)."""
    product = view(Elementwise, x)
    if product is not None and product.kind == "mul" and len(product.inputs) == 2:
        for one, up in (product.inputs, product.inputs[::-1]):
            gate = _gate(one)
            if gate is not None and isinstance(up, Node) and type_of(up) == type_of(gate[1]) and up is not gate[1]:
                return (*gate, up)
    alone = _gate(x)
    return None if alone is None else (*alone, None)


@rule(OneOf(Op(Quantize), Op(DynamicQuantize)))
def act_before_quantize(m: Match, rw: Rewriter) -> Node | tuple[Node, ...] | None:
    """quantize(act(gate) * up)"""
    asked = _format(m.root)
    found = None if asked is None else _gated(asked.x)
    if asked is None or found is None:
        return None
    kind, gate, up = found
    if len(asked.x.users) > 1:
        rw.decline(f"%{asked.x.name} is read as floats, too")
    scale, zero = (None, None) if asked.scale is None else static_parameters(rw, asked.scale, asked.zero_point)
    q = rw.call(K.act_quantize.default, gate, up, kind, scale, zero, asked.dtype, asked.symmetric, False)
    return rw.call(operator.getitem, q, 0) if asked.scale is not None else tuple(rw.call(operator.getitem, q, i) for i in range(3))


@dataclass(frozen=True)
class FuseActQuantize(Pass):
    """Both dialects; the activation must be read by the quantization alone."""

    contract: ClassVar[Contract] = ONE_STEP

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [act_before_quantize])
