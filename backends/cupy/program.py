"""A lowered graph with CUDA kernels in it, on the device where it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qgraph.backend import Kernel
from qgraph.backends.cupy.ops import K
from qgraph.edit import add_constant, graph_modules
from qgraph.errors import LoweringError
from qgraph.onnx_values import to_numpy
from qgraph.ops import Q
from qgraph.rewriter import Decline
from qgraph.text import path_of
from qgraph.types import attribute
from qgraph.views import Conv, Dequantize, Embedding, Linear, Lookup, const_value, view, view_any

NAMESPACE = "qgraph_cuda"

FUSED: dict[Any, str] = {
    Q.dequant_linear.default: "weight-only linear",
    Q.quantized_linear.default: "integer linear",
    Q.dequant_conv.default: "weight-only convolution",
    Q.quantized_conv.default: "integer convolution",
}
"""Fused qg ops, of which none should be left, and what is promised for them."""


@dataclass
class Program:
    """`gm` is an ordinary module: torch.compile and CUDA graphs take it."""

    gm: GraphModule
    device: torch.device
    found: tuple[Kernel, ...]

    @classmethod
    def of(cls, gm: GraphModule, device: torch.device, declines: Iterable[Decline]) -> Program:
        """The lowered graph, its tensors moved to the device."""
        reasons: dict[str, list[str]] = {}
        for d in declines:
            reasons.setdefault(d.node, []).append(d.reason)
        found = tuple(k for part in graph_modules(gm) for node in part.graph.nodes if (k := _kernel(node, reasons)) is not None)
        move(gm, device)
        return cls(gm, device, found)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Inputs go to the program's device. Tensors in, tensors on that device out; arrays in, arrays out."""
        leaves = pytree.tree_leaves((inputs, named))
        arrays = any(isinstance(v, np.ndarray) for v in leaves)
        args, kwargs = pytree.tree_map(self._tensor, (inputs, named))
        with torch.no_grad(), self._placing():
            found = self.gm(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda t: to_numpy(t.cpu()), found) if arrays else found

    def _placing(self) -> AbstractContextManager[Any]:
        """ONNX operations make tensors out of sizes and attributes: on this device, beside the others."""
        return self.device if "onnx_graph" in self.gm.meta else nullcontext()

    def _tensor(self, value: Any) -> Any:
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return value.to(self.device) if isinstance(value, Tensor) else value

    def kernels(self) -> list[Kernel]:
        """One line per operation on quantized weights and per quantization: the kernel that runs it, or why torch does."""
        return list(self.found)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raises LoweringError: there is no file format for a module with kernels."""
        raise LoweringError("a cupy program has no file format: keep the converted graph, or its ONNX file, and lower it again")


def _kernel(node: Node, reasons: dict[str, list[str]]) -> Kernel | None:
    if node.op != "call_function":
        return None
    if getattr(node.target, "namespace", None) == NAMESPACE:
        name = str(node.target).split(".")[1]
        return Kernel(path_of(node), name, name, True)
    promised = FUSED.get(node.target) or _stored_weight(node)
    if promised is None:
        return None
    reason = "; ".join(dict.fromkeys(reasons.get(node.name, ()))) or "no kernel reads these formats"
    return Kernel(path_of(node), promised, "torch", False, reason)


def _stored_weight(node: Node) -> str | None:
    """What a node is that reads a quantized weight as floats."""
    v = view_any((Linear, Conv, Embedding), node)
    return {Linear: "linear", Conv: "convolution", Embedding: "embedding"}[type(v)] if v is not None and _is_stored(v.weight) else None


def _is_stored(weight: Node) -> bool:
    """Dequantized from a constant, by the reference's op or by the kernel."""
    v = view(Dequantize, weight) or view(Lookup, weight)
    codes = v.q if v is not None else weight.args[0] if weight.target is K.dequantize.default else None
    return isinstance(codes, Node) and const_value(codes) is not None


def move(gm: GraphModule, device: torch.device) -> None:
    """Everything that the graph reads and every device that its calls name; nothing trains any more. The modules that hold the tensors are
    shared with other graphs and stay as they are."""
    moved: dict[int, Tensor] = {}
    for part in graph_modules(gm):
        names: dict[str, str] = {}
        for node in part.graph.nodes:
            node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))
            if node.op != "get_attr" or not isinstance(value := attribute(node), Tensor):
                continue
            if value.device != device or value.requires_grad:
                target = str(node.target)
                if target not in names:
                    names[target] = add_constant(part, target, moved.setdefault(id(value), value.detach().to(device)))
                node.target = names[target]
        part.recompile()
