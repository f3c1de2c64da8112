"""Moments: closed forms and grids against what sampling gives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgraph.moments import constant, joined, normal, only_bounds, product_of, sum_of, uniform

NORMAL = torch.special.ndtri(torch.linspace(0, 1, 400_003, dtype=torch.float64)[1:-1])
"""A sample of the standard normal distribution without luck: its quantiles."""

number = st.floats(-20, 20).map(lambda v: round(v, 3))
deviation = st.floats(0.01, 10).map(lambda v: round(v, 3))


def of(mean, std):
    return normal(torch.tensor(mean), torch.tensor(std))


@given(number, deviation, number, st.floats(0, 20))
def test_a_clipped_normal_value_has_the_moments_of_a_clipped_sample(mean, std, low, width):
    found = of(mean, std).clipped(low, low + width)
    sample = (mean + std * NORMAL).clamp(low, low + width)
    scale = std + abs(mean - low) + width
    assert math.isclose(found.mean, sample.mean(), abs_tol=1e-4 * scale)
    assert math.isclose(found.std, sample.std(), abs_tol=2e-3 * scale)
    assert float(found.low) >= low and float(found.high) <= low + width


@given(number, deviation)
def test_a_relu_is_a_clip_without_upper_limit(mean, std):
    found, sample = of(mean, std).clipped(0.0, math.inf), (mean + std * NORMAL).clamp(min=0)
    assert math.isclose(found.mean, sample.mean(), abs_tol=1e-4 * (std + abs(mean)))
    assert math.isclose(found.std, sample.std(), abs_tol=2e-3 * (std + abs(mean)))
    assert (float(found.low), float(found.high)) == (0.0, math.inf)


@pytest.mark.parametrize("value, clipped", [(-3.0, 0.0), (2.5, 2.5), (9.0, 6.0)])
def test_a_value_that_does_not_vary_is_clipped_as_a_number(value, clipped):
    found = constant(torch.tensor(value)).clipped(0.0, 6.0)
    assert float(found.mean) == pytest.approx(clipped) and float(found.std) == 0


@given(
    st.sampled_from([torch.sigmoid, torch.nn.functional.silu, torch.nn.functional.gelu, torch.nn.functional.hardswish, torch.tanh]),
    number,
    deviation,
)
def test_functions_without_closed_form_are_averaged(fn, mean, std):
    mean, std = mean / 10, min(std, 2.0)
    found, sample = of(mean, std).through(fn), fn(mean + std * NORMAL)
    assert math.isclose(found.mean, sample.mean(), rel_tol=2e-3, abs_tol=1e-3)
    assert math.isclose(found.std, sample.std(), rel_tol=5e-3, abs_tol=2e-3)


def test_a_range_follows_a_function_also_where_it_turns():
    found = of(-1.0, 0.5).within(6).through(torch.nn.functional.hardswish)
    assert float(found.low) == pytest.approx(-0.375, abs=1e-3)
    assert float(found.high) == pytest.approx(2 * 5 / 6, abs=1e-4)


def test_a_function_that_is_not_finite_has_no_moments():
    assert of(0.5, 1.0).through(torch.log) is None
    assert of(0.5, 1.0).bounded(0.1, None).through(torch.log) is not None


@given(number, deviation, number, deviation)
def test_sums_and_products_of_independent_values(m1, s1, m2, s2):
    generator = torch.Generator().manual_seed(0)
    x, y = (m + s * torch.randn(200_000, generator=generator, dtype=torch.float64) for m, s in ((m1, s1), (m2, s2)))
    a, b = of(m1, s1), of(m2, s2)
    scale = (abs(m1) + s1) * (abs(m2) + s2)
    assert math.isclose(sum_of(a, b).std, (x + y).std(), rel_tol=0.01)
    assert math.isclose(sum_of(a, b).mean, m1 + m2, abs_tol=1e-5)
    assert math.isclose(product_of(a, b).mean, (x * y).mean(), abs_tol=0.02 * scale)
    assert math.isclose(product_of(a, b).std, (x * y).std(), abs_tol=0.02 * scale)


def test_ranges_of_sums_and_products_are_those_of_their_ends():
    a, b = uniform(-1.0, 3.0), uniform(-2.0, 0.5)
    total, product = sum_of(a, b), product_of(a, b)
    assert (float(total.low), float(total.high)) == (-3.0, 3.5)
    assert (float(product.low), float(product.high)) == (-6.0, 2.0)


def test_factors_of_either_sign_turn_a_range():
    found = joined(torch.tensor([1.0, 2.0]), torch.tensor(0.5), torch.tensor(-1.0), torch.tensor(4.0)).times(torch.tensor([-2.0, 3.0]))
    assert found.mean.tolist() == [-2, 6] and found.std.tolist() == [1, 1.5]
    assert found.low.tolist() == [-8, -3] and found.high.tolist() == [2, 12]


def test_a_pooled_value_is_a_mixture_along_the_axes():
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator) + 0.1
    sample = mean[..., None] + std[..., None] * NORMAL.float()
    found = normal(mean, std).pooled([-1])
    torch.testing.assert_close(found.mean.flatten().float(), sample.mean((1, 2)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.std.flatten().float(), sample.flatten(1).std(1), rtol=1e-3, atol=1e-3)


def test_bounds_alone_are_no_moments():
    found = only_bounds(0.0, 1.0)
    assert not found.known
    assert (float(found.within(6).low), float(found.within(6).high)) == (0.0, 1.0)
