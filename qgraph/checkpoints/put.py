"""A parameter of a captured graph -> the value of a checkpoint.

    weight (q, scale, zero)      linear(x, dequantize(q)), embedding(dequantize(q), ids)
    with an order of columns     linear(x[..., order], dequantize(q)); one gather for all layers that read x in that order
    with minima of groups        zero = round(-minimum / scale) as integer, rest = minimum + zero * scale, a float per group:
                                 linear(x, dequantize(q)) + linear(sums of x over the groups, rest)
    with a format of x           linear(dequantize(quantize(x)), dequantize(q)), or dynamic_quantize

A rest of 0 throughout is not added. What reads a weight with an order or a rest otherwise gets it in float.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.checkpoints.tensor import QuantizedTensor, Value
from qgraph.edit import Prologue
from qgraph.errors import ModelError
from qgraph.ledger import FLOAT, Entry, state
from qgraph.ops import Q
from qgraph.rewriter import Rewriter
from qgraph.text import path_of
from qgraph.types import QSpec, attribute, int_range, storage, type_of
from qgraph.views import Embedding, Linear, key, view

aten = torch.ops.aten
BY = "from_checkpoint"


class Put:
    """`put(node, value)`: the readers of the parameter `node` read `value`. What several need of one x is computed once, behind x.

    `source` is the format's name, for the ledger. Raises ModelError for a value of another shape, or scales that the module's float
    type does not hold."""

    def __init__(self, gm: GraphModule, source: str) -> None:
        self.gm, self.source, self.prologue = gm, source, Prologue(gm)
        self.derived: dict[tuple[Node, Any], Node] = {}

    def __call__(self, node: Node, value: Value) -> None:
        kind = type_of(node)
        if kind is None or kind.shape != tuple(value.shape):
            raise ModelError(f"{node.target} is {kind} in the module, but {list(value.shape)} in the checkpoint")
        dtype: torch.dtype = getattr(torch, str(kind.dtype))
        if isinstance(value, Tensor):
            self.plain(node, value.to(dtype))
            return
        scale = value.scale.to(dtype)
        if not torch.equal(scale.to(value.scale.dtype), value.scale):
            have = str(value.scale.dtype).removeprefix("torch.")
            raise ModelError(f"{node.target} is {kind.dtype} in the module, which does not hold its {have} scales; use module.float()")
        self.quantized(node, replace(value, scale=scale))

    def plain(self, node: Node, value: Tensor) -> None:
        owner, _, name = str(node.target).rpartition(".")
        parameter = isinstance(attribute(node), torch.nn.Parameter)
        setattr(self.gm.get_submodule(owner), name, torch.nn.Parameter(value, requires_grad=False) if parameter else value)

    def quantized(self, node: Node, value: QuantizedTensor) -> None:
        zero, rest = _nearest_zero(value)
        spec, rw = value.spec, self.at(self.prologue.end)
        named = {spec.dtype: value.q, "scale": value.scale, "zero_point": zero}
        constants = [None if t is None else rw.const(t, name=f"{node.target}_{what}") for what, t in named.items()]
        readers = list(node.users)
        weight = rw.call(Q.dequantize.default, *constants, spec.dtype, spec.axis, spec.group, like=node, origin=node)
        for user in readers:
            how = self.read(user, node, weight, value, rest)
            kind = str(key(user.target)).removesuffix(".default")
            if how is None:
                user.replace_input_with(node, self.at(self.prologue.end).const(value.dequantize(), name=f"{node.target}_float"))
                entry = Entry(path_of(user), kind, "weight", FLOAT, BY, "read in a form that the checkpoint's layout does not allow")
            else:
                entry = Entry(path_of(user), kind, "weight", str(spec), BY, "; ".join([f"{self.source} as stored", *how]))
            state(self.gm).ledger.record(entry)

    def read(self, user: Node, node: Node, weight: Node, value: QuantizedTensor, rest: Tensor | None) -> list[str] | None:
        """Let `user` read the integers. Returns what this took beside them, None where it cannot."""
        v, table = view(Linear, user), view(Embedding, user)
        if v is not None and v.weight is node and (v.in_axis, v.x_axis, v.alpha) == (-1, -1, 1):
            return self.linear(user, v, weight, value, rest)
        if value.order is not None or (rest is not None and (table is None or table.weight is not node)):
            return None
        user.replace_input_with(node, weight)
        if rest is None or table is None:
            return []
        indices = table.indices

        def spread(rw: Rewriter) -> Node:
            """The rest of each group of the rows, on all elements of the group."""
            rows = rw.call(aten.embedding.default, rw.const(rest), indices, origin=user)
            groups = rw.call(aten.unflatten.int, user, -1, [-1, value.spec.group], origin=user)
            total = rw.call(aten.add.Tensor, groups, rw.call(aten.unsqueeze.default, rows, -1, origin=user), origin=user)
            return rw.call(aten.flatten.using_ints, total, -2, -1, like=user, origin=user)

        self.behind(user, spread)
        return ["what its minima are beside the nearest zero point is added"]

    def linear(self, user: Node, v: Linear, weight: Node, value: QuantizedTensor, rest: Tensor | None) -> list[str]:
        how, x = [], v.x
        if value.order is not None:
            x = self.gathered(x, value.order)
            how.append("its columns are sorted by group, and x is gathered in that order")
        if value.x is not None:
            x = self.integers(x, value, value.x)
            how.append(f"x as {value.x}")
        user.replace_input_with(v.weight, weight)
        user.replace_input_with(v.x, x)
        if rest is not None:
            sums = self.sums(v.x, value.spec.group)

            def add(rw: Rewriter) -> Node:
                part = rw.call(aten.linear.default, sums, rw.const(rest), like=user, origin=user)
                return rw.call(aten.add.Tensor, user, part, like=user, origin=user)

            self.behind(user, add)
            how.append("what its minima are beside the nearest zero point is added, by sums of x over groups")
        return how

    def at(self, place: Node) -> Rewriter:
        return Rewriter(self.gm, place, by=BY)

    def after(self, x: Node, what: Any, build: Callable[[Rewriter], Node]) -> Node:
        """build(rewriter), right behind x; once for all that ask for the same of x."""
        if (x, what) not in self.derived:
            self.derived[x, what] = build(self.at(self.prologue.after(x)))
        return self.derived[x, what]

    def gathered(self, x: Node, order: Tensor) -> Node:
        def build(rw: Rewriter) -> Node:
            return rw.call(aten.index_select.default, x, -1, rw.const(order, name="order"), like=x, origin=x)

        return self.after(x, order.numpy().tobytes(), build)

    def integers(self, x: Node, value: QuantizedTensor, spec: QSpec) -> Node:
        """x in the checkpoint's format of activations."""
        scale, zero, form = value.x_scale, value.x_zero_point, (spec.dtype, spec.axis, spec.group)

        def build(rw: Rewriter) -> Node:
            if scale is None:
                found = rw.call(Q.dynamic_quantize.default, x, spec.dtype, spec.symmetric, spec.axis, spec.group, origin=x)
                parts = [rw.call(operator.getitem, found, i, origin=x) for i in range(3)]
                return rw.call(Q.dequantize.default, *parts, *form, like=x, origin=x)
            factor = rw.const(scale.to(value.scale.dtype), name="x_scale")
            shift = None if zero is None else rw.const(zero, name="x_zero_point")
            q = rw.call(Q.quantize.default, x, factor, shift, *form, origin=x)
            return rw.call(Q.dequantize.default, q, factor, shift, *form, like=x, origin=x)

        constants = [None if t is None else float(t) for t in (scale, zero)]
        return self.after(x, (spec, *constants), build)

    def sums(self, x: Node, group: int) -> Node:
        def build(rw: Rewriter) -> Node:
            return rw.call(aten.sum.dim_IntList, rw.call(aten.unflatten.int, x, -1, [-1, group], origin=x), [-1], origin=x)

        return self.after(x, group, build)

    def behind(self, node: Node, build: Callable[[Rewriter], Node]) -> None:
        """What has read `node` reads build(rewriter), which may read `node`."""
        rw = Rewriter(self.gm, node.next, by=BY)
        new = build(rw)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in rw.created)


def _nearest_zero(value: QuantizedTensor) -> tuple[Tensor | None, Tensor | None]:
    """(zero point, rest): offset = rest - zero * scale with a zero point in the integers' range; no rest where it is 0 throughout.

    The rest is rounded to scale's type: exact in float32 but for minima of another magnitude than the scales."""
    if value.offset is None:
        return value.zero_point, None
    scale = value.scale.float()
    zero = (-value.offset.float() / scale).nan_to_num(0, 0, 0).clamp(*int_range(value.spec.dtype)).round()
    rest = (value.offset.float() + zero * scale).to(value.scale.dtype)
    return zero.to(storage(value.spec.dtype)), rest if bool(rest.any()) else None
