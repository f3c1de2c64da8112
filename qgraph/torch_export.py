"""aten GraphModule -> ONNX-dialect GraphModule, through torch.onnx.export; calls of torch.ops.qgraph stay what they are.

Weights are not copied on the way: the constants of the result are the parameters of the graph that came in, under their names.
"""

from __future__ import annotations

import io
import logging
import warnings
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as onnx_passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch._ops import OpOverload
from torch.export import Dim
from torch.fx import Graph, GraphModule
from torch.onnx import OnnxExporterError

from qgraph.errors import LoweringError
from qgraph.ledger import State, state
from qgraph.onnx_io import from_onnx
from qgraph.passes.open_attention import OpenAttention
from qgraph.pipeline import Context
from qgraph.qg_onnx import restore_qg_ops, translation

# LayerNormalization is whole from opset 17 and torch's translations start at 18; Gelu is whole from 20.
_OPSET, _GELU_OPSET = 18, 20
# Constants computed from larger tensors (elements) are left to qgraph's own passes: torch.onnx would copy and rename weights.
_SMALL = 1024

# Rules that undo the exporter's spelling of shapes and padding. None of them computes new weights, as folding batch norms would.
_TIDYING = (
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.min_max_rule,
    rules.max_min_rule,
)


def to_onnx_dialect(gm: GraphModule, *, opset: int | None = None) -> GraphModule:
    """The graph in ONNX operators, with the inputs, outputs, names and symbolic dimensions of its State.

    `opset` is by default the smallest one that keeps the graph's operators whole: 20 with gelu, else 18.
    Raises LoweringError for an operator that torch.onnx cannot translate, and for a graph without example inputs."""
    found = state(gm)
    if found.example_inputs is None:
        raise LoweringError("the graph has no example inputs to export it with: capture it with qgraph.capture(module, example_inputs)")
    flat, inputs, outputs = _flat(gm, found)
    OpenAttention().run(flat, Context())
    examples = tuple(found.example_inputs[i] for i in inputs)
    model = _exported(flat, examples, found.dim_names, opset or _opset(flat))
    _simplify(model)
    _name_nodes(model.graph)
    _name_values(model.graph, [found.input_names[i] for i in inputs], outputs)
    result = from_onnx(model)
    restore_qg_ops(result)
    new = state(result)
    new.ledger, new.recipe, new.stage, new.tied = found.ledger, found.recipe, found.stage, found.tied
    return result


def _flat(gm: GraphModule, found: State) -> tuple[GraphModule, list[int], list[str]]:
    """A copy that takes and returns flat tuples of tensors; the positions of its inputs, and the names of its outputs."""
    graph = Graph()
    results = graph.graph_copy(gm.graph, {})
    flat = list(results) if isinstance(results, tuple | list) else [results]
    names = found.output_names if len(found.output_names) == len(flat) else [f"output_{i}" for i in range(len(flat))]
    kept = [(value, name) for value, name in zip(flat, names, strict=True) if isinstance(value, torch.fx.Node)]
    graph.output(tuple(value for value, _ in kept))
    inputs = []
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        # Flags and None are arguments of the module, but not inputs of a model.
        if node.users or isinstance(found.example_inputs and found.example_inputs[i], torch.Tensor):
            inputs.append(i)
        else:
            graph.erase_node(node)
    return GraphModule(gm, graph), inputs, [name for _, name in kept]


def _opset(gm: GraphModule) -> int:
    gelu = any(isinstance(n.target, OpOverload) and n.target.overloadpacket is torch.ops.aten.gelu for n in gm.graph.nodes)
    return _GELU_OPSET if gelu else _OPSET


def _exported(gm: GraphModule, examples: tuple[Any, ...], dim_names: dict[str, str], opset: int) -> ir.Model:
    overloads = {n.target for n in gm.graph.nodes if isinstance(n.target, OpOverload) and n.target.namespace == "qgraph"}
    with _quiet():
        try:
            program = torch.onnx.export(
                gm,
                examples,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=_dynamic(gm, dim_names),
                custom_translation_table={overload: translation(overload) for overload in overloads},
                optimize=False,
                verbose=False,
            )
        except OnnxExporterError as error:
            raise LoweringError(f"torch.onnx cannot translate the graph to opset {opset} ({_reason(error)}); {_REMEDY}") from error
    assert program is not None
    return program.model


_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_REMEDY = "write that part of the module with other operators, or export it to ONNX yourself and use qgraph.from_onnx"


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _dynamic(gm: GraphModule, dim_names: dict[str, str]) -> tuple[dict[int, Any] | None, ...]:
    """torch.export's dynamic_shapes for the flat inputs, from the symbols in their types."""
    dims: dict[str, Any] = {}
    return tuple(_dims(node.meta.get("val"), dims, dim_names) for node in gm.graph.find_nodes(op="placeholder"))


def _dims(value: Any, dims: dict[str, Any], names: dict[str, str]) -> dict[int, Any] | None:
    if not isinstance(value, torch.Tensor):
        return None
    found: dict[int, Any] = {}
    for axis, size in enumerate(value.shape):
        if not isinstance(size, torch.SymInt):
            continue
        symbol = str(size)
        if symbol not in dims:
            dims[symbol] = _dim(size, names.get(symbol, symbol))
        found[axis] = dims[symbol]
    return found


def _dim(size: torch.SymInt, name: str) -> Any:
    """A named dimension of the symbol's range; an expression of other symbols is found again by the exporter."""
    expression = size.node.expr
    if not expression.is_symbol or not name.isidentifier():
        return Dim.AUTO
    bounds = size.node.shape_env.var_to_range[expression]
    high = int(bounds.upper) if bounds.upper.is_finite and bounds.upper < 2**31 else None
    return Dim(name, min=int(bounds.lower), max=high)


def _simplify(model: ir.Model) -> None:
    """torch.onnx's own clean-up (shape arithmetic, no-op casts, repeated nodes), but weights keep their layout, name and identity."""
    # The exporter names a stored tensor after its buffer, which may be the name of another value; folding goes by names.
    onnx_passes.NameFixPass()(model)
    # A second round folds what the rewrites of the first one uncovered.
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_may_fold)
        rewriter.rewrite(model, _TIDYING)
        optimizer.remove_unused_nodes(model)
    onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_shape_constants(model.graph)
    for step in (
        onnx_passes.CommonSubexpressionEliminationPass(),
        onnx_passes.OutputFixPass(),
        onnx_passes.NameFixPass(),
        onnx_passes.RemoveUnusedOpsetsPass(),
    ):
        step(model)


def _merge_shape_constants(graph: ir.Graph) -> None:
    """One initializer per short int64 list: shapes and axes, of which the exporter makes one per use."""
    kept: dict[Any, ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.size > 8 or value.is_graph_output():
            continue
        first = kept.setdefault((tuple(tensor.shape), tensor.tobytes()), value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[name]


def _may_fold(node: ir.Node) -> bool | None:
    """False for a node that reads a large constant, None where the default of the optimizer decides."""
    sizes = [v.const_value.size for v in node.inputs if v is not None and v.const_value is not None]
    return False if any(size > _SMALL for size in sizes) else None


def _name_nodes(graph: ir.Graph) -> None:
    """Nodes are called after the module they come from, "encoder.layer.0.query/MatMul"; torch's notes about the source go."""
    count: Counter[str] = Counter()
    for node in graph:
        scopes = literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        path = next((s for s in reversed(scopes[:-1]) if s and s != _NO_MODULE), "")
        name = f"{path}/{node.op_type}" if path else node.op_type
        node.name = f"{name}_{count[name]}" if count[name] else name
        count[name] += 1
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()


def _name_values(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives inputs and outputs the names of the State; whatever else has such a name gives way."""
    fixed = dict(zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True))
    wanted = set(fixed.values())
    for value in (*graph.initializers.values(), *(v for node in graph for v in node.outputs)):
        if value not in fixed and value.name in wanted:
            value.name = f"{value.name}_value"
    for i, value in enumerate(fixed):
        value.name = f"qgraph_renamed_{i}"
    for value, name in fixed.items():
        value.name = name


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns of things that were decided here."""
    log = logging.getLogger("torch")
    level = log.level
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
