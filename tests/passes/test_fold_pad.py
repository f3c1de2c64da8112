"""Zero padding moves into convolutions, through quantization too."""

import pytest
import torch
from torch import nn

from qgraph.ops import Q
from qgraph.passes import FoldPad
from qgraph.pipeline import Context
from qgraph.testing import check, from_torch
from qgraph.text import text
from tests.passes.graphs import from_text, ops


def declines(gm):
    ctx = Context()
    FoldPad().run(gm, ctx)
    return [d.reason for d in ctx.declines]


IMAGE = torch.randn(1, 2, 5, 6)
WEIGHT = "float[1,2,2,2] w = {1, -2, 3, 4, 5, -6, 7, 8}"


def test_padding_by_zeros_moves_into_the_onnx_convolution():
    constants = f"int64[8] p = {{0, 0, 1, 0, 0, 0, 2, 3}}, {WEIGHT}"
    body = "a = Pad (x, p) y = Conv <pads = [0, 1, 1, 0]> (a, w)"
    start = from_text(body, IMAGE, inputs="float[1,2,5,6] x", outputs="float[1,1,H,W] y", constants=constants)
    check(FoldPad(), start, (IMAGE,), """
        %0: f32[1,1,8,9] = onnx.Conv(%x, @w, pads=[1, 1, 3, 3])
        return %0
    """)  # fmt: skip


@pytest.mark.parametrize(
    ("pads", "value", "reason"),
    [
        ("{0, 1, 0, 0, 0, 0, 0, 0}", "{0}", "pads batch or channels"),
        ("{0, 0, -1, 0, 0, 0, 0, 0}", "{0}", "or crops"),
        ("{0, 0, 1, 0, 0, 0, 0, 0}", "{0.5}", None),
    ],
)
def test_other_padding_stays(pads, value, reason):
    weight = "float[1,3,2,2] w = {1, -2, 3, 4, 5, -6, 7, 8, 1, 2, 3, 4}" if "{0, 1" in pads else WEIGHT
    constants = f"int64[8] p = {pads}, float v = {value}, {weight}"
    start = from_text(
        "a = Pad (x, p, v) y = Conv (a, w)", IMAGE, inputs="float[1,2,5,6] x", outputs="float[1,1,H,W] y", constants=constants
    )
    assert [reason in d for d in declines(start[0])] == ([True] if reason else [])
    assert ops(check(FoldPad(), start, (IMAGE,), None)) == ["Pad", "Conv"]


def test_padding_moves_into_the_torch_convolution_when_it_is_symmetric():
    class Padded(nn.Module):
        def __init__(self, pads):
            super().__init__()
            self.pads, self.conv = pads, nn.Conv2d(2, 3, 2, padding=(1, 0))

        def forward(self, x):
            return self.conv(nn.functional.pad(x, self.pads))

    gm = check(FoldPad(), from_torch(Padded((2, 2, 1, 1)), IMAGE), (IMAGE,), None)
    assert "pad(" not in text(gm) and "[2, 2]" in text(gm)
    start = from_torch(Padded((2, 1, 1, 1)), IMAGE)
    assert "cannot express padding ((2, 2), (2, 1))" in declines(start[0])[0]


def test_padding_moves_through_quantize_and_dequantize_in_onnx():
    constants = f"int64[8] p = {{0, 0, 1, 0, 0, 0, 2, 3}}, float s = {{0.03}}, uint8 z = {{117}}, {WEIGHT}"
    body = "a = Pad (x, p) q = QuantizeLinear (a, s, z) d = DequantizeLinear (q, s, z) y = Conv <pads = [0, 1, 1, 0]> (d, w)"
    start = from_text(body, IMAGE, inputs="float[1,2,5,6] x", outputs="float[1,1,H,W] y", constants=constants)
    gm = check(FoldPad(), start, (IMAGE,), None)
    assert ops(gm) == ["QuantizeLinear", "DequantizeLinear", "Conv"] and "pads=[1, 1, 3, 3]" in text(gm)


def test_padding_stays_where_another_zero_point_reads_it():
    constants = f"int64[8] p = {{0, 0, 1, 0, 0, 0, 2, 3}}, float s = {{0.03}}, uint8 z = {{117}}, uint8 o = {{116}}, {WEIGHT}"
    body = "a = Pad (x, p) q = QuantizeLinear (a, s, z) d = DequantizeLinear (q, s, o) y = Conv (d, w)"
    start = from_text(body, IMAGE, inputs="float[1,2,5,6] x", outputs="float[1,1,H,W] y", constants=constants)
    assert ops(check(FoldPad(), start, (IMAGE,), None))[0] == "Pad"


@pytest.mark.parametrize("fake", [True, False])
def test_padding_moves_through_the_ops_of_the_qg_dialect(fake):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2)
            self.register_buffer("scale", torch.tensor(0.03))
            self.register_buffer("zero", torch.tensor(117, dtype=torch.uint8))

        def forward(self, x):
            x = nn.functional.pad(x, (2, 2, 1, 1))
            if fake:
                return self.conv(Q.fake_quantize(x, self.scale, self.zero, "uint8"))
            return self.conv(Q.dequantize(Q.quantize(x, self.scale, self.zero, "uint8"), self.scale, self.zero, "uint8"))

    printed = text(check(FoldPad(), from_torch(Net(), IMAGE), (IMAGE,), None))
    assert "pad" not in printed and "[1, 2]" in printed and "f32[1,2,5,6] = qg." in printed
