"""conv(pad(x, zeros)) -> conv(x) with that padding; also behind quantization, whose integers have an exact zero.

    conv(dequantize(quantize(pad(x)))) -> conv(dequantize(quantize(x))) with padding

quantize(0) is the zero point whatever the scale, and dequantize gives 0 back, so that padding before and after are the same. What produces
x then feeds the quantizer directly, the form that integer kernels are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node, map_arg

from qgraph.pattern import Match, OneOf, Op, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.slots import with_operands
from qgraph.views import Conv, Dequantize, FakeQuantize, Pad, Quantize

_PAD = Op(Pad, "pad", x=Var("x"), pads=Var("pads"), value=0.0, single_use=True)
_QUANTIZED = Op(Quantize, "quantize", x=_PAD, zero_point=Var("zero_point"), axis=None, single_use=True)


@dataclass(frozen=True)
class FoldPad(Pass):
    """Part of Canonicalize; by itself it is for backends, after quantization."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, RULES)


@rule(Op(Conv, x=_PAD, padding=Var("padding"), transposed=False))
def fold_pad(m: Match, rw: Rewriter) -> Node:
    found = _padded(m, rw, x=m.x)
    return rw.call(m.root.target, *found[0], like=m.root, **found[1])


@rule(
    Op(
        Conv,
        x=OneOf(
            Op(Dequantize, "value", q=_QUANTIZED, zero_point=Var("zero_point"), axis=None, single_use=True),
            Op(FakeQuantize, "value", x=_PAD, axis=None, single_use=True),
        ),
        padding=Var("padding"),
        transposed=False,
    )
)
def fold_quantized_pad(m: Match, rw: Rewriter) -> Node:
    _padded(m, rw, x=m.value)  # declines before anything is made
    inner, fed = (m.quantize, _again(m.quantize, m.pad, m.x, rw)) if "quantize" in m else (m.pad, m.x)
    found = _padded(m, rw, x=_again(m.value, inner, fed, rw))
    return rw.call(m.root.target, *found[0], like=m.root, **found[1])


def _again(call: Node, old: Node, new: Node, rw: Rewriter) -> Node:
    """The same call reading `new` for `old`; its type is found anew, or unknown."""
    args, kwargs = map_arg((call.args, call.kwargs), lambda n: new if n is old else n)
    attributes: dict[str, Any] = dict(kwargs)
    return rw.call(call.target, *args, origin=call, **attributes)


def _padded(m: Match, rw: Rewriter, *, x: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the convolution with both paddings, reading x."""
    if m.pads is None or m.padding is None:
        rw.decline("the padding depends on the input")
    if any(b or e for b, e in m.pads[:2]) or any(b < 0 or e < 0 for b, e in m.pads):
        rw.decline(f"padding {m.pads} pads batch or channels, or crops")
    padding = tuple((b + c, e + f) for (b, e), (c, f) in zip(m.padding, m.pads[2:], strict=True))
    found = with_operands(m.root, x=x, padding=padding)
    return rw.decline(f"{m.root.target} cannot express padding {padding}") if found is None else found


RULES = (fold_pad, fold_quantized_pad)
