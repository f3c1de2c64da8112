"""A pass of one's own: two linear layers in a row become one when that is smaller, on torch and on ONNX graphs alike.

(x W1) W2 + b  =  x (W1 W2) + b
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx
import torch
from torch.fx import GraphModule, Node, map_arg

import qgraph
from qgraph.pattern import Const, Op, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Match, Rewriter, rule
from qgraph.views import Linear, const_value

FIRST = Op(Linear, "first", x=Var("x"), weight=Const("w1"), bias=Var("b1"), in_axis=Var("in1"), alpha=1.0, x_axis=-1, single_use=True)


@rule(Op(Linear, "second", x=FIRST, weight=Const("w2"), in_axis=Var("in2"), x_axis=-1))
def merge(m: Match, rw: Rewriter) -> Node:
    if m.b1 is not None:
        rw.decline("the first layer has a bias")
    # As [out, in]: interfaces say which axis is which, whatever the op's own layout.
    w1, w2 = (const_value(w) if axis == -1 else const_value(w).T for w, axis in ((m.w1, m.in1), (m.w2, m.in2)))
    product = w2 @ w1
    if product.numel() > w1.numel() + w2.numel():
        rw.decline(f"{product.numel()} values instead of {w1.numel()} + {w2.numel()}")
    weight = rw.const(product if m.in2 == -1 else product.T, name="merged")
    args = map_arg(m.second.args, lambda n: {m.first: m.x, m.w2: weight}.get(n, n))
    return rw.call(m.second.target, *args, like=m.second, **m.second.kwargs)


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Fields of the dataclass would be the pass' options."""

    name: ClassVar[str] = "merge_linears"
    contract: ClassVar[Contract] = EQUIVALENT(1e-5)  # verify="numerics" checks it

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [merge])


def torch_graph(x: torch.Tensor) -> GraphModule:
    layers = torch.nn.Linear(32, 24, bias=False), torch.nn.Linear(24, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8), torch.nn.Linear(8, 6)
    return qgraph.capture(torch.nn.Sequential(*layers).eval(), (x,))


def onnx_graph() -> GraphModule:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 32] x) => (float[N, 16] y) { [down] h = MatMul (x, w1)  [up] y = Gemm <transB = 1> (h, w2, b) }""")
    values = {"w1": torch.randn(32, 24), "w2": torch.randn(16, 24), "b": torch.randn(16)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v.numpy(), name) for name, v in values.items())
    return qgraph.from_onnx(model)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    pipeline = qgraph.Pipeline(MergeLinears(), verify="numerics")
    for gm in (torch_graph(x), onnx_graph()):
        before, ctx = qgraph.text(gm), Context(samples=[(x,)])
        print(*pipeline.run(gm, ctx), qgraph.diff(before, qgraph.text(gm)), *ctx.declines, sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
