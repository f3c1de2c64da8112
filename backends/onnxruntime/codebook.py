"""lookup(codes, table, scale) -> Gather(table, codes) * scale, which ONNX Runtime computes once, when it loads the model.

The codes are stored with as many bits as they have: as planes of 4, 2 and 1 bits, whose widths add up to theirs (3 = 2 + 1), each packed
in bytes and unpacked by shifts and masks, so that no packed integer type is needed. Bytes that hold whole codes are looked up as they are.
Tables and scales are stored in float16 where that holds their numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.onnxruntime.emit import Emitter
from qgraph.backends.onnxruntime.sites import constant
from qgraph.backends.onnxruntime.standard import lowers
from qgraph.backends.onnxruntime.weights import blocked, padded, spread, unblocked
from qgraph.ops import Q
from qgraph.rewrite import Rewriter
from qgraph.views import Lookup, view


@lowers(Q.lookup.default)
def lookup(node: Node, rw: Rewriter) -> Node:
    """Case 1: one table, whole codes in a byte: Gather on bytes. Case 2: one table: Gather. Case 3: a table per index of an axis:
    GatherElements on rows of codes along that axis."""
    v = view(Lookup, node)
    assert v is not None  # it is this op's view
    o, table, codes = Emitter(rw), constant(v.table, rw), constant(v.q, rw)
    q, bits = padded(codes, v) if v.group else codes, (table.shape[-1] - 1).bit_length()
    shape = blocked(q, v)[0] if v.group else list(q.shape)
    scale = None if v.scale is None else spread(constant(v.scale, rw), v, q.dim())
    like = None if v.group else node  # the shape tells readers what they are
    by_bytes = v.table_axis is None and 8 % bits == 0 and shape[-1] % (8 // bits) == 0
    if by_bytes:
        y = _by_bytes(o, table, q.reshape(shape), bits, scale)
    elif v.table_axis is None:
        y = o("Gather", _stored(o, table, "table"), _indices(o, q.reshape(shape), bits), dtype="float32", like=like)
    else:
        y = _by_table(o, table, q, bits, v.table_axis % q.dim(), like)
        y = o("Reshape", y, o.const(torch.tensor(shape), "shape"), dtype="float32", since=5) if v.group else y
    if scale is not None and not by_bytes:
        y = o("Mul", y, _stored(o, scale, "scale"), dtype="float32", like=like, since=7)
    y = o.cast(y, str(table.dtype).removeprefix("torch."))
    if v.group:
        return unblocked(o, y, node, v, codes.shape)
    return o("Reshape", y, o.const(torch.tensor(shape), "shape"), like=node, since=5) if by_bytes else y


def _by_bytes(o: Emitter, table: Tensor, q: Tensor, bits: int, scale: Tensor | None) -> Node:
    """table[q] * scale as [..., n, 8 / bits] for q [..., n * 8 / bits], out of a table of what each byte stands for.

    All that ONNX Runtime computes on the way to a weight stays in memory until the last weight is done, so there is as little as can be."""
    each = 8 // bits
    digits = torch.stack([torch.arange(256) >> (bits * i) & (2**bits - 1) for i in range(each)], 1)
    levels = _stored(o, table[digits.clamp(max=len(table) - 1)], "table")
    ((_, _, data),) = planes(q.flatten(), bits)
    indices = o.cast(o.const(data.reshape(*q.shape[:-1], -1), "codes"), "int32")
    y = o("Gather", levels, indices, dtype="float32")
    if scale is None:
        return y
    if scale.dim():
        scale = scale.reshape(*scale.shape[:-1], *((1, 1) if scale.shape[-1] == 1 else (-1, each)))
    return o("Mul", y, _stored(o, scale, "scale"), dtype="float32", since=7)


def _by_table(o: Emitter, table: Tensor, q: Tensor, bits: int, axis: int, like: Node | None) -> Node:
    """Row i of the table read by what lies at index i of the axis."""
    moved, first = q.movedim(axis, 0), None if axis else like
    flat = moved.dim() == 2
    levels, codes = _stored(o, table, "table"), _indices(o, moved.flatten(1), bits)
    y = o("GatherElements", levels, codes, dtype="float32", like=first if flat else None, since=11, axis=1)
    y = y if flat else o("Reshape", y, o.const(torch.tensor(moved.shape), "shape"), dtype="float32", like=first, since=5)
    return o("Transpose", y, dtype="float32", like=like, perm=[*range(1, axis + 1), 0, *range(axis + 1, q.dim())]) if axis else y


def _stored(o: Emitter, values: Tensor, hint: str) -> Node:
    """float32 numbers, kept in float16 where that holds them all."""
    short = values.half()
    return o.cast(o.const(short if torch.equal(short.float(), values.float()) else values.float(), hint), "float32")


def planes(codes: Tensor, bits: int) -> list[tuple[int, int, Tensor]]:
    """Codes below 2**bits, a multiple of 8 of them -> (shift, width, bytes) of each plane: bits shift .. shift + width - 1 of the codes,
    8 / width codes in a byte, the first in its lowest bits."""
    found, shift = [], 0
    for width in (4, 2, 1):
        if bits & width:
            part = ((codes >> shift) & (2**width - 1)).reshape(-1, 8 // width)
            data = part[:, 0].clone()
            for i in range(1, 8 // width):
                data |= part[:, i] << (width * i)
            found.append((shift, width, data))
            shift += width
    return found


def _indices(o: Emitter, codes: Tensor, bits: int) -> Node:
    """The codes as int32, from their planes."""
    flat = codes.flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8))
    found = None
    for shift, width, data in planes(flat, bits):
        steps = torch.arange(0, 8, width, dtype=torch.uint8)
        part = o("BitShift", o.const(data[:, None], "codes"), o.const(steps, "steps"), dtype="uint8", since=11, direction="RIGHT")
        part = o("BitwiseAnd", part, o.const(torch.tensor(2**width - 1, dtype=torch.uint8), "mask"), dtype="uint8", since=18)
        part = o("Reshape", part, o.const(torch.tensor([-1]), "shape"), dtype="uint8", since=5)
        if found is not None:
            part = o("BitShift", part, o.const(torch.tensor(shift, dtype=torch.uint8), "shift"), dtype="uint8", since=11, direction="LEFT")
            part = o("BitwiseOr", found, part, dtype="uint8", since=18)
        found = part
    assert found is not None  # a table has two levels at least
    if len(flat) > codes.numel():
        bounds = (o.const(torch.tensor([n]), "bound") for n in (0, codes.numel()))
        found = o("Slice", found, *bounds, dtype="uint8", since=10)
    found = o("Reshape", found, o.const(torch.tensor(codes.shape), "shape"), dtype="uint8", since=5)
    return o.cast(found, "int32")
