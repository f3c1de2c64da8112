"""Emitter: ONNX nodes made by a rule, with type, name and the opset that they need."""

from __future__ import annotations

import operator
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from qgraph.edit import add_constant
from qgraph.onnx_io import opset, require_opset
from qgraph.onnx_ops import op
from qgraph.onnx_values import onnx_dtype
from qgraph.pipeline import Context
from qgraph.rewrite import Rewriter, Rule, graph_modules
from qgraph.text import path_of
from qgraph.types import TensorType, type_of

MICROSOFT = "com.microsoft"
FLOAT = int(ir.DataType.FLOAT)
INT8 = int(ir.DataType.INT8)


NEEDS = "onnxruntime.opsets"
Needs = dict[str, tuple[int, str]]
"""In a graph's meta: domain -> the version that emitted nodes need, and which one needs it."""


def emit(gm: GraphModule, ctx: Context, *rules: Rule) -> int:
    """Apply rules that make ONNX nodes, then raise the model to the smallest opsets that these need.

    Not while the rules run: raising an opset rewrites other nodes."""
    count = ctx.apply(gm, rules)
    for part in list(graph_modules(gm)):
        needs: Needs = part.meta.pop(NEEDS, {})
        for domain, (version, reason) in needs.items():
            require_opset(gm, version, reason, domain=domain)
    return count


class Emitter:
    """Makes ONNX nodes in the name of `origin` (default: the rule's root).

    The node made with `main=True` bears the origin's own path, so that reports find it; the others get the path and their op type."""

    def __init__(self, rw: Rewriter, origin: Node | None = None) -> None:
        self.rw, self.origin = rw, origin or rw.root
        self.path = path_of(self.origin)

    def __call__(
        self, op_type: str, *args: Any, dtype: str | None = None, like: Node | None = None, domain: str = "", since: int = 1,
        main: bool = False, outputs: int = 1, **attributes: Any,
    ) -> Node:  # fmt: skip
        """One node. `since`: the opset that first has this form. Its type is `dtype` with the shape of `like`, where they are given."""
        version = max(opset(self.rw.gm, domain), since)
        if version > opset(self.rw.gm, domain):
            needs: Needs = self.rw.gm.meta.setdefault(NEEDS, {})
            if version > needs.get(domain, (0, ""))[0]:
                needs[domain] = version, f"{op_type} at {self.path}"
        target = op(op_type, domain=domain, version=version, outputs=outputs)
        node = self.rw.call(target, *args, origin=self.origin, **attributes)
        node.meta["name"] = self.path if main else f"{self.path}/{op_type}"
        self._typed(node, dtype, like)
        return node

    def _typed(self, node: Node, dtype: str | None, like: Node | None) -> None:
        found = None if like is None else type_of(like)
        if dtype is not None or found is not None:
            node.meta["type"] = TensorType(dtype or (found.dtype if found else None), found.shape if found else None)

    def outputs(self, node: Node, *dtypes: str) -> tuple[Node, ...]:
        """The values of a node with several outputs."""
        found = []
        for i, dtype in enumerate(dtypes):
            value = self.rw.call(operator.getitem, node, i)
            value.meta["type"] = TensorType(dtype, None)
            found.append(value)
        return tuple(found)

    def cast(self, x: Node, dtype: str) -> Node:
        """x in another element type; x itself when it is known to have it."""
        t = type_of(x)
        if t is not None and t.dtype == dtype:
            return x
        return self("Cast", x, dtype=dtype, like=x, to=int(onnx_dtype(dtype)))

    def const(self, value: torch.Tensor, hint: str) -> Node:
        return self.rw.const(value, name=f"{self.origin.name}_{hint}")

    def integers(self, value: torch.Tensor, dtype: str, hint: str) -> Node:
        """A constant of an ONNX integer type that torch lacks, such as "int4"."""
        array = value.cpu().numpy().astype(ir.DataType[dtype.upper()].numpy())
        target = add_constant(self.rw.gm, f"{self.origin.name}_{hint}", ir.tensor(array))
        with self.rw.gm.graph.inserting_before(self.rw.root):
            node = self.rw.gm.graph.create_node("get_attr", target)
        node.meta["type"] = TensorType(dtype, tuple(value.shape))
        return node
