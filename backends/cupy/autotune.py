"""Which configuration of a kernel is fastest for a shape, measured on the GPU at hand and kept for later runs.

A family's `choose` names a default from a small table; before it does, it asks `preferred`:

    def choose(m, n, k, dtype):
        return preferred("w8a8", (bucket(m), n, k, str(dtype)), CONFIGS) or ...the default...

`autotune(program, *inputs)` runs the program once to see which ops it calls with what, times each of them with every configuration that its
`choose` could have named, and keeps the winners: a JSON file in $QGRAPH_CUDA_CACHE/tuned, one for each device and state of the kernels'
sources. Programs find it by themselves.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qgraph.backends.cupy.toolchain import HERE, keep, kept
from qgraph.errors import LoweringError

Config = TypeVar("Config", bound=Hashable)
Shape = tuple[int | str, ...]
Timer = Callable[[Callable[[], object]], float]
"""Seconds that a call takes on the device."""

FLUSHED = 256 << 20
"""Bytes written between two measurements: more than any second-level cache holds."""


@dataclass
class _Trial:
    """While ops are timed: what they ask for, and what they are told."""

    asked: dict[tuple[str, Shape], tuple[Hashable, ...]] = field(default_factory=dict)
    told: dict[tuple[str, Shape], Hashable] = field(default_factory=dict)


_TRIAL: ContextVar[_Trial | None] = ContextVar("trial", default=None)


def preferred(family: str, shape: Shape, configs: Sequence[Config]) -> Config | None:
    """The configuration that was fastest for this shape, out of those that can do it; None where nobody measured.

    `shape` is whatever the choice depends on; the number of rows best by `bucket`."""
    if (trial := _TRIAL.get()) is not None:
        trial.asked[family, shape] = tuple(configs)
        told = trial.told.get((family, shape))
        return next((c for c in configs if c == told), None)
    if not torch.cuda.is_initialized() or not (table := _table(torch.cuda.current_device())):
        return None
    winner = table.get(family, {}).get(_key(shape))
    return next((c for c in configs if repr(c) == winner), None)


def bucket(rows: int) -> int:
    """The next power of two: numbers of rows that share a choice."""
    return 1 << max(0, rows - 1).bit_length()


def autotune(program: Callable[..., object], *inputs: Any) -> dict[str, dict[str, str]]:
    """Times what `program(*inputs)` calls and keeps the fastest configurations; returns the device's table, family -> shape -> winner.

    Raises LoweringError without a GPU."""
    need_gpu()
    with _Recorder() as calls:
        program(*inputs)
    found: dict[str, dict[str, str]] = {}
    for run in calls.found.values():
        for (family, shape), config in tune(run, device_time).items():
            found.setdefault(family, {})[_key(shape)] = repr(config)
    return _remember(found)


def tune(run: Callable[[], object], timer: Timer) -> dict[tuple[str, Shape], Hashable]:
    """The fastest configuration for each choice that the call makes. Choices with one candidate are not measured."""
    with _trial() as trial:
        run()
        choices = dict(trial.asked)
        winners: dict[tuple[str, Shape], Hashable] = {}
        for choice, configs in choices.items():
            times: dict[Hashable, float] = {}
            for config in configs if len(configs) > 1 else ():
                trial.told = {**winners, choice: config}
                times[config] = timer(run)
            if times:
                winners[choice] = min(times, key=lambda c: times[c])
    return winners


def need_gpu() -> None:
    """Raises LoweringError where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise LoweringError("kernels are timed on a CUDA device, and torch sees none (torch.cuda.is_available() is False)")


def device_time(run: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds between two events around the call, on the current stream, with a cold second-level cache.

    The cache is flushed on the device right before, which takes longer than the host needs for the launches, so that the time between the
    events is the kernels' alone."""
    flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    for _ in range(3):
        run()
    pairs = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in pairs)) / 1e3


class _Recorder(TorchDispatchMode):
    """Collects calls of this backend's ops, one for each op and shapes, as functions that repeat them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, Callable[[], object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "qgraph_cuda":
            types_ = pytree.tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), str(t.dtype)), (args, kwargs))
            if (call := f"{func} {types_}") not in self.found:
                # Copies, made before it runs: some ops write to their operands.
                held = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
                self.found[call] = lambda: func(*held[0], **held[1])
        return func(*args, **kwargs)


@contextmanager
def _trial() -> Iterator[_Trial]:
    trial = _Trial()
    token = _TRIAL.set(trial)
    try:
        yield trial
    finally:
        _TRIAL.reset(token)


def _key(shape: Shape) -> str:
    return " ".join(map(str, shape))


def _path(device: int) -> Path:
    """The table's file for a device and the sources as they are."""
    sources = [p.read_text() for p in sorted((*HERE.glob("*.cu"), *HERE.glob("*.cuh")))]
    return kept("tuned", ".json", torch.cuda.get_device_name(device), *sources)


@cache
def _table(device: int) -> dict[str, dict[str, str]]:
    """What is kept for a device; empty where it was never tuned. Raises LoweringError for a file that is no such table."""
    return _read(_path(device))


def _read(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {str(family): {str(k): str(v) for k, v in winners.items()} for family, winners in found.items()}
    except (ValueError, AttributeError) as e:
        raise LoweringError(f"{path} is no table of tuned kernels ({e}): delete it, and tune again") from e


def _remember(found: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The device's table with what was found, as it is kept from now on."""
    path = _path(torch.cuda.current_device())
    table = _read(path)
    for family, winners in found.items():
        table.setdefault(family, {}).update(winners)
    keep(path, json.dumps(table, indent=1, sort_keys=True).encode())
    _table.cache_clear()
    return table
