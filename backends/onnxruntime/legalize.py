"""Passes that turn an onnx-dialect graph with qg ops into what ONNX Runtime's CPU provider fuses (see backends/README.md for the table).

    open_fused -> whole_ops -> modernize -> fuse_attention -> fold_pad -> absorb_activation -> turn_weights -> widen_half
    -> store_sparse -> claim_kernels -> multiply_out_weights -> quantize_biases -> lower_qg_ops -> shield_float -> keep_apart
    -> share_tables -> factor_scales -> merge_equal

Every pass is usable alone; after the last one no qg op is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node, map_arg

from qgraph.backends.onnxruntime import (
    codebook,  # noqa: F401  (fills standard.LOWER)
    weights,
)
from qgraph.backends.onnxruntime.apart import KeepApart
from qgraph.backends.onnxruntime.attention import FuseAttention
from qgraph.backends.onnxruntime.double_scales import FactorScales
from qgraph.backends.onnxruntime.emit import Emitter, emit
from qgraph.backends.onnxruntime.fused import OpenFused
from qgraph.backends.onnxruntime.half import WidenHalf
from qgraph.backends.onnxruntime.hard_swish import hard_swish_in_integers
from qgraph.backends.onnxruntime.linear import LINEAR_RULES
from qgraph.backends.onnxruntime.modernize import Modernize
from qgraph.backends.onnxruntime.pool import pool_in_integers
from qgraph.backends.onnxruntime.share_tables import ShareTables
from qgraph.backends.onnxruntime.shield import ShieldFloat
from qgraph.backends.onnxruntime.sites import constant, is_integer_site, static_source
from qgraph.backends.onnxruntime.sparse import StoreSparse
from qgraph.backends.onnxruntime.standard import leftovers, lower_rules
from qgraph.backends.onnxruntime.token import unsigned_rows
from qgraph.backends.onnxruntime.whole import WholeOps
from qgraph.errors import LoweringError
from qgraph.ledger import Entry, state
from qgraph.ops import Q, quantize_bias
from qgraph.passes.absorb_activation import AbsorbActivation
from qgraph.passes.fold_pad import FoldPad
from qgraph.passes.merge_equal import MergeEqual
from qgraph.pattern import Const, Match, Op, Opt, Var
from qgraph.pipeline import EQUIVALENT, EXACT, Context, Contract, Pass
from qgraph.qparams import BIAS_LIMIT
from qgraph.rewrite import Rewriter, graph_modules, rule
from qgraph.text import path_of, where
from qgraph.views import Conv, Dequantize, Linear, Quantize, const_value, key, view


@dataclass(frozen=True)
class TurnWeights(Pass):
    """Transposed weights are turned now, and a weight read by integer and float kernels gets a dequantization for each."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        count = emit(gm, ctx, weights.turn)
        return count + sum(_separate(node) for part in graph_modules(gm) for node in list(part.graph.nodes))


def _separate(node: Node) -> int:
    """One dequantization of a constant per reader, so that each may become what its reader wants. The integers stay shared."""
    v = view(Dequantize, node)
    if v is None or node.target is not Q.dequantize.default or const_value(v.q) is None:
        return 0
    readers = list(node.users)[1:]
    for reader in readers:
        with node.graph.inserting_before(node):
            copy = node.graph.node_copy(node)
        reader.replace_input_with(node, copy)
    return len(readers)


@rule(
    Op(
        Dequantize,
        "dq",
        q=Op(Quantize, "q", single_use=True, axis=None, dtype="int8"),
        axis=None,
        scale=Const("s"),
        zero_point=Opt(Const("z")),
    )
)
def unsigned(m: Match, rw: Rewriter) -> Node | None:
    """Static int8 activations become uint8 with the zero point moved by 128, the type of the fast kernels."""
    v, inner = view(Dequantize, m.dq), view(Quantize, m.q)
    if v is None or inner is None or v.dtype != "int8":
        return None
    zero = torch.tensor(0) if m.z is None else constant(m.z, rw)
    moved = rw.const((zero.to(torch.int16) + 128).to(torch.uint8), name=f"{m.q.name}_zero_point")
    q = rw.call(Q.quantize.default, inner.x, v.scale, moved, "uint8")
    return rw.call(Q.dequantize.default, q, v.scale, moved, "uint8", like=m.dq)


@dataclass(frozen=True)
class ClaimKernels(Pass):
    """Linears and embeddings with integer weights become the kernels that read these integers (linear.py, weights.py)."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-2)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        count = emit(gm, ctx, unsigned, unsigned_rows, pool_in_integers, hard_swish_in_integers)
        return count + emit(gm, ctx, *LINEAR_RULES, weights.gather)


@dataclass(frozen=True)
class MultiplyOutWeights(Pass):
    """Weights in front of float kernels: Cast * scale."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, weights.multiply_out)


@dataclass(frozen=True)
class QuantizeBiases(Pass):
    """A constant bias of an integer Conv or Gemm: float -> DequantizeLinear(int32, x_scale * w_scale).

    ONNX Runtime quantizes a float bias there by itself, without a range check: a bias of 2**31 steps or more silently comes out wrong.
    So where one does not fit, the weights of its channel get a coarser scale, in which it does; their part in the sum is then below
    the resolution of float32 beside that bias."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, quantize_bias_of_conv, quantize_bias_of_gemm)


WEIGHT = Op(Q.dequantize.default, "w", q=Const("q"), scale=Const("s"))


@rule(Op(Conv, x=Var("x"), weight=WEIGHT, bias=Const("bias"), transposed=False))
def quantize_bias_of_conv(m: Match, rw: Rewriter) -> Node | None:
    return _with_integer_bias(m, rw, out_axis=0)


@rule(Op(Linear, x=Var("x"), weight=WEIGHT, bias=Const("bias"), alpha=1.0, beta=1.0, out_axis=Var("out_axis")))
def quantize_bias_of_gemm(m: Match, rw: Rewriter) -> Node | None:
    return _with_integer_bias(m, rw, out_axis=m.out_axis % 2)


def _with_integer_bias(m: Match, rw: Rewriter, *, out_axis: int) -> Node | None:
    w, x = view(Dequantize, m.w), static_source(m.x)
    if w is None or x is None or not is_integer_site(m.root, m.w):
        return None
    q, scale, x_scale, bias = constant(w.q, rw), constant(w.scale, rw), constant(x.scale, rw), constant(m.bias, rw)
    if bias.dtype != torch.float32 or bias.shape != (q.shape[out_axis],):
        return None
    o, weight, reason = Emitter(rw), m.w, "scale derived: x_scale * w_scale"
    found = quantize_bias(bias, x_scale, scale)
    if not isinstance(found, torch.Tensor):
        reason = f"{found}: the weights of such channels are stored in coarser steps"
        q, scale = coarser(q, scale, bias, x_scale, out_axis)
        found = quantize_bias(bias, x_scale, scale)
        if w.zero_point is not None and bool(constant(w.zero_point, rw).any()) or not isinstance(found, torch.Tensor):
            rw.decline(f"{found}; give the layer a symmetric weight, or keep it in float by a rule")
        weight = rw.call(Q.dequantize.default, o.const(q, "weight"), o.const(scale, "scale"), None, w.dtype, out_axis, 0, like=m.w)
    if "qgraph" in rw.gm.meta:  # nested bodies have no ledger of their own
        kind = str(key(m.root.target)).removeprefix("::")
        state(rw.gm).ledger.record(Entry(path_of(m.root), kind, "bias", "int32", QuantizeBiases.name, reason))
    steps = (x_scale.reshape(()).float() * scale.reshape(-1).float()).expand(bias.shape).contiguous()
    b = o("DequantizeLinear", o.const(found, "bias"), o.const(steps, "bias_scale"), dtype="float32", since=13, axis=0)
    changed = {m.bias: b, m.w: weight}
    args, kwargs = map_arg((m.root.args, m.root.kwargs), lambda n: changed.get(n, n))
    attributes: dict[str, Any] = dict(kwargs)
    return rw.call(m.root.target, *args, like=m.root, **attributes)


def coarser(
    q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, x_scale: torch.Tensor, axis: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric per-channel weight integers in a scale in which the bias takes at most 2**30 steps: (integers, scale [N])."""
    old = scale.reshape(-1).float().expand(q.shape[axis])
    least = bias.abs().float() / (x_scale.reshape(()).float() * BIAS_LIMIT) * (1 + 2**-20)  # a hair above, for the product's rounding
    new = torch.maximum(old, torch.maximum(least, torch.finfo(torch.float32).smallest_normal / x_scale.reshape(()).float() * 2))
    ratio = (old / new).reshape([-1 if d == axis else 1 for d in range(q.dim())])
    return (q.float() * ratio).round().to(q.dtype), new


@dataclass(frozen=True)
class LowerQgOps(Pass):
    """What is left of the qg dialect, by the table standard.LOWER. Raises LoweringError for an op that is not in it."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        count = emit(gm, ctx, *lower_rules())
        left = leftovers([n for part in graph_modules(gm) for n in part.graph.nodes])
        if left:
            raise LoweringError(
                f"{where(left[0])}: the onnxruntime backend has no lowering for {left[0].target}; add it to its table LOWER"
            )
        return count


LEGALIZE: tuple[Pass, ...] = (
    OpenFused(),
    WholeOps(),
    Modernize(),
    FuseAttention(),
    FoldPad(),
    AbsorbActivation(),
    TurnWeights(),
    WidenHalf(),
    StoreSparse(),
    ClaimKernels(),
    MultiplyOutWeights(),
    QuantizeBiases(),
    LowerQgOps(),
    ShieldFloat(),
    KeepApart(),
    ShareTables(),
    FactorScales(),
    MergeEqual(),
)
"""The backend's passes in order."""
