"""Small graphs that several tests of passes start from."""

from torch import nn

from qgraph.testing import from_onnx


def from_text(body, *args, opset=20, inputs="float[2,3,4] x", outputs="float[2,3,4] y", constants=""):
    return from_onnx(f'<ir_version: 9, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) <{constants}> {{ {body} }}', *args)


def ops(gm):
    return [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"]


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)
