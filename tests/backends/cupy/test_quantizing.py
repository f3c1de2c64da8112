"""The quantize kernels give the reference's integers, scales and zero points bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import reference
from qgraph.backends.cupy import quantizing
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.quantizing import rows_work, tensor_work
from qgraph.backends.cupy.rows import CONFIGS, choose, strided
from qgraph.errors import LoweringError

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
LENGTHS = [(HALF, 576), (HALF, 101), (HALF, 4096), (HALF, 8197), (HALF, 33000), (FLOAT, 384), (FLOAT, 1027), (BFLOAT, 2048)]
"""Rows of a warp, of 256 and of 512 threads, longer than what they keep; whole vectors and ragged ones."""

SHAPES = ("test_schema", "test_faketensor")


def uneven(*shape, dtype=HALF, seed=0):
    """Rows with means, of very different sizes, with NaN, infinities and zeros among them."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) + 0.3
    x = x * torch.exp(3 * torch.randn(*shape[:-1], 1, generator=random))
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    at = torch.randint(0, 60 * len(special), shape, generator=random)
    x = torch.where((at < len(special)) & (torch.rand(*shape[:-1], 1, generator=random) < 0.5), special[at.clamp(max=4)], x)
    return x.to(dtype)


def equal(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


def dynamic_rows_agree(x, dtype, symmetric, schedule=0, checked=False):
    with emulation(schedule=schedule, checked=checked):
        *found, sums = K.quantize_rows(x, None, None, dtype, symmetric, True)
    for ours, expected in zip(found, reference.dynamic_quantize(x, dtype, symmetric, -1, -1), strict=True):
        equal(ours, expected)
    equal(sums, found[0].sum(-1, keepdim=True, dtype=torch.int32))


@pytest.mark.parametrize(("dtype", "k"), LENGTHS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_rows_get_the_scales_and_integers_of_the_reference(dtype, k, data):
    rows = data.draw(st.sampled_from([(1,), (5,), (2, 3)] if k < 4096 else [(1,), (3,)]))
    x = uneven(*rows, k, dtype=dtype, seed=data.draw(st.integers(0, 99)))
    integers = data.draw(st.sampled_from(["int8", "uint8", "int4", "uint7"]))
    dynamic_rows_agree(x, integers, data.draw(st.booleans()), schedule=data.draw(st.sampled_from([0, 1, 5])))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 9), k=st.integers(0, 70), seed=st.integers(0, 99), symmetric=st.booleans(), dtype=st.sampled_from(["int8", "uint8"])
)
def test_short_rows_may_be_anywhere(rows, k, seed, symmetric, dtype):
    dynamic_rows_agree(uneven(rows, k, seed=seed), dtype, symmetric)


@pytest.mark.parametrize("k", [64, 100])
def test_no_access_leaves_the_tensors(k):
    dynamic_rows_agree(uneven(9, k), "int8", False, checked=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-30, 1e-7, 3e-6, 1.0, 1e30, 3e38, float("inf")])
def test_ranges_of_any_size_are_the_references(size, symmetric):
    for dtype in (FLOAT, HALF):
        x = (torch.linspace(-1, 1, 64).reshape(2, 32) * size).to(dtype)
        dynamic_rows_agree(x, "int8", symmetric)


def test_quotients_on_the_border_of_two_integers_are_rounded_as_the_reference_does():
    """x = (n + 1/2) scale and its neighbours, for scales of many mantissas: one wrong bit of the quotient is another integer."""
    random = torch.Generator().manual_seed(0)
    scale = torch.rand(256, 1, generator=random) * 2.0 ** torch.randint(-60, 60, (256, 1), generator=random)
    ties = (torch.arange(-150, 150) + 0.5) * scale
    x = torch.cat([ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))], 1)
    with emulation():
        q, *_ = K.quantize_rows(x, scale, None, "int8", True, False)
    equal(q, reference.quantize(x, scale, None, "int8", -1, -1))


@pytest.mark.parametrize("scale", [0.02, 0.0, -0.5, 1e-42, 1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("zero_point", [None, -9])
def test_a_given_scale_may_be_any(scale, zero_point):
    x, scale = uneven(7, 45, dtype=FLOAT), torch.tensor(scale)
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int8)
    expected = reference.quantize(x, scale, zero, "int8")
    with emulation():
        q, none, _, sums = K.quantize_rows(x, scale, zero, "int8", False, True)
        equal(K.quantize_static(x, scale, zero, "int8"), expected)
    equal(q, expected)
    equal(sums, q.sum(-1, keepdim=True, dtype=torch.int32))
    assert none.numel() == 0


def test_each_row_may_have_its_own_scale_and_zero_point():
    x, scale = uneven(4, 3, 96), torch.rand(4, 3, 1).to(HALF)
    zero = torch.randint(0, 256, (4, 3, 1)).to(torch.uint8)
    with emulation():
        q, *_ = K.quantize_rows(x, scale, zero, "uint8", False, False)
    equal(q, reference.quantize(x, scale, zero, "uint8", -1, -1))


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 50, 83), (41, 1001), (64, 2048)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tensor_gets_one_scale_from_its_range(shape, symmetric):
    x = uneven(*shape) if shape else torch.tensor(-3.0, dtype=HALF)
    for schedule, dtype in enumerate(("int8", "uint8")):
        with emulation(schedule=schedule):
            found = K.quantize_tensor(x, dtype, symmetric)
        for ours, expected in zip(found, reference.dynamic_quantize(x, dtype, symmetric), strict=True):
            equal(ours, expected)


def test_the_ragged_end_of_a_tensor_counts_for_its_range():
    x = torch.randn(41, 1001, dtype=HALF)
    x[-1, -1] = 99
    with emulation():
        _, scale, _ = K.quantize_tensor(x, "int8", True)
    assert scale == torch.tensor(99 / 127, dtype=HALF)


def test_a_tensor_so_small_that_its_scale_is_zero():
    x = (torch.randn(40, 1000) * 1e-7).to(HALF)
    with emulation():
        found = K.quantize_tensor(x, "uint8", False)
    assert found[1] == 0
    equal(found[0], reference.dynamic_quantize(x, "uint8", False)[0])


def test_part_of_a_wider_matrix_is_read_where_it_lies():
    wide = uneven(6, 256)
    assert strided(wide[:, 128:])[0].data_ptr() == wide[:, 128:].data_ptr()
    assert strided(wide[:, 100:200])[0].data_ptr() != wide[:, 100:200].data_ptr(), "no multiple of 16 bytes"
    for x in (wide[:, 128:], wide[:, 100:200], wide[::2], wide.T, wide[1:, :7], wide[:1].expand(5, 256)):
        dynamic_rows_agree(x, "uint8", False)


def test_rows_come_from_memory_once():
    for k in (1024, 4096):
        x = torch.randn(8, k).to(HALF)
        with emulation(checked=True) as run:
            K.quantize_rows(x, None, None, "int8", True, False)
        (_, profile), least = run.profiles[0], rows_work(8, k, HALF).bytes
        assert (profile.unique, profile.sector_efficiency, profile.bank_conflicts) == (least, 1.0, 0)
        assert profile.traffic <= 1.05 * least


def test_a_tensor_comes_from_memory_twice_for_a_dynamic_scale_and_once_for_a_static_one():
    x = torch.randn(48, 2048).to(HALF)
    with emulation(checked=True) as run:
        K.quantize_tensor(x, "uint8", False)
        K.quantize_static(x, torch.tensor(0.1), None, "int8")
    (_, ranged), (_, dynamic), (_, static) = run.profiles
    for traffic, least in (
        (ranged.traffic + dynamic.traffic, tensor_work(x.numel(), HALF, dynamic=True)),
        (static.traffic, tensor_work(x.numel(), HALF, dynamic=False)),
    ):
        assert traffic <= 1.05 * least.bytes
    assert ranged.sector_efficiency == dynamic.sector_efficiency == static.sector_efficiency == 1


def test_the_smallest_team_that_holds_a_row_takes_it():
    assert [choose(k, HALF).lanes for k in (8, 1024, 1025, 8192, 8200, 32768, 40000)] == [32, 32, 256, 256, 512, 512, 512]
    assert choose(513, FLOAT) == CONFIGS[1]
    assert {(k.name, *(v for n, v in k.defines if n == "LANES")) for k in quantizing.KERNELS} >= {
        ("quantize_rows", str(c.lanes)) for c in CONFIGS
    }


def test_what_the_kernels_cannot_do_is_an_error_of_one_sentence():
    x = torch.randn(4, 8)
    with emulation(), pytest.raises(LoweringError, match="at most 8 bits, not to int16"):
        K.quantize_rows(x, None, None, "int16", True, False)
    with emulation(), pytest.raises(LoweringError, match="not float64"):
        K.quantize_rows(x.double(), None, None, "int8", True, False)
    with emulation(), pytest.raises(LoweringError, match="3 scales fit neither"):
        K.quantize_rows(x, torch.ones(3), None, "int8", True, False)
    with emulation(), pytest.raises(LoweringError, match="a scalar has no rows"):
        K.quantize_rows(torch.tensor(1.0), None, None, "int8", True, False)


def test_shapes_are_known_without_running():
    x = torch.randn(2, 5, 16, dtype=HALF)
    with emulation():
        for scale in (None, torch.tensor(0.1)):
            for sums in (True, False):
                torch.library.opcheck(K.quantize_rows.default, (x, scale, None, "uint8", False, sums), test_utils=SHAPES)
        torch.library.opcheck(K.quantize_static.default, (x, torch.tensor(0.1), None, "int8"), test_utils=SHAPES)
        torch.library.opcheck(K.quantize_tensor.default, (x, "uint8", True), test_utils=SHAPES)
