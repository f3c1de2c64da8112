"""One way to start a kernel: on the GPU through CuPy, on torch's current stream; or, with QGRAPH_CUDA=emulate, on the CPU.

Arguments are tensors (their address is passed), None (a null pointer), int (int32) and float (float32), in the kernel's order. Nothing waits
for the device, so launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgraph.backends.cupy.compiling import cubin
from qgraph.backends.cupy.emulate import Extent, build, emulated
from qgraph.backends.cupy.toolchain import HERE
from qgraph.errors import LoweringError

Argument = Tensor | int | float | None
Definition = str | int | bool

TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
"""Torch's float types as kernels name them."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of a .cu file in this folder, with the -D definitions that it is compiled with. `shared`: bytes of dynamic shared memory
    that a launch may ask for at most. `expects`: instructions that its machine code must hold ("IMMA", "LDG.E.128", see check.py)."""

    file: str
    name: str
    defines: tuple[tuple[str, str], ...] = ()
    shared: int = 0
    folder: Path = HERE
    expects: tuple[str, ...] = ()

    def __call__(self, grid: tuple[int, ...], block: int, *arguments: Argument) -> None:
        """Starts `grid` blocks of `block` threads with `shared` bytes of dynamic shared memory.

        Raises LoweringError where the tensors are on no device that can run it."""
        if 0 in grid:
            return
        x, y, z = (*grid, 1, 1, 1)[:3]
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        if device.type == "cuda":
            _on_gpu(self, device.index, (x, y, z), block, arguments)
        elif (how := emulated()) is not None:
            module = build(self.file, self.defines, how.checked, self.folder)
            done = module.launch(
                self.name, (x, y, z), (block, 1, 1), self.shared, [_c(a) for a in arguments], how.schedule, _extents(arguments)
            )
            if done is not None:
                how.profiles.append((self.name, done))
        else:
            raise LoweringError(
                f"kernel {self.name} has its tensors on {device}: move the program's inputs to a CUDA device, or set QGRAPH_CUDA=emulate"
            )


def kernel(file: str, name: str, /, *, shared: int = 0, expects: tuple[str, ...] = (), **defines: Definition) -> Kernel:
    """kernel("quantize.cu", "quantize_rows", T="__half", BLOCK=256)"""
    defined = tuple((k, str(int(v)) if isinstance(v, bool) else str(v)) for k, v in sorted(defines.items()))
    return Kernel(file, name, defined, shared, expects=expects)


def _c(argument: Argument) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


def _extents(arguments: tuple[Argument, ...]) -> list[Extent]:
    """From the first to the last element of each tensor."""
    tensors = [(i, a) for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.numel()]
    last = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for _, t in tensors]
    return [Extent(t.data_ptr(), (end + 1) * t.element_size(), i) for (i, t), end in zip(tensors, last, strict=True)]


def _on_gpu(kernel: Kernel, device: int, grid: tuple[int, int, int], block: int, arguments: tuple[Argument, ...]) -> None:
    import cupy

    with cupy.cuda.Device(device), _stream(torch.cuda.current_stream(device).cuda_stream):
        _compiled(kernel, device)(grid, (block, 1, 1), tuple(_cupy(a) for a in arguments), shared_mem=kernel.shared)


def _cupy(argument: Argument) -> Any:
    """CuPy passes numpy scalars with their own size."""
    if argument is None:
        return np.uint64(0)
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.float32(argument) if isinstance(argument, float) else np.int32(argument)


@lru_cache(maxsize=64)
def _stream(pointer: int) -> Any:
    import cupy

    return cupy.cuda.ExternalStream(pointer)


@cache
def _compiled(kernel: Kernel, device: int) -> Any:
    """The kernel loaded on a device, allowed the shared memory that it asks for."""
    import cupy

    major, minor = torch.cuda.get_device_capability(device)
    module = cupy.RawModule(path=str(cubin(kernel.file, kernel.defines, 10 * major + minor, kernel.folder)))
    found = module.get_function(kernel.name)
    if kernel.shared > 48 << 10:
        found.max_dynamic_shared_size_bytes = kernel.shared
    return found
