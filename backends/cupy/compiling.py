"""NVRTC: .cu files -> cubin, kept on disk by source, definitions and architecture. Needs CuPy, but neither a driver nor a device."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

from qgraph.backends.cupy.toolchain import HERE, elf_size, include_folders, keep, kept, source, whole
from qgraph.errors import LoweringError

FLAGS = ("--std=c++17", "-default-device")
OLDEST = 75
_LOADING = Lock()
"""While one thread has CuPy load NVRTC, another one would find it there, but not yet its libnvrtc-builtins (CuPy 14.2)."""


def nvrtc() -> Any:
    """cupy.cuda.nvrtc. Raises LoweringError where CuPy or its NVRTC is missing."""
    try:
        from cupy.cuda import nvrtc as found

        found.getVersion()
    except (ImportError, RuntimeError, OSError) as e:
        raise LoweringError(
            f"the cupy backend compiles its kernels with CuPy's NVRTC ({type(e).__name__}: {e}): pip install 'qgraph[cuda]', or set "
            "QGRAPH_CUDA=emulate to run them on the CPU"
        ) from e
    return found


def cubin(file: str, defines: tuple[tuple[str, str], ...], arch: int, folder: Path = HERE) -> Path:
    """The compiled file for sm_<arch> (80, 90, 120). Raises LoweringError with NVRTC's log, or for a device older than sm_75."""
    if arch < OLDEST:
        raise LoweringError(f"{file}: sm_{arch} is too old for the kernels; they need sm_{OLDEST} or newer")
    text = source(file, folder)
    flags = [*FLAGS, f"-arch=sm_{arch}", *(f"-D{k}={v}" for k, v in defines)]
    target = kept("cubin", ".cubin", text, *flags, _version())
    if not whole(target):
        keep(target, _compile(file, (folder / file).read_text(), [*flags, *(f"-I{f}" for f in include_folders())]))
    return target


def _version() -> str:
    with _LOADING:
        major, minor = nvrtc().getVersion()
    return f"{major}.{minor}"


def _compile(file: str, text: str, flags: list[str]) -> bytes:
    compiler = nvrtc()
    program = compiler.createProgram(text, file, (), ())
    try:
        try:
            compiler.compileProgram(program, tuple(flags))
        except compiler.NVRTCError as e:
            raise LoweringError(f"NVRTC cannot compile {file}:\n{compiler.getProgramLog(program)[-4000:]}") from e
        # CuPy takes the last byte of what NVRTC gives for the end of a text, and drops it.
        found = bytes(compiler.getCUBIN(program))
        return found.ljust(elf_size(found) or 0, b"\0")
    finally:
        compiler.destroyProgram(program)
