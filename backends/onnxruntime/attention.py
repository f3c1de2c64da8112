"""matmul(softmax(scale * matmul(q, k^T) + mask), v) -> Attention on [batch, length, heads * size], without the transpositions.

    Transpose(0,2,1,3)(chain(Transpose(Reshape(q)), ...)) -> Reshape(Attention(q, k, v, mask))

ONNX Runtime has a float kernel for the operator Attention of opset 23 (and none before), which reads and writes the heads where the
products around it have them, lets several heads of q share one of k and v, and returns past and new keys joined (gqa.py). A row whose
mask blocks every key comes out as zeros there; the chain makes NaN of it (-inf), or the mean of all values (the lowest number).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.attention import Found, find_attention, known_shape
from qgraph.backends.onnxruntime.emit import Emitter, emit
from qgraph.backends.onnxruntime.gqa import SPLIT, Heads, before_split, heads_of, return_presents
from qgraph.backends.onnxruntime.rotary import fuse_rotary
from qgraph.onnx_io import opset
from qgraph.pattern import Match, Op, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import Dim, TensorType, type_of
from qgraph.views import DataMovement, Linear, view

ATTENTION = 23
"""The opset that first has the operator."""


@rule(Op(DataMovement, kind="transpose", perm=Var("perm"), x=Op(Linear, "product", single_use=True)))
def fuse_attention(m: Match, rw: Rewriter) -> Node | None:
    found = find_attention(m.product) if m.perm == SPLIT else None
    if found is None:
        return None
    if opset(rw.gm) < ATTENTION:
        rw.decline(f"Attention is an operator of opset {ATTENTION}, to which this model of opset {opset(rw.gm)} was not raised")
    q, k, v = before_split(found.q), heads_of(found.k, found.k_perm), heads_of(found.v)
    if q is None or k is None or v is None:
        rw.decline("Attention takes q, k and v whose heads a Transpose has split, k and v behind a cache that only an output reads")
    shapes = [_known(n) for n in (q, k.new, v.new)]
    reason = _obstacle(found, k, v, shapes)
    if reason is not None:
        rw.decline(reason)
    o, of_q, of_v = Emitter(rw, m.product), shapes[0], shapes[2]
    assert of_q is not None and of_v is not None  # else declined
    operands: list[Node | None] = [_joined(o, n, shape) for n, shape in zip((q, k.new, v.new), shapes, strict=True)]  # type: ignore[arg-type]
    if found.mask is not None:
        operands.append(_mask(o, found.mask, q, k, of_q[1]))
    if k.past is not None and v.past is not None:
        operands += [*[None] * (found.mask is None), k.past, v.past]
    heads: dict[str, Any] = {"q_num_heads": of_q[2], "kv_num_heads": of_v[2], "scale": found.scale}
    y = o("Attention", *operands, since=ATTENTION, main=True, outputs=1 if k.past is None else 3, **heads)
    y = y if k.past is None else o.outputs(y, "float32")[0]
    y.meta["type"] = TensorType("float32", (of_q[0], of_q[1], of_q[2] * of_v[3]))  # type: ignore[operator]
    return o("Reshape", y, o.const(torch.tensor([0, 0, of_q[2], of_v[3]]), "shape"), like=m.root, since=5)


def _known(node: Node) -> tuple[Dim, ...] | None:
    """The shape of a float32 value of four axes whose lengths or their names are known, the last two as numbers."""
    t = type_of(node)
    if t is None or t.dtype != "float32" or t.shape is None or t.rank != 4 or None in t.shape:
        return None
    return t.shape if all(isinstance(d, int) for d in t.shape[2:]) else None


def _obstacle(found: Found, keys: Heads, values: Heads, shapes: list[tuple[Dim, ...] | None]) -> str | None:
    q, k, v = shapes
    if q is None or k is None or v is None:
        return "Attention takes float32 q, k and v that are split into a known number of heads by a Transpose"
    if q[0] != k[0] or q[2] != k[2] * keys.times or k[:3] != v[:3] or keys.times != values.times:  # type: ignore[operator]
        return f"q {list(q)}, k {list(k)} and v {list(v)} differ in batch or heads, or it is not known that they do not"
    pasts = [None if h.past is None else known_shape(h.past) for h in (keys, values)]
    if keys.past is not None or values.past is not None:
        ok = pasts[0] is not None and pasts[1] is not None and pasts[0][:3] == pasts[1][:3] and pasts[0][:2] == (k[0], k[2])
        if not ok or (pasts[0][3], pasts[1][3]) != (k[3], v[3]):  # type: ignore[index]
            return "it is not known that keys and values before these are of the same batch, heads and length"
    t = None if found.mask is None else type_of(found.mask)
    if found.mask is not None:
        lead = None if t is None or t.shape is None else (1, 1, 1, 1, *t.shape)[-4:-2]
        if lead is None or lead[0] not in (1, q[0]) or lead[1] not in (1, q[2]):
            return "it is not known that the mask has the batch and the heads of q"
    return None


def _joined(o: Emitter, node: Node, shape: tuple[Dim, ...]) -> Node:
    """[batch, length, heads, size] -> [batch, length, heads * size]: what the Reshape that split the heads has read, where it is known to
    be that."""
    width = shape[2] * shape[3]  # type: ignore[operator]
    joined = (*shape[:2], width)
    split = view(DataMovement, node)
    t = type_of(split.x) if split is not None and split.kind == "reshape" else None
    if split is not None and t is not None and t.shape == joined:
        return split.x
    y = o("Reshape", node, o.const(torch.tensor([0, 0, width]), "shape"), dtype="float32", since=5)
    y.meta["type"] = TensorType("float32", joined)
    return y


def _mask(o: Emitter, mask: Node, q: Node, k: Heads, rows: Dim) -> Node:
    """The mask with as many rows as q and columns as k: the kernel broadcasts over batch and heads only. Expanded once for all layers."""
    t, whole = type_of(mask), type_of(k.present or k.new)
    assert t is not None and t.shape is not None and whole is not None and whole.shape is not None  # the caller has looked
    dims, columns = (1, 1, 1, 1, *t.shape), whole.shape[1 if k.present is None else 2]
    if t.rank not in (0, 1) and dims[-2:] == (rows, columns) and None not in dims:
        return mask
    wanted = TensorType("float32", (dims[-4], dims[-3], rows, columns))
    for user in mask.users:
        if user.meta.get("from") == fuse_attention.name and type_of(user) == wanted:
            return user
    one = o.const(torch.tensor([1, 1]), "one")
    lengths = [o("Shape", n, dtype="int64", since=15, start=1, end=2) for n in (q, k.new)]
    if k.past is not None:
        lengths[1] = o("Add", o("Shape", k.past, dtype="int64", since=15, start=2, end=3), lengths[1], dtype="int64", since=7)
    y = o("Expand", mask, o("Concat", one, *lengths, dtype="int64", since=4, axis=0), since=8)
    y.meta["type"] = wanted
    return y


@rule(Op("::Reshape", data=Op("::Reshape", data=Var("x"), shape=Var("inner")), shape=Var("outer")))
def drop_round_trip(m: Match, rw: Rewriter) -> Node | None:
    """Reshape(Reshape(x)) -> x where x has that shape already."""
    was, now = type_of(m.x), type_of(m.root)
    return m.x if was is not None and now is not None and was == now and was.shape is not None and None not in was.shape else None


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Attention written as a chain, in a model of opset 23 or later, as one operator."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, fuse_rotary, fuse_attention, drop_round_trip) + return_presents(gm)
