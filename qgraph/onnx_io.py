"""ONNX files in and out: from_onnx, to_onnx, to_proto, save_onnx; an untouched model is written back equal."""

from __future__ import annotations

from qgraph.onnx_opset import opset, require_opset
from qgraph.onnx_read import from_onnx
from qgraph.onnx_save import save_onnx
from qgraph.onnx_write import to_onnx, to_proto

__all__ = ["from_onnx", "opset", "require_opset", "save_onnx", "to_onnx", "to_proto"]
