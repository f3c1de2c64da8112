"""What an ONNX graph carries besides nodes and weights, kept in `gm.meta` so that it can be written back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from qgraph.onnx_proto import Extras


class _Shared:
    """Immutable: copies of a graph share it."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


@dataclass(frozen=True)
class GraphHeader(_Shared):
    """One graph, nested body or function: `gm.meta["onnx_graph"]`.

    `inputs` holds every formal input, those with an initializer too (they are constants of the GraphModule, not placeholders);
    `extras` what the source proto had beyond onnx_ir, None when the source was an onnx_ir.Model."""

    name: str | None
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    opsets: Mapping[str, int]
    doc_string: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Extras | None = None
    identifier: tuple[str, str, str] | None = None
    attributes: tuple[ir.Attr, ...] = ()

    @property
    def is_function(self) -> bool:
        return self.identifier is not None

    @property
    def defaults(self) -> dict[str, Any]:
        """Values of a function's attributes that a call may leave out."""
        return {a.name: a.value for a in self.attributes if a.value is not None}


@dataclass(frozen=True)
class ModelHeader(_Shared):
    """The file around the graph: `gm.meta["onnx_model"]` of the root. `functions` maps identifiers to submodule names."""

    ir_version: int
    producer_name: str | None = None
    producer_version: str | None = None
    domain: str | None = None
    model_version: int | None = None
    doc_string: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    device_configurations: tuple[Any, ...] = ()
    functions: Mapping[tuple[str, str, str], str] = field(default_factory=dict)


def fields_of(model: ir.Model) -> dict[str, Any]:
    return {
        "ir_version": model.ir_version,
        "producer_name": model.producer_name,
        "producer_version": model.producer_version,
        "domain": model.domain,
        "model_version": model.model_version,
        "doc_string": model.doc_string,
        "metadata": dict(model.metadata_props),
        "device_configurations": tuple(model.device_configurations),
    }
