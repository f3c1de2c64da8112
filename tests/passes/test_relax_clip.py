"""relax_clip: clips from 0 become relus, on both dialects; others stay."""

import pytest
import torch
from torch import nn

from qgraph.passes.relax_clip import RelaxClip
from qgraph.testing import from_onnx, from_torch
from qgraph.text import text


def linear_relu6():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.ReLU6()).eval()


def test_a_relu6_becomes_a_relu_and_large_values_pass():
    net, x = linear_relu6(), torch.randn(4, 5) * 20
    gm, _ = from_torch(net, x)
    assert RelaxClip.contract.tol is None, "it is another model"
    assert RelaxClip()(gm).modified and "relu6" not in text(gm)
    assert torch.equal(gm(x), net[0](x).relu()) and float(gm(x).detach().max()) > 6
    assert not RelaxClip()(gm).modified


@pytest.mark.parametrize(("low", "changed"), [(0.0, True), (-1.0, False)])
def test_onnx_only_clips_from_0_are_relaxed(low, changed):
    source = f"""<ir_version: 8, opset_import: ["": 17]> g (float[2,3] x) => (float[2,3] y)
        <float low = {{{low}}}, float high = {{6}}> {{ y = Clip (x, low, high) }}"""
    x = torch.tensor([[9.0, -0.5, 3.0], [-2.0, 6.5, 1.0]])
    gm, _ = from_onnx(source, x)
    assert RelaxClip()(gm).modified == changed
    found = gm(x)
    found = found[0] if isinstance(found, tuple | list) else found
    assert torch.equal(found, x.relu() if changed else x.clamp(low, 6))
