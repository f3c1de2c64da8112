"""Predicted against measured: integer over float time of single operations that are read and written in float.

    python tests/bench/cost.py [--runs 60]

Both sessions run alternately with two threads; ratios are of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import onnxruntime as ort
import torch
from torch import nn

import qgraph
from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.backends.onnxruntime.placement import MACHINE, PLACEMENT
from qgraph.cost import work_of
from qgraph.views import Conv, Linear, view_any

CASES: tuple[tuple[str, nn.Module, tuple[int, ...]], ...] = (
    ("linear 1024 x 1024, 1 row", nn.Linear(1024, 1024), (1, 1024)),
    ("linear 1024 x 1024, 128 rows", nn.Linear(1024, 1024), (128, 1024)),
    ("conv 1x1 240 at 12 x 80", nn.Conv2d(240, 240, 1), (1, 240, 12, 80)),
    ("conv 1x1 16 to 32 at 24 x 160", nn.Conv2d(16, 32, 1), (1, 16, 24, 160)),
    ("conv 3x3 64 at 56 x 56", nn.Conv2d(64, 64, 3, padding=1), (1, 64, 56, 56)),
    ("depthwise 5x5 240 at 12 x 80", nn.Conv2d(240, 240, 5, padding=2, groups=240), (1, 240, 12, 80)),
    ("first conv 3x3 3 to 16 at 48 x 320", nn.Conv2d(3, 16, 3, stride=2, padding=1), (1, 3, 48, 320)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    runs = parser.parse_args().runs
    print(f"{'operation':38s} {'predicted':>9s} {'measured with conversions':>26s}")
    for label, module, shape in CASES:
        predicted, measured = ratio(module.eval(), torch.randn(shape), runs)
        print(f"{label:38s} {predicted:9.2f} {measured:26.2f}")


def ratio(module: nn.Module, x: torch.Tensor, runs: int) -> tuple[float, float]:
    """(predicted, measured) time of x -> quantize -> operation -> dequantize over that of the float operation."""
    gm = qgraph.capture(module, (x,))
    (work,) = (w for n in gm.graph.nodes if (v := view_any((Conv, Linear), n)) is not None and (w := work_of(v)) is not None)
    fp32 = MACHINE.float32.time(work)
    gain = MACHINE.gain(work, quantize=True, dequantize=any(isinstance(m, nn.Conv2d) for m in module.modules()))
    backend = OnnxRuntime(placement=PLACEMENT, threads=2)  # integers also where they do not pay
    quantized = qgraph.quantize(module, [(x,)], example_inputs=(x,), recipe="w8a8", backend=backend)
    programs = [backend.lower(gm), backend.lower(quantized)]
    times = list(zip(*(_times([p.session for p in programs], x, runs)), strict=True))
    return (fp32 - gain) / fp32, statistics.median(times[1]) / statistics.median(times[0])


def _times(sessions: list[ort.InferenceSession], x: torch.Tensor, runs: int) -> Iterator[tuple[float, ...]]:
    for _ in range(runs):
        row = []
        for session in sessions:
            start = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: x.numpy()})
            row.append(time.perf_counter() - start)
        yield tuple(row)


if __name__ == "__main__":
    main()
