"""weight_gemv.cu and weight_gemm.cu, emulated, against the reference; what they ask of memory; the packed layout."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph import reference
from qgraph.backends.cupy import weight_only
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.profile import Profile
from qgraph.backends.cupy.weight_only import BITS, KERNELS, LARGE, MEDIUM, ONE, ROWS, SMALL, WIDE, Plan, candidates, choose, linear, work
from qgraph.backends.cupy.weight_packing import PackedWeight, dequantize_packed, pack_bias, pack_weight, unpack_weight
from qgraph.errors import LoweringError
from qgraph.types import int_range, storage

DTYPES = [f"{sign}int{bits}" for bits in BITS for sign in ("", "u")]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F32: 1e-3, F16: 1e-3, BF16: 3e-3}  # bfloat16 rounds y, and in the GEMM the weight, by 1.4e-3 each


@dataclass(frozen=True)
class Case:
    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    dtype: str
    group: int

    def packed(self, real: torch.dtype = F16) -> PackedWeight:
        return pack_weight(self.weight, self.scale, self.zero, self.dtype, self.group, real=real)

    def dequantized(self) -> Tensor:
        axis = reference.weight_axis(self.scale, self.group)
        return reference.dequantize(self.weight, self.scale, self.zero, self.dtype, axis, self.group)


def case(n: int, k: int, dtype: str, group: int = 0, *, zeros: bool = False, per_tensor: bool = False, seed: int = 0) -> Case:
    """Random integers and scales of two decades; group 0: a scale for each output."""
    random = torch.Generator().manual_seed(seed)
    low, high = int_range(dtype)
    shape = () if per_tensor else (n, -(-k // group)) if group else (n,)
    scale = 10 ** (2 * torch.rand(shape, generator=random) - 3)
    zero = torch.randint(low, high + 1, shape, generator=random).to(storage(dtype)) if zeros else None
    return Case(torch.randint(low, high + 1, (n, k), generator=random).to(storage(dtype)), scale, zero, dtype, group)


def inputs(m: int, k: int, real: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(real)


def check(c: Case, x: Tensor, bias: Tensor | None = None, *, schedule: int = 0, checked: bool = False) -> None:
    with emulation(schedule=schedule, checked=checked):
        found = linear(x, c.packed(x.dtype), None if bias is None else pack_bias(bias))
    wide, w = x.double(), c.dequantized().double()
    expected = wide @ w.T + (0 if bias is None else bias.double())
    apart = found.double() - expected
    assert (found.dtype, found.shape) == (x.dtype, expected.shape)
    assert apart.norm() <= TOLERANCE[x.dtype] * expected.norm()
    reach = wide.norm(dim=1, keepdim=True) * w.norm(dim=1) + expected.abs()
    assert bool((apart.abs() <= TOLERANCE[x.dtype] * reach).all())  # no output is wrong alone


# Products


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "group", "zeros", "real"),
    [
        (1, 200, 328, "uint4", 64, True, F32),
        (1, 130, 2500, "int3", 96, True, F16),
        (1, 130, 2500, "uint4", 96, True, F16),
        (1, 72, 200, "int8", 0, False, BF16),
        (1, 130, 320, "uint2", 32, True, F16),
        (1, 120, 2700, "int2", 96, False, F16),
        (1, 520, 2700, "uint2", 96, True, BF16),
        (1, 300, 328, "uint4", 64, True, F32),
        (5, 200, 328, "uint4", 64, True, F32),
        (3, 131, 200, "uint4", 64, True, F16),
        (7, 130, 1300, "int4", 128, False, BF16),
        (8, 66, 130, "uint8", 64, True, BF16),
        (20, 130, 328, "int3", 96, True, F32),
        (33, 70, 328, "uint2", 32, True, F16),
        (150, 130, 200, "int8", 32, True, F16),
    ],
)
def test_a_product_is_the_references(m: int, n: int, k: int, dtype: str, group: int, zeros: bool, real: torch.dtype) -> None:
    check(case(n, k, dtype, group, zeros=zeros), inputs(m, k, real), torch.randn(n), schedule=m % 3)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 400),
    st.sampled_from(["int4", "uint4"]),
    st.sampled_from([0, 32, 64, 96, 128]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_ragged_shapes_groups_zero_points_and_biases(
    m: int, n: int, k: int, dtype: str, group: int, zeros: bool, bias: bool, schedule: int
) -> None:
    check(case(n, k, dtype, group, zeros=zeros), inputs(m, k, F16), torch.randn(n) if bias else None, schedule=schedule)


def test_a_float32_vector_is_not_rounded() -> None:
    c, x = case(64, 256, "uint4", 32, zeros=True), inputs(1, 256, F32)
    with emulation():
        found = linear(x, c.packed(F32))
    torch.testing.assert_close(found, x @ c.dequantized().T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("m", [1, 3])
def test_a_scale_for_the_tensor_and_leading_axes(m: int) -> None:
    c, x = case(64, 128, "int4", per_tensor=True), inputs(m, 128, F16)
    with emulation():
        found = linear(x.reshape(1, m, 128), c.packed())
    assert found.shape == (1, m, 64)
    torch.testing.assert_close(found[0].double(), x.double() @ c.dequantized().double().T, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [1e-8, 1e4])
def test_scales_that_half_does_not_hold(factor: float) -> None:
    c = case(64, 128, "int4", 64)
    scaled = Case(c.weight, c.scale * factor, None, c.dtype, c.group)
    assert scaled.packed().ratio.dtype == F16
    x = (inputs(3, 128, F32) * min(1 / factor, 1e4)).to(F16)
    with emulation():
        found = linear(x, scaled.packed()).double()
    expected = x.double() @ scaled.dequantized().double().T
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_outputs_whose_scales_are_zero_are_their_bias() -> None:
    c = case(64, 64, "uint4", 32)
    c.scale[5] = 0
    with emulation():
        found = linear(inputs(2, 64, F16), c.packed(), pack_bias(torch.arange(64.0)))
    assert found[:, 5].tolist() == [5.0, 5.0]


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    with emulation():
        assert linear(torch.zeros(shape, dtype=F16), case(66, 64, "int4").packed()).shape == (*shape[:-1], 66)


@pytest.mark.parametrize("m", [1, 4])
def test_a_split_of_k_gives_the_same_bits_in_every_schedule(m: int) -> None:
    c, x = case(64, 4096, "int4", 128), inputs(m, 4096, F16)
    assert choose(m, 64, 4096, 4, F16, 90).splits > 1
    found = []
    for schedule in (0, 1, 7):
        with emulation(schedule=schedule):
            found.append(linear(x, c.packed()))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# Memory


def profiles(c: Case, x: Tensor) -> dict[str, Profile]:
    with emulation(checked=True) as run:
        linear(x, c.packed(x.dtype))
    return dict(run.profiles)


@pytest.mark.parametrize(
    ("dtype", "real", "most"),
    [("uint4", F16, 1.045), ("uint4", F32, 1.04), ("uint8", BF16, 1.03), ("int3", F16, 1.04), ("int2", F16, 1.05), ("uint2", F16, 1.05)],
)
def test_the_vector_kernel_moves_little_more_than_it_must(dtype: str, real: torch.dtype, most: float) -> None:
    zeros, bits = dtype.startswith("u"), int(dtype[-1])
    found = profiles(case(1024, 4096, dtype, 128, zeros=zeros), inputs(1, 4096, real))
    least = work(1, 1024, 4096, bits, 128, real, zeros=zeros).bytes
    assert sum(p.traffic for p in found.values()) <= most * least
    assert all(p.sector_efficiency == 1 and p.bank_conflicts == 0 for p in found.values())


@pytest.mark.parametrize(("m", "dtype"), [(8, "uint4"), (20, "int3")])
def test_the_tensor_core_kernel_has_no_bank_conflicts_and_whole_sectors(m: int, dtype: str) -> None:
    found = profiles(case(256, 512, dtype, 32, zeros=True), inputs(m, 512, F16))["weight_gemm"]
    assert found.bank_conflicts == 0 and found.sector_efficiency == 1
    rows = choose(m, 256, 512, int(dtype[-1]), F16, 90).config.rows
    assert found.mma_float == 256 // 16 * (512 // 16) * (rows // 8)


def test_ragged_shapes_touch_no_memory_that_is_not_theirs() -> None:
    check(case(67, 90, "uint4", 32, zeros=True), inputs(1, 90, F16), torch.randn(67), checked=True)
    check(case(67, 90, "uint4", 32, zeros=True), inputs(5, 90, F16), torch.randn(67), checked=True)


# Layout


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 140), st.integers(1, 200), st.sampled_from([*DTYPES, "int5", "uint7"]), st.sampled_from([0, 32, 96]), st.booleans())
def test_unpacking_gives_back_what_was_packed(n: int, k: int, dtype: str, group: int, zeros: bool) -> None:
    c = case(n, k, dtype, group, zeros=zeros)
    packed = c.packed(F32)
    assert torch.equal(unpack_weight(packed, dtype), c.weight)
    torch.testing.assert_close(dequantize_packed(packed), c.dequantized(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "bits"), [("uint2", 2), ("uint3", 3), ("uint4", 4), ("uint5", 8), ("uint8", 8)])
def test_a_code_takes_its_bits(dtype: str, bits: int) -> None:
    packed = case(128, 192, dtype).packed()
    assert packed.bits == bits and packed.codes.nbytes == 128 * 192 * bits // 8


@pytest.mark.parametrize(("n", "k"), [(0, 0), (21, 38), (90, 77), (127, 127)])
def test_four_bits_lie_where_the_drawing_says(n: int, k: int) -> None:
    weight = torch.zeros(128, 128, dtype=torch.uint8)
    weight[n, k] = 9
    codes = pack_weight(weight, torch.ones(128), None, "uint4").codes
    (j, g, o), (s, h, t, e) = (n % 64 // 16, n % 16 // 2, n % 2), (k % 64 // 16, k % 16 // 8, k % 8 // 2, k % 2)
    word = int(codes[n // 64, k // 64, j, 4 * g + t, s])
    assert codes.count_nonzero() == 1 and word & 0xFFFFFFFF == 9 << 4 * (o + 2 * h + 4 * e)


# The choice, and what is refused


@pytest.mark.parametrize(
    ("m", "real", "arch", "config"),
    [(1, F16, 90, ONE), (2, F16, 80, SMALL), (8, BF16, 90, SMALL), (9, F16, 90, MEDIUM), (64, F32, 90, MEDIUM), (65, F16, 120, LARGE)]
    + [(1, F32, 90, ONE), (2, F32, 90, ROWS), (8, F32, 90, ROWS), (9, F32, 90, MEDIUM), (30, F16, 75, ONE)],
)
def test_the_kernel_follows_the_rows(m: int, real: torch.dtype, arch: int, config: weight_only.Config) -> None:
    assert choose(m, 4096, 4096, 8, real, arch).config == config


@pytest.mark.parametrize(
    ("bits", "real", "n", "config"),
    [(2, F16, 4096, WIDE), (3, BF16, 4096, WIDE), (4, F16, 4096, ONE), (4, F32, 4096, WIDE), (8, F32, 4096, ONE), (2, F16, 128, ONE)],
)
def test_codes_that_are_short_beside_x_have_wide_blocks(bits: int, real: torch.dtype, n: int, config: weight_only.Config) -> None:
    assert choose(1, n, 4096, bits, real, 90).config == config


def test_k_is_split_only_where_blocks_are_few() -> None:
    assert choose(1, 4096, 4096, 4, F16, 90) == Plan(ONE, 4)
    assert choose(1, 4096, 4096, 2, F16, 90) == Plan(WIDE, 3)
    assert choose(1, 49152, 576, 4, F16, 90) == Plan(ONE, 1)
    assert choose(512, 4096, 4096, 4, F16, 90) == Plan(LARGE, 2)


@pytest.mark.parametrize("real", [F16, BF16, F32])
def test_every_kernel_that_may_be_chosen_is_compiled_by_the_check(real: torch.dtype) -> None:
    for m in (1, 2, 8, 16, 64, 300):
        found = {plan.config.kernel(real, b) for b in BITS for plan in candidates(m, 256, 4096, b, real, 90)}
        assert found <= set(KERNELS)


def test_the_op_has_a_schema_and_a_shape_function() -> None:
    w = case(66, 64, "uint4", 32, zeros=True).packed()
    arguments = (inputs(2, 64, F16), w.codes, w.row, w.ratio, w.zeros, pack_bias(torch.randn(66)), w.zero, w.n, w.group)
    with emulation():
        torch.library.opcheck(K.weight_only_linear, arguments, test_utils=("test_schema", "test_faketensor"))


def test_refuses_what_the_kernels_do_not_do() -> None:
    c = case(64, 128, "int4", 32)
    with pytest.raises(LoweringError, match="groups of multiples of 32 inputs, not 16"):
        pack_weight(c.weight, torch.ones(64, 8), None, "int4", 16)
    with pytest.raises(LoweringError, match="codes of 2 to 8 bits, not int16"):
        pack_weight(c.weight.to(torch.int16), torch.ones(64), None, "int16")
    with emulation():
        with pytest.raises(LoweringError, match="x has 100 inputs, and the packed weight 192"):
            linear(torch.zeros(1, 100, dtype=F16), case(64, 192, "int4").packed())
        with pytest.raises(LoweringError, match=r"packed in torch.float16 and x is torch.float32"):
            linear(torch.zeros(1, 128), c.packed(F16))
        with pytest.raises(LoweringError, match="float32, float16 or bfloat16, not float64"):
            linear(torch.zeros(1, 128, dtype=torch.float64), c.packed(F16))
