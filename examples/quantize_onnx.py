"""An ONNX file to INT8 ONNX, with a rule of one's own, and the ledger of what was decided for each weight and why.

The same from a shell: qgraph quantize float.onnx -o int8.onnx --calibration data.npz --set rules.head=null
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import qgraph

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
encoder (float[N, T, 48] x) => (float[N, T, 7] y) {
  [norm] n = LayerNormalization <axis = -1> (x, gain, shift)
  [query] q = MatMul (n, wq)
  [key] k = MatMul (n, wk)
  [value] v = MatMul (n, wv)
  kt = Transpose <perm = [0, 2, 1]> (k)
  [logits] products = MatMul (q, kt)
  scaled = Mul (products, scale)
  attention = Softmax <axis = -1> (scaled)
  [mix] mixed = MatMul (attention, v)
  residual = Add (x, mixed)
  [up] up = MatMul (residual, wu)
  biased = Add (up, bu)
  active = Relu (biased)
  [head] y = MatMul (active, wh)
}
"""
SHAPES = {"wq": (48, 32), "wk": (48, 32), "wv": (48, 48), "wu": (48, 96), "bu": (96,), "wh": (96, 7), "gain": (48,), "shift": (48,)}


def build(path: Path) -> Path:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(MODEL)
    arrays = {name: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32) for name, shape in SHAPES.items()}
    arrays |= {"gain": 1 + arrays["gain"], "scale": np.array(32**-0.5, np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def main(folder: Path) -> None:
    rng = np.random.default_rng(1)
    source, output = build(folder / "float.onnx"), folder / "int8.onnx"
    batches = [{"x": rng.normal(0.2, 1, (4, length, 48)).astype(np.float32)} for length in (16, 24, 16)]
    recipe = qgraph.load_recipe("w8a8", ["rules.head=null", "observer=percentile"])
    quantized = qgraph.quantize(source, batches, recipe=recipe, output=output)
    print(quantized.meta["qgraph"].ledger.table(), end="\n\n")

    x = batches[1]["x"]
    float_y, int8_y = (onnxruntime.InferenceSession(str(p)).run(None, {"x": x})[0] for p in (source, output))
    print(f"SQNR {10 * np.log10((float_y**2).sum() / ((float_y - int8_y) ** 2).sum()):.1f} dB")
    print(*(f"{k.node}: {k.became} {k.reason}" for k in qgraph.lower(quantized).kernels()), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
