"""Observers against plain numpy: statistics, ranges, merging, bad values, state."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.choices import Percentile
from qgraph.errors import CalibrationError, RecipeError
from qgraph.histogram import Histogram
from qgraph.observe import OBSERVERS, Observer, observer, paused, range_of, register_observer
from qgraph.ranges import MinMax
from qgraph.types import PerAxis, PerGroup, PerToken, QSpec

UINT8 = QSpec("uint8", symmetric=False)
INT8 = QSpec("int8")
KINDS = ["minmax", "moving-average", "percentile", "entropy", "mse"]

finite = st.floats(-(2.0**99), 2.0**99, width=32)  # magnitudes from 1e30 stand for infinity
tensors = st.lists(finite, min_size=0, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float32))


def fed(kind: str, parts: list[Tensor], spec: QSpec = UINT8, **options: object) -> Observer:
    found = observer(kind, spec, name="x", **options)
    for part in parts:
        found(part)
    return found


def same(a: Observer, b: Observer) -> None:
    assert all(torch.equal(x, y) for x, y in zip((*a.range(), *a.qparams()), (*b.range(), *b.qparams()), strict=True))
    assert (a.seen, a.infinite) == (b.seen, b.infinite)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_is_the_identity_and_sees_one_batch_as_it_is(kind: str, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
    found = observer(kind, UINT8, **({"percentile": 100} if kind == "percentile" else {}))
    assert found(x) is x
    low, high = found.range()
    assert (low.dtype, low.shape, high.shape) == (torch.float32, (), ())
    assert (low, high) == (x.float().min(), x.float().max())
    assert found.dtype == dtype
    assert found.seen == 35


@pytest.mark.parametrize("kind", ["minmax", "moving-average"])
@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_per_axis_ranges_have_one_entry_per_index_of_the_axis(kind: str, axis: int) -> None:
    x = torch.randn(4, 5, 6)
    low, high = fed(kind, [x], QSpec("int8", granularity=PerAxis(axis))).range()
    rows = x.movedim(axis, 0).flatten(1)
    assert torch.equal(low, rows.min(1).values) and torch.equal(high, rows.max(1).values)


def test_per_axis_of_a_vector_does_not_alias_the_data() -> None:
    x = torch.tensor([1.0, -2.0])
    found = fed("minmax", [x], QSpec("int8", granularity=PerAxis(0)))
    x.zero_()
    assert found.range()[0].tolist() == [1.0, -2.0]


@given(st.lists(tensors, min_size=1, max_size=6), st.randoms(), st.sampled_from(["minmax", "percentile", "entropy", "mse"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_order_and_any_sharding_give_the_same_qparams(parts: list[Tensor], random, kind: str, symmetric: bool) -> None:
    spec = QSpec("int3", symmetric)
    options = {"minmax": {}, "percentile": {"percentile": 90.0, "bins": 32}}.get(kind, {"bins": 32})
    parts.append(torch.tensor([0.37, -0.011]))
    whole = fed(kind, [torch.cat(parts)], spec, **options)
    shuffled = parts.copy()
    random.shuffle(shuffled)
    shards = [fed(kind, shuffled[i::3], spec, **options) for i in range(3)]
    random.shuffle(shards)
    merged = shards[0]
    for shard in shards[1:]:
        merged.merge(shard)
    same(merged, whole)
    if kind != "minmax":
        assert torch.equal(merged.statistic.counts, whole.statistic.counts)
        assert merged.statistic.exponent == whole.statistic.exponent


@given(st.lists(finite, min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_histogram_counts_are_those_of_exact_arithmetic(values: list[float]) -> None:
    x = np.array(values, np.float32)
    found = fed("percentile", [torch.from_numpy(v.reshape(1)) for v in x], bins=16).statistic
    exponent = int(found.exponent)
    index = np.trunc(np.ldexp(x.astype(np.float64), -exponent)).astype(int) + 15
    assert found.counts.tolist() == np.bincount(index, minlength=31).tolist()
    assert exponent == -110 or abs(np.ldexp(np.abs(x.astype(np.float64)).max(), -exponent)) >= 8  # no wider than needed


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("name", ["normal", "relu", "negative", "bimodal"])
def test_percentiles_agree_with_numpy_within_a_bin(percentile: float, name: str) -> None:
    normal = np.random.default_rng(5).normal(0.2, 1.5, 50_000).astype(np.float32)
    x = {"normal": normal, "relu": np.maximum(normal, 0), "negative": -np.abs(normal) - 1, "bimodal": np.sign(normal) * 5 + normal}[name]
    parts = [torch.from_numpy(p) for p in np.array_split(x, 7)]
    bin_width = 2.0 ** fed("percentile", parts).statistic.exponent

    def brackets(data: np.ndarray, q: float, value: Tensor) -> bool:
        """Whether the value lies between the neighbours of rank q, give or take one bin."""
        rank = int(q / 100 * len(data))
        below, above = np.sort(data)[[max(rank - 2, 0), min(rank + 2, len(data) - 1)]]
        return below - bin_width <= value <= above + bin_width

    low, high = fed("percentile", parts, UINT8, percentile=percentile).range()
    cut = (100 - percentile) / 2
    assert brackets(x, cut, low) and brackets(x, 100 - cut, high)
    assert x.min() <= low and high <= x.max()
    low, high = fed("percentile", parts, INT8, percentile=percentile).range()
    assert low == -high and brackets(np.abs(x), percentile, high)
    assert high <= np.abs(x).max()


def test_a_percentile_of_100_is_minmax() -> None:
    parts = [torch.randn(50) * 3 - 1, torch.rand(20) + 4]
    assert fed("percentile", parts, percentile=100).range() == fed("minmax", parts).range()


def test_a_percentile_ignores_one_outlier_that_minmax_keeps() -> None:
    x = torch.cat([torch.linspace(-1, 1, 100_001), torch.tensor([1000.0])])
    assert fed("minmax", [x]).range()[1] == 1000
    assert fed("percentile", [x], bins=1 << 14, percentile=99.9).range()[1] < 1.01


def test_moving_average_follows_torchs_convention() -> None:
    batches = [torch.randn(11) * k + k for k in range(1, 9)]
    low, high = batches[0].min().double(), batches[0].max().double()
    for b in batches[1:]:
        low, high = low + 0.1 * (b.min() - low), high + 0.1 * (b.max() - high)
    found = fed("moving-average", batches, momentum=0.1).range()
    torch.testing.assert_close(found, (low.float(), high.float()))


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_moving_average_of_consecutive_shards_is_that_of_the_stream(cut: int) -> None:
    batches = [torch.randn(11) * k - 2 * k for k in range(1, 9)]
    merged = fed("moving-average", batches[:cut], momentum=0.2)
    merged.merge(fed("moving-average", batches[cut:], momentum=0.2))
    torch.testing.assert_close(merged.range(), fed("moving-average", batches, momentum=0.2).range())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_with_an_observer_that_saw_nothing_changes_nothing(kind: str) -> None:
    x = torch.tensor([0.5, -3.25, 8.0])
    left, right, want = fed(kind, [x]), fed(kind, []), fed(kind, [x])
    left.merge(observer(kind, UINT8))
    right.merge(want)
    same(left, want)
    same(right, want)


def test_different_kinds_and_bins_do_not_merge() -> None:
    with pytest.raises(CalibrationError, match="'x': cannot merge Histogram of uint8"):
        fed("minmax", []).merge(fed("percentile", []))
    with pytest.raises(CalibrationError, match="histograms of 16 and 32 bins"):
        fed("percentile", [torch.ones(1)], bins=16).merge(fed("percentile", [torch.ones(1)], bins=32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_is_an_error_that_names_the_value_and_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    found = fed(kind, [torch.tensor([1.0, -2.0])])
    before = found.range()
    with pytest.raises(CalibrationError, match=r"the value 'x' contains NaN \(1 of 3 elements\)"):
        found(torch.tensor([5.0, float("nan"), float("inf")], dtype=dtype))
    assert found.range() == before and found.seen == 2


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_are_counted_but_not_in_the_range(kind: str) -> None:
    found = fed(kind, [torch.tensor([1.5, float("inf"), -0.75, float("-inf")])])
    same_range = fed(kind, [torch.tensor([1.5, -0.75])]).range()
    assert found.range() == same_range
    assert (found.seen, found.infinite) == (2, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "mask"), [(torch.float32, -3.4e38), (torch.bfloat16, -1.7e38), (torch.float64, -1e30), (torch.float16, -65504)]
)
def test_constants_of_masks_stand_for_infinity(kind: str, dtype: torch.dtype, mask: float) -> None:
    found = fed(kind, [torch.tensor([1.5, mask, -0.75, mask], dtype=dtype)])
    assert found.range() == fed(kind, [torch.tensor([1.5, -0.75])]).range()
    assert (found.seen, found.infinite) == (2, 2)


def test_infinities_are_left_out_per_channel() -> None:
    x = torch.tensor([[1.0, float("inf"), -4.0], [float("inf"), float("inf"), float("-inf")]])
    low, high = fed("minmax", [x], QSpec("int8", granularity=PerAxis(0))).range()
    assert low.tolist() == [-4, 0] and high.tolist() == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_infinities_or_nothing_at_all_give_no_range(kind: str) -> None:
    with pytest.raises(CalibrationError, match="the value 'x' has no range: it was never observed"):
        fed(kind, [torch.empty(0, 3)]).qparams()
    with pytest.raises(CalibrationError, match="'x' has no range: only 2 infinite values were seen"):
        fed(kind, [torch.tensor([float("inf"), float("-inf")])]).qparams()


@pytest.mark.parametrize("kind", KINDS)
def test_integers_and_empty_tensors_are_passed_over(kind: str) -> None:
    found = fed(kind, [torch.tensor([3.0]), torch.empty(2, 0), torch.tensor([100]), torch.tensor([True])])
    assert found.range()[1] == 3 and found.seen == 1


@pytest.mark.parametrize("x", [torch.zeros(4), torch.tensor(-0.0), torch.tensor([1e-45, -1e-40]), torch.tensor([9e29, -9e29])])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_denormal_and_huge_ranges_have_qparams(kind: str, x: Tensor) -> None:
    scale, zero_point = fed(kind, [x]).qparams()
    assert scale.isfinite() and scale > 0 and 0 <= zero_point <= 255


def test_shapes_must_agree_along_the_axis_only() -> None:
    found = fed("minmax", [torch.ones(2, 3), torch.ones(7, 3)], QSpec("int8", granularity=PerAxis(1)))
    with pytest.raises(CalibrationError, match="'x' has 4 entries along axis 1, but 3 in earlier data"):
        found(torch.ones(2, 4))
    with pytest.raises(CalibrationError, match=r"'x' has shape \[3\], without axis 1"):
        found(torch.ones(3))


def test_a_frozen_observer_does_not_move() -> None:
    found = fed("minmax", [torch.ones(2)])
    found.freeze()
    found(torch.full((2,), 9.0))
    assert found.range()[1] == 1
    found.freeze(False)
    with paused(torch.nn.Sequential(found)):
        found(torch.full((2,), 9.0))
    assert found.range()[1] == 1
    found(torch.full((2,), 9.0))
    assert found.range()[1] == 9


def test_reset_forgets() -> None:
    found = fed("percentile", [torch.ones(2)], bins=64)
    found.reset()
    same_as_new = fed("percentile", [torch.tensor([2.0])], bins=64)
    found(torch.tensor([2.0]))
    same(found, same_as_new)


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_saving_and_copying(kind: str) -> None:
    found = fed(kind, [torch.randn(9), torch.randn(4) * 5])
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(found).state_dict(), file)
    file.seek(0)
    loaded = torch.nn.Sequential(observer(kind, UINT8))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    same(loaded[0], found)
    twin = copy.deepcopy(found)
    same(twin, found)
    twin(torch.full((3,), 50.0))
    assert twin.seen == found.seen + 3 and twin.range()[1] > found.range()[1] - 1e-6
    same(loaded[0], found)


def test_state_has_a_fixed_size() -> None:
    def size(found: Observer) -> int:
        return sum(v.numel() for v in found.get_extra_state()["statistic"].values() if isinstance(v, Tensor))

    for kind in KINDS:
        assert size(fed(kind, [torch.randn(3)])) == size(fed(kind, [torch.randn(1000) * 2.0**i for i in range(30)]))


@pytest.mark.parametrize(
    "spec", [QSpec("int8", granularity=PerToken(), dynamic=True), QSpec("int4", granularity=PerGroup(1, 4)), QSpec(dynamic=True)]
)
def test_only_static_per_tensor_and_per_axis_formats_are_observed(spec: QSpec) -> None:
    with pytest.raises(
        RecipeError, match="only per-tensor and per-axis" if not spec.dynamic else "only static ranges are observed.*at run time"
    ):
        observer("mse", spec)


def test_unknown_kinds_and_options_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match="unknown observer 'percentil'; did you mean 'percentile'"):
        observer("percentil", INT8)
    with pytest.raises(RecipeError, match="observer 'percentile' has no option 'bin'; did you mean 'bins'"):
        observer("percentile", INT8, bin=64)
    for options in ({"bins": 100}, {"bins": 4}, {"percentile": 20}, {"percentile": 101}):
        with pytest.raises(RecipeError):
            observer("percentile", INT8, **options)
    for momentum in (0, 1.5, -0.1):
        with pytest.raises(RecipeError, match="momentum"):
            observer("moving-average", INT8, momentum=momentum)


def test_users_can_register_an_observer() -> None:
    @register_observer("half-range")
    def half_range(spec: QSpec, *, name: str = "", factor: float = 0.5) -> Observer:
        def choose(statistic: MinMax, spec: QSpec) -> tuple[Tensor, Tensor]:
            return factor * statistic.low, factor * statistic.high

        return Observer(spec, MinMax(), choose, name=name)

    try:
        found = fed("half-range", [torch.tensor([-4.0, 8.0])], factor=0.25)
        assert found.range() == (torch.tensor(-1.0), torch.tensor(2.0))
        assert found.name == "x"
    finally:
        del OBSERVERS["half-range"]


def test_statistic_and_range_choice_combine_freely() -> None:
    found = Observer(UINT8, Histogram(64), name="x")
    found(torch.tensor([-1.0, 7.0]))
    assert found.range() == (torch.tensor(-1.0), torch.tensor(7.0))
    found.choose = Percentile(50)
    assert found.range()[1] < 7.2


def test_weight_ranges_have_the_shape_of_the_scale() -> None:
    w = torch.randn(6, 10)
    assert range_of(w, INT8)[0].shape == ()
    low, high = range_of(w.half(), QSpec("int8", granularity=PerAxis(-1)))
    assert torch.equal(low, w.half().float().amin(0)) and torch.equal(high, w.half().float().amax(0))
    low, _ = range_of(w, QSpec("int4", granularity=PerGroup(1, 4)))
    assert low.shape == (6, 3) and low[2, 2] == w[2, 8:].min()
    w[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match="the weight 'fc.weight' contains NaN or infinity"):
        range_of(w, INT8, name="fc.weight")
