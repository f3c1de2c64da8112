"""QGRAPH_CUDA=emulate: the unchanged .cu files built by g++ and run on the CPU, one fiber per CUDA thread.

A build is "fast" or "checked". A checked one is compiled with the compiler's memory-access hooks (-fsanitize=thread, without its runtime):
each access of the kernel is seen, so that accesses out of bounds or misaligned, races in shared memory and reads of unwritten memory become
errors, and a memory profile can be taken (emulator/checks.h).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import cast

from qgraph.backends.cupy.profile import Place, Profile
from qgraph.backends.cupy.toolchain import HERE, cuda_include, include_folders, keep, kept, source, whole
from qgraph.errors import LoweringError

FLAGS = ("-std=c++17", "-O2", "-march=x86-64-v3", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-w")
CHECKED = "-DQG_CHECKED"
EMULATOR = HERE / "emulator"
HOOKS = (CHECKED, "-fsanitize=thread", "-g1", "-gdwarf-4")
KERNEL = re.compile(r"QG_KERNEL\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(")

Dims = tuple[int, int, int]


@dataclass
class Emulation:
    """How launches are emulated. `schedule`: the threads of a block run in order (0), in reverse (1), or shuffled with that seed.
    `profiles`: the kernel's name and what it asked of memory for each launch so far, if checked."""

    checked: bool = False
    schedule: int = 0
    profiles: list[tuple[str, Profile]] = field(default_factory=list)


_CHOSEN: ContextVar[Emulation | None] = ContextVar("emulation", default=None)


@contextmanager
def emulation(*, checked: bool = False, schedule: int = 0) -> Iterator[Emulation]:
    """Inside, kernels whose tensors are on the CPU are emulated so, whatever $QGRAPH_CUDA says."""
    token = _CHOSEN.set(Emulation(checked, schedule))
    try:
        yield cast(Emulation, _CHOSEN.get())
    finally:
        _CHOSEN.reset(token)


def emulated() -> Emulation | None:
    """The emulation that is on, by `emulation` or by QGRAPH_CUDA=emulate. Raises LoweringError for another word than emulate."""
    if (chosen := _CHOSEN.get()) is not None:
        return chosen
    asked = os.environ.get("QGRAPH_CUDA", "")
    if asked not in ("", "emulate"):
        raise LoweringError(f"QGRAPH_CUDA={asked}: 'emulate' is what it can be, or unset for the GPU")
    return Emulation() if asked else None


@dataclass(frozen=True)
class Extent:
    """The memory of a tensor that is an argument of a launch: its address, how many bytes, the number of the argument."""

    address: int
    bytes: int
    argument: int


class Emulated:
    """One .cu file with its definitions, built for the CPU."""

    def __init__(self, path: Path, checked: bool = False):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.emu_error.restype = ctypes.c_char_p
        self.library.emu_stack_bytes.restype = ctypes.c_size_t
        self.library.emu_stacks(ctypes.c_void_p(ctypes.addressof(_stacks(self.library.emu_stack_bytes()))))
        self.lines: dict[int, str] = {}
        self.checked = checked
        if checked:
            self.library.emu_base.restype = ctypes.c_uint64
            self.library.emu_places.restype = ctypes.POINTER(_Place)
            for address, size, name in _shared_arrays(path):
                self.library.emu_static_shared(ctypes.c_uint64(address), ctypes.c_uint64(size), name.encode())

    def launch(
        self,
        name: str,
        grid: Dims,
        block: Dims,
        shared: int,
        arguments: Sequence[ctypes._SimpleCData[object]],
        schedule: int = 0,
        tensors: Sequence[Extent] = (),
    ) -> Profile | None:
        """Runs a whole grid; gives its profile, if checked. `tensors`: the memory that a checked kernel may touch. Raises LoweringError
        with what the emulator found wrong."""
        self.library.emu_schedule(schedule)
        if self.checked:
            self._allow(tensors)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        dims = (ctypes.c_uint * 6)(*grid, *block)
        if getattr(self.library, f"emu_launch_{name}")(dims, ctypes.c_uint(shared), pointers):
            raise LoweringError(f"kernel {name}: {self._with_lines(self.library.emu_error().decode())}")
        return self._profile() if self.checked else None

    def _allow(self, tensors: Sequence[Extent]) -> None:
        n = len(tensors)
        addresses, sizes = (ctypes.c_uint64 * n)(*(t.address for t in tensors)), (ctypes.c_uint64 * n)(*(t.bytes for t in tensors))
        self.library.emu_tensors(n, addresses, sizes, (ctypes.c_int * n)(*(t.argument for t in tensors)))

    def _profile(self) -> Profile:
        totals = (ctypes.c_uint64 * 5)()
        n = self.library.emu_profile(totals)
        found = self.library.emu_places()[:n]
        self._find_lines(p.pc for p in found)
        kinds = ("load", "store", "atomic")
        places = (
            Place(self.lines[p.pc], "shared" if p.shared else "global", kinds[p.kind], p.warps, p.bytes, p.served, p.least)  # type: ignore[arg-type]
            for p in found
        )
        return Profile(tuple(places), *totals)

    def _with_lines(self, message: str) -> str:
        """{address} -> file.cu:17; fast builds know no lines and leave them out."""
        if not self.checked:
            return re.sub(r",? at \{0x[0-9a-f]+\}", "", message)
        offsets = {m: int(m, 16) - self.library.emu_base() for m in re.findall(r"\{(0x[0-9a-f]+)\}", message)}
        self._find_lines(offsets.values())
        for address, offset in offsets.items():
            message = message.replace(f"{{{address}}}", self.lines[offset])
        return message

    def _find_lines(self, offsets: Iterable[int]) -> None:
        """Fills `lines` for return addresses, as offsets in the library: the innermost line that is not in qg.cuh or the emulator."""
        new = sorted(set(offsets) - self.lines.keys())
        if not new:
            return
        command = ["addr2line", "-a", "-i", "-e", str(self.path), *(f"{o - 1:#x}" for o in new)]
        for offset, found in zip(new, re.split(r"^0x[0-9a-f]+\n", _output(command), flags=re.MULTILINE)[1:], strict=True):
            frames = [Path(line.split(" (")[0]).name for line in found.splitlines()]
            kernel = [f for f in frames if f.split(":")[0] not in _not_the_kernel()]
            self.lines[offset] = (kernel or ["an unknown line"])[0]


@cache
def _stacks(size: int) -> ctypes.Array[ctypes.c_char]:
    """Memory for the stacks of emulated threads: one for all libraries, or a process would run out of mappings."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return (ctypes.c_char * size).from_buffer(memory)


class _Place(ctypes.Structure):
    """emulator/traffic.h, Place."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("pc", "shared", "kind", "warps", "lanes", "bytes", "served", "least")]


def _shared_arrays(path: Path) -> Iterator[tuple[int, int, str]]:
    """Address, bytes and name of the static __shared__ arrays: variables inside functions (kernel::tile)."""
    for address, size, name in re.findall(
        r"^(\w+) (\w+) [bBdDuV] ((?!guard |emu::|std::).*::\w+.*)$", _output(["nm", "-SC", str(path)]), re.MULTILINE
    ):
        yield int(address, 16), int(size, 16), name


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise LoweringError(f"checked emulation needs {command[0]}, which comes with g++'s binutils: {e}") from e


@cache
def build(file: str, defines: tuple[tuple[str, str], ...] = (), checked: bool = False, folder: Path = HERE) -> Emulated:
    """Compiles (or finds in the cache) `folder/file` with its definitions. Raises LoweringError with the compiler's words."""
    flags = (*FLAGS, *(HOOKS if checked else ()))
    target = kept("emulated", ".so", source(file, folder), _emulator(), repr(defines), *flags)
    if not whole(target):
        exports = "".join(f"QG_EXPORT({name})\n" for name in KERNEL.findall((folder / file).read_text()))
        defined = "".join(f"#define {k} {v}\n" for k, v in defines)
        with tempfile.TemporaryDirectory() as scratch:
            unit, built, linked = (Path(scratch) / n for n in ("unit.cpp", "unit.o", "unit.so"))
            unit.write_text(f'{defined}#include "{folder / file}"\n{exports}')
            _run([*_compiler(), *flags, *_includes(), "-include", str(_header(flags)), "-c", str(unit), "-o", str(built)], file)
            # The checks come first: of a function that both have, theirs is without the hooks that would call it again.
            parts = [str(_checks()), str(built)] if checked else [str(built)]
            _run([*_compiler(), "-shared", *parts, "-o", str(linked)], file)
            keep(target, linked.read_bytes())
    return Emulated(target, checked)


@cache
def _not_the_kernel() -> frozenset[str]:
    """Files whose lines say nothing of a kernel. By name: a build may be kept from a checkout in another folder."""
    return frozenset(("qg.cuh", *(p.name for p in EMULATOR.glob("*.h"))))


@cache
def _emulator() -> str:
    """The emulator's own sources."""
    return "\n".join(p.read_text() for p in sorted(EMULATOR.glob("*.h")))


@cache
def _checks() -> Path:
    """checks.h compiled, without the hooks."""
    flags = (*FLAGS, CHECKED)
    target = kept("emulated", ".o", _emulator(), *flags)
    if not whole(target):
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch) / "checks.o"
            _run([*_compiler(), *flags, *_includes(), "-x", "c++", "-c", str(EMULATOR / "checks.h"), "-o", str(built)], "checks.h")
            keep(target, built.read_bytes())
    return target


@cache
def _header(flags: tuple[str, ...]) -> Path:
    """emu.h beside its precompiled form, which halves the time of a build."""
    forward = kept("emulated", ".h", _emulator(), str(EMULATOR), str(cuda_include()), *flags)
    precompiled = forward.with_suffix(".h.gch")
    if not precompiled.exists():
        keep(forward, f'#include "{EMULATOR / "emu.h"}"\n'.encode())
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "emu.gch"
            _run([*_compiler(), *flags, *_includes(), "-x", "c++-header", str(forward), "-o", str(made)], "emu.h")
            keep(precompiled, made.read_bytes())
    return forward


@cache
def _compiler() -> tuple[str, ...]:
    if (found := shutil.which("g++")) is None:
        raise LoweringError("QGRAPH_CUDA=emulate builds the kernels with g++, which is not installed here")
    return (found,)


@cache
def _includes() -> tuple[str, ...]:
    return tuple(f"-I{f}" for f in include_folders())


def _run(command: list[str], file: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoweringError(f"g++ cannot build {file}:\n{done.stderr[-4000:]}")
