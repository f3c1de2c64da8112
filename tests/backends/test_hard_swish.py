"""hard_swish between integers: what it becomes, how close it is, and what stays float."""

import onnxruntime as ort
import pytest
import torch

from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.backends.onnxruntime.legalize import ClaimKernels, LowerQgOps
from qgraph.onnx_io import to_proto
from qgraph.pipeline import Context, Pipeline
from tests.backends.by_hand import load, node_of, quantize_static, ready

X = torch.linspace(-6, 7, 2 * 3 * 5 * 7).view(2, 3, 5, 7)


def curve(shift: float | None = None):
    """x -> Q/DQ -> hard_swish (+ shift) -> Q/DQ -> Neg."""
    body = "h = HardSwish(x)  " + ("y = Neg(h)" if shift is None else "s = Add(h, c)  y = Neg(s)")
    gm = load(
        f'<ir_version: 8, opset_import: ["": 14]> g (float[2,3,5,7] x) => (float[2,3,5,7] y) {{ {body} }}', c=torch.tensor([shift or 0.0])
    )
    quantize_static(gm, next(n for n in gm.graph.nodes if n.op == "placeholder"), -6.0, 7.0)
    quantize_static(gm, node_of(gm, "HardSwish" if shift is None else "Add"), min(-0.375 + (shift or 0), 0.0), 7.0 + (shift or 0))
    return ready(gm)


def run(gm) -> torch.Tensor:
    found = ort.InferenceSession(to_proto(gm).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": X.numpy()})
    return torch.from_numpy(found[0])


def op_types(gm) -> list[str]:
    return [n.target.op_type for n in gm.graph.nodes if hasattr(n.target, "op_type")]


@pytest.mark.parametrize("shift", [None, 0.8, -0.9])
def test_hard_swish_becomes_two_integer_kernels(shift):
    gm = curve(shift)
    want = gm(X)[0]
    Pipeline(ClaimKernels(), LowerQgOps()).run(gm, Context())
    assert op_types(gm).count("QLinearLeakyRelu") == op_types(gm).count("QLinearMul") == 1 and "HardSwish" not in op_types(gm)
    error, step = (run(gm) - want).abs(), (7.375 + abs(shift or 0)) / 255
    assert (error <= 2 * step + X.abs() / 255).all()
    outside = X.abs() > 3.2  # where the gate is 0 or 1 it is exact; the shift is rounded to whole steps
    assert (error[outside] <= 1.51 * step).all()


def test_a_shift_that_has_no_zero_point_stays_float():
    gm, ctx = curve(-0.9), Context()
    last = [n for n in gm.graph.nodes if str(n.target) == "qgraph.quantize.default"][-1]
    getattr(gm, str(last.args[2].target)).zero_()
    ClaimKernels().run(gm, ctx)
    assert "HardSwish" in op_types(gm) and any("zero point" in str(d) for d in ctx.declines)


def test_a_second_run_changes_nothing():
    gm = curve()
    assert ClaimKernels().run(gm, Context()) and not ClaimKernels().run(gm, Context())


def test_the_product_is_promised_and_read_back():
    found = OnnxRuntime(threads=1).lower(curve()).kernels()
    assert [(k.promised, k.became) for k in found] == [("QLinearMul", "QLinearMul")]
