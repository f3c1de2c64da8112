"""Bytes and operations -> the time that a device needs at least: its roofline.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore architectures", CACM 52(4), 2009.
Nothing here is measured; times measured on a device are tests/bench/cuda.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qgraph.backends.cupy.resources import MULTIPROCESSORS, Multiprocessor

SECTOR = 32
"""Bytes that a GPU moves at least between its memory and its caches."""


@dataclass(frozen=True)
class Work:
    """What a kernel cannot avoid: `bytes` read from and written to global memory, each once, and operations by the unit that does them
    (a multiply and an add count as two): int8 and fp16 on tensor cores, fp32 on the ordinary cores."""

    bytes: int
    int8_ops: int = 0
    fp16_ops: int = 0
    fp32_ops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bytes + other.bytes, self.int8_ops + other.int8_ops, self.fp16_ops + other.fp16_ops, self.fp32_ops + other.fp32_ops
        )


@dataclass(frozen=True)
class Device:
    """A GPU as its maker states it, at boost clock and without sparsity: bytes/s of its memory, operations/s, SMs.

    `fp16` is the rate of half-precision tensor cores that accumulate in float32, as the kernels do."""

    name: str
    arch: int
    bandwidth: float
    int8: float
    fp16: float
    fp32: float
    sms: int

    @property
    def multiprocessor(self) -> Multiprocessor:
        """What an SM holds: threads, blocks, registers, shared memory."""
        return MULTIPROCESSORS[self.arch]

    def times(self, work: Work) -> dict[str, float]:
        """Seconds that each unit needs at least: memory, tensor (int8 and fp16 share these cores), fp32."""
        return {
            "memory": work.bytes / self.bandwidth,
            "tensor": work.int8_ops / self.int8 + work.fp16_ops / self.fp16,
            "fp32": work.fp32_ops / self.fp32,
        }

    def time(self, work: Work) -> float:
        """Seconds at the roofline: the units work at the same time, so the slowest counts."""
        return max(self.times(work).values())

    def bound(self, work: Work) -> str:
        """The unit that `time` waits for: memory, tensor or fp32."""
        times = self.times(work)
        return max(times, key=lambda unit: times[unit])


A100_40 = Device("A100 SXM 40GB", 80, 1.555e12, 624e12, 312e12, 19.5e12, 108)
"""NVIDIA A100 Tensor Core GPU Architecture (whitepaper, 2020)."""
A100 = Device("A100 SXM 80GB", 80, 2.039e12, 624e12, 312e12, 19.5e12, 108)
"""NVIDIA A100 Tensor Core GPU datasheet (2021)."""
H100 = Device("H100 SXM", 90, 3.35e12, 1979e12, 989.4e12, 66.9e12, 132)
"""NVIDIA H100 Tensor Core GPU Architecture (whitepaper, 2022); the bandwidth of the datasheet."""
H200 = Device("H200 SXM", 90, 4.8e12, 1979e12, 989.4e12, 66.9e12, 132)
"""NVIDIA H200 Tensor Core GPU datasheet (2023)."""
RTX4090 = Device("RTX 4090", 89, 1.008e12, 660.6e12, 165.2e12, 82.6e12, 128)
"""NVIDIA Ada GPU Architecture (whitepaper v2, 2022)."""

DEVICES = (A100_40, A100, H100, H200, RTX4090)
_CALLED = {"A100-SXM4-40GB": A100_40, "A100-SXM4-80GB": A100, "H100 80GB HBM3": H100, "H200": H200, "RTX 4090": RTX4090}


def known(name: str) -> Device | None:
    """The device that a driver calls so ("NVIDIA H100 80GB HBM3"), None for one without numbers here."""
    return _CALLED.get(name.removeprefix("NVIDIA ").removeprefix("GeForce "))


def traffic_fraction(least: int, sectors: int) -> float:
    """The least bytes over those that were moved, where `sectors` sectors of 32 bytes were touched (the emulator's memory profile)."""
    return least / (sectors * SECTOR) if sectors else 1.0


def wave_fraction(blocks: int, resident: int) -> float:
    """How much of the device `blocks` equal blocks keep busy, `resident` of which run at once (SMs x blocks an SM holds): the last wave is
    as long as the others."""
    return blocks / (ceil(blocks / resident) * resident) if blocks else 1.0


def predicted_fraction(device: Device, work: Work, *, sectors: int, blocks: int, blocks_per_sm: int = 1) -> float:
    """The fraction of the roofline that a launch can reach: its own traffic in the place of the least, and whole waves of blocks.

    Pessimistic where blocks read the same tiles: `sectors` counts what the SMs ask for, of which the second-level cache serves a part."""
    moved = Work(sectors * SECTOR, work.int8_ops, work.fp16_ops, work.fp32_ops)
    return device.time(work) / device.time(moved) * wave_fraction(blocks, device.sms * blocks_per_sm)
