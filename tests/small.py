"""Small models with biases, non-square weights and a free batch dimension, for tests that need a file rather than a real model."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.numpy_helper import from_array

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
mlp (float[N, 16] x) => (float[N, 5] y) {
  [first] product = MatMul (x, w1)
  [bias] sum = Add (product, b1)
  [relu] hidden = Relu (sum)
  [second] y = Gemm <transB = 1> (hidden, w2, b2)
}
"""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {"w1": (16, 24), "b1": (24,), "w2": (5, 24), "b2": (5,)}
    return {name: rng.normal(0.1, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def mlp_proto() -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.extend(from_array(array, name) for name, array in weights().items())
    onnx.checker.check_model(model)
    return model


def save_mlp(path: Path, *, external: bool = False) -> Path:
    """The MLP as a file, optionally with its weights in `<name>.data` beside it."""
    data = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 0} if external else {}
    onnx.save(mlp_proto(), path, **data)
    return path


def samples(count: int = 12, *, seed: int = 3) -> np.ndarray:
    """[count, 16] float32 with an offset, so that activation zero points are not trivial."""
    return np.random.default_rng(seed).normal(0.3, 1.0, (count, 16)).astype(np.float32)


class Mlp(torch.nn.Module):
    """The same function in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 24), torch.nn.Linear(24, 5)
        w = {name: torch.from_numpy(array) for name, array in weights().items()}
        self.load_state_dict({"first.weight": w["w1"].T, "first.bias": w["b1"], "second.weight": w["w2"], "second.bias": w["b2"]})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def mlp_torch() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """(module, example inputs), as `qgraph quantize PACKAGE.MODULE:FUNCTION` wants it."""
    return Mlp().eval(), (torch.from_numpy(samples(4)),)
