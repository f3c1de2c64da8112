"""torch.compile(model, backend=qgraph.torch_backend(recipe)): the compiled function is a quantized program.

TorchDynamo hands over an FX graph whose parameters are inputs. They are frozen into the graph, which is then captured, quantized and
lowered like any other; the compiled function takes dynamo's inputs and drops the frozen ones. Gradients do not flow through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qgraph.api import convert, lower, prepare
from qgraph.backend import Backend
from qgraph.capture import capture
from qgraph.edit import add_constant, copy_graph
from qgraph.errors import RecipeError
from qgraph.formats import SITES
from qgraph.recipe import Recipe, load_recipe
from qgraph.views import view_any

Compiled = Callable[..., Any]


def torch_backend(
    recipe: str | Recipe = "w8a8-dynamic", *, backend: str | Backend = "onnxruntime"
) -> Callable[[GraphModule, Sequence[Any]], Compiled]:
    """A backend for torch.compile. Raises RecipeError for a static recipe: dynamo has no calibration data.

    Graphs without anything to quantize (dynamo may split a model) run as they are."""
    recipe = load_recipe(recipe)
    if recipe.static:
        raise RecipeError(f"recipe {recipe.name} needs calibration data, which torch.compile has not; use w8a8-dynamic or w8a16")

    def compile_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        frozen, kept = freeze(gm, example_inputs)
        dynamic = any(not isinstance(x, torch.Tensor) for x in example_inputs)
        program: list[Compiled] = []

        def compiled(*args: Any) -> Any:
            inputs = tuple(args[i] for i in kept)
            if not program:  # only now: dynamo's own tracing has ended, and the inputs are real
                program.append(_program(frozen, inputs, dynamic, recipe, backend))
            out = program[0](*inputs)
            return out if isinstance(out, tuple | list) else (out,)

        return compiled

    return compile_graph


def freeze(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, list[int]]:
    """Parameters and buffers become constants, symbolic sizes are read off the tensors that have them.

    Returns the graph and the positions of the inputs that are left."""
    new, kept = copy_graph(gm), []
    placeholders = [n for n in new.graph.nodes if n.op == "placeholder"]
    tensors = [n for n, x in zip(placeholders, example_inputs, strict=True) if isinstance(x, torch.Tensor)]
    for i, (node, x) in enumerate(zip(placeholders, example_inputs, strict=True)):
        with new.graph.inserting_before(_first_call(new)):
            if not isinstance(x, torch.Tensor):
                replacement = _size(node, x, tensors)
            elif isinstance(x, torch.nn.Parameter) or "_dynamo_static_input_type" in getattr(node, "meta", {}).get("tensor_dict", {}):
                replacement = new.graph.get_attr(add_constant(new, str(node.target), x.detach()))
            else:
                kept.append(i)
                continue
        node.replace_all_uses_with(replacement)
        new.graph.erase_node(node)
    new.graph.lint()
    new.recompile()
    return new, kept


def _first_call(gm: GraphModule) -> Node:
    found: Node = next(n for n in gm.graph.nodes if n.op != "placeholder")
    return found


def _size(node: Node, x: Any, tensors: Sequence[Node]) -> Node:
    """The node that reads a size which dynamo passes as an input of its own."""
    symbol = str(node.meta.get("example_value", x))
    for tensor in tensors:
        for dim, size in enumerate(tensor.meta["example_value"].shape):
            if str(size) == symbol:
                found: Node = node.graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
                return found
    raise RecipeError(f"torch.compile passes {symbol}, which is no tensor and no tensor's size; compile with dynamic=False")


def _program(frozen: GraphModule, inputs: tuple[Any, ...], dynamic: bool, recipe: Recipe, backend: str | Backend) -> Compiled:
    shapes = tuple(dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for x in inputs) if dynamic else None
    graph = capture(frozen, inputs, dynamic_shapes=shapes)
    if not any(view_any(SITES, n) for n in graph.graph.nodes):
        return graph
    return lower(convert(prepare(graph, recipe=recipe, backend=backend)), backend=backend)
