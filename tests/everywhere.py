"""ONNX Runtime with integers wherever it has a kernel: small convolutions would not pay."""

from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.backends.onnxruntime.placement import PLACEMENT

EVERYWHERE = OnnxRuntime(placement=PLACEMENT)
