"""The CUDA kernels on a GPU in one run of a few minutes: build all of them, check every family against the reference, time them.

    python -m tests.bench.cuda [--minutes 7] [--rows 1 16 ...] [--models 7B 135M] [--tune] [--markdown] [--json FILE]

Times are medians of CUDA events with a cold second-level cache, as weights are in a decoder. Beside each linear: torch's float16 matmul of the
same shape, and torch._int_mm for integers. "of roofline": the least time by the GPU's own numbers (roofline.py) over the measured one. --tune
tries all configurations of a shape first, and keeps the fastest for later runs. Exit status 1 where a kernel is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from qgraph.backends.cupy.autotune import Timer, autotune, device_time, need_gpu
from qgraph.backends.cupy.check import kernels
from qgraph.backends.cupy.compiling import cubin
from qgraph.backends.cupy.roofline import Device, known
from tests.backends.cupy import cases
from tests.backends.cupy.cases import SMALL, Case

ROWS = (1, 8, 16, 64, 256, 1024, 4096)
MODELS = {
    "7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "135M": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}
"""N, K of a decoder's linears: queries with keys and values, output, gate with up, down."""
WIDTH = 4096
"""Of a row that becomes integers."""
CACHES = ((1, 1024), (1, 8192), (16, 1024), (16, 8192))
"""Sequences, tokens."""
HEADS = (32, 8, 128)
"""Of queries, of the cache, and their size."""

LINEARS: dict[str, Callable[[torch.device, int, int, int], Case]] = {
    "w8a8": cases.integer_linear,
    "w4a16-g128": cases.weight_only_linear,
    "w8a16": lambda d, m, n, k: cases.weight_only_linear(d, m, n, k, bits=8, group=k),
}
ROW_KERNELS: dict[str, Callable[[torch.device, int, int], Case]] = {
    "quantize rows": cases.rows_to_integers,
    "quantize tensor": cases.tensor_to_integers,
    "norm + quantize": cases.norm_to_integers,
    "silu * up + quantize": cases.act_to_integers,
    "embedding of 4 bits": lambda d, m, k: cases.gathered_rows(d, m, 32000, k),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a kernel and of torch in float16 (and int8, where it has that) on the same shape; bytes/s and operations/s that the least
    work makes of them, and the fraction of the roofline, where the GPU's numbers are known."""

    kernel: str
    shape: str
    seconds: float
    half: float | None
    integer: float | None
    bandwidth: float
    rate: float
    fraction: float | None

    @classmethod
    def of(
        cls,
        kernel: str,
        shape: str,
        case: Case,
        seconds: float,
        gpu: Device | None,
        half: float | None = None,
        integer: float | None = None,
    ) -> Timing:
        work = case.work
        operations = work.int8_ops + work.fp16_ops + work.fp32_ops
        fraction = None if gpu is None else gpu.time(work) / seconds
        return cls(kernel, shape, seconds, half, integer, work.bytes / seconds, operations / seconds, fraction)


@dataclass
class Bench:
    """`timer` measures a call, on `device`; nothing new is begun after `deadline` (of perf_counter)."""

    device: torch.device
    gpu: Device | None
    timer: Timer
    deadline: float
    tune: bool = False

    def check(self) -> dict[str, str]:
        """What is wrong, by case; empty where every family equals the reference."""
        return {name: wrong for name, make in SMALL.items() if (wrong := self._wrong(make))}

    def _wrong(self, make: Callable[[torch.device], Case]) -> str:
        try:
            case = make(self.device)
            case.check(case.op(case.x))
        except Exception as e:  # noqa: BLE001  # one broken family does not keep the others from being seen
            return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        return ""

    def timings(self, models: Sequence[str], rows: Sequence[int]) -> Iterator[Timing]:
        """Until the time is over."""
        tasks = [*self._linears(models, rows), *self._rows(rows), *self._caches()]
        for i, task in enumerate(tasks):
            if perf_counter() > self.deadline:
                print(f"time is over: {len(tasks) - i} of {len(tasks)} timings left out", file=sys.stderr)
                return
            yield from task()

    def _linears(self, models: Sequence[str], rows: Sequence[int]) -> Iterator[Callable[[], Iterator[Timing]]]:
        for model in models:
            for n, k in MODELS[model]:
                for m in rows:
                    yield lambda m=m, n=n, k=k: self._linear(m, n, k)  # type: ignore[misc]

    def _linear(self, m: int, n: int, k: int) -> Iterator[Timing]:
        random = cases.Random(self.device)
        x, weight = random.normal(m, k), random.normal(n, k)
        half, integer = self.timer(lambda: F.linear(x, weight)), None
        if m > 16 and k % 8 == 0 and n % 8 == 0 and self.device.type == "cuda":  # what torch._int_mm takes
            a, b = random.integers(-128, 127, m, k), random.integers(-128, 127, n, k).t()
            integer = self.timer(lambda: torch._int_mm(a, b))
        for name, make in LINEARS.items():
            yield self._timed(name, f"{m} x {n} x {k}", make(self.device, m, n, k), half, integer if name == "w8a8" else None)

    def _rows(self, rows: Sequence[int]) -> Iterator[Callable[[], Iterator[Timing]]]:
        for name, make in ROW_KERNELS.items():
            for m in rows:
                yield lambda name=name, make=make, m=m: iter([self._timed(name, f"{m} x {WIDTH}", make(self.device, m, WIDTH))])  # type: ignore[misc]

    def _caches(self) -> Iterator[Callable[[], Iterator[Timing]]]:
        for batch, tokens in CACHES:
            for bits in (8, 4):
                yield lambda batch=batch, tokens=tokens, bits=bits: self._attention(batch, tokens, bits)  # type: ignore[misc]

    def _attention(self, batch: int, tokens: int, bits: int) -> Iterator[Timing]:
        random, (heads, kv_heads, size) = cases.Random(self.device), HEADS
        q, k = random.normal(batch, heads, 1, size), random.normal(batch, kv_heads, tokens, size)
        half = self.timer(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True))
        case = cases.cached_attention(self.device, batch, *HEADS, tokens, bits=bits)
        yield self._timed(f"append + attend, {bits} bits", f"{batch} x {tokens} tokens", case, half)

    def _timed(self, name: str, shape: str, case: Case, half: float | None = None, integer: float | None = None) -> Timing:
        if self.tune:
            autotune(case.op, case.x)
        return Timing.of(name, shape, case, self.timer(lambda: case.op(case.x)), self.gpu, half, integer)


def build(arch: int) -> tuple[int, float]:
    """Compiles every kernel for a device: how many there are, and seconds."""
    start = perf_counter()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda k: cubin(k.file, k.defines, arch, k.folder), kernels()))
    return len(found), perf_counter() - start


HEADER = ("kernel", "M x N x K", "us", "torch half us", "times as fast", "torch int8 us", "GB/s", "TOP/s", "of roofline")


def cells(t: Timing) -> tuple[str, ...]:
    def us(seconds: float | None) -> str:
        return "" if seconds is None else f"{1e6 * seconds:.1f}"

    faster = "" if t.half is None else f"{t.half / t.seconds:.2f}"
    fraction = "" if t.fraction is None else f"{t.fraction:.0%}"
    return (
        t.kernel,
        t.shape,
        us(t.seconds),
        us(t.half),
        faster,
        us(t.integer),
        f"{t.bandwidth / 1e9:.0f}",
        f"{t.rate / 1e12:.2f}",
        fraction,
    )


def markdown(found: Sequence[Timing]) -> str:
    lines = [HEADER, tuple("---" for _ in HEADER), *map(cells, found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(found: Sequence[Timing]) -> Table:
    made = Table(*HEADER)
    for t in found:
        made.add_row(*cells(t))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cuda", description="Build, check and time the CUDA kernels.")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no timing is begun  [default: 7]")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="M")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tune", action="store_true", help="try every configuration of a shape first, and keep the fastest")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    deadline = perf_counter() + 60 * options.minutes
    need_gpu()
    device, console = torch.device("cuda", torch.cuda.current_device()), Console()
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    console.print(f"{name}, sm_{10 * major + minor}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    count, seconds = build(10 * major + minor)
    console.print(f"{count} kernels built in {seconds:.1f} s")
    bench = Bench(device, known(name), device_time, deadline, options.tune)
    wrong = bench.check()
    console.print(
        *(f"WRONG {case}: {why}" for case, why in wrong.items()), f"{len(SMALL) - len(wrong)} of {len(SMALL)} checks passed", sep="\n"
    )
    found = list(bench.timings(options.models, options.rows))
    console.print(markdown(found) if options.markdown else table(found), soft_wrap=options.markdown)
    if options.json is not None:
        result: dict[str, Any] = {
            "device": name,
            "kernels": count,
            "build_s": seconds,
            "wrong": wrong,
            "timings": [asdict(t) for t in found],
        }
        options.json.write_text(json.dumps(result, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
