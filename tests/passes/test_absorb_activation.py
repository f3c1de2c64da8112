"""absorb_activation: quantize(clip(x)) -> quantize(x), only where saturation does exactly the same."""

import pytest
import torch
from torch import Tensor, nn

from qgraph.passes.absorb_activation import AbsorbActivation
from qgraph.pipeline import Context
from qgraph.testing import check, from_onnx, from_torch

X = torch.linspace(-3, 9, 50)


class Act(nn.Module):
    def __init__(self, fn: nn.Module, scale: float, zero_point: int) -> None:
        super().__init__()
        self.fn = fn
        self.register_buffer("s", torch.tensor(scale))
        self.register_buffer("z", torch.tensor(zero_point, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        q: Tensor = torch.ops.qgraph.quantize(self.fn(x * 1.5), self.s, self.z, "uint8")
        return q


def test_torch_relu_goes_when_zero_is_the_smallest_integer() -> None:
    check(
        AbsorbActivation(),
        from_torch(Act(nn.ReLU(), 0.03, 0), X),
        (X,),
        """
        %0: f32[50] = aten.mul.Tensor(%x, 1.5)
        %1: u8[50] = qg.quantize(%0, @s, @z, 'uint8')
        return %1
        """,
        tol=0,
    )


@pytest.mark.parametrize("scale", [6 / 255, 5.9 / 255, 0.0235294])
def test_relu6_goes_when_six_is_the_largest_integer(scale: float) -> None:
    gm = check(AbsorbActivation(), from_torch(Act(nn.ReLU6(), scale, 0), X), (X,), None, tol=0)
    assert len([n for n in gm.graph.nodes if n.op == "call_function"]) == 2


@pytest.mark.parametrize(("fn", "scale", "zero"), [(nn.ReLU(), 0.03, 7), (nn.ReLU6(), 0.03, 0), (nn.Hardtanh(-1, 2), 3 / 255, 80)])
def test_declines_when_more_would_get_through(fn: nn.Module, scale: float, zero: int) -> None:
    gm, want = from_torch(Act(fn, scale, zero), X)
    ctx = Context()
    assert AbsorbActivation().run(gm, ctx) == 0
    assert "saturation alone would let more through" in ctx.declines[0].reason
    assert torch.equal(gm(X), want)


def test_an_activation_that_others_read_stays() -> None:
    class Two(Act):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fn(x)
            return torch.ops.qgraph.quantize(y, self.s, self.z, "uint8"), y

    gm, _ = from_torch(Two(nn.ReLU(), 0.03, 0), X)
    assert AbsorbActivation().run(gm, Context()) == 0


def test_onnx_clip_goes() -> None:
    source = """
        <ir_version: 10, opset_import: ["": 17]>
        g (float[50] x) => (uint8[50] y)
          <float low = {0}, float high = {6}, float s = {0.0235}, uint8 z = {0}> {
            c = Clip (x, low, high)
            y = QuantizeLinear (c, s, z)
          }
    """
    check(
        AbsorbActivation(),
        from_onnx(source, X),
        (X,),
        """
        %0: u8[50] = qg.quantize(%x, @s, @z, 'uint8')
        return %0
        """,
        tol=0,
    )
