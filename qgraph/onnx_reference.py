"""One ONNX operator through `onnx.reference`: slow, complete, and the meaning of every operator without a fast path.

Evaluators are kept on the operator per attribute values and input types, so that repeated calls only run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator

from qgraph.errors import ModelError
from qgraph.onnx_proto import attribute_proto
from qgraph.onnx_values import from_reference, to_numpy

if TYPE_CHECKING:
    from qgraph.onnx_ops import OnnxOp


def reference(op: OnnxOp, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    """Runs the operator on the CPU; results go to the device of the first tensor input.

    Raises ModelError for an operator that onnx.reference does not have."""
    arrays = [to_numpy(x) for x in inputs]
    run = _evaluator(op, arrays, attributes)
    feeds = {f"i{n}": a for n, a in enumerate(arrays) if a is not None}
    outputs = [from_reference(o) for o in run.run(None, feeds)]
    device = next((x.device for x in inputs if isinstance(x, torch.Tensor)), torch.device("cpu"))
    if device.type != "cpu":
        outputs = [o.to(device) if isinstance(o, torch.Tensor) else o for o in outputs]
    return outputs[0] if op.outputs == 1 else tuple(outputs)


def _evaluator(op: OnnxOp, arrays: list[Any], attributes: dict[str, Any]) -> ReferenceEvaluator:
    if any(callable(v) for v in attributes.values()):
        # A nested graph may be rewritten between calls.
        return _build(op, arrays, attributes)
    cache: dict[Any, ReferenceEvaluator] = op.__dict__.setdefault("_evaluators", {})
    key = (*(_signature(a) for a in arrays), *((k, _hashable(v)) for k, v in attributes.items()))
    found = cache.get(key)
    if found is None:
        found = cache[key] = _build(op, arrays, attributes)
    return found


def _signature(array: Any) -> Any:
    if isinstance(array, list):
        return ("sequence", _signature(array[0]) if array else None)
    return None if array is None else (np.asarray(array).dtype.str, np.asarray(array).dtype.name)


def _hashable(value: Any) -> Any:
    # Objects without content equality (tensors) are kept alive by the operator, so their identity is enough.
    return tuple(value) if isinstance(value, (list, tuple)) else value if isinstance(value, (int, float, str, bytes)) else id(value)


def _build(op: OnnxOp, arrays: list[Any], attributes: dict[str, Any]) -> ReferenceEvaluator:
    node = onnx.NodeProto(op_type=op.op_type, domain=op.domain)
    node.input.extend("" if a is None else f"i{n}" for n, a in enumerate(arrays))
    node.output.extend(f"o{n}" for n in range(op.outputs))
    fixed = dict(op.fixed)
    for name, value in attributes.items():
        node.attribute.append(attribute_proto(fixed[name]) if name in fixed else _attribute(op, name, value))
    inputs = [onnx.ValueInfoProto(name=f"i{n}", type=_type_proto(a)) for n, a in enumerate(arrays) if a is not None]
    outputs = [onnx.ValueInfoProto(name=o) for o in node.output]
    graph = onnx.GraphProto(node=[node], name="one", input=inputs, output=outputs)
    model = onnx.ModelProto(graph=graph, opset_import=_opsets(op), ir_version=10)
    try:
        return ReferenceEvaluator(model)
    except (NotImplementedError, RuntimeError, onnx.onnx_cpp2py_export.defs.SchemaError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"operator {op!r} cannot be run here: {reason}") from error


def _opsets(op: OnnxOp) -> list[onnx.OperatorSetIdProto]:
    found = [helper.make_opsetid(op.domain, op.version)]
    # Operators of other domains may be functions over the default one.
    return found if op.domain == "" else [*found, helper.make_opsetid("", onnx.defs.onnx_opset_version())]


def _attribute(op: OnnxOp, name: str, value: Any) -> onnx.AttributeProto:
    if not callable(value):
        return make_attribute(op, name, value)
    # Not imported above: the writer is built on OnnxOp, and OnnxOp on this file.
    from qgraph.onnx_write import body_proto

    if value.captures:
        raise ModelError(f"operator {op!r} cannot be run here: its nested graph {name!r} reads values of the outer graph")
    return helper.make_attribute(name, body_proto(value.body))


def make_attribute(op: OnnxOp, name: str, value: Any) -> onnx.AttributeProto:
    """An attribute of the type that the operator's schema declares: a rewrite may write 2 for 2.0, and an empty list has no type."""
    declared = None
    if onnx.defs.has(op.op_type, op.version, op.domain):
        known = onnx.defs.get_schema(op.op_type, op.version, op.domain).attributes.get(name)
        if known is not None:
            kind: Any = known.type
            declared = int(kind)
    plain: Any = list(value) if isinstance(value, (list, tuple)) else value
    if declared == onnx.AttributeProto.FLOAT:
        plain = float(plain)
    elif declared == onnx.AttributeProto.FLOATS:
        plain = [float(v) for v in plain]
    return helper.make_attribute(name, plain, attr_type=declared)


def _type_proto(array: Any) -> onnx.TypeProto:
    if isinstance(array, list):
        return helper.make_sequence_type_proto(_type_proto(array[0])) if array else onnx.TypeProto()
    if isinstance(array, dict):
        return onnx.TypeProto()
    dtype = np.asarray(array).dtype
    code = onnx.TensorProto.STRING if dtype.kind in "OUS" else int(ir.DataType.from_numpy(dtype))
    return helper.make_tensor_type_proto(code, None)
