"""A backend of one's own: INT8 weights are multiplied by our kernel, everything else runs in torch.

It says where it can compute (placement), makes a program of a converted graph (lower), and reports what became of each promise."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import qgraph
from qgraph.backend import Kernel, Placement
from qgraph.ops import Q
from qgraph.passes import FuseDequantMatmul
from qgraph.pattern import Op, Var
from qgraph.rewrite import Match, Rewriter, apply, rule
from qgraph.text import path_of
from qgraph.views import Linear


def packed_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel: weight [out, in] int8, scale [out]; scales are applied to the result, not to the weight."""
    y = x @ weight.T.to(x.dtype) * scale
    return y if bias is None else y + bias


@rule(Op(Q.dequant_linear.default, x=Var("x"), weight=Var("w"), scale=Var("s"), bias=Var("b"), zero_point=None, dtype="int8", group=0))
def use_kernel(m: Match, rw: Rewriter) -> Node:
    return rw.call(packed_linear, m.x, m.w, m.s, m.b)


def accepts(operation: Linear, role: str, spec: qgraph.QSpec) -> str | None:
    per_output = isinstance(spec.granularity, qgraph.PerAxis) and spec.symmetric and spec.dtype == "int8"
    return None if per_output else f"packed_linear takes symmetric int8 per output channel, not {spec}"


@dataclass(frozen=True)
class Program:
    gm: GraphModule
    made: list[Kernel]

    def __call__(self, *inputs: Any) -> Any:
        return self.gm(*inputs)

    def kernels(self) -> list[Kernel]:
        return self.made

    def save(self, path: str) -> None:
        torch.save(self.gm.state_dict(), path)


class Packed:
    name = "packed"
    placement = Placement(weight_only=(Linear,), accepts=accepts)

    def lower(self, gm: GraphModule, *, strict: bool = False) -> Program:
        FuseDequantMatmul()(gm)
        promised = {path_of(n) for n in gm.graph.nodes if n.target is Q.dequant_linear.default}
        apply(gm, [use_kernel])
        fused = {path_of(n) for n in gm.graph.nodes if n.target is packed_linear}
        return Program(gm, [Kernel(p, "packed", "packed" if p in fused else "torch", p in fused) for p in sorted(promised)])

    def export(self, gm: GraphModule, path: str) -> None:
        self.lower(gm).save(path)


def main() -> None:
    torch.manual_seed(0)
    qgraph.register_backend("packed", Packed)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.GELU(), torch.nn.Linear(32, 6)).eval()
    x = torch.randn(5, 20)
    quantized = qgraph.quantize(model, example_inputs=(x,), recipe="w8a16", backend="packed")
    program = qgraph.lower(quantized, backend="packed")
    print(*program.kernels(), sep="\n")
    print(f"relative error {(program(x) - model(x)).norm() / model(x).norm():.4f}")


if __name__ == "__main__":
    main()
