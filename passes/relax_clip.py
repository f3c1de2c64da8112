"""clip(x, 0, high) -> relu(x): a model whose channels can be scaled one by one, but another model where x exceeds the limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.onnx_ops import OnnxOp, op
from qgraph.pattern import Match, Op, Var
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.views import Activation


@rule(Op(Activation, kind="clip", low=0.0, high=Var("high"), x=Var("x")))
def relax(m: Match, rw: Rewriter) -> Node:
    """Nagel et al., Data-Free Quantization (2019), section 5.1.1: relu6 stands in the way of equalization"""
    target = m.root.target
    if isinstance(target, OnnxOp):
        return rw.call(op("Relu", version=target.version), m.x, like=m.root)
    return rw.call(torch.ops.aten.relu.default, m.x)


@dataclass(frozen=True)
class RelaxClip(Pass):
    """Only where a recipe asks for it, ahead of `cle`: measure the float model's metric before and after."""

    contract: ClassVar[Contract] = LOSSY

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [relax])
