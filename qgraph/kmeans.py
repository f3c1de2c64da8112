"""1-D k-means of many rows at once: the levels that weighted values of a row lie nearest to.

Clusters on a line are intervals, so a row is sorted and summed up once; an interval's cost then takes two differences. Where intervals may
end at `BINS` places only, dynamic programming finds the best ones exactly (Wang & Song, Ckmeans.1d.dp, 2011); Lloyd's iteration takes
it from there to a fixed point. Rows of at most `BINS` values are solved exactly; longer ones come within 1 % of the least cost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BINS = 4
"""Places per level where intervals may end, but at least 32."""

ROUNDS = 20
"""Lloyd's iterations; most rows are done after 12."""

CHUNK = 2**21
"""Numbers that are worked on at a time."""

FAINT = 1e-6
"""What a value without weight counts, as a share of the row's mean weight: its code should be sensible all the same."""


def kmeans(rows: Tensor, weight: Tensor, count: int) -> Tensor:
    """Ascending levels, float32 [n, count], for the values [n, m] of each row with weights >= 0 [n, m], that make
    sum(weight * (value - nearest level)**2) small."""
    step = max(1, CHUNK // max(rows.shape[1], _bins(count) ** 2))
    parts = zip(rows.split(step), weight.split(step), strict=True)
    return torch.cat([_solve(r.double().contiguous(), w.double(), count) for r, w in parts]).float()


def _bins(count: int) -> int:
    return max(32, BINS * count)


def _solve(rows: Tensor, weight: Tensor, count: int) -> Tensor:
    mean = weight.mean(1, keepdim=True)
    weight = torch.where(mean > 0, weight.clamp(min=FAINT * mean), 1.0)
    x, order = rows.sort(1)
    weight = weight.gather(1, order)
    total, moment = (pad(t.cumsum(1), (1, 0)) for t in (weight, weight * x))
    ends = _best_intervals(_places(x, weight, _bins(count)), total, moment, count)
    levels = x.gather(1, ((ends[:, 1:] + ends[:, :-1]) // 2).clamp(max=x.shape[1] - 1))
    levels = _centres(ends, total, moment, levels)
    for _ in range(ROUNDS):
        inner = torch.searchsorted(x, (levels[:, 1:] + levels[:, :-1]) / 2, right=True)
        new = _centres(torch.cat([ends[:, :1], inner, ends[:, -1:]], 1), total, moment, levels)
        if torch.equal(new, levels):
            break
        levels = new
    return levels


def _centres(ends: Tensor, total: Tensor, moment: Tensor, old: Tensor) -> Tensor:
    """Weighted means of the intervals between `ends` [n, count + 1]; an empty one keeps its old level."""
    w, m = (t.gather(1, ends).diff(dim=1) for t in (total, moment))
    return torch.where(w > 0, m / w, old).sort(1).values


def _places(x: Tensor, weight: Tensor, bins: int) -> Tensor:
    """Positions 0 .. m in a sorted row where intervals may end, [n, bins + 1], as dense as the best levels would be of very many: as the
    cube root of the density of weight (Panter & Dite, 1951)."""
    n, m = x.shape
    if m <= bins:
        return torch.arange(m + 1).expand(n, -1)
    gap = pad((x[:, 2:] - x[:, :-2]) / 2, (1, 1), mode="replicate").clamp(min=1e-30)
    mass = (weight.pow(1 / 3) * gap.pow(2 / 3)).cumsum(1)
    inner = torch.searchsorted(mass, mass[:, -1:] * torch.arange(1, bins) / bins) + 1
    return pad(pad(inner.clamp(max=m), (1, 0)), (0, 1), value=m)


def _best_intervals(places: Tensor, total: Tensor, moment: Tensor, count: int) -> Tensor:
    """The places [n, count + 1] that bound the `count` intervals of least cost, which is that of greatest sum(moment**2 / total)."""
    w, m = (t.gather(1, places).float() for t in (total, moment))
    width, height = (t[:, None, :] - t[:, :, None] for t in (w, m))
    gain = torch.where(width > 0, height.square() / width, 0.0)  # of the interval from place i to place j
    gain += torch.full(gain.shape[1:], -torch.inf).tril(-1)
    best, choices = gain[:, 0], []
    for _ in range(count - 1):
        best, choice = (best[:, :, None] + gain).max(1)
        choices.append(choice)
    path = [torch.full((len(places), 1), places.shape[1] - 1)]
    for choice in reversed(choices):
        path.append(choice.gather(1, path[-1]))
    path.append(torch.zeros_like(path[0]))
    return places.gather(1, torch.cat(path[::-1], 1))
