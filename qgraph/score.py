"""How good and how fast a program is beside the float one: metrics on batches, and the ratio of median latencies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qgraph.backend import Program
from qgraph.errors import CalibrationError
from qgraph.feeds import Input, arrange
from qgraph.isolate import power

Run = Callable[[Any], tuple[Tensor, ...]]
"""One batch, as calibration takes it -> the outputs, tensors in the order of the graph."""
Metric = Callable[[Run, Iterable[Any]], float]
"""(run, evaluation batches) -> a number, higher is better."""
Timer = Callable[[Program, Sequence[Any]], float]
"""Seconds of one call of a program on these inputs."""


def runs(program: Program, inputs: Sequence[Input]) -> Run:
    """The program as metrics call it."""

    def run(batch: Any) -> tuple[Tensor, ...]:
        found = program(*arrange(batch, inputs, where="evaluation batch"))
        return tuple(torch.as_tensor(x) for x in tree_leaves(found))

    return run


def kept_power(reference: Run, run: Run, batches: Iterable[Any]) -> float:
    """1 - |error|**2 / |signal|**2 against the float outputs, the mean over the float outputs of the model: 0.99 is an SQNR of 20 dB."""
    signal: dict[int, float] = {}
    error: dict[int, float] = {}
    for batch in batches:
        for i, (a, b) in enumerate(zip(reference(batch), run(batch), strict=True)):
            if a.is_floating_point():
                signal[i] = signal.get(i, 0.0) + power(a)
                error[i] = error.get(i, 0.0) + power(a.float() - b.float())
    if not signal:
        raise CalibrationError("metric 'sqnr' compares float outputs, and the evaluation data gave none; give a function as metric")
    return 1 - statistics.fmean(error[i] / signal[i] if signal[i] else float(error[i] > 0) for i in signal)


def agreement(reference: Run, run: Run, batches: Iterable[Any]) -> float:
    """The share of rows of the first output whose largest element, along the last axis, is where the float model has it."""
    same = rows = 0
    for batch in batches:
        a, b = reference(batch)[0].argmax(-1), run(batch)[0].argmax(-1)
        same, rows = same + int((a == b).sum()), rows + a.numel()
    return same / rows if rows else 0.0


METRICS: Mapping[str, Callable[[Run, Run, Iterable[Any]], float]] = {"sqnr": kept_power, "agreement": agreement}
"""Metrics that need no labels: the float model is right, and scores 1."""


def seconds_of(program: Program, args: Sequence[Any]) -> float:
    start = time.perf_counter()
    program(*args)
    return time.perf_counter() - start


def latency_ratio(
    reference: Program,
    program: Program,
    args: Sequence[Any],
    *,
    timer: Timer = seconds_of,
    least: int = 11,
    most: int = 200,
    budget: float = 1.5,
) -> float:
    """Median latency of `program` over that of `reference`, run in turn so that drift hits both: between `least` and `most` rounds, as
    many as `budget` seconds hold, after two that do not count."""
    times: list[tuple[float, float]] = []
    for _ in range(2):
        reference(*args), program(*args)
    while len(times) < least or (len(times) < most and sum(map(sum, times)) < budget):
        times.append((timer(reference, args), timer(program, args)))
    base, own = (statistics.median(column) for column in zip(*times, strict=True))
    return float(own / base)
