"""A model with one layer that is hard to quantize, in torch and as ONNX: one channel of its input is a thousand times the others."""

import numpy as np
import onnx
import torch
from onnx.numpy_helper import from_array

SENSITIVE = "second"
TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[N, 16] x) => (float[N, 7] y) {
  [first] a = Gemm <transB = 1> (x, w0, b0)
  [relu] r = Relu (a)
  [second] b = Gemm <transB = 1> (r, w1, b1)
  [tanh] t = Tanh (b)
  [third] y = Gemm <transB = 1> (t, w2, b2)
}
"""
SHAPES = ((24, 16), (12, 24), (7, 12))


def weights() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    found = [(rng.normal(0, 0.3, shape), rng.normal(0.2, 0.1, shape[0])) for shape in SHAPES]
    (w0, b0), (w1, _), _ = found
    w0[3], b0[3] = np.abs(w0[3]) * 1000, abs(b0[3]) * 1000
    w1[:, 3] /= 1000
    return [(w.astype(np.float32), b.astype(np.float32)) for w, b in found]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(i, o) for o, i in SHAPES)
        for layer, (w, b) in zip((self.first, self.second, self.third), weights(), strict=True):
            layer.weight.data, layer.bias.data = torch.from_numpy(w), torch.from_numpy(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.relu(self.first(x)))))


def proto() -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT)
    for i, (w, b) in enumerate(weights()):
        model.graph.initializer.extend([from_array(w, f"w{i}"), from_array(b, f"b{i}")])
    onnx.checker.check_model(model)
    return model


def batches(count: int = 4, *, seed: int = 0) -> list[tuple[torch.Tensor]]:
    """[6, 16] each."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 16, generator=generator) + 0.2,) for _ in range(count)]


MODELS = {"torch": (Net().eval(), batches(1)[0]), "onnx": (proto(), None)}
"""origin -> (model, example inputs)"""
