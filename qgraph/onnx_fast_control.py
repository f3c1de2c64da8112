"""Control flow: If, Loop, Scan and SequenceMap. A nested graph arrives as a callable of its formal inputs returning a tuple."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgraph.onnx_fast import fast
from qgraph.onnx_values import TORCH_DTYPES, to_numpy

Body = Callable[..., tuple[Any, ...]]


def _pack(op: Any, outputs: Sequence[Any]) -> Any:
    return outputs[0] if op.outputs == 1 else tuple(outputs)


@fast("If", values=True)
def if_(op: Any, condition: Any, *, then_branch: Body, else_branch: Body) -> Any:
    return _pack(op, then_branch() if bool(condition) else else_branch())


@fast("Loop", values=True)
def loop(op: Any, trips: Any, condition: Any, *carried: Any, body: Any) -> Any:
    """body(iteration, condition, *carried) -> (condition, *carried, *one element of each scan output)."""
    limit = None if trips is None else int(trips)
    going = condition is None or bool(condition)
    state, rows, i = list(carried), [], 0
    while going and (limit is None or i < limit):
        found = body(torch.tensor(i), torch.tensor(True) if condition is None else torch.as_tensor(going), *state)
        going = bool(found[0])
        state = list(found[1 : 1 + len(carried)])
        rows.append(found[1 + len(carried) :])
        i += 1
    scans = op.outputs - len(carried)
    columns = list(zip(*rows, strict=True)) if rows else [()] * scans
    stacked = [_stack(column, 0, body.output_type(1 + len(carried) + n)) for n, column in enumerate(columns)]
    return _pack(op, [*state, *stacked])


def _stack(elements: Sequence[Any], axis: int, type_: Any) -> Any:
    """Scan results as one value; without any element, an empty one of the declared type."""
    if not elements:
        dtype = TORCH_DTYPES.get(type_.type.dtype, torch.float32) if type_ is not None else torch.float32
        dims = [d if isinstance(d, int) else 0 for d in type_.shape or ()] if type_ is not None else []
        return torch.empty([*dims[:axis], 0, *dims[axis:]], dtype=dtype)
    if isinstance(elements[0], Tensor):
        return torch.stack(list(elements), axis)
    return np.stack([to_numpy(e) for e in elements], axis)


@fast("Scan", values=True)
def scan(
    op: Any,
    *inputs: Any,
    body: Any,
    num_scan_inputs: int,
    directions: Sequence[int] | None = None,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
) -> Any:
    if op.version < 9:
        return _batched_scan(op, *inputs, body=body, count=num_scan_inputs, directions=directions)
    states = len(inputs) - num_scan_inputs
    outputs = op.outputs - states
    return _pack(
        op,
        _scan(
            body,
            inputs[:states],
            inputs[states:],
            (scan_input_axes or [0] * num_scan_inputs, scan_input_directions or [0] * num_scan_inputs),
            (scan_output_axes or [0] * outputs, scan_output_directions or [0] * outputs),
        ),
    )


Layout = tuple[Sequence[int], Sequence[int]]
"""Axes and directions (1 = backwards) of scanned inputs or outputs."""


def _scan(body: Any, state: Sequence[Any], inputs: Sequence[Tensor], read: Layout, written: Layout) -> list[Any]:
    """body(*state, *one slice of each input) -> (*state, *one slice of each output)."""
    slices = [x.flip(a).unbind(a) if d else x.unbind(a) for x, a, d in zip(inputs, *read, strict=True)]
    rows = []
    carried = list(state)
    for step in zip(*slices, strict=True):
        found = body(*carried, *step)
        carried = list(found[: len(state)])
        rows.append(found[len(state) :])
    outputs = []
    for n, (axis, backwards) in enumerate(zip(*written, strict=True)):
        type_ = body.output_type(len(state) + n)
        rank = rows[0][n].dim() if rows else len(type_.shape or ()) if type_ is not None else 0
        elements = [row[n] for row in (reversed(rows) if backwards else rows)]
        outputs.append(_stack(elements, axis % (rank + 1), type_))
    return [*carried, *outputs]


def _batched_scan(op: Any, lengths: Any, *inputs: Any, body: Any, count: int, directions: Sequence[int] | None) -> Any:
    """Opset 8: axis 0 is the batch, axis 1 the sequence, and every sequence may have its own length; the rest is zero."""
    states = len(inputs) - count
    results = []
    for b in range(inputs[states].shape[0]):
        length = inputs[states].shape[1] if lengths is None else int(lengths[b])
        scanned = [x[b, :length] for x in inputs[states:]]
        layout = [0] * (op.outputs - states)
        found = _scan(body, [x[b] for x in inputs[:states]], scanned, ([0] * count, directions or [0] * count), (layout, layout))
        missing = inputs[states].shape[1] - length
        padded = [torch.cat([y, y.new_zeros(missing, *y.shape[1:])]) for y in found[states:]]
        results.append([*found[:states], *padded])
    return _pack(op, [torch.stack(column) for column in zip(*results, strict=True)])


@fast("SequenceMap", values=True)
def sequence_map(op: Any, sequence: list[Any], *others: Any, body: Body) -> Any:
    rows = [body(x, *(o[i] if isinstance(o, list) else o for o in others)) for i, x in enumerate(sequence)]
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(op.outputs)]
    return _pack(op, columns)
