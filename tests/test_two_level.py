"""Scales that are whole multiples of one scale per channel: exact, within int8, and hardly worse than those they come from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.qparams import choose_qparams, minmax
from qgraph.reference import fake_quantize, spread
from qgraph.two_level import LARGEST, snap, split
from qgraph.types import PerGroup, QSpec, int_range

FORMATS = [("int4", False), ("uint4", False), ("int4", True), ("uint4", True), ("int3", True), ("uint2", False)]


def weight(seed: int, n: int, k: int) -> torch.Tensor:
    """Rows far apart in size, one of zeros, one positive, one negative; some groups of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-3, 2, n)[:, None] * (1 + 9 * torch.rand(1, k, generator=generator) ** 6)
    w[0], w[1], w[2, : k // 2] = 0.0, w[1].abs() + 1e-3, 0.0
    w[3] = -w[3].abs()
    return w


def plain_grid(w, dtype, symmetric, group):
    spec = QSpec(dtype, symmetric, PerGroup(1, group))
    scale, zero = choose_qparams(*minmax(w, 1, group), spec)
    return scale, None if symmetric and spec.signed else zero


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(4, 9), st.sampled_from([20, 32, 50]), st.sampled_from([8, 16, 64]), st.sampled_from(FORMATS))
def test_every_code_is_a_whole_number_of_int8_steps(seed, n, k, group, format):
    dtype, symmetric = format
    w = weight(seed, n, k)
    grid = snap(w, plain_grid(w, dtype, symmetric, group), dtype, group)
    found = split(grid, dtype)
    assert found is not None
    s, multiple = found
    assert torch.equal(s[:, None] * multiple, grid[0])
    low, high = int_range(dtype)
    zero = torch.zeros_like(multiple) if grid[1] is None else grid[1].float()
    assert float((torch.maximum(zero - low, high - zero) * multiple.abs()).max()) <= LARGEST


@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
def test_it_costs_little(dtype, symmetric):
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    plain = plain_grid(w, dtype, symmetric, 32)
    lost = [float((fake_quantize(w, *g, dtype, 1, 32) - w).square().sum()) for g in (plain, snap(w, plain, dtype, 32))]
    assert lost[1] < 1.02 * lost[0]


def test_the_product_of_integers_is_the_dequantized_weight_bit_for_bit():
    w = weight(3, 6, 50)
    grid = snap(w, plain_grid(w, "uint4", False, 16), "uint4", 16)
    s, multiple = split(grid, "uint4")
    zero = spread(grid[1].float(), w, 1, 16)
    codes = ((w / spread(grid[0], w, 1, 16)).round() + zero).clamp(0, 15)
    integers = (codes - zero) * spread(multiple, w, 1, 16)
    assert torch.equal(integers, integers.to(torch.int8).float())
    assert torch.equal(integers * s[:, None], fake_quantize(w, *grid, "uint4", 1, 16))


def test_scales_of_one_level_are_told_apart():
    w = weight(0, 6, 64)
    assert split(plain_grid(w, "int4", True, 16), "int4") is None
    one = plain_grid(w, "int4", True, 64)
    assert torch.equal(split(one, "int4")[1], torch.ones(6, 1)), "one group per row is an int8 weight already"


def test_multiples_whose_codes_leave_int8_are_not_taken():
    scale = torch.tensor([[1.0, 40.0]])
    assert split((scale, None), "int3") is None
    assert split((scale, None), "int2")[1].tolist() == [[1.0, 40.0]]


def test_steps_of_either_sign_keep_it():
    w = weight(1, 5, 32)
    scale = plain_grid(w, "int4", True, 8)[0] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    grid = snap(w, (scale, None), "int4", 8)
    used = (w.reshape(5, 4, 8) != 0).any(-1)
    assert torch.equal(grid[0].sign()[used], scale.sign()[used])
    assert split(grid, "int4") is not None
