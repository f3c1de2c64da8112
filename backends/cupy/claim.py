"""qg ops -> the torch ops that start kernels (torch.ops.qgraph_cuda.*), weights packed now.

    quantize                        quantize_static
    dynamic_quantize                quantize_tensor, quantize_rows
    quantized_linear                w8a8_linear
    quantized_conv                  w8a8_conv
    dequant_linear                  weight_only_linear
    embedding of a dequantized      embedding_dequantize
    dequantize                      dequantize

A node that no rule takes stays what it is and runs in torch; `Program.kernels()` tells which, and the reason that its rule gave.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends.cupy import quantizing, w8a8, weight_only  # noqa: F401  (register their ops)
from qgraph.backends.cupy.embedding import pack_table
from qgraph.backends.cupy.launch import TYPES
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.packed_cache import packed
from qgraph.backends.cupy.w8a8_conv import pack_conv
from qgraph.backends.cupy.weight_packing import pack_bias, pack_weight
from qgraph.errors import LoweringError
from qgraph.ops import Q
from qgraph.pattern import Match, Op, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import QSpec, storage, type_of
from qgraph.views import Embedding, const_value, operands


@rule(Op(Q.quantize.default))
def quantize(m: Match, rw: Rewriter) -> Node:
    """One scale for the tensor."""
    got = operands(m.root)
    _require_bytes(rw, got["dtype"])
    _float_type(rw, got["x"])
    if got["axis"] is not None:
        rw.decline(f"the kernel quantizes with one scale, not with scales along axis {got['axis']}")
    return rw.call(K.quantize_static.default, got["x"], *static_parameters(rw, got["scale"], got["zero_point"]), got["dtype"], like=m.root)


def static_parameters(rw: Rewriter, scale: Node, zero_point: Node | None) -> tuple[Node, Node | None]:
    """As the row kernels read them, float32 and int32, so that no conversion is launched; those that are not stored stay as they are."""
    wide = scale if const_value(scale) is None else rw.const(scale, _float32)
    return wide, zero_point if zero_point is None or const_value(zero_point) is None else rw.const(zero_point, _int32)


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.float32)


def _int32(value: Tensor) -> Tensor:
    return value.to(torch.int32)


@rule(Op(Q.dynamic_quantize.default))
def dynamic_quantize(m: Match, rw: Rewriter) -> tuple[Node, ...]:
    """One scale for the tensor, or one for each row, from their ranges."""
    got = operands(m.root)
    _require_bytes(rw, got["dtype"])
    _float_type(rw, got["x"])
    if got["group"] > 0:
        rw.decline(f"the kernels quantize rows as a whole, not in groups of {got['group']}")
    if got["axis"] is None:
        found = rw.call(K.quantize_tensor.default, got["x"], got["dtype"], got["symmetric"])
    else:
        found = rw.call(K.quantize_rows.default, got["x"], None, None, got["dtype"], got["symmetric"], False)
    return tuple(rw.call(operator.getitem, found, i) for i in range(3))


@rule(Op(Q.quantized_linear.default))
def quantized_linear(m: Match, rw: Rewriter) -> Node:
    """Integers times integers, on tensor cores."""
    got = operands(m.root)
    scale, made = _integers(rw, got, _pack_integers)
    stored = [_read(rw, got, made, name) for name in ("weight", "scale", "sums", "zero_point")]
    y = (got["y_scale"], got["y_zero_point"], got["y_dtype"])
    return rw.call(K.w8a8_linear.default, *_x(got), *stored, _int_bias(rw, got), scale.dtype, *y, like=m.root)


@rule(Op(Q.quantized_conv.default))
def quantized_conv(m: Match, rw: Rewriter) -> Node:
    """The same on the windows of an image."""
    got = operands(m.root)
    if got["groups"] != 1 or len(got["stride"]) > 2:
        rw.decline(f"the kernel has one group and one or two spatial axes, not {got['groups']} and {len(got['stride'])}")
    scale, made = _integers(rw, got, _pack_windows)
    stored = [_read(rw, got, made, name) for name in ("weight", "scale", "sums")]
    window = (made["kernel"].tolist(), got["stride"], got["padding"], got["dilation"])
    y = (got["y_scale"], got["y_zero_point"], got["y_dtype"])
    return rw.call(K.w8a8_conv.default, *_x(got), *stored, _int_bias(rw, got), scale.dtype, *window, *y, like=m.root)


def _integers(rw: Rewriter, got: dict[str, Any], pack: Callable[..., Mapping[str, Tensor]]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The weight's scale and what `pack` makes of it."""
    for name in ("x_dtype", "w_dtype", "y_dtype"):
        if got[name] is not None:
            _require_bytes(rw, got[name])
    weight, scale, zero = (_stored(rw, got[k]) for k in ("weight", "w_scale", "w_zero_point"))
    if scale is None or scale.dtype not in TYPES:
        rw.decline("the weight has no float scale that is stored")
    try:
        return scale, packed(pack, weight, scale, zero)
    except LoweringError as e:
        rw.decline(str(e))


def _x(got: dict[str, Any]) -> tuple[Node, Node, Node | None]:
    return got["x"], got["x_scale"], got["x_zero_point"]


def _int_bias(rw: Rewriter, got: dict[str, Any]) -> Node | None:
    return None if got["bias"] is None else rw.const(got["bias"], w8a8.pack_bias)


def _read(rw: Rewriter, got: dict[str, Any], made: Mapping[str, Tensor], name: str) -> Node | None:
    """A new constant of what was packed, None for what is not there."""
    return rw.const(made[name], name=f"{got['weight'].target}_{name}") if name in made else None


@rule(Op(Q.dequant_linear.default))
def dequant_linear(m: Match, rw: Rewriter) -> Node:
    """Floats times integers that are dequantized on the way."""
    got = operands(m.root)
    real = _float_type(rw, got["x"])
    weight, scale, zero = (_stored(rw, got[k]) for k in ("weight", "scale", "zero_point"))
    try:
        made = packed(_pack_codes, weight, scale, zero, str(got["dtype"]), int(got["group"]), real)
    except LoweringError as e:
        rw.decline(str(e))
    bias = None if got["bias"] is None else rw.const(got["bias"], pack_bias)
    stored = [_read(rw, got, made, name) for name in ("codes", "row", "ratio", "zeros")]
    return rw.call(K.weight_only_linear.default, got["x"], *stored, bias, *made["sizes"].tolist(), like=m.root)


@rule(Op(Embedding, weight=Op(Q.dequantize.default, "table"), indices=Var("indices")))
def embedding(m: Match, rw: Rewriter) -> Node:
    """Rows of integers are gathered, then dequantized."""
    w, ids = operands(m.table), type_of(m.indices)
    table, _, _ = (_stored(rw, w[k]) for k in ("q", "scale", "zero_point"))
    group = _rows_of_scales(rw, w, rank=2)
    dtype = w["dtype"]
    _require_bytes(rw, dtype)
    _float_type(rw, w["scale"])
    if ids is None or ids.dtype != "int64":
        rw.decline(f"the kernel reads ids of int64, and %{m.indices.name} is {ids or 'of unknown type'}")
    codes = rw.const(w["q"], lambda q: pack_table(q, dtype))
    return rw.call(K.embedding_dequantize.default, m.indices, codes, w["scale"], w["zero_point"], dtype, table.shape[1], group, like=m.root)


@rule(Op(Q.dequantize.default))
def dequantize(m: Match, rw: Rewriter) -> Node:
    """What torch reads as floats."""
    got, kind = operands(m.root), type_of(m.root)
    _require_bytes(rw, got["dtype"])
    _float_type(rw, got["scale"])
    group = _rows_of_scales(rw, got, rank=None if kind is None or kind.shape is None else len(kind.shape))
    return rw.call(K.dequantize.default, got["q"], got["scale"], got["zero_point"], group, like=m.root)


def _rows_of_scales(rw: Rewriter, got: dict[str, Any], rank: int | None) -> int:
    """`group` of the kernels that dequantize, whose scales run along rows: one in all, one per row, or one per group of a row."""
    axis, group = got["axis"], got["group"]
    if axis is None or (axis == -1 and group == -1):
        return 0
    if rank is not None and group > 0 and axis % rank == rank - 1:
        return int(group)
    if rank != 2 or axis % rank != 0 or group:
        rw.decline(f"the kernel has scales along the last axis or one per row, not along axis {axis} in groups of {group}")
    return 0


def _pack_integers(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Mapping[str, Tensor]:
    p = w8a8.pack(weight, scale, zero)
    return _present(weight=p.weight, scale=p.scale, sums=p.sums, zero_point=p.zero_point)


def _pack_windows(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Mapping[str, Tensor]:
    p = pack_conv(weight, scale, zero)
    return _present(weight=p.weight, scale=p.scale, sums=p.sums, kernel=torch.tensor(weight.shape[2:]))


def _pack_codes(weight: Tensor, scale: Tensor, zero: Tensor | None, dtype: str, group: int, real: torch.dtype) -> Mapping[str, Tensor]:
    p = pack_weight(weight, scale, zero, dtype, group, real=real)
    return _present(codes=p.codes, row=p.row, ratio=p.ratio, zeros=p.zeros, sizes=torch.tensor([p.zero, p.n, p.group]))


def _present(**tensors: Tensor | None) -> Mapping[str, Tensor]:
    return {k: t for k, t in tensors.items() if t is not None}


def _stored(rw: Rewriter, node: Node | None) -> Any:
    """The constant, None for an operand that is not there; anything else declines."""
    if node is None:
        return None
    value = const_value(node)
    if value is None:
        rw.decline(f"%{node.name} is not stored: weights are packed when the graph is lowered")
    return value


def _require_bytes(rw: Rewriter, dtype: str) -> None:
    if storage(dtype).itemsize > 1:
        rw.decline(f"the kernels have integers of at most 8 bits, not {QSpec(dtype)}")


def _float_type(rw: Rewriter, x: Node) -> torch.dtype:
    kind = type_of(x)
    found = None if kind is None or kind.dtype is None else getattr(torch, kind.dtype, None)
    if found not in TYPES:
        rw.decline(f"the kernels read float32, float16 and bfloat16, and %{x.name} is {kind or 'of unknown type'}")
    return found  # type: ignore[no-any-return]  # getattr of a module


RULES = (quantize, dynamic_quantize, quantized_linear, quantized_conv, dequant_linear, embedding)


@dataclass(frozen=True)
class ClaimKernels(Pass):
    """Every fused qg op, quantization and quantized embedding gets its kernel. The numbers are those of the reference, but for the order of
    float sums where only the weight is in integers."""

    contract: ClassVar[Contract] = EQUIVALENT(2e-3)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, RULES) + ctx.apply(gm, [dequantize])  # those that the others have left
