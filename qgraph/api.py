"""prepare -> calibrate -> convert -> lower | export, and quantize, which is all of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch.fx import GraphModule, Node

from qgraph import saturation
from qgraph.backend import Backend, Program, Targeted, get_backend
from qgraph.calibrate import calibrate
from qgraph.capture import capture
from qgraph.edit import copy_graph, graph_modules
from qgraph.errors import CalibrationError, ModelError, RecipeError
from qgraph.heap import give_back
from qgraph.ledger import Stage, state
from qgraph.onnx_io import from_onnx
from qgraph.onnx_ops import OnnxOp
from qgraph.passes import (
    Canonicalize,
    FoldAttentionBiases,
    FoldBatchNorm,
    FoldConstants,
    FoldFakeQuant,
    InferTypes,
    InsertFakeQuant,
    InsertObservers,
    KvQuant,
    MergeEqual,
    RemoveDead,
    SinkConstants,
    TieWeights,
    UntieWeights,
)
from qgraph.passes.reduce_range import exact_on
from qgraph.pipeline import Context, Pass, Pipeline, Verify
from qgraph.recipe import Recipe, load_recipe
from qgraph.resume import open_run
from qgraph.rewriter import Decline
from qgraph.score import Metric
from qgraph.text import where
from qgraph.views import Cast, Dequantize, DynamicQuantize, FakeLookup, FakeQuantize, Lookup, Quantize, const_value, view, view_any

Model = torch.nn.Module | torch.export.ExportedProgram | GraphModule | onnx.ModelProto | onnx_ir.Model | str | PathLike[str]
Source = str | Recipe | Path

AUTO = "auto"
"""The recipe that is searched for."""

QUANTIZED_OPS = frozenset(
    ("QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "QGemm", "MatMulNBits", "GatherBlockQuantized", "MatMulIntegerToFloat")
    + ("DynamicQuantizeMatMul", "QAttention", "MatMulBnb4", "QMoE")
)
"""ONNX operations that only quantized models have."""

PREPARE: tuple[Pass, ...] = (
    *(InferTypes(), SinkConstants(), MergeEqual(), Canonicalize(), UntieWeights(), FoldConstants(), FoldBatchNorm()),
    *(FoldAttentionBiases(), MergeEqual(), RemoveDead()),
)
"""What every model goes through before it is annotated; none of them changes numbers beyond float rounding."""


def as_graph(model: Model, example_inputs: Any = None, *, dynamic_shapes: Any = None) -> GraphModule:
    """One graph of the model, whatever it is: captured, imported, or a copy of a graph that qgraph made.

    Raises CaptureError, ModelError, or TypeError for something that is no model."""
    if isinstance(model, GraphModule) and "qgraph" in model.meta:
        return copy_graph(model)
    if isinstance(model, str | PathLike | onnx.ModelProto | onnx_ir.Model):
        return from_onnx(model)
    if isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        return capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    raise TypeError(f"a model is a torch module, an exported program, a graph, an ONNX model or a path, not {type(model).__name__}")


def prepare(
    model: Model,
    example_inputs: Any = None,
    *,
    recipe: Source = "w8a8",
    backend: str | Backend = "onnxruntime",
    dynamic_shapes: Any = None,
    verify: Verify | None = None,
) -> GraphModule:
    """The model as a float graph with observers where `recipe` and `backend` want integers.

    `example_inputs` and `dynamic_shapes` are torch.export's, for torch modules only. `verify="numerics"` checks every pass against
    its contract on the example inputs. The model itself is not changed.
    Raises CaptureError, ModelError (also for a model that is quantized already, or has nothing to quantize), RecipeError."""
    recipe = load_recipe(recipe)
    target = get_backend(backend)
    gm = as_graph(model, example_inputs, dynamic_shapes=dynamic_shapes)
    check_float(gm)
    observe = InsertObservers(recipe, target.placement)
    wanted = exact_on(target.target, recipe.stages) if isinstance(target, Targeted) else recipe.stages
    kv = recipe.kv_cache
    cache = () if kv is None else (KvQuant(kv.bits, bool(kv.symmetric), target.placement.accepts),)
    stages = _in_order(wanted, observe, *cache)
    waiting = next((i for i, p in enumerate(stages) if p.needs_data or p.at == "quantized"), len(stages))
    _run(gm, *PREPARE, verify=verify)
    state(gm).declines = _run(gm, *stages[:waiting], verify=verify)
    state(gm).pending = stages[waiting:]
    if observe in state(gm).pending:
        observe.check(gm)
    return _at(gm, "prepared", recipe)


def convert(prepared: GraphModule, *, verify: Verify | None = None) -> GraphModule:
    """The prepared graph with integer weights and quantize/dequantize nodes, callable in torch: the reference of every backend.

    `prepared` keeps its observers. Raises CalibrationError when an observer has seen no data or stages of the recipe have not run,
    ModelError for a graph not prepared."""
    if state(prepared).stage not in ("prepared", "calibrated"):
        raise ModelError(f"convert takes a prepared graph, this one is {state(prepared).stage}: call qgraph.prepare first")
    if waiting := state(prepared).pending:
        names = ", ".join(p.name for p in waiting if not isinstance(p, InsertObservers))
        raise CalibrationError(f"stages of the recipe have not run yet ({names}): call qgraph.calibrate(prepared, batches) first")
    gm = copy_graph(prepared)
    _run(gm, InsertFakeQuant.of(gm), FoldFakeQuant(), TieWeights(), RemoveDead(), verify=verify)
    saturation.record(gm)
    give_back()
    return _at(gm, "converted")


def lower(quantized: GraphModule, *, backend: str | Backend = "onnxruntime", strict: bool = False) -> Program:
    """A program of `backend` that runs. With `strict`, a promised kernel that the runtime did not use raises LoweringError."""
    return get_backend(backend).lower(copy_graph(quantized), strict=strict)


def export(quantized: GraphModule, path: str | PathLike[str], *, backend: str | Backend = "onnxruntime") -> Path:
    """Write the lowered model to `path`, checked and loaded by the runtime before it gets its name. Returns the path.

    Raises LoweringError, or ModelError when the file cannot be written; an existing file is replaced only at success."""
    target = Path(fspath(path))
    if target.is_dir():
        raise ModelError(f"cannot write the model to {target}: it is a folder; give a file name such as {target / 'model.onnx'}")
    if not target.parent.is_dir():
        raise ModelError(f"cannot write {target}: the folder {target.parent} does not exist")
    get_backend(backend).export(copy_graph(quantized), target)
    return target


def quantize(
    model: Model,
    batches: Iterable[Any] | None = None,
    *,
    example_inputs: Any = None,
    recipe: Source = "w8a8",
    backend: str | Backend = "onnxruntime",
    dynamic_shapes: Any = None,
    output: str | PathLike[str] | None = None,
    verify: Verify | None = None,
    metric: str | Metric = "sqnr",
    max_drop: float | None = None,
    evaluation: Iterable[Any] | None = None,
    resume: str | PathLike[str] | None = None,
) -> GraphModule:
    """prepare, calibrate and convert in one call, and export when `output` is a path. Returns the quantized graph.

    `batches` is needed by recipes with static ranges or with stages that look at data. Raises what those functions raise.
    `recipe="auto"` searches for the fastest program whose `metric` on `evaluation` falls by `max_drop` at most, see `auto.auto`; `metric`,
    `max_drop` and `evaluation` are for it alone. `resume`: a folder (for "auto", a file) that keeps what is done, so that a run which was
    killed goes on where it was; another model, recipe or data is refused."""
    if recipe == AUTO:
        from qgraph.auto import auto

        found = auto(
            model,
            batches,
            example_inputs=example_inputs,
            backend=backend,
            dynamic_shapes=dynamic_shapes,
            metric=metric,
            max_drop=max_drop,
            evaluation=evaluation,
            resume=resume,
        )
        if output is not None:
            export(found, output, backend=backend)
        return found
    if (max_drop, evaluation) != (None, None):
        raise RecipeError(f'max_drop and evaluation are for recipe="auto", not for {recipe}')
    recipe = load_recipe(recipe)
    if recipe.needs_data and batches is None:
        asks = next((f"stage {p.name} of recipe {recipe.name}" for p in recipe.stages if p.needs_data), f"recipe {recipe.name}")
        raise CalibrationError(f"{asks} needs calibration data: give batches, or take a recipe without it, such as w8a8-dynamic")
    prepared = prepare(model, example_inputs, recipe=recipe, backend=backend, dynamic_shapes=dynamic_shapes, verify=verify)
    if resume is not None:
        open_run(resume, prepared, batches, get_backend(backend).name)
    calibrate(prepared, batches, verify=verify)
    quantized = convert(prepared, verify=verify)
    if output is not None:
        export(quantized, output, backend=backend)
    return quantized


def _in_order(stages: tuple[Pass, ...], *observe: Pass) -> tuple[Pass, ...]:
    """The recipe's stages in its order, around what inserts observers: of the float graph, of the observed one, of the quantized one."""
    order = ("float", "observed", "quantized")
    for a, b in pairwise(stages):
        if order.index(a.at) > order.index(b.at):
            raise RecipeError(f"stage {b.name} runs on the {b.at} graph, so it cannot come after {a.name}, which runs on the {a.at} one")
    first, *rest = ([p for p in stages if p.at == at] for at in order)
    return (*first, *observe, *(p for part in rest for p in part))


def check_float(gm: GraphModule) -> None:
    """Raises ModelError for a graph that holds quantized operations: quantizing it again would pile error on error."""
    for part in graph_modules(gm):
        found = [n for n in part.graph.nodes if _is_quantized(n)]
        if found:
            raise ModelError(
                f"the model is quantized already ({len(found)} operations, the first at {where(found[0])}); take the float model"
            )


def _is_quantized(node: Node) -> bool:
    if view_any((Quantize, Dequantize, FakeQuantize, DynamicQuantize, Lookup, FakeLookup), node) is not None:
        return True
    if isinstance(node.target, OnnxOp) and node.target.op_type in QUANTIZED_OPS:
        return True
    if isinstance(node.target, OnnxOp) and node.target.op_type == "BitShift":  # packed codes of a weight
        return any(codes.dim() > 1 for n in node.all_input_nodes if (codes := const_value(n)) is not None)
    cast = view(Cast, node)  # a weight in Cast(int8) * scale, or in bytes that are looked up
    is_weight = cast is not None and ("float" in cast.to or any(getattr(user.target, "op_type", "") == "Gather" for user in node.users))
    stored = const_value(cast.x) if cast is not None and is_weight else None
    return stored is not None and stored.dtype in (torch.int8, torch.uint8) and stored.dim() > 1


def _run(gm: GraphModule, *passes: Pass, verify: Verify | None) -> tuple[Decline, ...]:
    """Run passes; `verify="numerics"` uses the example inputs of the capture. Returns what they refused."""
    example = state(gm).example_inputs
    ctx = Context(samples=[example] if example is not None else [])
    Pipeline(*passes, verify=verify).run(gm, ctx)
    return tuple(ctx.declines)


def _at(gm: GraphModule, stage: Stage, recipe: Recipe | None = None) -> GraphModule:
    found = state(gm)
    found.stage, found.recipe = stage, recipe or found.recipe
    return gm
