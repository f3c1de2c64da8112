"""Scales in two levels: each group's scale is an integer multiple of one float scale of its output channel.

    (q - z) * scale[n, g] == s[n] * ((q - z) * k[n, g]),   |(q - z) * k| <= 127

So codes of at most 4 bits become int8 weights with one scale per channel, and products of 8-bit integers take them. Lin et al.,
QServe (2024), section 4.1, "progressive group quantization", where the int8 values of the first level keep within a protective range of
119, so that no code of the second leaves int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.qparams import minmax, reduce_rows
from qgraph.reference import fake_quantize
from qgraph.types import int_range

PROTECTED = 119
LARGEST = 127
LARGEST_BITS = 4
SAMPLE = 4
"""Channels that are looked at before all of them."""

Grid = tuple[Tensor, Tensor | None]
"""Scales [n, g] and zero points [n, g] (None: 0) of rows [n, k] in groups."""


def split(grid: Grid, dtype: str) -> tuple[Tensor, Tensor] | None:
    """(s [n], k [n, g]), both float32 and k whole numbers, with s * k = scale exactly; None for scales that are not of two levels."""
    scale, zero = grid
    if len(scale) > SAMPLE and split((scale[:SAMPLE], None if zero is None else zero[:SAMPLE]), dtype) is None:
        return None  # nearly always so for scales of one level
    least = scale.double().abs().amin(1, keepdim=True)
    s = torch.zeros_like(least)
    for parts in range(1, LARGEST + 1):
        unit = least / parts
        exact = ((scale / unit).round() * unit == scale).all(1, keepdim=True) & (unit.float() == unit)
        s = torch.where((s == 0) & exact, unit, s)
        if bool((s > 0).all()):
            k = (scale / s).round().float()
            return (s[:, 0].float(), k) if bool((k.abs() * _reach(grid, dtype) <= LARGEST).all()) else None
    return None


def snap(rows: Tensor, grid: Grid, dtype: str, group: int) -> Grid:
    """The grid in two levels that is nearest: of the multiples around each scale, the one that loses less of rows [n, k].

    `dtype` has at most 4 bits. Zero points move so that the least value that has a code stays, where int8 allows."""
    scale, zero = grid
    low, high = minmax(rows, 1, group)
    used = (low < 0) | (high > 0)
    s = _channel_scale(torch.where(used, scale.abs() * _reach(grid, dtype), 0.0))
    best, best_zero, least = scale, zero, torch.full_like(scale, torch.inf)
    for multiple in ((scale / s).abs().floor(), (scale / s).abs().ceil()):
        k = torch.where(used, multiple.clamp(min=1) * scale.sign(), 1.0)
        z = None if zero is None else _moved(zero, scale / (s * k), k, dtype)
        lost = _lost(rows, (s * k, z), dtype, group).where(k.abs() * _reach((k, z), dtype) <= LARGEST, torch.inf)
        better, least = lost < least, torch.minimum(lost, least)
        best = torch.where(better, s * k, best)
        best_zero = None if z is None or best_zero is None else torch.where(better, z, best_zero)
    return best, best_zero


def _reach(grid: Grid, dtype: str) -> Tensor:
    """How far codes are from the zero point at most, [n, g]."""
    low, high = int_range(dtype)
    z = torch.zeros_like(grid[0]) if grid[1] is None else grid[1].float()
    return torch.maximum(z - low, high - z)


def _channel_scale(extent: Tensor) -> Tensor:
    """s [n, 1] for groups [n, g] that reach so far; products with k are exact in float32, for s has 16 bits of mantissa, and k 7."""
    largest = extent.amax(1, keepdim=True) / PROTECTED
    s = ((largest.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    return torch.where(largest > 0, s, 1.0)


def _moved(zero: Tensor, by: Tensor, k: Tensor, dtype: str) -> Tensor:
    """Zero points for scales that are smaller by a factor; the old one where codes would leave int8."""
    low, high = int_range(dtype)
    moved = (low + (zero.float() - low) * by).round().clamp(low, high)
    fits = k.abs() * _reach((k, moved), dtype) <= LARGEST
    return torch.where(fits, moved, zero.float()).to(zero.dtype)


def _lost(rows: Tensor, grid: Grid, dtype: str, group: int) -> Tensor:
    """Squared error of each group [n, g]."""

    def total(error: Tensor) -> tuple[Tensor, Tensor]:
        found = error.square().sum(1)
        return found, found

    return reduce_rows(rows - fake_quantize(rows, *grid, dtype, 1, group), 1, group, total)[0]
