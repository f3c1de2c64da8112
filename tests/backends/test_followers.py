"""Functions that are computed on bytes because their neighbours are: measured to be faster so, and nothing else is."""

import pytest
import torch
from torch import nn
from torch.nn.functional import leaky_relu

import qgraph
from qgraph.onnx_io import to_proto
from qgraph.torch_export import to_onnx_dialect
from tests.everywhere import EVERYWHERE

X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """conv(f(conv x) + f(conv x))"""

    def __init__(self, curve):
        super().__init__()
        torch.manual_seed(0)
        self.curve, self.a, self.b, self.c = curve, nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x):
        return self.c(self.curve(self.a(x)) + self.curve(self.b(x)))


def leaky(x):
    return leaky_relu(x, 0.2)


def quantized(curve, origin):
    model = Residual(curve).eval()
    if origin == "onnx":
        return qgraph.quantize(to_proto(to_onnx_dialect(qgraph.capture(model, (X,)))), [(X,)], backend=EVERYWHERE)
    return qgraph.quantize(model, [(X,)], example_inputs=(X,), backend=EVERYWHERE)


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_leaky_relu_and_the_sum_behind_it_stay_in_integers(origin):
    gm = quantized(leaky, origin)
    program = qgraph.lower(gm, backend=EVERYWHERE, strict=True)
    assert sorted(k.became for k in program.kernels()) == ["QLinearAdd"] + ["QLinearConv"] * 3 + ["QLinearLeakyRelu"] * 2
    want, (got, *_) = Residual(leaky).eval()(X).detach(), torch.utils._pytree.tree_leaves(program(X))
    assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("curve", [torch.sigmoid, torch.tanh, nn.functional.silu, nn.functional.hardsigmoid])
def test_functions_whose_kernel_on_bytes_gains_nothing_do_not_pull_sums_into_integers(curve):
    program = qgraph.lower(quantized(curve, "torch"), backend=EVERYWHERE)
    assert [k.became for k in program.kernels()] == ["QLinearConv"] * 3
