"""Sessions of ONNX Runtime's CPU provider, with its refusals as readable errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from qgraph.errors import LoweringError

REFUSALS = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NotImplemented, state.RuntimeException)
"""What InferenceSession raises for a model that it cannot load."""

ERROR = 3
"""Severity from which ONNX Runtime logs: warnings about saved optimized graphs are of no use here."""


@dataclass(frozen=True)
class Options:
    """`threads`: of one operator, None for ONNX Runtime's choice. `entries`: session configuration entries.
    `optimized` False: every node is computed as it is written, for comparing numbers."""

    threads: int | None = None
    entries: Mapping[str, str] = field(default_factory=dict)
    optimized: bool = True


def session(
    model: str | bytes, options: Options, *, optimized: str | None = None, entries: Mapping[str, str] | None = None
) -> ort.InferenceSession:
    """A CPU session of a file or of serialized bytes; `optimized` is where to write the graph that it runs.

    Raises LoweringError with ONNX Runtime's reason when it refuses the model."""
    o = ort.SessionOptions()
    o.log_severity_level = ERROR
    levels = ort.GraphOptimizationLevel
    o.graph_optimization_level = levels.ORT_ENABLE_ALL if options.optimized else levels.ORT_DISABLE_ALL
    if options.threads is not None:
        o.intra_op_num_threads, o.inter_op_num_threads = options.threads, 1
    if optimized is not None:
        o.optimized_model_filepath = optimized
    for name, value in {**options.entries, **(entries or {})}.items():
        o.add_session_config_entry(name, value)
    try:
        return ort.InferenceSession(model, o, providers=["CPUExecutionProvider"])
    except REFUSALS as error:
        reason = " ".join(str(error).split())
        raise LoweringError(f"ONNX Runtime {ort.__version__} refuses the model: {reason}") from error


@cache
def newest_ir_version() -> int:
    """The newest ir_version that the installed ONNX Runtime reads (it says so nowhere)."""
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:])
    for version in range(onnx.IR_VERSION, 2, -1):
        model = onnx.helper.make_model(graph, ir_version=version, opset_imports=[onnx.helper.make_opsetid("", 7)])
        try:
            session(model.SerializeToString(), Options(threads=1))
        except LoweringError:
            continue
        return version
    raise LoweringError(f"ONNX Runtime {ort.__version__} reads none of the ir_versions up to {onnx.IR_VERSION}")
