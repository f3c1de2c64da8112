"""Ranges -> scales and zero points, and the derived bias."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import CalibrationError
from qgraph.ops import Q, choose_qparams, minmax, quantize_bias
from qgraph.types import QSpec, int_range, storage

DTYPES = [f"{u}int{b}" for u in ("", "u") for b in (2, 3, 4, 7, 8, 16)]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, 1e-45, -1e-40, 1.2e-38, 3.4e38, -3.4e38, 1.0])


@settings(max_examples=400, deadline=None)
@given(FINITE, FINITE, st.sampled_from(DTYPES), st.booleans())
def test_every_finite_range_gets_a_scale_that_represents_zero_and_its_bounds(a: float, b: float, dtype: str, symmetric: bool) -> None:
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero = choose_qparams(low, high, QSpec(dtype, symmetric))
    assert scale.dtype == torch.float32 and zero.dtype == storage(dtype)
    assert 1.17e-38 < scale.item() < math.inf
    qmin, qmax = int_range(dtype)
    width = max(-min(a, b, 0.0), max(a, b, 0.0)) / ((qmax - qmin) // 2) if symmetric else (max(a, b, 0.0) - min(a, b, 0.0)) / (qmax - qmin)
    assert scale.item() <= max(width * 1.000001, 1.18e-38) or width == 0
    assert Q.fake_quantize(torch.zeros(3), scale, zero, dtype).tolist() == [0.0] * 3
    if max(abs(a), abs(b)) < 1e38:  # beyond, half a step more than the bound may overflow
        bounds = torch.stack([low, high])
        error = (Q.fake_quantize(bounds, scale, zero, dtype).double() - bounds.double()).abs().max()
        assert error <= scale.double() * (0.501 if symmetric else 1.001)  # the rounding of zero_point costs half a step more


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), st.sampled_from(DTYPES))
def test_ordinary_ranges_follow_the_formula_in_float32(a: float, b: float, dtype: str) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    qmin, qmax = int_range(dtype)
    scale, zero = choose_qparams(torch.tensor(low), torch.tensor(high), QSpec(dtype, symmetric=False))
    if high - low > 1e-30:
        want = (np.float32(high) - np.float32(low)) / np.float32(qmax - qmin)
        assert scale.item() == want
        assert int(zero) == min(max(round(float(np.float32(qmin) - np.float32(low) / want)), qmin), qmax)
    scale, zero = choose_qparams(torch.tensor(low), torch.tensor(high), QSpec(dtype, symmetric=True))
    if high - low > 1e-30:
        assert scale.item() == np.float32(max(-low, high)) / np.float32((qmax - qmin) // 2)
    assert int(zero) == (0 if qmin else (qmax + 1) // 2)


def test_a_zero_range_has_scale_one() -> None:
    scale, zero = choose_qparams(torch.tensor([0.0, -1.0]), torch.tensor([0.0, 3.0]), QSpec("uint8", symmetric=False))
    assert scale.tolist() == [1.0, np.float32(4) / np.float32(255)]
    assert zero.tolist() == [0, 64]


def test_float16_scales_are_rounded_before_the_zero_point_and_never_zero() -> None:
    low, high = torch.tensor([-1e-7, -1.0]), torch.tensor([1e-7, 2.0])
    scale, zero = choose_qparams(low, high, QSpec("uint8", symmetric=False), dtype=torch.float16)
    assert scale.dtype == torch.float16
    assert scale[0].item() == 2.0**-24
    assert scale[1] == torch.tensor(3 / 255).half()
    assert int(zero[1]) == round(1.0 / scale[1].item())


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1.0), (-1.0, math.inf), (-math.inf, 0.0), (2.0, 1.0)])
def test_a_range_that_is_not_finite_raises(low: float, high: float) -> None:
    with pytest.raises(CalibrationError, match="no scale fits the range"):
        choose_qparams(torch.tensor([0.0, low]), torch.tensor([1.0, high]), QSpec())


def test_minmax_has_the_shape_of_the_scale() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5, 9.0], [4.0, 4.0, -1.0, -7.0, 2.0]])
    assert [t.tolist() for t in minmax(x)] == [-7.0, 9.0]
    assert [t.tolist() for t in minmax(x, -2, 0)] == [[-2.0, -7.0], [9.0, 4.0]]
    assert [t.tolist() for t in minmax(x, 1, 2)] == [[[-2.0, 0.5, 9.0], [4.0, -7.0, 2.0]], [[1.0, 3.0, 9.0], [4.0, -1.0, 2.0]]]
    assert [t.tolist() for t in minmax(x, 0, 3)] == [[[1.0, -2.0, -1.0, -7.0, 2.0]], [[4.0, 4.0, 3.0, 0.5, 9.0]]]
    assert [t.tolist() for t in minmax(x, -1, -1)] == [[[-2.0], [-7.0]], [[9.0], [4.0]]]


def test_minmax_of_nothing_is_zero_and_nan_is_seen() -> None:
    assert [t.tolist() for t in minmax(torch.zeros(0, 3), 1, 0)] == [[0.0] * 3, [0.0] * 3]
    assert [t.shape for t in minmax(torch.zeros(3, 0), 1, 4)] == [(3, 0), (3, 0)]
    assert [t.item() for t in minmax(torch.tensor(-2.0, dtype=torch.bfloat16))] == [-2.0, -2.0]
    assert all(math.isnan(t.item()) for t in minmax(torch.tensor([1.0, math.nan])))


def test_a_bias_is_rounded_to_steps_of_the_product_of_scales() -> None:
    x_scale, w_scale = torch.tensor(0.02), torch.tensor([0.003, 0.5])
    bias = torch.tensor([1.0, -0.025])
    got = quantize_bias(bias, x_scale, w_scale)
    assert isinstance(got, torch.Tensor) and got.dtype == torch.int32
    step = np.float32(0.02) * w_scale.numpy()
    assert got.tolist() == np.rint(bias.numpy() / step).tolist() == [16667, -2]


@pytest.mark.parametrize(
    ("bias", "w_scale", "reason"),
    [
        ([1.0, 30.0], [0.1, 1e-9], r"bias\[1\] is .* steps"),
        ([1.0, math.nan], [0.1, 0.1], r"bias\[1\] is nan steps"),
        ([0.0, 0.0], [0.1, 1e-38], "underflows"),
    ],
)
def test_a_bias_beyond_int32_stays_float_for_a_reason(bias: list[float], w_scale: list[float], reason: str) -> None:
    got = quantize_bias(torch.tensor(bias), torch.tensor(0.01), torch.tensor(w_scale))
    assert isinstance(got, str)
    assert re.search(reason, got), got
