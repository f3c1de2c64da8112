"""Runners execute a prepared graph on one batch and feed its observers: TorchRunner anywhere, OrtRunner for ONNX graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qgraph.errors import CalibrationError, LoweringError, QGraphError
from qgraph.feeds import inputs_of
from qgraph.ranges import infinite_from
from qgraph.taps import ORT_ERRORS, Tap, open_session
from qgraph.text import where
from qgraph.types import type_of
from qgraph.watch import Watch


class Runner(Protocol):
    """Runs one batch; observers of the graph it was made for are updated."""

    def run(self, args: Sequence[Any]) -> None:
        """`args`: one value per placeholder, in order. Raises CalibrationError when the graph does not run on them."""


class TorchRunner:
    """Interprets the graph in torch, without gradients; every value is dropped after its last use. Runs any graph, also one with
    observers inside If, Loop, Scan and function bodies."""

    def __init__(self, gm: GraphModule) -> None:
        self._interpreter = _Interpreter(gm)

    def run(self, args: Sequence[Any]) -> None:
        interpreter = self._interpreter
        try:
            with torch.no_grad():
                interpreter.run(*args, enable_io_processing=False)
        except QGraphError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as e:
            at = f" at {where(interpreter.current)}" if interpreter.current is not None else ""
            raise CalibrationError(f"the model does not run on this batch{at}: {_first_line(e)}") from e
        finally:
            interpreter.env.clear()


class _Interpreter(Interpreter):
    """An Interpreter that remembers where it is, and leaves error messages alone."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.current: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.current = n
        return super().run_node(n)


def has_nested_observers(gm: GraphModule) -> bool:
    """Whether an observer sits inside a control-flow or function body, whose values cannot be outputs of the graph."""
    bodies = (m for m in gm.modules() if isinstance(m, GraphModule) and m is not gm)
    return any(True for body in bodies for _ in observed(body))


def observed(gm: GraphModule) -> Iterator[tuple[Node, Node, Watch]]:
    """(observer node, the value it watches, the observer) of this graph, without its bodies."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(found := gm.get_submodule(str(node.target)), Watch):
            value = node.args[0]
            assert isinstance(value, Node)
            yield node, value, found


class OrtRunner:
    """Runs an ONNX-dialect graph in one ONNX Runtime session in which the watched values are extra outputs.

    Where observers need no more than the bounds of a tensor, the graph reduces it itself (minimum, maximum, sum, size), so that
    four scalars leave. ONNX Runtime's minimum and maximum skip NaN: the sum tells. A value whose sum is not finite, or that reaches
    what stands for infinity, leaves whole from then on, for the observer to tell which and leave it out. The tensors that leave whole
    (percentiles, per axis) are alive together until each has been observed: for those, memory grows with the batch, never with the
    number of batches.

    Raises LoweringError when ONNX Runtime cannot run the graph; TorchRunner can.
    """

    def __init__(self, gm: GraphModule) -> None:
        if has_nested_observers(gm):
            raise LoweringError("observers inside control-flow or function bodies cannot be outputs of an ONNX Runtime session")
        if any(i.type is not None and i.type.dtype == "bfloat16" for i in inputs_of(gm)):
            raise LoweringError("numpy, through which ONNX Runtime is fed, has no bfloat16")
        values: dict[Node, list[Watch]] = {}
        for _, value, found in observed(gm):
            values.setdefault(value, []).append(found)
        self._gm = gm
        self._open([_tap(i, value, found) for i, (value, found) in enumerate(values.items())])

    def _open(self, taps: list[Tap]) -> None:
        self._taps, self._session = taps, open_session(self._gm, taps)
        self._inputs = [i.name for i in self._session.get_inputs()]

    def run(self, args: Sequence[Any]) -> None:
        feed = {name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in zip(self._inputs, args, strict=True)}
        results = self._results(feed)
        while odd := {t.name for t in self._taps if t.reduced and not _plain(t, results)}:
            self._open([replace(t, reduced=False) if t.name in odd else t for t in self._taps])
            results = self._results(feed)
        for tap in self._taps:
            low, high, size, whole = (results.pop(f"{tap.name}{what}", None) for what in (".min", ".max", ".size", ""))
            for found in tap.observers:
                if tap.reduced:
                    found.update_bounds(float(low), float(high), int(size), dtype=getattr(torch, str(tap.dtype)))
                else:
                    x = torch.from_numpy(whole)
                    found.update(x.bfloat16() if tap.dtype == "bfloat16" else x)

    def _results(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for tap in self._taps for name in tap.outputs]
        try:
            return dict(zip(names, self._session.run(names, feed), strict=True))
        except ORT_ERRORS as e:
            raise CalibrationError(f"ONNX Runtime does not run the model on this batch: {_first_line(e)}") from e


def _plain(tap: Tap, results: Mapping[str, Any]) -> bool:
    """Whether the bounds say it all: neither NaN nor what stands for infinity is among the values."""
    low, high, total, size = (float(results[f"{tap.name}.{what}"]) for what in ("min", "max", "sum", "size"))
    limit = infinite_from(getattr(torch, str(tap.dtype)))
    return not size or (math.isfinite(total) and -limit < low <= high < limit)


def _tap(number: int, value: Node, found: Sequence[Watch]) -> Tap:
    known = type_of(value)
    dtype = known.dtype if known is not None else None
    reduced = known is not None and known.is_float and not any(o.wants_values for o in found)
    return Tap(value, f"qgraph.tap.{number}", tuple(found), dtype, reduced)


def _first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)
