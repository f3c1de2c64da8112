"""nn.Module | ExportedProgram | GraphModule -> one flat aten GraphModule, before decomposition."""

from __future__ import annotations

import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx._pytree import tree_flatten_spec
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from qgraph.errors import CaptureError
from qgraph.flatten import Entangled, flatten
from qgraph.interface import dim_names, input_names, output_names, register_output_types
from qgraph.ledger import State
from qgraph.origin import error_line

T = TypeVar("T")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def capture(module: torch.nn.Module | ExportedProgram, example_inputs: Any = None, dynamic_shapes: Any = None) -> GraphModule:
    """The module as one flat graph of aten calls that takes and returns what the module did.

    `example_inputs` is a tuple of positional arguments, a dict of keyword arguments or one tensor; an ExportedProgram brings its own.
    `dynamic_shapes` is torch.export's; without it every dimension is fixed to the example's. The module is captured in eval mode and left
    as it was; its tensors are shared with the graph, not copied. A GraphModule that is an aten graph already is copied as it is, one that
    qgraph made is returned. `gm.meta["qgraph"]` holds the State: input, output and dimension names, example inputs, tied paths.

    Raises CaptureError with the line of the module's source that cannot be captured."""
    if isinstance(module, GraphModule) and isinstance(module.meta.get("qgraph"), State):
        return module
    if isinstance(module, ExportedProgram):
        inputs = module.example_inputs if example_inputs is None and module.example_inputs else _inputs(example_inputs)
        return _from_program(module, inputs, dynamic_shapes, None)
    if not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule):
        kind = "a TorchScript module" if isinstance(module, torch.jit.ScriptModule) else f"a {type(module).__name__}"
        raise CaptureError(f"capture takes an nn.Module, an ExportedProgram or a GraphModule, not {kind}")
    inputs = _in_order(_inputs(example_inputs), inspect.signature(module.forward))
    if isinstance(module, GraphModule) and dynamic_shapes is None and _is_aten(module):
        try:
            return _described(*flatten(module), inputs, None, None)
        except Entangled:
            pass  # export it, which functionalizes
    program = _exported(module, inputs, dynamic_shapes)
    return _from_program(program, inputs, dynamic_shapes, inspect.signature(module.forward))


def _inputs(example: Any) -> Inputs:
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, dict):
        return (), example
    if isinstance(example, tuple | list):
        return tuple(example), {}
    kind = type(example).__name__
    raise CaptureError(f"example_inputs must be a tuple of arguments, a dict of keyword arguments or a tensor, got {kind}")


def _in_order(inputs: Inputs, signature: inspect.Signature) -> Inputs:
    """Keyword arguments in the order of the parameters, so that the graph takes them by position as the module does."""
    known = {name: inputs[1][name] for name in signature.parameters if name in inputs[1]}
    return inputs[0], known | inputs[1]


def _is_aten(gm: GraphModule) -> bool:
    """All calls are aten (or other) overloads with known values, as torch.export and make_fx leave them."""
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_method"):
            return False
        if node.op == "call_function" and not isinstance(node.target, OpOverload | HigherOrderOperator):
            sized = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
            if not sized and node.target is not operator.getitem:
                return False
        if node.op in ("call_function", "placeholder") and "val" not in node.meta:
            return False
    return True


def _from_program(program: ExportedProgram, inputs: Inputs, dynamic_shapes: Any, signature: inspect.Signature | None) -> GraphModule:
    try:
        gm, tied = flatten(program.module(check_guards=False))
    except Entangled:
        with _quiet():
            program = program.run_decompositions({})
        gm, tied = flatten(program.module(check_guards=False))
    return _described(gm, tied, inputs, dynamic_shapes, signature)


def _described(
    gm: GraphModule, tied: tuple[tuple[str, ...], ...], inputs: Inputs, dynamic_shapes: Any, signature: inspect.Signature | None
) -> GraphModule:
    """Fills in the State."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    in_spec = getattr(gm, "_in_spec", None)
    flat = tuple(inputs[0]) if in_spec is None else tuple(tree_flatten_spec((list(inputs[0]), inputs[1]), in_spec))
    names = input_names(placeholders, inputs, signature)
    gm.meta["qgraph"] = State(
        source="torch",
        example_inputs=flat,
        dynamic_shapes=dynamic_shapes,
        input_names=names,
        output_names=output_names(gm, names),
        dim_names=dim_names(placeholders, inputs, dynamic_shapes, signature),
        tied=tied,
    )
    return gm


def _exported(module: torch.nn.Module, inputs: Inputs, dynamic_shapes: Any) -> ExportedProgram:
    """torch.export in eval mode: following Python as it runs or, where that fails, by torch's bytecode analysis.

    The error that is reported is the first one: it was raised at the module's own line."""
    with _evaluating(module):
        first = _attempt(lambda: _export(module, inputs, dynamic_shapes, strict=False))
        if isinstance(first, ExportedProgram):
            return first
        if isinstance(first, GuardOnDataDependentSymNode):
            raise _explained(module, first) from first
        answer = _attempt(lambda: torch.no_grad()(module)(*inputs[0], **inputs[1]))
        if isinstance(answer, Exception):
            raise _refused(module, answer) from answer
        strict = not register_output_types(answer)
        second = _attempt(lambda: _export(module, inputs, dynamic_shapes, strict=strict))
        if isinstance(second, ExportedProgram):
            return second
        raise _explained(module, first) from first


def _export(module: torch.nn.Module, inputs: Inputs, dynamic_shapes: Any, *, strict: bool) -> ExportedProgram:
    with _quiet(), _unfused():
        return torch.export.export(module, inputs[0], inputs[1], dynamic_shapes=dynamic_shapes, strict=strict)


def _attempt(call: Callable[[], T]) -> T | Exception:
    """The result or the error, of any type: forward() is the user's code, and what export raises has no common base."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  (see above; every caller turns it into a CaptureError)
        return error


def _refused(module: torch.nn.Module, error: Exception) -> CaptureError:
    name, at = type(module).__name__, error_line(error)
    what = f"{name} fails on the example inputs themselves{f' at {at}' if at else ''} ({_reason(error)})"
    return CaptureError(f"{what}; give example_inputs that forward() accepts")


def _explained(module: torch.nn.Module, error: Exception) -> CaptureError:
    at = error_line(error)
    return CaptureError(f"cannot capture {type(module).__name__}{f' at {at}' if at else ''} ({_reason(error)}); {_remedy(error)}")


def _reason(error: Exception) -> str:
    """The error in a line: its first one, and the first point of a list that follows."""
    if isinstance(error, GuardOnDataDependentSymNode):
        return "this needs the value of a tensor, which only exists at run time"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    points = [line for line in lines[1:] if line.startswith("- ")]
    advice = re.compile(r"For more information, run with TORCH_LOGS\S*|If you're using .*")
    text = advice.sub("", f"{type(error).__name__}: {lines[0]} {points[0] if points else ''}")
    return shorten(text, width=240, placeholder="...").rstrip(". :")


def _remedy(error: Exception) -> str:
    text = str(error)
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in text:
        return "the program may not depend on the values in a tensor: use torch.where or torch.cond, or compute it outside of forward()"
    if "numpy" in text:
        return "use the torch function instead of numpy's"
    if "dynamic_shapes" in text or "Constraints violated" in text:
        return "change dynamic_shapes, or the line that fixes the size, and give examples of size 2 or more: a size of 1 becomes fixed"
    return "write this line with torch operations, or export the model to ONNX and use qgraph.from_onnx"


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode by the flags alone, since train() and eval() may be overridden and do work that cannot be undone; afterwards every
    attribute is what it was, also those that forward() sets (while tracing, to tensors without data)."""
    before = [(space, dict(space)) for m in module.modules() for space in (m.__dict__, m._buffers, m._parameters)]
    for m in module.modules():
        m.training = False
    try:
        yield
    finally:
        for space, values in before:
            if space.keys() != values.keys() or any(space[k] is not v for k, v in values.items()):
                space.clear()
                space.update(values)


@contextmanager
def _unfused() -> Iterator[None]:
    """Without gradients torch's own transformer layers take a path of one opaque operator each."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch prints partial graphs and logs hints while it fails; the error that is raised says all of it in a line."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.export", "torch.fx.experimental.symbolic_shapes", "torch._dynamo")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)
