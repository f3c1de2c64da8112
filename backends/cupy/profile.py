"""Memory profile: what one emulated launch asked of memory, by place in the kernel (emulator/traffic.h counts it).

    with emulation(checked=True) as run:
        op(x, weight)
    for name, profile in run.profiles:
        profile.sector_efficiency, profile.bank_conflicts, profile.traffic

An access is one of a warp: what its lanes do together at one place. Caches are not modelled: `traffic` is what leaves the SMs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

SECTOR = 32
"""Global memory moves in pieces of so many bytes."""


@dataclass(frozen=True)
class Place:
    """The accesses of one place in the code. `line`: file.cu:17; `accesses`: of warps; `bytes`: that the lanes asked for, together;
    `served`: sectors of global or wavefronts of shared memory; `least`: how many could have done it."""

    line: str
    space: Literal["global", "shared"]
    kind: Literal["load", "store", "atomic"]
    accesses: int
    bytes: int
    served: int
    least: int


@dataclass(frozen=True)
class Profile:
    """What a launch did. `read`, `written`: bytes of its tensors, each counted once however often it is touched; `mma_int8`, `mma_float`:
    instructions of warps; `dp4a`: instructions of threads."""

    places: tuple[Place, ...]
    read: int
    written: int
    mma_int8: int
    mma_float: int
    dp4a: int

    def select(
        self, space: str, kinds: Iterable[str] = ("load", "store", "atomic"), lines: Iterable[str] | None = None
    ) -> tuple[Place, ...]:
        """The places of `space`, of these kinds, at these lines ("file.cu:17"), as of a main loop."""
        wanted = None if lines is None else set(lines)
        return tuple(p for p in self.places if p.space == space and p.kind in kinds and (wanted is None or p.line in wanted))

    @property
    def requested(self) -> int:
        """Bytes of global memory that the threads asked for, loads and stores."""
        return sum(p.bytes for p in self.select("global"))

    @property
    def sectors(self) -> int:
        return sum(p.served for p in self.select("global"))

    @property
    def least_sectors(self) -> int:
        """As few as could hold what each access of a warp asked for, were it in one piece."""
        return sum(p.least for p in self.select("global"))

    @property
    def sector_efficiency(self) -> float:
        """1 if every access of a warp touches no more sectors than its bytes need."""
        return self.least_sectors / self.sectors if self.sectors else 1.0

    @property
    def traffic(self) -> int:
        """Bytes between the SMs and the L2 cache, were there no L1: every sector of every access."""
        return SECTOR * self.sectors

    @property
    def unique(self) -> int:
        """Bytes that a launch must move even with a perfect cache: those read and those written, once each."""
        return self.read + self.written

    @property
    def redundancy(self) -> float:
        """Traffic over the bytes that must be moved: what caches and the tiling have to make up for."""
        return self.traffic / self.unique if self.unique else 1.0

    @property
    def wavefronts(self) -> int:
        return sum(p.served for p in self.select("shared"))

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts of shared memory beyond those that the same accesses take without conflicts."""
        return sum(p.served - p.least for p in self.select("shared"))
