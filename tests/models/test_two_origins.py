"""One model from PyTorch and from ONNX: the same integer weights and scales, the same decisions."""

from collections import Counter

import pytest
import torch
from torch.fx import GraphModule

import qgraph
from qgraph.views import Dequantize, Embedding, Linear, const_value, view, view_any
from tests.models.zoo import RealModel


def converted(real: RealModel, origin: str, recipe: str) -> GraphModule:
    if origin == "torch":
        prepared = qgraph.prepare(real.model, real.example_inputs, recipe=recipe, dynamic_shapes=real.dynamic_shapes)
    else:
        prepared = qgraph.prepare(real.float_onnx, recipe=recipe)
    qgraph.calibrate(prepared, list(real.calibration_batches(8))[:2])
    return qgraph.convert(prepared)


def weights(gm: GraphModule) -> Counter[tuple[bytes, ...]]:
    """Integers [out, in], scales and zero points of every linear and embedding, as bytes."""
    found: Counter[tuple[bytes, ...]] = Counter()
    for node in gm.graph.nodes:
        v = view_any((Linear, Embedding), node)
        w = view(Dequantize, v.weight) if v is not None else None
        if w is None:
            continue
        turned = isinstance(v, Linear) and v.out_axis == -1
        tensors = [const_value(t) for t in (w.q, w.scale, w.zero_point) if t is not None]
        found[tuple((t.T if turned and t.dim() == 2 else t).contiguous().numpy().tobytes() for t in tensors)] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "count"), [("w8a8-dynamic", 39), ("w8a8", 39), ("w4a16-g128", 39)])
def test_minilm_has_the_same_integers_and_scales_from_both_origins(minilm: RealModel, recipe: str, count: int) -> None:
    ours, theirs = (weights(converted(minilm, origin, recipe)) for origin in ("torch", "onnx"))
    assert ours == theirs
    assert ours.total() == count


@pytest.mark.slow
def test_minilm_activations_have_the_same_scales_from_both_origins(minilm: RealModel) -> None:
    """Static scales come from torch's numbers on one side and ONNX Runtime's on the other: equal up to float rounding."""

    def scales(gm: GraphModule) -> torch.Tensor:
        quantized = [n for n in gm.graph.nodes if n.target is torch.ops.qgraph.quantize.default]
        return torch.tensor(sorted(float(const_value(n.args[1])) for n in quantized))

    ours, theirs = (scales(converted(minilm, origin, "w8a8")) for origin in ("torch", "onnx"))
    assert ours.numel() == theirs.numel() > 20
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
