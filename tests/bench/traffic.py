"""What the CUDA kernels ask of memory, counted by the emulator: no GPU, no times.

    python -m tests.bench.traffic [--markdown]

A row for each call, of aligned sizes: the bytes that it must move (its `work`), the bytes of the 32-byte sectors that its warps touch (all
launches of the call, no cache between SM and memory), wavefronts of shared memory beyond the least, and the fraction of the roofline that this
traffic leaves on some GPUs. Matrix products on tensor cores read tiles again that a second-level cache would hold: their fraction is a lower bound."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.layers import DEVICES
from qgraph.backends.cupy.profile import Profile
from qgraph.backends.cupy.roofline import Work, predicted_fraction, traffic_fraction
from tests.backends.cupy import cases
from tests.backends.cupy.cases import Case

CPU = torch.device("cpu")
CALLS: dict[str, Callable[[], Case]] = {
    "quantize rows, 16 x 4096": lambda: cases.rows_to_integers(CPU, 16, 4096),
    "quantize tensor, 64 x 4096": lambda: cases.tensor_to_integers(CPU, 64, 4096),
    "norm + quantize, 16 x 4096": lambda: cases.norm_to_integers(CPU, 16, 4096),
    "norm + quantize, 2048 x 4096": lambda: cases.norm_to_integers(CPU, 2048, 4096),
    "silu * up + quantize, 16 x 4096": lambda: cases.act_to_integers(CPU, 16, 4096),
    "embedding of 4 bits, 64 x 4096": lambda: cases.gathered_rows(CPU, 64, 1000, 4096),
    "w2a16-g128, 1 x 1024 x 4096": lambda: cases.weight_only_linear(CPU, 1, 1024, 4096, bits=2),
    "w3a16-g128, 1 x 1024 x 4096": lambda: cases.weight_only_linear(CPU, 1, 1024, 4096, bits=3),
    "w4a16-g128, 1 x 1024 x 4096": lambda: cases.weight_only_linear(CPU, 1, 1024, 4096),
    "w8a16, 1 x 1024 x 4096": lambda: cases.weight_only_linear(CPU, 1, 1024, 4096, bits=8, group=4096),
    "w4a16-g128, 64 x 256 x 1024": lambda: cases.weight_only_linear(CPU, 64, 256, 1024),
    "w8a8, 1 x 1024 x 4096": lambda: cases.integer_linear(CPU, 1, 1024, 4096),
    "w8a8, 8 x 1024 x 4096": lambda: cases.integer_linear(CPU, 8, 1024, 4096),
    "w8a8, 8 x 4096 x 4096": lambda: cases.integer_linear(CPU, 8, 4096, 4096),
    "w8a8, 128 x 256 x 1024": lambda: cases.integer_linear(CPU, 128, 256, 1024),
    "append + attend, 8 bits, 1024 tokens": lambda: cases.cached_attention(CPU, 1, 32, 8, 128, 1024),
    "append + attend, 4 bits, 1024 tokens": lambda: cases.cached_attention(CPU, 1, 32, 8, 128, 1024, bits=4),
}


@dataclass(frozen=True)
class Traffic:
    """A call's least work, and the profiles of its launches."""

    call: str
    work: Work
    profiles: tuple[Profile, ...]

    @classmethod
    def of(cls, call: str, make: Callable[[], Case]) -> Traffic:
        with emulation():
            case = make()
        with emulation(checked=True) as seen:
            found = case.op(case.x)
        case.check(found)
        return cls(call, case.work, tuple(profile for _, profile in seen.profiles))

    @property
    def sectors(self) -> int:
        return sum(p.sectors for p in self.profiles)

    def cells(self) -> tuple[str, ...]:
        """One block to an SM at a time, and as many blocks as SMs: only the traffic counts."""
        least, conflicts = sum(p.least_sectors for p in self.profiles), sum(p.bank_conflicts for p in self.profiles)
        fractions = (predicted_fraction(d, self.work, sectors=self.sectors, blocks=d.sms) for d in DEVICES)
        return (
            self.call,
            f"{self.work.bytes / 1e3:.1f}",
            f"{self.sectors * 32 / 1e3:.1f}",
            f"{1 / traffic_fraction(self.work.bytes, self.sectors):.3f}",
            f"{least / self.sectors:.1%}",
            str(conflicts),
            *(f"{f:.0%}" for f in fractions),
        )


HEADER = ("call", "least kB", "moved kB", "moved / least", "sectors used", "bank conflicts", *(d.name for d in DEVICES))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.traffic", description="Count what the CUDA kernels ask of memory.")
    parser.add_argument("--markdown", action="store_true")
    options, console = parser.parse_args(arguments), Console()
    rows = [Traffic.of(*call).cells() for call in CALLS.items()]
    if options.markdown:
        for line in (HEADER, tuple("---" for _ in HEADER), *rows):
            console.print(f"| {' | '.join(line)} |", markup=False, soft_wrap=True)
        return
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
