"""What the matrix products move and how many blocks they start, by their tilings: an operand once for each block that reads it, partial sums
written and read. The tests compare it with what the emulator counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qgraph.backends.cupy import w8a8, weight_only
from qgraph.backends.cupy.roofline import SECTOR, Device, Work, predicted_fraction


@dataclass(frozen=True)
class Launch:
    """Bytes between SMs and memory without a cache between them, blocks, and how many of these an SM holds at least."""

    bytes: int
    blocks: int
    per_sm: int

    def fraction(self, device: Device, work: Work) -> float:
        """Of the roofline of `device` that such a launch can reach."""
        return predicted_fraction(device, work, sectors=-(-self.bytes // SECTOR), blocks=self.blocks, blocks_per_sm=self.per_sm)


def integer_linear(m: int, n: int, k: int, out: torch.dtype, device: Device) -> Launch:
    """Of w8a8_linear, as `w8a8.choose` has it on the device."""
    config = w8a8.choose(m, n, k, arch=device.arch, sms=device.sms)
    tile, wide = config.tile, config.outputs * config.rounds
    high, across = (tile.m, tile.n) if tile is not None else (config.rows, wide)
    rows, columns = -(-m // high), -(-n // across)
    partial = 8 * config.splits * rows * columns * high * across if config.splits > 1 else 0
    moved = m * k * columns + n * k * rows + m * n * out.itemsize + 8 * n + partial
    return Launch(moved, rows * columns * config.splits, w8a8.RESIDENT if tile is not None else 1)


def weight_only_linear(m: int, n: int, k: int, bits: int, group: int, real: torch.dtype, device: Device, *, zeros: bool) -> Launch:
    """Of weight_only_linear, as `weight_only.choose` has it on the device."""
    plan = weight_only.choose(m, n, k, bits, real, device.arch)
    rows, columns = -(-m // plan.config.rows), -(-n // plan.config.outputs)
    least = weight_only.work(m, n, k, bits, group, real, zeros=zeros).bytes
    results = m * n * real.itemsize
    x = m * k * (2 if isinstance(plan.config, weight_only.Gemm) else real.itemsize)
    weight = least - results - m * k * real.itemsize
    partial = 8 * plan.splits * m * n if plan.splits > 1 else 0
    return Launch(x * columns + weight * rows + results + partial, rows * columns * plan.splits, plan.config.blocks)
