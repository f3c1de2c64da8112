"""scale = q * d: float scales -> 8-bit integers times one float per run of neighbours, exactly or to the nearest.

QLoRA (Dettmers et al., 2023, section 3, double quantization) and GGUF's super-blocks store scales so: 8 bits and a bit instead of 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
SHORTEST, LONGEST = 16, 256
"""Scales in a run. Shorter ones save little, longer ones are coarse beside the smallest scales in them."""

_KEPT = ~0x1FF
"""The bits of a float32 that a run's factor keeps: with 7 bits of an integer the product has 22 and is exact."""


@dataclass(frozen=True)
class Factored:
    """scale = q * d: q int8 [runs, length], d float32 [runs, 1]."""

    q: Tensor
    d: Tensor

    @property
    def value(self) -> Tensor:
        return self.q * self.d


def run_length(count: int, longest: int = LONGEST) -> int | None:
    """The longest run not above `longest` into which `count` scales can be cut, None where that is below 16."""
    return next(_lengths(count, longest), None)


def _lengths(count: int, longest: int) -> Iterator[int]:
    return (n for n in range(min(longest, count), SHORTEST - 1, -1) if count % n == 0)


def nearest(scale: Tensor, length: int) -> Factored:
    """The float32 scales in runs of `length`: d = max |scale| / 127, a hair less, and no q is 0 where scale is not."""
    runs = scale.reshape(-1, length)
    top = (runs.abs().amax(1, keepdim=True) / LARGEST).contiguous()
    d = (top.view(torch.int32) & _KEPT).view(torch.float32)
    q = torch.where(d > 0, runs / d, 0.0).round().clamp(-LARGEST, LARGEST)
    return Factored(torch.where(q == 0, runs.sign(), q).to(torch.int8), d)


def factored(scale: Tensor) -> Factored | None:
    """The same scales bit for bit in the longest runs that allow it; None where none does, as with scales that nobody made so."""
    flat = scale.reshape(-1)
    for length in _lengths(flat.numel(), LONGEST):
        if _is_exact(flat[: 8 * length], length) and _is_exact(flat, length):
            return nearest(flat, length)
    return None


def _is_exact(scale: Tensor, length: int) -> bool:
    return torch.equal(nearest(scale, length).value, scale.reshape(-1, length))
