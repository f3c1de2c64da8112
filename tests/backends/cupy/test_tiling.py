"""What tilings move, beside what the emulator counts of the kernels."""

import pytest
import torch

from qgraph.backends.cupy import tiling
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.roofline import A100, RTX4090, Work
from qgraph.backends.cupy.tiling import Launch
from tests.backends.cupy import cases

CPU = torch.device("cpu")
# The emulator counts as a device of 108 multiprocessors does in w8a8.choose, and as sm_90 in weight_only.choose.
INTEGER = [(1, 512, 2048), (8, 256, 1024), (16, 128, 2048), (128, 256, 512)]
WEIGHT_ONLY = [(1, 512, 4096, 4), (1, 512, 4096, 2), (5, 256, 1024, 4), (64, 256, 512, 4), (64, 256, 1024, 4), (20, 128, 1024, 3)]


@pytest.mark.parametrize(("m", "n", "k"), INTEGER)
def test_an_integer_product_moves_what_its_tiling_says(m, n, k):
    case = cases.integer_linear(CPU, m, n, k)
    with emulation(checked=True) as seen:
        y = case.op(case.x)
    counted = sum(p.traffic for name, p in seen.profiles if name != "w8a8_row_sums")
    assert tiling.integer_linear(m, n, k, y.dtype, A100).bytes == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(("m", "n", "k", "bits"), WEIGHT_ONLY)
def test_a_weight_only_product_moves_what_its_tiling_says(m, n, k, bits):
    case = cases.weight_only_linear(CPU, m, n, k, bits=bits)
    with emulation(checked=True) as seen:
        y = case.op(case.x)
    counted = sum(p.traffic for _, p in seen.profiles)
    found = tiling.weight_only_linear(m, n, k, bits, 128, y.dtype, A100, zeros=True)
    assert found.bytes == pytest.approx(counted, rel=0.05)


def test_a_last_wave_of_few_blocks_costs_as_much_as_a_full_one():
    work = Work(32 * 1000)
    full, spilled = Launch(32 * 1000, 2 * 108, 2), Launch(32 * 1000, 2 * 108 + 1, 2)
    assert full.fraction(A100, work) == 1.0 and spilled.fraction(A100, work) == pytest.approx(217 / 432)
    assert Launch(64 * 1000, 2 * 128, 2).fraction(RTX4090, work) == pytest.approx(0.5)
