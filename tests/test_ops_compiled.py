"""The qg ops stay one node, with the reference's numbers, through torch.export, torch.compile and torch.onnx.export."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnxscript import opset21 as op
from torch import Tensor
from torch.library import opcheck

from qgraph.ops import Q


def example(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "x": torch.randn(3, 6),
        "scale": torch.tensor(0.03),
        "zero": torch.tensor(120, dtype=torch.uint8),
        "w": torch.randint(-127, 128, (4, 6), dtype=torch.int8),
        "w_scale": torch.rand(4) * 0.01 + 0.001,
        "bias": torch.randn(4),
        "kernel": torch.randint(-127, 128, (4, 2, 3), dtype=torch.int8),
    }


class Net(torch.nn.Module):
    """Every op once."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in example().items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = Q.quantize(x, self.scale, self.zero, "uint8")
        d, s, z = Q.dynamic_quantize(x, "uint8", False, -1, -1)
        x_args, w_args = (q, self.scale, self.zero, "uint8"), (self.w_scale, None, "int8", self.bias)
        window = ([1], [1, 0], [1], 3)
        return (
            Q.dequantize(q, self.scale, self.zero, "uint8"),
            Q.fake_quantize(x, self.scale, self.zero, "uint8"),
            Q.quantized_linear(d, s, z, "uint8", self.w, *w_args),
            Q.quantized_linear(*x_args, self.w, *w_args, self.scale, self.zero, "uint8"),
            Q.dequant_linear(x, self.w, *w_args[:2], self.bias, "int8"),
            Q.quantized_conv(q[None], *x_args[1:], self.kernel[:3, :1], self.w_scale[:3], None, "int8", self.bias[:3], *window),
            Q.dequant_conv(x[None], self.kernel[:3, :1], self.w_scale[:3], None, self.bias[:3], "int8", *window),
        )


def test_export_keeps_each_op_whole_and_its_sizes_symbolic() -> None:
    net, x = Net(), example()["x"]
    rows, columns = torch.export.Dim("rows"), 6

    class Two(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            d, s, z = Q.dynamic_quantize(x, "int8", True, -1, 4)
            return Q.dequantize(d, s, z, "int8", -1, 4), Q.quantized_linear(
                d, net.scale, None, "int8", net.w, net.w_scale, None, "int8", None
            )

    program = torch.export.export(Two(), (x,), dynamic_shapes=({0: rows, 1: None},))
    assert {str(n.target) for n in program.graph.nodes if "qgraph" in str(n.target)} == {
        "qgraph.dynamic_quantize.default",
        "qgraph.dequantize.default",
        "qgraph.quantized_linear.default",
    }
    wide = torch.randn(11, columns)
    for got, want in zip(program.module()(wide), Two()(wide), strict=True):
        assert torch.equal(got, want)
    whole = torch.export.export(net, (x,)).run_decompositions().module()
    for got, want in zip(whole(x), net(x), strict=True):
        assert torch.equal(got, want)


def test_compile_takes_the_full_graph_and_changes_no_bit() -> None:
    net, x = Net(), example()["x"]
    for got, want in zip(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x), strict=True):
        assert torch.equal(got, want)


def test_fake_quantize_trains_under_compile() -> None:
    def loss(x: Tensor) -> Tensor:
        return (Q.fake_quantize(x * 2, torch.tensor(0.01), None, "int8") ** 2).sum()

    x = torch.linspace(-1, 1, 12)
    plain, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(plain.grad, compiled.grad)
    assert 0 < int((plain.grad == 0).sum()) < 12


e = example()
LEVELS = torch.tensor([-0.5, 0.0, 0.7])
CALLS = {
    "quantize": (e["x"], e["scale"], e["zero"], "uint8"),
    "dequantize": (e["w"], e["w_scale"], None, "int8", 0),
    "fake_quantize": (e["x"].requires_grad_(), e["scale"], e["zero"], "uint8"),
    "dynamic_quantize": (e["x"].detach(), "uint8", False, 1, 4),
    "lookup": (e["w"].clamp(0, 2).to(torch.uint8), LEVELS, e["w_scale"], None, 0),
    "fake_lookup": (e["x"].detach().requires_grad_(), LEVELS.expand(len(e["x"]), 3), None, 0),
    "dequant_linear": (e["x"].detach().requires_grad_(), e["w"], e["w_scale"], None, e["bias"], "int8"),
    "quantized_linear": (
        e["w"][:2],
        e["scale"],
        None,
        "int8",
        e["w"],
        e["w_scale"],
        None,
        "int8",
        e["bias"],
        e["scale"],
        e["zero"],
        "uint8",
    ),
    "dequant_conv": (e["x"].detach()[None, :2], e["kernel"], e["w_scale"], None, e["bias"], "int8", [2], [1, 0], [1], 1),
    "quantized_conv": (e["w"][None, :2], e["scale"], None, "int8", e["kernel"], e["w_scale"], None, "int8", None, [1], [0, 2], [2], 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_schema_shape_function_and_gradient_agree_with_the_body(name: str) -> None:
    opcheck(getattr(Q, name).default, CALLS[name])


def test_torch_onnx_export_takes_a_translation_table(tmp_path) -> None:
    class Small(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Q.quantize(x.tanh(), torch.tensor(0.01), torch.tensor(100, dtype=torch.uint8), "uint8")

    def translate(x, scale, zero_point, dtype, axis=None, group=0):
        assert (dtype, axis, group) == ("uint8", None, 0)
        return op.QuantizeLinear(x, scale, zero_point)

    x = torch.randn(2, 5)
    table = {Q.quantize.default: translate}
    torch.onnx.export(Small(), (x,), tmp_path / "m.onnx", dynamo=True, custom_translation_table=table, opset_version=21, verbose=False)
    got = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0]
    np.testing.assert_array_equal(got, Small()(x).numpy())
