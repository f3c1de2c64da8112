"""The printed form of a graph, the difference of two graphs, and what a node is called in messages.

%0: f32[2,3] = aten.linear(%x, @weight, @bias)
%1: f32[2,3] = onnx.Add(%0, @c)
return %1
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qgraph.origin import source_place
from qgraph.types import TensorType, type_of

_NUMBER = re.compile(r"%\d+\b")
_MADE = re.compile(r"(\s*)%\d+: .*? = ([^(]+)")


def text(gm: GraphModule) -> str:
    """One line per call, numbered in order, so that two graphs that do the same in the same order print the same.

    `%x` is an input, `@w` a stored tensor; the bodies of control flow follow their call, indented under their own name."""
    return "\n".join(_lines(gm, ""))


def diff(before: GraphModule | str, after: GraphModule | str) -> str:
    """The lines that differ between two graphs or printed forms, with three lines around them; "" when the graphs do the same.

    A line that only moved, so that values before it have other numbers, is no difference."""
    a, b = ((value if isinstance(value, str) else text(value)).splitlines() for value in (before, after))
    rows = list(_rows(a, b))
    changed = [i for i, row in enumerate(rows) if row[0] != " "]
    shown = sorted({j for i in changed for j in range(max(0, i - 3), min(len(rows), i + 4))})
    gaps = {j for i, j in pairwise(shown) if j != i + 1}
    return "\n".join(line for i in shown for line in (["..."] if i in gaps else []) + [rows[i]])


def _rows(a: list[str], b: list[str]) -> Iterator[str]:
    """Every line, marked " ", "-" or "+"; common lines with the numbers of `b`."""
    plain_a, plain_b = ([_NUMBER.sub("%", line) for line in lines] for lines in (a, b))
    numbers: dict[tuple[int, str], str] = {}  # (indentation, number in b) -> number in a
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, plain_a, plain_b).get_opcodes():
        if tag != "equal":
            _pair(a[i1:i2], b[j1:j2], numbers)
            if i2 - i1 == j2 - j1:  # one for one: what reads the new value reads what stood there
                for x, y in zip(a[i1:i2], b[j1:j2], strict=True):
                    _renumbered(x, y, numbers)
            yield from (f"- {x}" for x in a[i1:i2])
            yield from (f"+ {y}" for y in b[j1:j2])
            continue
        for x, y in zip(a[i1:i2], b[j1:j2], strict=True):
            same = _NUMBER.findall(x) == _renumbered(x, y, numbers)
            yield from (f"  {y}",) if same else (f"- {x}", f"+ {y}")


def _pair(a: list[str], b: list[str], numbers: dict[tuple[int, str], str]) -> None:
    """Among lines that differ, the calls of one op in order make the same values: what reads them has not changed."""
    made = [(_MADE.match(x), x) for x in a]
    left = [(m[2], _NUMBER.findall(x)[0]) for m, x in made if m]
    for y in b:
        m = _MADE.match(y)
        old = next((pair for pair in left if m and pair[0] == m[2]), None)
        if m and old is not None:
            left.remove(old)
            numbers[len(m[1]), _NUMBER.findall(y)[0]] = old[1]


def _renumbered(x: str, y: str, numbers: dict[tuple[int, str], str]) -> list[str | None]:
    """The values of line `y` under the numbers that they have in the other graph, whose line `x` says what `y` makes."""
    indent = len(y) - len(y.lstrip())
    if _MADE.match(x) and _MADE.match(y):
        numbers[indent, _NUMBER.findall(y)[0]] = _NUMBER.findall(x)[0]
    return [numbers.get((indent, n)) for n in _NUMBER.findall(y)]


ALSO = "also"
"""The key of `node.meta` that holds the names of equal operations that were merged into this one."""


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
    place = source_place(node)
    return f"{path_of(node)} ({place})" if place else path_of(node)


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
    if node.op == "get_attr":  # what it names may be missing
        return f"{name} = @{node.target}"
    if node.op == "placeholder":
        return f"{name}: {_type(node)}"
    if node.op == "output":
        return f"return {_returned(node, names)}"
    arguments = [_argument(a, names) for a in node.args] + [f"{k}={_argument(v, names)}" for k, v in sorted(node.kwargs.items())]
    if fixed := getattr(node.target, "fixed", ()):
        arguments += [f"{k}=<{str(getattr(getattr(a, 'type', None), 'name', 'attribute')).lower()}>" for k, a in fixed]
    return f"{name}: {_type(node)} = {target_name(node)}({', '.join(arguments)})"


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
