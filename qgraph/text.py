"""The printed form of a graph, the difference of two graphs, and what a node is called in messages.

    %0: f32[2,3] = aten.linear(%x, @weight, @bias)
    %1: f32[2,3] = onnx.Add(%0, @c)
    return %1
"""

from __future__ import annotations

import difflib
import operator
import re
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qgraph.types import TensorType, type_of


def text(gm: GraphModule) -> str:
    """One line per call, numbered in order, so that two graphs that do the same in the same order print the same.

    `%x` is an input, `@w` a stored tensor; the bodies of control flow follow their call, indented under their own name."""
    return "\n".join(_lines(gm, ""))


def diff(before: GraphModule | str, after: GraphModule | str) -> str:
    """Unified diff of two graphs, or of two printed forms; empty when they print the same. Numbering is by position, so
    lines are matched without their numbers."""
    a, b = (value if isinstance(value, str) else text(value) for value in (before, after))
    return "\n".join(difflib.unified_diff(a.splitlines(), b.splitlines(), "before", "after", lineterm=""))


def path_of(node: Node) -> str:
    """What users call the node: its ONNX name, the path of the module that made it ("encoder.layer.0.query"), else its FX name."""
    if name := node.meta.get("name"):
        return str(name)
    if name := getattr(node.meta.get("onnx"), "name", None):
        return str(name)
    stack = node.meta.get("nn_module_stack")
    path = _module_path(next(reversed(stack.values()))[0]) if stack else ""
    return path or node.name


def where(node: Node) -> str:
    """The path, and the user's source line when it is known: "encoder.query (model.py:12)"."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace)
    return f"{path_of(node)} ({found[-1][0]}:{found[-1][1]})" if found else path_of(node)


def describe(node: Node) -> str:
    """The node as its own line, with FX names instead of numbers; for errors about graphs that do not print."""
    return _line(node, {n: f"%{n.name}" for n in node.all_input_nodes if n.op != "get_attr"}, f"%{node.name}")


def _module_path(path: str) -> str:
    """ "L['self'].layer['0'].query" -> "layer.0.query"."""
    return re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", re.sub(r"^L\['self'\]\.?", "", str(path))).strip(".")


def _lines(gm: GraphModule, indent: str) -> list[str]:
    names: dict[Node, str] = {}
    lines: list[str] = []
    count = 0
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%{node.target}"
        elif node.op == "output":
            lines.append(f"{indent}return {_returned(node, names)}".rstrip())
        elif node.op != "get_attr":
            lines.append(indent + _line(node, names, f"%{count}"))
            names[node] = f"%{count}"
            count += 1
            for name, body in _bodies(gm, node):
                lines.append(f"{indent}  {name}({', '.join(_inputs(body.graph))})")
                lines += _lines(body, indent + "    ")
    return lines


def _line(node: Node, names: dict[Node, str], name: str) -> str:
    if node.op == "placeholder":
        return f"{name}: {_type(node)}"
    arguments = [_argument(a, names) for a in node.args] + [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
    if fixed := getattr(node.target, "fixed", ()):
        arguments += [f"{k}=<{str(getattr(getattr(a, 'type', None), 'name', 'attribute')).lower()}>" for k, a in fixed]
    return f"{name}: {_type(node)} = {target_name(node)}({', '.join(arguments)})" if node.op != "output" else f"return {_returned(node, names)}"


def _inputs(graph: Graph) -> list[str]:
    return [f"%{n.target}" for n in graph.nodes if n.op == "placeholder"]


def _returned(node: Node, names: dict[Node, str]) -> str:
    value = node.args[0]
    return ", ".join(_argument(v, names) for v in value) if isinstance(value, tuple | list) else _argument(value, names)


def _bodies(gm: GraphModule, node: Node) -> list[tuple[str, GraphModule]]:
    attributes = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    if node.op == "call_module":
        attributes.append(str(node.target))
    found = [(name, _get(gm, name)) for name in attributes]
    return [(f"@{name}", body) for name, body in found if isinstance(body, GraphModule)]


def _get(gm: torch.nn.Module, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part, None)
    return value


def target_name(node: Node) -> str:
    """ "aten.linear", "qg.dequantize", "onnx.MatMul", "com.microsoft.FusedMatMul", "getitem", "module:act_observer"."""
    target: Any = node.target
    if node.op == "call_module":
        return f"module:{target}"
    if hasattr(target, "op_type"):
        return f"{target.domain or 'onnx'}.{target.op_type}"
    if isinstance(target, torch._ops.OpOverload):
        return re.sub(r"^qgraph\.", "qg.", str(target).removesuffix(".default"))
    if target is operator.getitem or node.op == "call_method":
        return "getitem" if target is operator.getitem else f"method:{target}"
    return str(getattr(target, "__name__", target))


def _type(node: Node) -> str:
    kind = type_of(node)
    if kind is not None:
        return str(kind)
    return _value_type(node.meta.get("val"))


def _value_type(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(_value_type(v) for v in value)})"
    if isinstance(value, torch.Tensor):
        return str(TensorType(str(value.dtype).removeprefix("torch."), tuple(d if isinstance(d, int) else str(d) for d in value.shape)))
    if isinstance(value, torch.SymInt | int):
        return "int"
    return "float" if isinstance(value, torch.SymFloat | float) else "?"


def _argument(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return f"@{value.target}" if value.op == "get_attr" else names.get(value, f"%{value.name}")
    if isinstance(value, tuple | list):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v, names)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return ":".join("" if v is None else _argument(v, names) for v in (value.start, value.stop, value.step))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return repr(value) if isinstance(value, str) else str(value)
