"""torch.ops.qgraph.* <-> nodes of ONNX domain "qgraph", 1:1 and read off the op's schema.

Tensors are the node's inputs, everything else its attributes; an attribute that is None is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch._ops import OpOverload
from torch.fx import GraphModule

import qgraph.ops  # noqa: F401  (defines torch.ops.qgraph)
from qgraph.onnx_ops import OnnxOp

DOMAIN = "qgraph"
_TENSORS = [f"tensor({t})" for t in ("float", "double", "float16", "bfloat16", *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)))]
_ATTRIBUTES = {
    "int": OpSchema.AttrType.INT,
    "bool": OpSchema.AttrType.INT,
    "float": OpSchema.AttrType.FLOAT,
    "str": OpSchema.AttrType.STRING,
    "List[int]": OpSchema.AttrType.INTS,
    "List[float]": OpSchema.AttrType.FLOATS,
}


def translation(overload: OpOverload) -> Callable[..., Any]:
    """For torch.onnx's custom_translation_table: records one node of the op's name."""
    arguments = overload._schema.arguments
    op = Op(Opset(DOMAIN, 1), _name(overload), _onnx_schema(overload))

    def translate(*args: Any, **kwargs: Any) -> Any:
        values = {a.name: a.default_value for a in arguments} | dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        inputs = [values[a.name] for a in arguments if _kind(a) == "Tensor"]
        attributes = {a.name: values[a.name] for a in arguments if _kind(a) != "Tensor" and values[a.name] is not None}
        return op(*inputs, **attributes)

    translate.__name__ = op.name
    return translate


def restore_qg_ops(gm: GraphModule) -> int:
    """Calls of ONNX domain "qgraph" become calls of torch.ops.qgraph.*; returns how many there were."""
    nodes = [n for n in gm.graph.nodes if isinstance(n.target, OnnxOp) and n.target.domain == DOMAIN]
    for node in nodes:
        overload = getattr(torch.ops.qgraph, node.target.op_type).default
        node.meta["name"] = node.meta.pop("onnx").name
        node.meta.pop("onnx_sig", None)
        node.target, node.args, node.kwargs = overload, _positional(overload, node.args, node.kwargs), {}
    gm.recompile()
    return len(nodes)


def _positional(overload: OpOverload, inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments in the order of the schema; defaults at the end are left out."""
    tensors = iter(inputs)
    values: list[Any] = []
    needed = 0
    for at, a in enumerate(overload._schema.arguments, 1):
        value = next(tensors, None) if _kind(a) == "Tensor" else attributes.get(a.name, a.default_value)
        values.append(bool(value) if _kind(a) == "bool" else value)
        if not a.has_default_value() or value is not a.default_value:
            needed = at
    return tuple(values[:needed])


def _kind(argument: Any) -> str:
    """ "Tensor" for `Tensor? zero_point`, "int" for `int? axis`."""
    kind = str(argument.type)
    return kind[len("Optional[") : -1] if kind.startswith("Optional[") else kind


def _name(overload: OpOverload) -> str:
    return str(overload._schema.name).split("::")[1]


def _onnx_schema(overload: OpOverload) -> OpSchema:
    """Every tensor has a type of its own: the reference bodies check types, this schema only carries names."""
    arguments = overload._schema.arguments
    tensors = [a for a in arguments if _kind(a) == "Tensor"]
    results = [f"y{i}" for i in range(len(overload._schema.returns))]
    option = OpSchema.FormalParameterOption
    return OpSchema(
        _name(overload),
        DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(a.name, f"T_{a.name}", param_option=option.Single if str(a.type) == "Tensor" else option.Optional)
            for a in tensors
        ],
        outputs=[OpSchema.FormalParameter(name, f"T_{name}") for name in results],
        type_constraints=[(f"T_{name}", _TENSORS, "") for name in [*(a.name for a in tensors), *results]],
        attributes=[
            OpSchema.Attribute(a.name, _ATTRIBUTES[_kind(a)], "", required=not a.has_default_value())
            for a in arguments
            if _kind(a) != "Tensor"
        ],
    )
