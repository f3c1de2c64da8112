"""Compile check: every kernel in every configuration, for sm_80, sm_90 and sm_120, without a GPU.

    python -m qgraph.backends.cupy.check [--arch 80 90 120] [--family quantizing ...] [--markdown]

prints what each takes (registers, shared memory, blocks that an SM holds) and exits with status 1 where one spills registers, has no
__launch_bounds__, does not fit the SM, or lacks an instruction that it `expects`. --markdown prints the table of backends/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module

from rich.console import Console
from rich.table import Table

from qgraph.backends.cupy.compiling import cubin
from qgraph.backends.cupy.launch import TYPES, Kernel
from qgraph.backends.cupy.resources import MULTIPROCESSORS, Usage, usages
from qgraph.errors import LoweringError, nearest

ARCHS = (80, 90, 120)

FAMILIES = ("quantizing", "norm_quantize", "act_quantize", "w8a8", "w8a8_conv", "weight_only", "embedding", "kv_cache")
"""The modules of this package with a tuple KERNELS: every configuration that a launch may choose."""

ELEMENTS = frozenset({*TYPES.values(), "int8_t", "uint8_t"})


@dataclass(frozen=True)
class Checked:
    """A kernel as it was compiled for one architecture. `blocks`: how many an SM holds; `problems`: sentences, none if all is well."""

    kernel: Kernel
    arch: int
    usage: Usage
    blocks: int
    problems: tuple[str, ...]


def kernels(families: Iterable[str] = FAMILIES) -> tuple[Kernel, ...]:
    """The kernels of the families. Raises LoweringError for a family that is none."""
    found: list[Kernel] = []
    for family in families:
        if family not in FAMILIES:
            raise LoweringError(f"there is no kernel family {family}{nearest(family, FAMILIES)}")
        found += import_module(f"qgraph.backends.cupy.{family}").KERNELS
    return tuple(dict.fromkeys(found))


def check(found: Sequence[Kernel], archs: Sequence[int] = ARCHS) -> list[Checked]:
    """Every kernel for every architecture, by kernel. Raises LoweringError where one does not compile, or a tool is missing."""
    for arch in archs:
        if arch not in MULTIPROCESSORS:
            raise LoweringError(f"sm_{arch} is none of the architectures whose SM is known here: {', '.join(map(str, MULTIPROCESSORS))}")
    units = dict.fromkeys((k.file, k.defines, arch, k.folder) for k in found for arch in archs)
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(units, pool.map(lambda unit: usages(cubin(*unit), unit[2]), units), strict=True))
    return [_checked(k, arch, compiled[k.file, k.defines, arch, k.folder]) for k in found for arch in archs]


def _checked(kernel: Kernel, arch: int, unit: dict[str, Usage]) -> Checked:
    if kernel.name not in unit:
        raise LoweringError(f"{kernel.file} has no kernel {kernel.name}{nearest(kernel.name, unit)}")
    usage = unit[kernel.name]
    blocks = MULTIPROCESSORS[arch].holds(usage.threads, usage.registers, usage.shared + kernel.shared) if usage.threads else 0
    return Checked(kernel, arch, usage, blocks, tuple(_problems(kernel, usage, blocks)))


def _problems(kernel: Kernel, usage: Usage, blocks: int) -> Iterable[str]:
    if usage.stack or usage.local:
        yield f"{usage.stack + usage.local} bytes of each thread are in memory: spilled registers, or an array with a computed index"
    if not usage.threads:
        yield "no __launch_bounds__, so that its registers may not fit the block"
    elif not blocks:
        yield f"a block of {usage.threads} threads with {usage.shared + kernel.shared} bytes of shared memory does not fit an SM"
    for missing in [i for i in kernel.expects if not usage.has(i)]:
        yield f"its machine code has no {missing}"


def configuration(kernel: Kernel) -> str:
    """T=__half TILE_M=64, the definitions that it is compiled with."""
    return " ".join(f"{k}={v}" for k, v in kernel.defines)


def shape(kernel: Kernel) -> str:
    """Its configuration without the types of elements."""
    return " ".join(f"{k}={v}" for k, v in kernel.defines if v not in ELEMENTS)


Row = tuple[str, ...]


def header(archs: Sequence[int]) -> Row:
    return ("kernel", "configuration", "threads", "shared", *(f"sm_{a}" for a in archs), "instructions")


def rows(checked: Iterable[Checked], label: Callable[[Kernel], str] = configuration) -> list[Row]:
    """Name, configuration, threads, bytes of shared memory, for each architecture "registers / blocks", the instructions that it holds. Kernels
    with one label share a row: the most registers and bytes, the fewest blocks."""
    found: dict[tuple[str, str], list[Checked]] = {}
    for c in checked:
        found.setdefault((c.kernel.name, label(c.kernel)), []).append(c)
    return [(*title, *_cells(group)) for title, group in found.items()]


def _cells(group: Sequence[Checked]) -> Row:
    by_arch = [[c for c in group if c.arch == arch] for arch in dict.fromkeys(c.arch for c in group)]
    return (
        str(max(c.usage.threads for c in group)),
        str(max(c.usage.shared + c.kernel.shared for c in group)),
        *(f"{max(c.usage.registers for c in some)} / {min(c.blocks for c in some)}" for some in by_arch),
        " ".join(i for i in group[0].kernel.expects if all(c.usage.has(i) for c in group)),
    )


def markdown(checked: Iterable[Checked], archs: Sequence[int] = ARCHS) -> str:
    """The table of backends/README.md: a row for all element types of a configuration."""
    title = header(archs)
    lines = [
        title,
        tuple("---" for _ in title),
        *((f"`{name}`", f"`{how}`" if how else "", *rest) for name, how, *rest in rows(checked, shape)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a kernel has a problem, which is printed, or an error."""
    parser = argparse.ArgumentParser(prog="python -m qgraph.backends.cupy.check", description="Compile every kernel; show what it takes.")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), metavar="N", help="sm_N  [default: 80 90 120]")
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), metavar="NAME", help=f"of {', '.join(FAMILIES)}  [default: all]")
    parser.add_argument("--markdown", action="store_true", help="Print the table of backends/README.md.")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        checked = check(kernels(options.family), options.arch)
    except LoweringError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    if options.markdown:
        console.print(markdown(checked, options.arch), markup=False, soft_wrap=True)
    else:
        table = Table(*header(options.arch), caption="sm_N: registers of a thread / blocks that an SM holds; shared: bytes of a block")
        for row in rows(checked):
            table.add_row(*row)
        console.print(table)
    broken = [(c, p) for c in checked for p in c.problems]
    for c, problem in broken:
        console.print(f"{c.kernel.name} {configuration(c.kernel)} sm_{c.arch}: {problem}", markup=False, soft_wrap=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
