"""A small model whose input has two large channels, in torch and as ONNX, observed as stages at "observed" find it."""

import numpy as np
import onnx
import torch
from onnx.numpy_helper import from_array
from torch import nn

import qgraph

LARGE = [3, 20]
"""The input's large channels."""

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[B,5,32] x) => (float[B,5,9] y) {
    [a] p = MatMul (x, wa)  [bias] ab = Add (p, ba)  [b] q = MatMul (x, wb)  s = Add (ab, q)  r = Relu (s)  [c] y = MatMul (r, wc) }"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(32, 24), nn.Linear(32, 24, bias=False), nn.Linear(24, 9, bias=False)

    def forward(self, x):
        return self.c(torch.relu(self.a(x) + self.b(x)))


def inputs(count=4, *, seed=1):
    x = torch.randn(count, 2, 5, 32, generator=torch.Generator().manual_seed(seed)) + 0.2
    x[..., LARGE] *= 40
    return list(x)


def proto():
    net, model = Net(), onnx.parser.parse_model(TEXT)
    tensors = {"wa": net.a.weight.T, "ba": net.a.bias, "wb": net.b.weight.T, "wc": net.c.weight.T}
    model.graph.initializer.extend(from_array(np.ascontiguousarray(t.detach()), k) for k, t in tensors.items())
    return model


def observed(origin, recipe, *, net=None):
    """The prepared graph: nothing has been calibrated."""
    if origin == "onnx":
        return qgraph.prepare(proto(), recipe=recipe)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return qgraph.prepare((net or Net()).eval(), (inputs(1)[0],), recipe=recipe, dynamic_shapes=shapes)


def computed(gm, x):
    """The first output, in float."""
    with torch.no_grad():
        found = gm(x)
    return torch.as_tensor(found[0] if isinstance(found, list | tuple) else found)


def outliers(gm):
    """What the ledger says stays in float: node -> (decision, reason)."""
    return {e.node: (e.decision, e.reason) for e in gm.meta["qgraph"].ledger if e.role == "outliers"}
