"""Statistics that stages collect, against all the data at once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import CalibrationError
from qgraph.statistics import AbsMax, Mean, Quantiles, Tokens

shapes = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=5)


@given(shapes, st.randoms(), st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_any_order_and_sharding_is_all_the_data_at_once(shapes, random, dtype: torch.dtype) -> None:
    batches = [(torch.randn(n, 3, k) * 5 - 2).to(dtype) for n, k in [*shapes, (2, 2)]]
    whole = torch.cat([b.transpose(0, 1).flatten(1) for b in batches], 1).float()
    made = [[AbsMax(1), Mean(-2), Quantiles(bins=4096), Tokens()] for _ in range(2)]
    random.shuffle(batches)
    for batch in batches:
        for statistic in made[random.randint(0, 1)]:
            statistic.update(batch)
    for one, other in zip(*made, strict=True):
        one.merge(other)
    absmax, mean, quantiles, tokens = made[0]
    assert torch.equal(absmax.value, whole.abs().amax(1))
    torch.testing.assert_close(mean.value, whole.mean(1), rtol=1e-5, atol=1e-6)
    assert (tokens.rows, tokens.calls) == (sum(3 * b.shape[0] for b in batches), len(batches))
    assert (quantiles.quantile(0), quantiles.quantile(1)) == (whole.min(), whole.max())


def test_the_interquartile_range_of_a_normal_distribution() -> None:
    found = Quantiles()
    for seed in range(3):
        found.update(torch.randn(20_000, generator=torch.Generator().manual_seed(seed)) * 2 + 7)
    assert found.interquartile_range == pytest.approx(2 * 1.349, rel=0.02)
    assert found.quantile(0.5) == pytest.approx(7, abs=0.05)


def test_vectors_have_one_value_per_index() -> None:
    absmax, mean = AbsMax(0), Mean(0)
    for x in (torch.tensor([1.0, -4.0]), torch.tensor([-3.0, 2.0])):
        absmax.update(x)
        mean.update(x)
    assert absmax.value.tolist() == [3, 4] and mean.value.tolist() == [-1, -1]


def test_what_stands_for_infinity_is_no_magnitude() -> None:
    found = AbsMax(-1)
    found.update(torch.tensor([[1.0, -math.inf, -3.4e38], [-2.0, 5.0, -1e30]]))
    assert found.value.tolist() == [2, 5, 0]
    half = AbsMax(-1)
    half.update(torch.tensor([[-65504.0, 7.0]], dtype=torch.float16))
    assert half.value.tolist() == [0, 7] and half.value.dtype == torch.float32


def test_nothing_seen_and_bad_data() -> None:
    assert AbsMax(0).value is None and Mean(0).value is None
    with pytest.raises(CalibrationError, match="'h' has no range: it was never observed"):
        Quantiles(name="h").quantile(0.5)
    with pytest.raises(CalibrationError, match="'h' contains NaN"):
        AbsMax(0, name="h").update(torch.tensor([math.nan, 1.0]))
    with pytest.raises(CalibrationError, match="'h' contains NaN or infinity"):
        Mean(0, name="h").update(torch.tensor([math.inf, 1.0]))
    with pytest.raises(CalibrationError, match=r"'h' has shape \[2\], without axis 1"):
        Mean(1, name="h").update(torch.ones(2))
    with pytest.raises(CalibrationError, match="without axis -3"):
        AbsMax(-3).update(torch.ones(2, 2))
