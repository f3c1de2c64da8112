"""What a compiled kernel takes of a GPU: registers, stack, shared memory, its instructions, and how many blocks an SM holds.

Read out of cubins with `cuobjdump` (a wheel, nvidia-cuda-cuobjdump with nvidia-cuda-nvdisasm, or of a toolkit): no device and no driver.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qgraph.errors import LoweringError

RESERVED = 1024
"""Bytes of shared memory that the system takes of every block from sm_80 on."""


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of an SM share: threads, blocks, bytes of shared memory (and how many of them one block may have), registers."""

    threads: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65536

    def holds(self, threads: int, registers: int, shared: int) -> int:
        """How many blocks of `threads` threads are resident at once, with that many registers a thread and bytes of shared memory; 0: not
        even one.

        Registers are given to warps, 256 at a time, out of four equal parts (CUDA's occupancy calculator, cuda_occupancy.h)."""
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = 4 * (self.registers // 4 // per_warp) // warps if per_warp else self.blocks
        by_shared = 0 if shared > self.shared_per_block else self.shared // (-(-shared // 128) * 128 + RESERVED)
        return min(self.blocks, self.threads // (32 * warps), by_registers, by_shared)


_LARGE = Multiprocessor(2048, 32, 164 << 10, 163 << 10)
_HOPPER = Multiprocessor(2048, 32, 228 << 10, 227 << 10)
_SMALL = Multiprocessor(1536, 24, 100 << 10, 99 << 10)
MULTIPROCESSORS = {
    80: _LARGE,
    86: Multiprocessor(1536, 16, 100 << 10, 99 << 10),
    89: _SMALL,
    90: _HOPPER,
    100: _HOPPER,
    120: _SMALL,
}
"""CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""


@dataclass(frozen=True)
class Usage:
    """One kernel of a cubin. `stack` and `local`: bytes of a thread in memory, which is where registers spill to. `shared`: static bytes.
    `threads`: of a block at most, by its __launch_bounds__; 0 without. `opcodes`: how often each instruction occurs ("LDG.E.128")."""

    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    opcodes: Counter[str]

    def has(self, instruction: str) -> bool:
        """Whether some opcode starts with the instruction's first word and has its other words: LDG.128 is in LDG.E.128.CONSTANT."""
        first, *others = instruction.split(".")
        return any(name == first and set(others) <= set(rest) for name, *rest in (o.split(".") for o in self.opcodes))


@cache
def cuobjdump() -> Path:
    """The tool's path. Raises LoweringError where it is not installed."""
    for folder in _wheel_folders():
        if (folder / "cuobjdump").exists():
            return folder / "cuobjdump"
    if (found := shutil.which("cuobjdump")) is not None:
        return Path(found)
    raise LoweringError(
        "compiled kernels are read with cuobjdump, which is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or put "
        "a CUDA toolkit's bin folder on PATH"
    )


def _wheel_folders() -> Iterable[Path]:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from sorted(Path(folder).glob("cu*/bin"), reverse=True)


def usages(cubin: Path, arch: int) -> dict[str, Usage]:
    """Every kernel of a cubin for sm_<arch>, by name. Raises LoweringError where cuobjdump cannot read the file."""
    text = _dump(cubin, "--dump-resource-usage", "-elf", "-sass")
    threads, opcodes = _launch_bounds(text), _opcodes(text)
    found = {
        name: Usage(
            registers=fields["REG"],
            stack=fields["STACK"],
            local=fields["LOCAL"],
            # From sm_90 on the reserved bytes are counted.
            shared=max(0, fields["SHARED"] - (RESERVED if arch >= 90 else 0)),
            threads=threads.get(name, 0),
            opcodes=opcodes.get(name, Counter()),
        )
        for name, fields in _resources(text).items()
    }
    if not found or any(not u.opcodes for u in found.values()):
        raise LoweringError(f"{cubin}: cuobjdump shows no machine code; is nvdisasm (pip install nvidia-cuda-nvdisasm) beside it?")
    return found


def _dump(cubin: Path, *options: str) -> str:
    done = subprocess.run([cuobjdump(), *options, cubin], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoweringError(f"cuobjdump cannot read {cubin}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout


def _resources(text: str) -> dict[str, dict[str, int]]:
    """ " Function f:" and, in the line behind it, "REG:16 STACK:0 SHARED:0 LOCAL:0 ..."."""
    found = re.findall(r"^ Function (\S+?):\n\s+(REG:.*)$", text, re.MULTILINE)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", fields)} for name, fields in found}


def _launch_bounds(text: str) -> dict[str, int]:
    """Threads by the attribute MAX_THREADS (or REQNTID), x y z in hexadecimal, of each section .nv.info.<kernel>."""
    found = {}
    for name, body in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.|\Z)", text, re.MULTILINE | re.DOTALL):
        if bounds := re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s*\w+\s+Value:\s*((?:0x[0-9a-f]+ ?)+)", body):
            x, y, z = (int(v, 16) for v in bounds[1].split())
            found[name] = x * y * z
    return found


def _opcodes(text: str) -> dict[str, Counter[str]]:
    """What stands behind "/*0010*/" and a predicate, in the listing of each function."""
    found = {}
    for name, body in re.findall(r"^\s*Function : (\S+)\n(.*?)(?=^\s*Function : |\Z)", text, re.MULTILINE | re.DOTALL):
        found[name] = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE))
    return found
