"""Weights that no integer kernel reads as they are: turned, stored as int8 rows, or multiplied out in float when the model is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qgraph.backends.onnxruntime.emit import FLOAT, MICROSOFT, Emitter
from qgraph.backends.onnxruntime.packing import SMALLEST_BLOCK, container_bits, gather_blocks
from qgraph.backends.onnxruntime.sites import constant, is_integer_site
from qgraph.ops import Q
from qgraph.pattern import Const, Match, Op, Var
from qgraph.rewrite import Rewriter, rule
from qgraph.types import storage
from qgraph.views import DataMovement, Dequantize, Embedding, Lookup, view

STORED = Op(Q.dequantize.default, "w", q=Const("q"), scale=Const("scale"))
"""Not any Dequantize: a DequantizeLinear that the model came with, or that another rule has made, stays."""


@rule(Op(DataMovement, kind="transpose", x=STORED, perm=Var("perm")))
def turn(m: Match, rw: Rewriter) -> Node | None:
    """Transpose(dequantize(const)) -> dequantize(const turned), the axis of its scales moved along."""
    w, perm = view(Dequantize, m.w), m.perm
    if w is None or perm is None:
        return None

    def turned(t: torch.Tensor) -> torch.Tensor:
        return t.permute(perm)

    rank = len(perm)
    axis = None if w.axis is None else perm.index(w.axis % rank)
    scale, zero = w.scale, w.zero_point
    if w.group:
        scale, zero = rw.const(w.scale, turned), None if w.zero_point is None else rw.const(w.zero_point, turned)
    return rw.call(Q.dequantize.default, rw.const(w.q, turned), scale, zero, w.dtype, axis, w.group)


@rule(Op(Embedding, "gather", weight=STORED, indices=Var("indices")))
def gather(m: Match, rw: Rewriter) -> Node | None:
    """Rows of a table of integers; the table is never dequantized as a whole.

    Case 1: one scale per row, or per group of a row: GatherBlockQuantized. A block may be longer than a row.
    Case 2: Cast(Gather(integers)) * scale, for one scale in all, and layouts that case 1 has not."""
    w = view(Dequantize, m.w)
    if w is None:
        return None
    if w.axis is not None and (w.group > 0 or w.axis % 2 == 0):
        found = _gather_blocks(m, w, rw)
        if found is not None:
            return found
    if w.group:
        rw.decline(f"GatherBlockQuantized takes groups that are a power of two of at least {SMALLEST_BLOCK}, the group is {w.group}")
    o = Emitter(rw)
    rows = o("Gather", w.q, m.indices, dtype=str(storage(w.dtype)).removeprefix("torch."), like=m.root, main=True)
    float_type = str(constant(w.scale, rw).dtype).removeprefix("torch.")
    y = o.cast(rows, float_type)
    for op_type, factor in (("Sub", w.zero_point), ("Mul", w.scale)):
        if factor is not None:
            y = o(op_type, y, _row_factor(o, factor, w, m.indices, float_type), dtype=float_type, like=m.root, since=7)
    return y


def _gather_blocks(m: Match, w: Dequantize, rw: Rewriter) -> Node | None:
    q, scale = constant(w.q, rw), constant(w.scale, rw)
    zero = None if w.zero_point is None else constant(w.zero_point, rw)
    block = w.group or max(SMALLEST_BLOCK, 1 << (q.shape[1] - 1).bit_length())
    if block & (block - 1) or block < SMALLEST_BLOCK or scale.dtype == torch.bfloat16 or (w.group and w.axis % 2 == 0):  # type: ignore[operator]
        return None
    grid = (scale, zero) if w.group else (scale[:, None], None if zero is None else zero[:, None])
    b = gather_blocks(q, *grid, w.dtype, block=block)
    if b is None:
        return None
    o = Emitter(rw)
    operands = [o.const(b.data, "blocks"), m.indices, o.const(b.scale, "scale")]
    if b.zero_point is not None:
        operands.append(o.const(b.zero_point, "zero_point"))
    attributes: dict[str, Any] = {"bits": b.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    return o("GatherBlockQuantized", *operands, like=m.root, domain=MICROSOFT, main=True, **attributes)


def _row_factor(o: Emitter, factor: Node, w: Dequantize, indices: Node, float_type: str) -> Node:
    """The scale or zero point of the gathered rows: gathered too when there is one per row, else it broadcasts."""
    value = constant(factor, o.rw).to(getattr(torch, float_type))
    if w.axis is None or w.axis % 2 == 1:
        return o.const(value, "factor")
    return o("Gather", o.const(value[:, None], "factor"), indices, dtype=float_type)


@rule(STORED)
def multiply_out(m: Match, rw: Rewriter) -> Node | None:
    """dequantize(const) -> Cast(const) * scale in float32, which ONNX Runtime computes once, when it loads the model.

    DequantizeLinear stays only where an integer kernel takes it: before a float product ONNX Runtime either runs it again at every
    call or turns the pair into MatMulNBits at level 4, quantizing the activations without being asked."""
    w = view(Dequantize, m.w)
    if w is None or not m.w.users:
        return None
    integer = [is_integer_site(user, m.w) for user in m.w.users]
    if all(integer):
        return None
    if any(integer):
        rw.decline("one weight is read by an integer and by a float kernel; it stays dequantized at run time")
    q, scale = constant(w.q, rw), constant(w.scale, rw)
    zero = None if w.zero_point is None else constant(w.zero_point, rw)
    o, kind = Emitter(rw), str(scale.dtype).removeprefix("torch.")
    blocks, width = None, q.shape
    if w.group:
        blocks, width = blocked(q, w)
    stored = padded(q, w) if w.group else q
    y = o.cast(w.q, "float32") if stored is q and container_bits(w.dtype) == 8 else _as_float(o, stored, w.dtype, "blocks")
    if w.group:
        y = o("Reshape", y, o.const(torch.tensor(blocks), "shape"), dtype="float32", since=5)
    like = None if w.group else m.w  # the shape tells readers what they are
    if zero is not None:
        y = o("Sub", y, _as_float(o, spread(zero, w, q.dim()), w.dtype, "zero_point"), dtype="float32", like=like, since=7)
    y = o("Mul", y, o.const(spread(scale.float(), w, q.dim()), "scale"), dtype="float32", like=like, since=7)
    y = o.cast(y, kind)  # last: without 16-bit arithmetic on the CPU, ONNX Runtime would leave the product to every run
    if w.group:
        y = unblocked(o, y, m.w, w, width)
    return y


def _as_float(o: Emitter, q: torch.Tensor, dtype: str, hint: str) -> Node:
    """Constant integers in float32, stored in 4 bits where these hold them."""
    if container_bits(dtype) == 4:
        return o("Cast", o.integers(q, "uint4" if dtype.startswith("u") else "int4", hint), dtype="float32", since=21, to=FLOAT)
    return o.cast(o.const(q, hint), "float32")


def blocked(q: torch.Tensor, w: Dequantize | Lookup) -> tuple[list[int], torch.Size]:
    axis = w.axis % q.dim()  # type: ignore[operator]
    return [*q.shape[:axis], -(-q.shape[axis] // w.group), w.group, *q.shape[axis + 1 :]], q.shape


def padded(q: torch.Tensor, w: Dequantize | Lookup) -> torch.Tensor:
    axis = w.axis % q.dim()  # type: ignore[operator]
    extra = -q.shape[axis] % w.group
    return torch.cat([q, torch.zeros_like(q.narrow(axis, 0, 1)).repeat_interleave(extra, axis)], axis) if extra else q


def spread(factor: torch.Tensor, w: Dequantize | Lookup, rank: int) -> torch.Tensor:
    """A scale or zero point reshaped to broadcast against the integers (in blocks)."""
    if w.axis is None:
        return factor.reshape(())
    axis = w.axis % rank
    return factor.unsqueeze(axis + 1) if w.group else factor.reshape([-1 if d == axis else 1 for d in range(rank)])


def unblocked(o: Emitter, y: Node, root: Node, w: Dequantize | Lookup, shape: torch.Size) -> Node:
    """Blocks side by side again, without what the last one has too much."""
    axis = w.axis % len(shape)  # type: ignore[operator]
    whole = [*shape[:axis], -(-shape[axis] // w.group) * w.group, *shape[axis + 1 :]]
    if list(shape) == whole:
        return o("Reshape", y, o.const(torch.tensor(whole), "shape"), like=root, since=5)
    y = o("Reshape", y, o.const(torch.tensor(whole), "shape"), since=5)
    bounds = (o.const(torch.tensor([n]), "bound") for n in (0, shape[axis], axis))
    return o("Slice", y, *bounds, like=root, since=10)
