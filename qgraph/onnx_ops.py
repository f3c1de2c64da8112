"""`OnnxOp`: one ONNX operator as an FX call target: op(*inputs, **attributes) -> value or tuple of values.

Inputs are positional, None for an absent optional one; attributes that FX can print are keywords. The others ride on the target
(`fixed`): tensors, types, references to a function's attributes. A graph attribute is a nested GraphModule passed under the
attribute's own name, with the outer values it reads in `captures__NAME`; a call of a model-local function carries the function's
body as `body__function`.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
from torch.fx import GraphModule, Interpreter

from qgraph import onnx_fast_control, onnx_fast_microsoft, onnx_fast_nn, onnx_fast_quant, onnx_fast_reduce, onnx_fast_shape
from qgraph.onnx_fast import FAST
from qgraph.onnx_proto import attribute_proto
from qgraph.onnx_reference import reference
from qgraph.onnx_values import from_ir

Fixed = tuple[tuple[str, ir.Attr], ...]
FUNCTION_BODY = "body__function"
CAPTURES = "captures__"

FAMILIES = (onnx_fast_control, onnx_fast_microsoft, onnx_fast_nn, onnx_fast_quant, onnx_fast_reduce, onnx_fast_shape)
"""The files whose import fills `FAST`, besides onnx_fast itself."""


@dataclass(frozen=True, eq=False)
class OnnxOp:
    """An operator of one opset version, with the attributes that only the target can carry and the number of outputs.

    Equality is identity: make them through `op`, which returns the same object for the same meaning."""

    domain: str
    op_type: str
    version: int
    fixed: Fixed = ()
    outputs: int = 1
    overload: str = ""

    def __post_init__(self) -> None:
        # FX names nodes and the names in generated code after these two.
        object.__setattr__(self, "__name__", self.op_type)
        object.__setattr__(self, "__qualname__", self.op_type)
        object.__setattr__(self, "__module__", "qgraph.onnx_ops")

    @property
    def key(self) -> str:
        """What tables know the operator by: "::MatMul", "com.microsoft::MatMulNBits"."""
        return f"{self.domain}::{self.op_type}"

    @property
    def references(self) -> dict[str, str]:
        """Attributes that are taken from the calling function: name -> name in the function."""
        return {name: str(attr.ref_attr_name) for name, attr in self.fixed if attr.is_ref()}

    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        body = attributes.pop(FUNCTION_BODY, None)
        values = [from_ir(x) if isinstance(x, ir.TensorProtocol) else x for x in inputs]
        attrs = {name: attr.value for name, attr in self.fixed if not attr.is_ref()} | attributes
        if body is not None:
            return _one(self, run_body(body, values, attributes=body.meta["onnx_graph"].defaults | attrs))
        attrs = _bind_captures(attrs)
        fast = FAST.get(self.key)
        found = fast(self, *values, **attrs) if fast is not None else NotImplemented
        return reference(self, values, attrs) if found is NotImplemented else found

    def __repr__(self) -> str:
        return f"{self.domain + '.' if self.domain else ''}{self.op_type}-{self.version}"

    def __copy__(self) -> OnnxOp:
        return self

    def __deepcopy__(self, memo: Any) -> OnnxOp:
        return self

    def __reduce__(self) -> Any:
        fixed = tuple(attribute_proto(attr).SerializeToString() for _, attr in self.fixed)
        return _restore, (self.domain, self.op_type, self.version, fixed, self.outputs, self.overload)


# Weak: an operator that carries a tensor goes with the graphs that use it.
_INTERNED: weakref.WeakValueDictionary[Any, OnnxOp] = weakref.WeakValueDictionary()


def op(op_type: str, *, domain: str = "", version: int = 1, fixed: Fixed = (), outputs: int = 1, overload: str = "") -> OnnxOp:
    """The one OnnxOp with these fields."""
    key = (domain, op_type, version, tuple(_attr_key(a) for _, a in fixed), outputs, overload)
    found = _INTERNED.get(key)
    if found is None:
        found = OnnxOp(domain, op_type, version, fixed, outputs, overload)
        if not any(isinstance(k, int) for k in key[3]):
            _INTERNED[key] = found
    return found


def _restore(domain: str, op_type: str, version: int, fixed: Sequence[bytes], outputs: int, overload: str) -> OnnxOp:
    attrs = (ir.from_proto(onnx.AttributeProto.FromString(a)) for a in fixed)
    return op(op_type, domain=domain, version=version, fixed=tuple((a.name, a) for a in attrs), outputs=outputs, overload=overload)


def _attr_key(attr: ir.Attr) -> str | int:
    """A digest of the attribute's content; its identity where reading the content would defeat memory mapping."""
    if isinstance(attr.value, ir.ExternalTensor) or attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return id(attr)
    return hashlib.sha1(attribute_proto(attr).SerializeToString(deterministic=True)).hexdigest()


def _one(target: OnnxOp, outputs: Sequence[Any]) -> Any:
    return outputs[0] if target.outputs == 1 else tuple(outputs)


def _bind_captures(attrs: dict[str, Any]) -> dict[str, Any]:
    """Replaces each nested graph by a function of its formal inputs."""
    bound = {name: value for name, value in attrs.items() if not name.startswith(CAPTURES)}
    for name, body in bound.items():
        if isinstance(body, (GraphModule, Bound)):
            bound[name] = Bound(body, tuple(attrs.get(CAPTURES + name, ())))
    return bound


@dataclass(frozen=True)
class Bound:
    """A nested graph with its captured values (and, inside a function, the function's attributes)."""

    body: GraphModule | Bound
    captures: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def output_type(self, i: int) -> ir.TypeAndShape | None:
        """Declared type of the i-th output."""
        if isinstance(self.body, Bound):
            return self.body.output_type(i)
        value: ir.Value = self.body.meta["onnx_graph"].outputs[i]
        return None if value.type is None else ir.TypeAndShape(value.type, value.shape)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if isinstance(self.body, Bound):
            return self.body(*inputs, *self.captures)
        return run_body(self.body, [*inputs, *self.captures], attributes=self.attributes)


def run_body(body: GraphModule, inputs: Sequence[Any], *, attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """Runs a nested graph or a function's body; `attributes` are what references inside it stand for."""
    formal = sum(n.op == "placeholder" for n in body.graph.nodes)
    padded = [*inputs, *[None] * (formal - len(inputs))]
    return tuple(_Body(body, attributes).run(*padded) if attributes else body(*padded))


class _Body(Interpreter):
    """Runs a body with the function's attributes filled in; a call inside finds nested graphs bound to the same attributes."""

    def __init__(self, body: GraphModule, attributes: Mapping[str, Any]) -> None:
        super().__init__(body)
        self.attributes = attributes

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, OnnxOp):
            found = {name: self.attributes.get(source) for name, source in target.references.items()}
            kwargs = kwargs | {name: value for name, value in found.items() if value is not None}
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        is_function = isinstance(found, GraphModule) and found.meta["onnx_graph"].is_function
        return Bound(found, (), self.attributes) if isinstance(found, GraphModule) and not is_function else found
