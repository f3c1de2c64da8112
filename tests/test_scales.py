"""The search of scales against what ranges give, and against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import RecipeError
from qgraph.qparams import choose_qparams, minmax
from qgraph.reference import fake_quantize
from qgraph.scales import hqq, scales_of, search
from qgraph.types import PerAxis, PerGroup, PerTensor, QSpec


def loss(rows, scale, zero, spec, importance=None):
    axis, group = (1, spec.group) if spec.group else (0, 0)
    flat = lambda t: t if t is None or group else t.flatten()
    found = fake_quantize(rows, flat(scale), flat(zero), spec.dtype, axis, group)
    return ((found - rows).square() * (1 if importance is None else importance)).sum()


def plain(rows, spec):
    scale, zero = choose_qparams(*minmax(rows, spec.axis, spec.group), spec)
    return (scale, zero) if spec.group else (scale[:, None], zero[:, None])


SPECS = [
    QSpec(dtype, symmetric, granularity)
    for dtype, symmetric in (
        ("int2", True),
        ("int3", True),
        ("int4", True),
        ("uint4", True),
        ("uint2", False),
        ("uint4", False),
        ("int4", False),
    )
    for granularity in (PerGroup(1, 8), PerGroup(1, 5), PerAxis(0))
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), offset=st.sampled_from([0.0, 1.0, -3.0]))
def test_searched_scales_lose_no_more_than_those_of_the_range(spec, seed, offset):
    g = torch.Generator().manual_seed(seed)
    rows, importance = torch.randn(3, 17, generator=g) + offset, torch.rand(17, generator=g) ** 3
    scale, zero = search(rows, spec, importance)
    assert loss(rows, scale, zero, spec, importance) <= 1.0001 * loss(rows, *plain(rows, spec), spec, importance) + 1e-9


def test_a_search_over_all_steps_finds_little_better():
    g = torch.Generator().manual_seed(0)
    rows, spec = torch.randn(40, 16, generator=g), QSpec("int3", True, PerGroup(1, 16))
    steps = rows.abs().amax(1, keepdim=True) / 4 * torch.linspace(-1.2, 1.2, 2000)
    steps = steps[..., steps.abs().amin(0) > 0]
    q = (rows[:, None] / steps[..., None]).round().clamp(-4, 3)
    best = (q * steps[..., None] - rows[:, None]).square().sum(-1).amin(1).sum()
    assert loss(rows, *search(rows, spec), spec) <= 1.05 * best


def test_the_larger_tail_gets_the_longer_end_of_the_integers():
    rows = torch.tensor([[4.0, -1.0, 2.0, 1.0], [-4.0, 1.0, 2.0, 1.0]])
    scale, zero = search(rows, QSpec("int3", True, PerGroup(1, 4)))
    assert zero is None and scale[0] < 0 < scale[1]
    assert loss(rows, scale, zero, QSpec("int3", True, PerGroup(1, 4))) == 0


def test_importance_moves_the_scale_to_the_columns_that_matter():
    rows, spec = torch.tensor([[8.0, 0.3, -0.7, 1.0]]), QSpec("int2", True, PerGroup(1, 4))
    importance = torch.tensor([1e-6, 1.0, 1.0, 1.0])
    assert loss(rows, *search(rows, spec, importance), spec, importance) < 0.2 * loss(rows, *search(rows, spec), spec, importance)


def test_zero_groups_and_short_last_groups_have_scales_that_work():
    rows, spec = torch.zeros(2, 5), QSpec("uint4", False, PerGroup(1, 4))
    rows[0, 4] = 3.0
    scale, zero = search(rows, spec)
    assert scale.shape == zero.shape == (2, 2) and zero.dtype == torch.uint8
    assert bool((scale[1] == 1).all()) and float(loss(rows, scale, zero, spec)) < 1e-12


@pytest.mark.parametrize("spec", [QSpec("uint4", False, PerGroup(1, 32)), QSpec("int3", True, PerGroup(1, 32))], ids=str)
def test_hqq_loses_less_than_the_range_by_its_own_measure_and_more_squares_than_the_search(spec):
    rows = torch.distributions.StudentT(3.0).sample((64, 128)) * 0.02

    def measure(power, scale, zero):
        return (fake_quantize(rows, scale, zero, spec.dtype, 1, 32) - rows).abs().pow(power).sum()

    assert measure(0.7, *hqq(rows, spec)) < 0.97 * measure(0.7, *plain(rows, spec))
    assert measure(2, *search(rows, spec)) <= measure(2, *hqq(rows, spec))


@pytest.mark.parametrize("way", ["search", "hqq"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerAxis(1), PerGroup(0, 4), PerGroup(1, 5)], ids=str)
def test_scales_have_the_shape_that_the_spec_gives_them(granularity, way):
    spec = QSpec("uint4", False, granularity)
    weight = torch.randn(6, 10)
    scale, zero = scales_of(weight, spec, way, torch.rand(6, 10))
    found = fake_quantize(weight, scale, zero, spec.dtype, spec.axis, spec.group)
    assert (found - weight).square().mean() < 0.02


def test_groups_along_the_first_axis_are_those_of_the_turned_weight():
    weight, importance = torch.randn(8, 6), torch.rand(8, 6)
    for a, b in zip(
        scales_of(weight, QSpec("uint3", False, PerGroup(0, 4)), "search", importance),
        scales_of(weight.T, QSpec("uint3", False, PerGroup(1, 4)), "search", importance.T),
        strict=True,
    ):
        assert torch.equal(a, b.T)


def test_another_way_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="search"):
        scales_of(torch.ones(2, 2), QSpec("int4"), "serch")
