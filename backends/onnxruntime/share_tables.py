"""Codes of an embedding table that is a weight, too, are stored once: the product reads them out of the table.

    MatMulNBits(x, codes in blocks)   -> MatMulNBits(x, Reshape(Pad(table)))
    MatMul(x, Cast(integers) * scale) -> MatMul(x, Cast(Transpose(table xor 128)) * scale)

ONNX Runtime computes what follows from constants when it loads the model, so this costs nothing but disk that is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends.onnxruntime.emit import INT8, Emitter, emit
from qgraph.edit import graph_modules
from qgraph.onnx_ops import OnnxOp
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, replace
from qgraph.views import const_value

SMALLEST = 2**14
"""Bytes of a table that is worth the operations around it."""


@dataclass(frozen=True)
class ShareTables(Pass):
    """Recognises the codes by their values, for weights of GatherBlockQuantized in 8 bits, and in 4 bits where the blocks are the same."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        count = sum(self.share(part) for part in graph_modules(gm))
        return count + emit(gm, ctx)

    def share(self, gm: GraphModule) -> int:
        tables = {
            str(n.args[0].target): n.args[0] for n in gm.graph.nodes if _is_op(n, "GatherBlockQuantized") and isinstance(n.args[0], Node)
        }
        count = 0
        for node in [n for n in gm.graph.nodes if n.op == "get_attr" and tables and str(n.target) not in tables and n.users]:
            stored = const_value(node)
            if stored is None or stored.dtype not in (torch.uint8, torch.int8) or stored.numel() < SMALLEST:
                continue
            for table in tables.values():
                codes = const_value(table)
                make = None if codes is None else _derivation(stored, codes)
                if make is not None:
                    rw = Rewriter(gm, next(iter(node.users)), by=self.name)
                    replace(node, make(Emitter(rw), table))
                    count += 1
                    break
        if count:
            gm.graph.lint()
            gm.recompile()
        return count


def _is_op(node: Node, op_type: str) -> bool:
    return isinstance(node.target, OnnxOp) and node.target.op_type == op_type


def _derivation(stored: Tensor, codes: Tensor) -> Callable[[Emitter, Node], Node] | None:
    """What makes `stored` of the table's codes [V, D] (uint8), or None. Case 1: [V, blocks, bytes]. Case 2: integers [D or more, V]."""
    v, d = codes.shape
    if stored.dtype == torch.uint8 and stored.dim() == 3 and stored.shape[0] == v:
        flat = stored.reshape(v, -1)
        extra, filler = flat.shape[1] - d, int(flat[0, -1])
        if extra < 0 or not torch.equal(flat[:, :d], codes) or bool((flat[:, d:] != filler).any()):
            return None

        def blocks(o: Emitter, table: Node) -> Node:
            wide = _padded(o, table, [0, 0, 0, extra], torch.tensor(filler, dtype=torch.uint8)) if extra else table
            return o("Reshape", wide, o.const(torch.tensor(stored.shape), "shape"), dtype="uint8", since=5)

        return blocks
    if stored.dtype == torch.int8 and stored.dim() == 2 and stored.shape[1] == v and stored.shape[0] >= d:
        if bool(stored[d:].any()) or not torch.equal(stored[:d].T.contiguous().view(torch.uint8) ^ 128, codes):
            return None

        def turned(o: Emitter, table: Node) -> Node:
            moved = o("BitwiseXor", table, o.const(torch.tensor(128, dtype=torch.uint8), "middle"), dtype="uint8", since=18)
            y = o("Transpose", o("Cast", moved, dtype="int8", to=INT8), dtype="int8", perm=[1, 0])
            extra = stored.shape[0] - d
            return _padded(o, y, [0, 0, extra, 0], torch.tensor(0, dtype=torch.int8)) if extra else y

        return turned
    return None


def _padded(o: Emitter, x: Node, pads: list[int], value: Tensor) -> Node:
    dtype = str(value.dtype).removeprefix("torch.")
    return o("Pad", x, o.const(torch.tensor(pads), "pads"), o.const(value, "pad"), dtype=dtype, since=13)
