"""linear(x, dequantize(weight)) with one scale per row of x -> an integer product, its rows multiplied by their scales.

    q, s, z = rows of x in uint8 (standard.py: ReduceMax, ReduceMin, QuantizeLinear in blocks as long as a row)
    y = MatMulIntegerToFloat([q, z ... z], [W; C]) * s + b      C: rows of int8 that add up to -(column sums of W)

Integer kernels take one zero point for all rows. The columns of z make the sum over k of (q - z) W[k, n] in the same integer product,
exactly; symmetric rows need none, their zero point is 128. All readers of x share its statistics and its integers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.onnxruntime.emit import MICROSOFT, Emitter
from qgraph.backends.onnxruntime.sites import LinearSite, Weight, dynamic_source, linear_site
from qgraph.ops import Q
from qgraph.pattern import Match, Op
from qgraph.rewrite import Rewriter, rule
from qgraph.types import TensorType, type_of
from qgraph.views import Dequantize

ROWS = "onnxruntime.correction_rows"
LARGEST_PART = 4
"""More correction rows than K / 4 cost more than a correction of the float result."""


@rule(Op(Dequantize, dtype="int8", group=-1))
def unsigned_rows(m: Match, rw: Rewriter) -> Node | None:
    """dequantize(int8 rows) -> dequantize(uint8 rows): the same numbers with integers and zero points 128 higher, which kernels read fast."""
    found = dynamic_source(m.root)
    if found is None or found[1].dtype != "int8":
        return None
    source, rows, _ = found
    new = rw.call(Q.dynamic_quantize.default, source, "uint8", rows.symmetric, rows.axis, rows.group)
    t = type_of(source)
    picks = Emitter(rw).outputs(new, "uint8", (t.dtype if t is not None else None) or "float32", "uint8")
    return rw.call(Q.dequantize.default, *picks, "uint8", rows.axis, rows.group, like=m.root)


def token_integer(s: LinearSite, rw: Rewriter) -> Node | None:
    """Rows of uint8 with a scale each, weights per tensor or per output channel.

    The scales multiply the float result, and the bias is added by a Sum: ONNX Runtime would fuse an Add with a Gelu behind it into
    BiasGelu, which takes longer than both."""
    found, w = dynamic_source(s.v.x), s.int8()
    if found is None or w is None or found[1].group != -1:
        return None
    reason = _obstacle(s, found[1].dtype, w)
    if reason is not None:
        rw.decline(reason)
    _learn_length(found[0], w.q.shape[1])
    o = Emitter(rw, s.node)
    q, scale, zero = found[2].q, found[2].scale, found[2].zero_point
    y = _symmetric(o, s, w, q) if found[1].symmetric else _asymmetric(o, s, w, q, zero)
    y = o("Mul", y, o.cast(scale, "float32") if s.half else scale, dtype="float32", like=s.root, since=7)
    bias = s.bias_value()
    if bias is not None:
        y = o("Sum", y, o.const(bias.float(), "bias"), dtype="float32", like=s.root, since=8)
    return o.cast(y, s.half) if s.half else y


def _obstacle(s: LinearSite, dtype: str, w: Weight) -> str | None:
    """Why no integer kernel serves, so that the product is a float one of what was dequantized."""
    if dtype != "uint8":
        return f"integer kernels read rows of 8 bits, not of {dtype}; the product is a float one"
    if w.group:
        return (
            f"no integer kernel has one scale per row of x beside groups of {w.group} in the weight: MatMulNBits level 4 quantizes rows in the "
            f"weight's groups (activations.group={w.group}), and stage two-level gives weights of 4 bits scales that are one per channel in "
            "int8; the product is a float one"
        )
    if not w.symmetric or w.dtype.startswith("u"):
        return "integer products of rows with a scale each take signed symmetric weights; the product is a float one"
    if not s.plain or (s.bias is not None and s.bias_value() is None):
        return "integer products have no transposed x, no alpha and beta, and take a constant bias only; the product is a float one"
    return None


def _learn_length(x: Node, k: int) -> None:
    """x has rows of K elements, says the weight; their QuantizeLinear must know."""
    t = type_of(x)
    if t is not None and t.shape and not isinstance(t.shape[-1], int):
        x.meta["type"] = TensorType(t.dtype, (*t.shape[:-1], k))


def _product(o: Emitter, s: LinearSite, w: Weight, q: Node, kn: Node, *zero: Node) -> Node:
    """q . kn * w_scale in float32, of integers q and kn [K, N]; the zero point of q is 0 or the one that is given."""
    one, scale = o.const(torch.tensor(1.0), "one"), o.const(w.scale.float(), "scale")
    return o("MatMulIntegerToFloat", q, kn, one, scale, *zero, dtype="float32", like=s.root, domain=MICROSOFT, main=True)


def _symmetric(o: Emitter, s: LinearSite, w: Weight, q: Node) -> Node:
    return _product(o, s, w, q, s.kn(o.rw), o.const(torch.tensor(128, dtype=torch.uint8), "zero_point"))


def _asymmetric(o: Emitter, s: LinearSite, w: Weight, q: Node, zero: Node | None) -> Node:
    """Case 1: few correction rows; in the integer product. Case 2: subtracted in float: q . W * w_scale - z * (column sums * w_scale)."""
    if _allowed(sums := _column_sums(w)) <= w.q.shape[1]:
        count = _shared_rows(s.v.x)
        kn = _corrected(o, s, w, count)
        return _product(o, s, w, o("Concat", q, *[zero] * count, dtype="uint8", since=4, axis=-1) if count else q, kn)
    y = _product(o, s, w, q, s.kn(o.rw))
    row = o.const((sums.float() * w.per_channel.float())[None], "column_sums")
    return o("Sub", y, o("Mul", o.cast(zero, "float32"), row, dtype="float32", since=7), dtype="float32", like=s.root, since=7)  # type: ignore[arg-type]


def _corrected(o: Emitter, s: LinearSite, w: Weight, count: int) -> Node:
    """int8 [K + count, N]; where the first K rows are computed from codes, the rest is appended to these."""
    whole = corrected(w.q.T, count)
    if not s.w.group:
        return o.const(whole, "corrected")
    kn = s.kn(o.rw)
    return o("Concat", kn, o.const(whole[len(whole) - count :], "correction"), dtype="int8", since=4, axis=0) if count else kn


def _column_sums(w: Weight) -> Tensor:
    """[N], exact."""
    return w.q.sum(1, dtype=torch.int32)


def _allowed(sums: Tensor) -> int:
    """The smallest K for which a correction within the integer product pays."""
    return correction_rows(sums) * LARGEST_PART


def _shared_rows(x: Node) -> int:
    """Correction rows of the weights that read x, as many for each of them as the one that needs most: then they share the columns of z.

    Kept with x, for these weights are claimed one after the other."""
    if ROWS not in x.meta:
        weights = [site.int8() for user in x.users if (site := linear_site(user)) is not None and site.v.x is x]
        found = [(w.q.shape[1], _column_sums(w)) for w in weights if w is not None and not w.group]
        x.meta[ROWS] = max((correction_rows(sums) for k, sums in found if _allowed(sums) <= k), default=0)
    return int(x.meta[ROWS])


def correction_rows(sums: Tensor) -> int:
    """How many int8 rows it takes to add up to these column sums."""
    return -(-int(sums.abs().amax()) // 127) if sums.numel() else 0


def corrected(q: Tensor, count: int) -> Tensor:
    """int8 [K, N] -> [K + count, N], whose columns each add up to 0. `count` is at least `correction_rows` of its column sums."""
    left, rows = -q.sum(0, dtype=torch.int32), [q]
    for _ in range(count):
        rows.append(left.clamp(-127, 127).to(q.dtype)[None])
        left = left - rows[-1][0]
    return torch.cat(rows)
