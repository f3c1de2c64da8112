"""linear(x, dequantize(constant)) -> the kernel of ONNX Runtime that reads the integers.

    x                                         becomes
    dynamic, uint8 per tensor                 DynamicQuantizeLinear, MatMulInteger, Cast, Mul, Add     -> DynamicQuantizeMatMul
    dynamic, 8 bits per row (per token)       MatMulIntegerToFloat between row statistics and row scales (token.py)
    dynamic, int8 in the weight's groups      MatMulNBits, accuracy level 4
    static, uint8 per tensor, with a bias     Gemm with an int32 bias (2 axes) -> QGemm, or MatMulIntegerToFloat
    float, weight of at most 4 bits           MatMulNBits, accuracy level 1
    float, weight of 8 bits                   Cast * scale (legalize.py)

What is not in the table is left to DequantizeLinear. Which spelling is fused was found by experiment on ONNX Runtime 1.31.1.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from qgraph.backends.onnxruntime.emit import FLOAT, MICROSOFT, Emitter
from qgraph.backends.onnxruntime.packing import block_size, container_bits, kernel_bits, matmul_blocks
from qgraph.backends.onnxruntime.sites import LinearSite, Weight, constant, dynamic_source, linear_rules, rank, static_source
from qgraph.backends.onnxruntime.token import token_integer
from qgraph.ledger import Entry, state
from qgraph.ops import Q, quantize_bias
from qgraph.rewrite import Rewriter
from qgraph.text import path_of
from qgraph.types import QSpec
from qgraph.views import Activation, Elementwise, const_value, view

CHANNEL_BLOCK = 128
"""Block of a weight with one scale per channel: longer ones are faster, and 128 is the longest that every kernel takes."""


def dynamic_integer(s: LinearSite, rw: Rewriter) -> Node | None:
    """q, s, z = DynamicQuantizeLinear(x); Cast(MatMulInteger(q, W, z)) * (s * w_scale) + bias.

    Only this order of the multiplications is fused. One DynamicQuantizeLinear serves all consumers of x, each then being a
    MatMulIntegerToFloat. 16-bit floats are converted around it: the integer kernels know float32 scales only."""
    found, w = dynamic_source(s.v.x), s.int8()
    if found is None or w is None or w.group or found[1].axis is not None or (found[1].dtype, found[1].symmetric) != ("uint8", False):
        return None
    if not s.plain or (s.bias is not None and s.bias_value() is None):
        rw.decline("MatMulInteger has no transposed x, no alpha and beta, and takes a constant bias only")
    o = Emitter(rw, s.node)
    q, x_scale, zero = _quantized(o, found[0], half=s.half, known=(found[2].q, found[2].scale, found[2].zero_point))
    w_zero = () if w.symmetric else (o.const(w.zero_point.contiguous(), "zero_point"),)  # type: ignore[union-attr]
    acc = o("MatMulInteger", q, s.kn(rw), zero, *w_zero, dtype="int32", like=s.root, since=10, main=True)
    scale = o("Mul", x_scale, o.const(w.scale.float(), "scale"), dtype="float32", since=7)
    y = o("Mul", o("Cast", acc, dtype="float32", like=s.root, to=FLOAT), scale, dtype="float32", like=s.root, since=7)
    bias = s.bias_value()
    if bias is not None:
        y = o("Add", y, o.const(bias.float(), "bias"), dtype="float32", like=s.root, since=7)
    elif _adds_axes(s):
        y = o("Max", y, o.const(torch.tensor(-torch.inf), "lowest"), dtype="float32", like=s.root, since=8)
    return o.cast(y, s.half) if s.half else y


def _adds_axes(s: LinearSite) -> bool:
    """A constant with more axes than x is added, such as [1, 1, N] on [M, K]: ONNX Runtime would fuse it as the bias and lose the axes."""
    add = view(Elementwise, next(iter(s.node.users))) if len(s.node.users) == 1 else None
    values = [const_value(v) for v in add.inputs] if add is not None and add.kind == "add" else []
    return any(v is not None and v.dim() > (rank(s.v.x) or v.dim()) for v in values)


def _quantized(o: Emitter, x: Node, *, half: str | None, known: tuple[Node, Node, Node | None]) -> tuple[Node, Node, Node | None]:
    """The dynamic quantization as it is, or a float32 one of a 16-bit x (equal ones are merged later)."""
    if not half:
        return known
    wide = o.rw.call(Q.dynamic_quantize.default, o("Cast", x, dtype="float32", like=x, to=FLOAT), "uint8", False)
    return o.outputs(wide, "uint8", "float32", "uint8")  # type: ignore[return-value]


def blockwise(s: LinearSite, rw: Rewriter) -> Node | None:
    """MatMulNBits: level 4 quantizes rows of x in the weight's blocks (amax / 127), level 1 keeps them in float.

    8-bit codes are fast at level 4 only; per-channel scales are repeated for each block."""
    found, w = dynamic_source(s.v.x), s.weight()
    if w is None or (static_source(s.v.x) is not None and not s.int8().group):  # type: ignore[union-attr]  # there is a weight
        return None
    level = 4 if found is not None and _as_level_4(found[1].dtype, found[1].symmetric, found[1].axis, found[1].group, w) else 1
    if container_bits(w.dtype) == 8 and level != 4:
        return None
    size = block_size(w.group or CHANNEL_BLOCK)
    if size is None or not s.plain or (s.bias is not None and s.bias_value() is None):
        rw.decline(f"MatMulNBits takes groups that are a multiple of 16, and no alpha, beta or transposed x; the group is {w.group}")
    x = found[0] if found is not None and level == 4 else s.v.x
    return _matmul_nbits(s, w, x, size=size, level=level, rw=rw)


def _as_level_4(dtype: str, symmetric: bool, axis: int | None, group: int, w: Weight) -> bool:
    return dtype == "int8" and symmetric and axis == -1 and group == w.group > 0 and block_size(group) == group


def _matmul_nbits(s: LinearSite, w: Weight, x: Node, *, size: int, level: int, rw: Rewriter) -> Node:
    o, (n, k) = Emitter(rw, s.node), w.q.shape
    scale, zero = w.scale, w.zero_point
    if not w.group:  # one group as long as a row
        scale, zero = w.per_channel[:, None], None if zero is None else zero.reshape(-1, 1).expand(n, 1)
    bits = kernel_bits(w.dtype, level=level, block=size)
    b = matmul_blocks(w.q, scale, zero, w.dtype, group=w.group or -(-k // size) * size, block=size, bits=bits)
    if bits != QSpec(w.dtype).bits and "qgraph" in rw.gm.meta:  # nested bodies have no ledger of their own
        reason = f"MatMulNBits has codes of 2, 4 and 8 bits, those of 2 fast for int8 rows in blocks of 64 and 128 alone, so {w.dtype} takes {bits}"
        state(rw.gm).ledger.record(Entry(path_of(s.node), "MatMulNBits", "container", f"{bits} bits", "claim_kernels", reason))
    bias, half = s.bias_value(), "float16" if s.half == "float16" else None
    float_type = getattr(torch, half or "float32")
    operands = [o.const(b.data, "blocks"), o.const(b.scale.to(float_type), "scale")]
    operands.append(None if b.zero_point is None else o.const(b.zero_point, "zero_point"))  # type: ignore[arg-type]
    if bias is not None:
        operands += [None, o.const(bias.to(float_type), "bias")]  # type: ignore[list-item]
    while operands[-1] is None:
        operands.pop()
    attributes = {"K": k, "N": n, "bits": b.bits, "block_size": size, "accuracy_level": level}
    x = o.cast(x, "float32") if s.half == "bfloat16" else x
    y = o("MatMulNBits", x, *operands, dtype=half or "float32", like=s.root, domain=MICROSOFT, main=True, **attributes)
    return o.cast(y, s.half) if s.half == "bfloat16" else y


def static_bias(s: LinearSite, rw: Rewriter) -> Node | None:
    """A constant bias behind static activations. ONNX Runtime folds it into an integer kernel in two forms only.

    Case 1: x has two axes and the bias fits int32 at scale x_scale * w_scale: Gemm, which becomes QGemm.
    Case 2: MatMulIntegerToFloat with a float bias. (QDQ leaves a separate Add there, and for fixed shapes nothing is fused at all:
    MatMul and Add turn into a float Gemm before the integer fusions run, also where Add is a residual one; and so do Gemm and a Relu
    that float reads.)"""
    x, w, bias = static_source(s.v.x), s.int8(), s.bias_value()
    if x is None or w is None or w.group or container_bits(w.dtype) != 8 or not s.plain:
        return None
    if bias is None and (s.bias is not None or not (s.w.group or _is_summed(s.node))):
        return None
    x_scale = constant(x.scale, rw)
    two_axes = rank(s.v.x) == 2 or s.v.bias is not None  # a linear with a bias of its own is a Gemm
    gemm = two_axes and bias is not None and not s.w.group and not _is_rectified(s.root)
    integer = quantize_bias(bias, x_scale, w.scale) if gemm and bias is not None else "no int32 bias on two axes"
    o = Emitter(rw, s.node)
    if isinstance(integer, torch.Tensor):
        scale = (x_scale.reshape(()).float() * w.per_channel.float()).contiguous()
        b = o("DequantizeLinear", o.const(integer, "bias"), o.const(scale, "bias_scale"), dtype="float32", since=13, axis=0)
        return o("Gemm", s.v.x, s.v.weight, b, like=s.root, since=13, main=True, transB=int(s.v.out_axis % 2 == 0))
    if x.dtype != "uint8" or x.zero_point is None:
        return None
    w_zero = None if w.zero_point is None else o.const(w.zero_point, "zero_point")
    operands = [x.q, s.kn(rw), x.scale, o.const(w.scale, "scale"), x.zero_point]
    if bias is not None:
        operands += [w_zero, o.const(bias.float(), "bias")]  # type: ignore[list-item]
    elif w_zero is not None:
        operands.append(w_zero)
    return o("MatMulIntegerToFloat", *operands, dtype="float32", like=s.root, domain=MICROSOFT, main=True)


def _is_rectified(node: Node) -> bool:
    """Its one reader is a relu; one that saturation performs is gone by now."""
    act = view(Activation, next(iter(node.users))) if len(node.users) == 1 else None
    return act is not None and act.kind == "relu"


def _is_summed(node: Node) -> bool:
    """Its one reader adds it to something, in float."""
    add = view(Elementwise, next(iter(node.users))) if len(node.users) == 1 else None
    return add is not None and add.kind == "add"


LINEAR_RULES = (
    *linear_rules("dynamic_integer", dynamic_integer),
    *linear_rules("token_integer", token_integer),
    *linear_rules("blockwise", blockwise),
    *linear_rules("static_bias", static_bias),
)
