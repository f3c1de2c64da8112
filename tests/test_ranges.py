"""Range choices against brute force: entropy as published, least squared error by exhaustion, weights and streams alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.choices import MSE, Entropy, Percentile
from qgraph.errors import CalibrationError, RecipeError
from qgraph.histogram import Histogram, Values
from qgraph.observe import observer, range_of
from qgraph.ops import Q, choose_qparams
from qgraph.ranges import Range
from qgraph.types import PerAxis, PerGroup, PerTensor, QSpec

UINT8, INT8, INT4, UINT4 = QSpec("uint8", False), QSpec("int8"), QSpec("int4"), QSpec("uint4", False)


def data(name: str, n: int = 20_000) -> Tensor:
    g = torch.Generator().manual_seed(7)
    normal = torch.randn(n, generator=g) * 1.7 + 0.3
    match name:
        case "normal":
            return normal
        case "relu":
            return normal.relu()
        case "negative":
            return -normal.abs() - 0.5
        case "heavy tails":
            return normal**3
        case "outlier":
            return torch.cat([normal, torch.tensor([400.0])])
    return normal.sigmoid() * normal


NAMES = ["normal", "relu", "negative", "heavy tails", "outlier", "silu"]


def histogram(x: Tensor, bins: int = 2048) -> Histogram:
    return Histogram(bins).of([x], x.amin(), x.amax())


def error(x: Tensor, found: Range, spec: QSpec) -> float:
    """What quantize-dequantize really costs."""
    scale, zero_point = choose_qparams(*found, spec)
    return float((Q.fake_quantize(x, scale, zero_point, spec.dtype) - x).double().square().sum())


def least(x: Tensor, spec: QSpec, steps: int = 60) -> float:
    """The least error on a grid of ranges, by trying them all."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shrink = [1.12**-i for i in range(steps)]
    if spec.symmetric:
        r = max(-low, high)
        ranges = [(-r * a, r * a) for a in shrink]
    else:
        ranges = [(low * a, high * b) for a in (shrink if low else [1]) for b in (shrink if high else [1])]
    scale, zero_point = (p.double().unsqueeze(1) for p in choose_qparams(*torch.tensor(ranges).T, spec))
    q = ((x.double() / scale).round() + zero_point).clamp(*spec.range)
    return float(((q - zero_point) * scale - x).square().sum(1).min())


@pytest.mark.parametrize("spec", [INT8, INT4, UINT8, UINT4, QSpec("uint8"), QSpec("int3", False)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_mse_is_as_good_as_the_best_of_all_ranges(name: str, spec: QSpec) -> None:
    x = data(name, 2000)
    best = least(x, spec, 60 if spec.symmetric else 30)
    tolerance = 1.02 if spec.symmetric or spec.bits == 8 else 1.08
    for found in (histogram(x), Values(x.unsqueeze(0))):
        chosen = MSE()(found, spec)
        assert error(x, tuple(t.reshape(()) for t in chosen), spec) <= tolerance * best


def test_mse_cuts_what_few_bits_cannot_hold_and_little_where_there_are_many() -> None:
    x = data("normal")
    ranges = [float(MSE()(histogram(x), QSpec(f"int{bits}"))[1]) for bits in (2, 4, 8, 16)]
    assert ranges == sorted(ranges) and ranges[0] < 0.7 * ranges[1] < 0.7 * ranges[2]
    assert ranges[3] > 0.9 * float(x.abs().max())


@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=30), st.integers(-20, 20), st.booleans(), st.sampled_from(["int2", "uint3", "int8"])
)
@settings(max_examples=150, deadline=None)
def test_the_error_of_values_is_that_of_fake_quantize(values: list[int], exponent: int, symmetric: bool, dtype: str) -> None:
    x, spec = torch.tensor(values).float() * 1.1 * 2.0**exponent, QSpec(dtype, symmetric)
    low, high = x.amin() * torch.tensor([1.0, 0.6, 0.3]), x.amax() * torch.tensor([1.0, 0.4, 0.7])
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    got = Values(x.unsqueeze(0)).squared_error(*(p.unsqueeze(1) for p in choose_qparams(low, high, spec)), spec)
    want = [error(x, (a, b), spec) for a, b in zip(low, high, strict=True)]
    torch.testing.assert_close(got[:, 0], torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-9 * 4.0**exponent)


@pytest.mark.parametrize("spec", [INT8, UINT8, INT4], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_a_histogram_is_that_of_values_spread_inside_the_bins(name: str, spec: QSpec) -> None:
    x = data(name, 400)
    h = histogram(x, 64)
    lower, upper = (e.float() for e in h.edges())
    inside = (torch.arange(500) + 0.5) / 500
    spread = torch.cat([(a + inside * (b - a)).repeat(int(c)) for a, b, c in zip(lower, upper, h.counts, strict=True) if c])
    for shrink in (1.0, 0.5):
        found = x.amin() * shrink, x.amax() * shrink
        found = torch.minimum(*found), torch.maximum(*found)
        got = h.squared_error(*(p.reshape(1, 1) for p in choose_qparams(*found, spec)), spec)
        assert float(got) == pytest.approx(error(spread, found, spec) / 500, rel=0.01)


def published_divergence(counts: np.ndarray, first: int, end: int, levels: int) -> float:
    """KL(P || Q) by the published steps, one bin after the other."""
    p = counts[first:end].astype(float)
    q = np.zeros_like(p)
    for j in range(levels):
        part = slice(j * len(p) // levels, (j + 1) * len(p) // levels)
        filled = p[part] > 0
        if filled.any():
            q[part][filled] = p[part].sum() / filled.sum()
    p[np.flatnonzero(p)[0]] += counts[:first].sum()
    p[np.flatnonzero(p)[-1]] += counts[end:].sum()
    p, q = p / p.sum(), q / q.sum()
    if (q[p > 0] == 0).any():
        return math.inf
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@pytest.mark.parametrize(("name", "bits"), [("normal", 8), ("heavy tails", 8), ("outlier", 8), ("relu", 8), ("normal", 4), ("silu", 4)])
def test_entropy_is_the_published_procedure(name: str, bits: int) -> None:
    h = histogram(data(name, 50_000), 512)
    counts, levels = h.magnitudes().numpy().copy(), 2 ** (bits - 1)
    counts[0] = counts[1]
    ends = range(levels, int(np.flatnonzero(counts)[-1]) + 2)
    best = min(reversed(ends), key=lambda i: published_divergence(counts, 0, i, levels))
    low, high = Entropy(candidates=10_000)(h, QSpec(f"int{bits}"))
    assert high == -low == min(best * 2.0 ** int(h.exponent), float(torch.maximum(-h.low, h.high)))


def test_entropy_of_two_ends_is_the_best_upper_end_for_its_lower_one() -> None:
    h = histogram(data("silu", 50_000) * 3 - 0.7, 256)
    counts, zero = h.counts.numpy().copy(), 255
    counts[zero] = counts[[zero - 1, zero + 1]].max()
    low, high = Entropy(candidates=10_000)(h, UINT4)
    lower, upper = (e.float() for e in h.edges())
    first = int((lower == low).nonzero()[-1])
    ends = [i for i in range(zero + 2, int(np.flatnonzero(counts)[-1]) + 2) if i - first >= 16]
    best = min(reversed(ends), key=lambda i: published_divergence(counts, first, i, 16))
    assert high == upper[best - 1]
    assert h.low <= low < 0 < high <= h.high


def test_entropy_cuts_an_outlier_and_keeps_what_has_no_tail() -> None:
    assert Entropy()(histogram(data("outlier")), INT8)[1] < 40
    flat = torch.linspace(-3, 3, 100_001)
    assert Entropy()(histogram(flat), INT8)[1] > 2.9
    assert Entropy()(histogram(flat), QSpec("int16"))[1] == 3  # more levels than bins: nothing is cut


def test_zeros_of_a_relu_do_not_change_what_entropy_chooses() -> None:
    x = data("relu")
    assert Entropy()(histogram(torch.cat([x, torch.zeros(10**6)])), UINT8) == Entropy()(histogram(x), UINT8)


CHOICES = [MSE(), Entropy(), Percentile(99)]


@pytest.mark.parametrize("choose", CHOICES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("spec", [INT8, UINT8, QSpec("int2"), QSpec("uint16", False)], ids=str)
@pytest.mark.parametrize(
    "x", [[0.0] * 5, [3.0] * 4, [-2.5], [1e-40, 0.0], [0.0, 5.0], [-1e29, 9e29], [1e-5] * 999 + [1e5]], ids=lambda x: str(x[-1])
)
def test_degenerate_data_has_a_range_within_its_bounds(choose, spec: QSpec, x: list[float]) -> None:
    t = torch.tensor(x)
    for found in (histogram(t), Values(t.unsqueeze(0))):
        low, high = (float(side) for side in choose(found, spec))
        r = float(t.abs().max())
        assert min(float(t.min()), 0) <= low <= high <= max(float(t.max()), 0) if not spec.symmetric else -r <= low == -high <= high <= r
        scale, _ = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
        assert scale > 0 and scale.isfinite()


@pytest.mark.parametrize("choose", CHOICES, ids=lambda c: type(c).__name__)
def test_weights_and_streams_mean_the_same(choose) -> None:
    x = data("silu", 50_000)
    for spec in (INT8, UINT8):
        stream, weight = choose(histogram(x), spec), choose(Values(x.unsqueeze(0)), spec)
        for a, b in zip(stream, weight, strict=True):
            assert float(a) == pytest.approx(float(b), rel=0.06, abs=0.01)


@pytest.mark.parametrize("kind", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("spec", [QSpec("int8", granularity=PerAxis(1)), QSpec("uint8", False, PerAxis(-2))], ids=str)
def test_channels_are_observed_as_if_each_were_alone(kind: str, spec: QSpec) -> None:
    batches = [torch.randn(40, 3, 50) * torch.tensor([[0.01], [1.0], [300.0]]) for _ in range(4)]
    batches[2][0, 1, 3:5], batches[3][:, 0] = torch.tensor([math.inf, -3.4e38]), math.inf
    found, shard = observer(kind, spec, bins=256), observer(kind, spec, bins=256)
    for i, batch in enumerate(batches):
        (shard if i % 2 else found)(batch)
    shard.merge(found)
    low, high = shard.range()
    for i in range(3):
        alone = observer(kind, QSpec(spec.dtype, spec.symmetric), bins=256)
        for batch in batches:
            alone(batch[:, i])
        assert (low[i], high[i]) == alone.range()
    assert shard.infinite == 2 + 40 * 50
    fresh = observer(kind, spec, bins=256)
    fresh.load_state_dict(shard.state_dict())
    assert torch.equal(fresh.range()[0], low)


@pytest.mark.parametrize("kind", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(1, 16), PerGroup(0, 5), PerGroup(-1, 64)], ids=lambda g: str(g)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weight_ranges_are_those_of_each_row_alone(kind: str, granularity, dtype: torch.dtype) -> None:
    w = (torch.randn(6, 36, generator=torch.Generator().manual_seed(3)) ** 3).to(dtype)
    spec = QSpec("uint4", False, granularity)
    options = {"percentile": 90} if kind == "percentile" else {}
    low, high = range_of(w, spec, kind, **options)
    scale, zero_point = choose_qparams(low, high, spec)
    assert Q.fake_quantize(w.float(), scale, zero_point, spec.dtype, spec.axis, spec.group).shape == w.shape
    row, at = {
        PerTensor(): (w.flatten(), ()),
        PerAxis(0): (w[4], 4),
        PerAxis(-1): (w[:, 7], 7),
        PerGroup(1, 16): (w[2, 32:], (2, 2)),
        PerGroup(0, 5): (w[5:, 9], (1, 9)),
        PerGroup(-1, 64): (w[3], (3, 0)),
    }[granularity]
    alone = range_of(row, QSpec("uint4", False), kind, **options)
    assert torch.equal(low[at], alone[0]) and torch.equal(high[at], alone[1])


def test_mse_of_weights_is_never_worse_than_minmax_and_better_at_four_bits() -> None:
    w = torch.randn(64, 500, generator=torch.Generator().manual_seed(1))
    for bits, gain in ((8, 1.001), (4, 0.8)):
        spec = QSpec(f"int{bits}", granularity=PerAxis(0))
        scale = [choose_qparams(*range_of(w, spec, kind), spec)[0] for kind in ("minmax", "mse")]
        minmax, mse = ((Q.fake_quantize(w, s, None, spec.dtype, 0) - w).square().sum(1) for s in scale)
        assert (mse <= minmax * 1.0001).all() and mse.sum() < gain * minmax.sum()


def test_large_rows_are_worked_on_piece_by_piece() -> None:
    x = torch.randn(1, 100_003)
    scale, zero_point = choose_qparams(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), UINT8)
    got = Values(x).squared_error(scale, zero_point, UINT8)
    assert float(got) == pytest.approx(error(x, (torch.tensor(-1.0), torch.tensor(2.0)), UINT8), rel=1e-5)


def test_weights_without_elements_or_with_nan_and_unknown_kinds() -> None:
    assert [t.tolist() for t in range_of(torch.empty(2, 0), QSpec("int8", granularity=PerAxis(0)), "mse")] == [[0, 0], [0, 0]]
    with pytest.raises(CalibrationError, match="the weight 'w' contains NaN"):
        range_of(torch.tensor([math.nan]), INT8, "mse", name="w")
    with pytest.raises(RecipeError, match="unknown observer 'mes'; did you mean 'mse'"):
        range_of(torch.ones(2), INT8, "mes")
    with pytest.raises(RecipeError, match="candidates must be at least 2"):
        range_of(torch.ones(2), INT8, "entropy", candidates=1)
