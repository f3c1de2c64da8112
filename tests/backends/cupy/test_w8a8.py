"""w8a8_gemm.cu and w8a8_dp4a.cu, emulated, against qgraph.reference: equal bit for bit."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import reference
from qgraph.backends.cupy import w8a8
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.w8a8 import LARGE, MEDIUM, SMALL, Config, pack, pack_bias, padded, unpack
from qgraph.errors import LoweringError
from qgraph.types import int_range, storage

SCHEDULES = (0, 1, 7)


@dataclass(frozen=True)
class Case:
    """One call with random operands. `x_zero`, `w_zero`: None, "one" or "rows"; `bias`: None, "float" or "int"."""

    m: int = 37
    n: int = 70
    k: int = 200
    x_dtype: str = "int8"
    w_dtype: str = "int8"
    per_token: bool = True
    x_zero: str | None = None
    w_zero: str | None = None
    bias: str | None = "float"
    dtype: torch.dtype = torch.float32
    y_dtype: str | None = None
    relu: bool = False

    def operands(self):
        """x, x_scale, x_zero, weight, w_scale, w_zero, bias, y_scale, y_zero."""
        g = torch.Generator().manual_seed(self.m + self.k)

        def integers(shape, dtype):
            low, high = int_range(dtype)
            return torch.randint(low, high + 1, shape, generator=g).to(storage(dtype))

        def positive(*shape):
            return (torch.rand(shape, generator=g) * 0.01 + 0.001).to(self.dtype)

        zeros = {None: None, "one": (1,), "rows": (self.m, 1)}[self.x_zero]
        w_zeros = {None: None, "one": (1,), "rows": (self.n,)}[self.w_zero]
        bias = None if self.bias is None else torch.randn(self.n, generator=g).to(self.dtype)
        if self.bias == "int":  # of any size: the sum is modulo 2**32
            bias = torch.randint(-(2**31), 2**31, (self.n,), generator=g).to(torch.int32)
        return (
            integers((self.m, self.k), self.x_dtype),
            positive(self.m, 1) if self.per_token else positive(1),
            None if zeros is None else integers(zeros, self.x_dtype),
            integers((self.n, self.k), self.w_dtype),
            positive(self.n) if self.n % 2 else positive(1),
            None if w_zeros is None else integers(w_zeros, self.w_dtype),
            bias,
            None if self.y_dtype is None else torch.rand(1, generator=g) * (0.001 + self.k * 0.002),
            None if self.y_dtype is None else integers((1,), self.y_dtype),
        )

    def expected(self):
        x, x_scale, x_zero, weight, w_scale, w_zero, bias, y_scale, y_zero = self.operands()
        linear = (x, x_scale, x_zero, self.x_dtype, weight, w_scale, w_zero, self.w_dtype, bias)
        if not self.relu:
            return reference.quantized_linear(*linear, y_scale, y_zero, self.y_dtype)
        y = torch.relu(reference.quantized_linear(*linear))
        return y if self.y_dtype is None else reference.quantize(y, y_scale, y_zero, self.y_dtype)


def call(case, operands=None, **more):
    x, x_scale, x_zero, weight, w_scale, w_zero, bias, y_scale, y_zero = operands or case.operands()
    p = pack(weight, w_scale, w_zero)
    columns = (p.weight, p.scale, p.sums, p.zero_point, None if bias is None else pack_bias(bias))
    return K.w8a8_linear(x, x_scale, x_zero, *columns, case.dtype, y_scale, y_zero, case.y_dtype, case.relu, **more)


def agrees(case, config, **how):
    """The case by one configuration equals the reference; what the emulation saw."""
    with pytest.MonkeyPatch.context() as patch, emulation(**how) as seen:
        patch.setattr(w8a8, "choose", lambda *_, **__: config)
        got = call(case)
    torch.testing.assert_close(got, case.expected(), rtol=0, atol=0)
    return seen


# A kernel is built for each tile, output type and signedness of x: these cover every tile and type, and both signs.
KERNELS = {
    "large": (Config(LARGE), Case(dtype=torch.float16)),
    "medium": (Config(MEDIUM), Case(x_dtype="uint8")),
    "medium, split": (Config(MEDIUM, 2), Case(x_dtype="uint8")),
    "small, bytes": (Config(SMALL), Case(y_dtype="uint8")),
    "small, split": (Config(SMALL, 2), Case(y_dtype="int8")),
    "medium, bfloat16": (Config(MEDIUM), Case(dtype=torch.bfloat16)),
    "dp4a, 1 row": (Config(rows=1), Case()),
    "dp4a, 8 rows": (Config(rows=8), Case()),
    "dp4a, wide": (Config(rows=8, outputs=64, rounds=2), Case(x_dtype="uint8")),
}
cases = st.builds(
    dict,
    m=st.integers(1, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 200),
    per_token=st.booleans(),
    w_dtype=st.sampled_from(["int8", "uint8", "int4"]),
    x_zero=st.sampled_from([None, "one", "rows"]),
    w_zero=st.sampled_from([None, "one", "rows"]),
    bias=st.sampled_from([None, "float", "int"]),
    relu=st.booleans(),
)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=10, deadline=None)
@given(case=cases, schedule=st.sampled_from(SCHEDULES))
def test_equals_the_reference_for_any_shape_and_operands(kernel, case, schedule):
    config, like = KERNELS[kernel]
    agrees(replace(like, **case), config, schedule=schedule)


@settings(max_examples=12, deadline=None)
@given(
    case=cases,
    x_dtype=st.sampled_from(["int8", "uint8", "int4"]),
    y=st.sampled_from([None, "int8", "uint8", "int4"]),
    t=st.sampled_from(w8a8.REAL),
)
def test_dp4a_takes_every_type(case, x_dtype, y, t):
    agrees(Case(**case | {"m": case["m"] % 9 + 1}, x_dtype=x_dtype, y_dtype=y, dtype=t), Config(rows=8))


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_access_is_out_of_bounds_or_races(kernel):
    config, like = KERNELS[kernel]
    agrees(replace(like, m=19, n=37, k=272, x_zero="rows", w_zero="rows"), config, checked=True, schedule=7)


@pytest.mark.parametrize("rows", [2, 8])
def test_rounds_read_x_again_where_it_does_not_fit(rows):
    agrees(Case(rows, 150, 8208), Config(rows=rows, outputs=64, rounds=3), schedule=7)


TILINGS = [
    (1, 2048, Config(rows=1)),
    (8, 2048, Config(rows=8)),
    (8, 2048, Config(rows=8, outputs=64, rounds=2)),
    (16, 512, Config(SMALL)),
    (64, 512, Config(MEDIUM)),
    (128, 512, Config(LARGE)),
]


@pytest.mark.parametrize(("m", "k", "config"), TILINGS)
def test_global_traffic_is_that_of_the_tiling_and_no_bank_conflicts(m, k, config):
    """x is read once for each block of columns, the weight for each block of rows, and the result is written once, in whole sectors."""
    n = 256
    like = next(c for config_, c in KERNELS.values() if config_.tile == config.tile and config_.splits == 1)
    (_, profile) = agrees(replace(like, m=m, n=n, k=k, x_zero="one"), config, checked=True).profiles[0]
    wide, high = (config.tile.n, config.tile.m) if config.tile else (config.outputs * config.rounds, config.rows)
    size = like.expected().element_size()
    ideal = m * k * (n // wide) + n * k * max(1, m // high) + m * n * size
    assert profile.bank_conflicts == 0
    assert profile.sector_efficiency > 0.95 if config.tile else profile.sector_efficiency == 1
    assert profile.traffic < (1.1 if config.tile else 1.02) * ideal
    assert profile.mma_int8 * 16 * 8 * 32 + profile.dp4a * 4 == m * n * k


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [(1, 256, 576, Config(rows=1)), (2, 128, 4096, w8a8.vectors(2, 4096)[0]), (8, 192, 4096, w8a8.vectors(8, 14336)[0])],
)
def test_few_rows_move_little_more_than_they_must(m, n, k, config):
    """A block's columns, or a few blocks', stand for as many as they are chosen for."""
    seen = agrees(Case(m, n, k, dtype=torch.float16), config, checked=True)
    assert sum(p.traffic for _, p in seen.profiles) <= 1.05 * w8a8.work(m, n, k).bytes


def test_splits_move_little_more_than_the_weight():
    """The least K of a split keeps the partial sums to an eighth of what the blocks read."""
    config = w8a8.choose(16, 128, 2048)
    assert config == Config(SMALL, 2)
    ((_, profile),) = agrees(Case(16, 128, 2048, y_dtype="int8"), config, checked=True).profiles
    assert profile.traffic < 1.15 * (16 * 2048 + 128 * 2048)


@pytest.mark.parametrize("k", [37, 64])
def test_rows_of_x_may_be_ragged_strided_or_misaligned(k):
    wide = torch.randint(-128, 128, (2, 3, k + 1), dtype=torch.int8)
    for x in (wide[..., 1:], wide[..., :k].transpose(0, 1), wide.flatten()[1 : 1 + 6 * k].view(6, k), wide[0, 0, :k]):
        weight, one = torch.randint(-128, 128, (5, k), dtype=torch.int8), torch.tensor([0.5])
        with emulation():
            got = call(Case(), (x, one, None, weight, one, None, None, None, None))
        assert torch.equal(got, reference.quantized_linear(x, one, None, "int8", weight, one, None, "int8", None))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 16), (8, 0, 16), (8, 5, 0)])
def test_empty_operands_are_fine(m, n, k):
    with emulation():
        assert torch.equal(call(Case(m, n, k)), Case(m, n, k).expected())


def test_scales_that_are_no_numbers_saturate_as_the_reference_does():
    """inf * 0 is NaN, which becomes the smallest integer."""
    case = Case(9, 5, 32, y_dtype="int8", bias=None)
    x, x_scale, *others = case.operands()
    x[0], x_scale[1], x_scale[0], x_scale[2] = 0, torch.nan, torch.inf, -torch.inf
    with emulation():
        y = call(case, (x, x_scale, *others))
    x_zero, weight, w_scale, w_zero, bias, y_scale, y_zero = others
    linear = (x, x_scale, x_zero, "int8", weight, w_scale, w_zero, "int8", bias)
    assert torch.equal(y, reference.quantized_linear(*linear, y_scale, y_zero, "int8"))
    assert (y[:2] == -128).all()


def test_requantization_divides_the_scales_before_it_multiplies():
    """s / y_scale is 0.5 to the last bit, so that odd sums are halfway; s * (1 / y_scale) is a little less or more for some y_scale."""
    x, weight = torch.arange(-4, 4, dtype=torch.int8)[:, None], torch.ones(1, 1, dtype=torch.int8)
    for y_scale in torch.arange(1.0, 100.0):
        with emulation():
            got = call(Case(y_dtype="int8"), (x, torch.ones(1), None, weight, (y_scale / 2)[None], None, None, y_scale, None))
        assert torch.equal(got, (x.float() / 2).round().to(torch.int8))


def test_parameters_may_be_strided_and_zero_points_wider():
    case = Case(6, 12, 48, x_zero="rows", w_zero="rows", y_dtype="uint8")
    x, x_scale, x_zero, *others, y_scale, y_zero = case.operands()
    strided = [torch.stack((v, v), -1)[..., 0] for v in (x_scale, x_zero.int())]
    with emulation():
        got = call(case, (x, *strided, *others, y_scale, y_zero.int()))
    assert torch.equal(got, case.expected())


def test_row_sums_that_are_given_are_taken():
    case = Case(5, 12, 48, w_zero="rows")
    sums = case.operands()[0].to(torch.int32).sum(-1, dtype=torch.int32)
    with emulation(checked=True) as seen:
        assert torch.equal(call(case, x_sum=sums), case.expected())
    assert [name for name, _ in seen.profiles] == ["w8a8_dp4a"]


# Packing


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["int8", "uint8", "int4", "uint4"]), st.sampled_from([None, "one", "rows"]))
def test_unpack_inverts_pack(n, k, dtype, w_zero):
    _, _, _, weight, scale, zero, *_ = Case(1, n, k, w_dtype=dtype, w_zero=w_zero).operands()
    packed = pack(weight, scale, zero)
    got, got_scale, got_zero = unpack(packed, k)
    assert packed.weight.shape == (n, padded(k)) and packed.weight.dtype == torch.int8 and not packed.weight[:, k:].any()
    centred = weight.int() - (0 if zero is None else zero.int().reshape(-1, 1))
    assert torch.equal(got.int() - (0 if got_zero is None else got_zero[:, None]), centred)
    assert torch.equal(packed.sums[:n], centred.sum(1, dtype=torch.int32))
    assert torch.equal(got_scale, scale.expand(n))
    if zero is None and int(weight.max()) <= 127:
        assert torch.equal(got, weight.to(torch.int8))


def test_zero_points_are_subtracted_when_packing_where_int8_holds_what_remains():
    weight = torch.tensor([[0, 255], [128, 1]], dtype=torch.uint8)
    assert pack(weight, torch.ones(1), torch.tensor([128], dtype=torch.uint8)).zero_point is None
    assert pack(weight, torch.ones(1)).zero_point is not None
    assert pack(weight, torch.ones(1), torch.tensor([127], dtype=torch.uint8)).zero_point is not None


# Choices


@given(st.integers(1, 5000), st.integers(1, 20000), st.integers(1, 20000), st.sampled_from([75, 80, 89, 90, 120]), st.integers(16, 160))
def test_every_choice_is_a_kernel_that_is_checked(m, n, k, arch, sms):
    config = w8a8.choose(m, n, k, arch=arch, sms=sms)
    if config.tile is None:
        assert m <= config.rows or config.rows == 8
        assert w8a8.dp4a(config.rows) in w8a8.KERNELS
        assert config in w8a8.vectors(m, n, sms=sms) and config.rounds <= w8a8.ROUNDS
        return
    assert arch >= 80 and config.splits >= 1 and (config.splits == 1 or k >= config.splits * w8a8.LEAST_SPLIT)
    steps = -(-padded(k) // config.tile.k)
    assert (config.splits - 1) * -(-steps // config.splits) < steps, "no split is empty"
    assert all(w8a8.gemm(config.tile, out, unsigned=u) in w8a8.KERNELS for out in w8a8.OUT.values() for u in (False, True))
    assert config in w8a8.candidates(m, n, k, sms=sms)


def test_few_rows_wait_for_the_weight_and_many_for_tensor_cores():
    assert w8a8.choose(1, 4096, 4096) == Config(rows=1)
    assert w8a8.choose(5, 1536, 576) == Config(rows=8)
    assert w8a8.choose(5, 4096, 4096) == Config(rows=8, outputs=64)
    assert w8a8.choose(2, 14336, 4096, sms=132) == Config(rows=2, outputs=64, rounds=2)
    assert w8a8.choose(300, 4096, 4096, arch=75) == Config(rows=8, outputs=64)
    assert w8a8.choose(16, 4096, 4096).tile == SMALL
    assert w8a8.choose(64, 4096, 4096).tile == MEDIUM
    assert w8a8.choose(2048, 4096, 4096) == Config(LARGE)
    assert w8a8.choose(128, 768, 768).tile == MEDIUM
    assert w8a8.work(64, 128, 256).int8_ops == 2 * 64 * 128 * 256


# The op


def test_the_op_has_a_schema_and_shapes_that_hold():
    case = Case(5, 6, 32, y_dtype="uint8")
    x, x_scale, _, weight, w_scale, _, bias, y_scale, y_zero = case.operands()
    p = pack(weight, w_scale)
    arguments = (x, x_scale, None, p.weight, p.scale, p.sums, None, pack_bias(bias), torch.float16, y_scale, y_zero, "uint8")
    with emulation():
        torch.library.opcheck(w8a8.w8a8_linear, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 32, dtype=torch.int16)}, "no kernel multiplies x"),
        ({"x": torch.zeros(3, 64, dtype=torch.int8)}, "no kernel multiplies x"),
        ({"x_scale": torch.ones(2, 1)}, "one scale and zero point or one for each of 3 rows"),
        ({"dtype": torch.float64}, "no kernel multiplies x"),
        ({"y_dtype": "int16"}, "at most 8 bits, not to int16"),
    ],
)
def test_what_no_kernel_does_is_named(change, message):
    p = pack(torch.zeros(5, 32, dtype=torch.int8), torch.ones(1))
    good = {"x": torch.zeros(3, 32, dtype=torch.int8), "x_scale": torch.ones(1), "dtype": torch.float32, "y_dtype": None} | change
    with emulation(), pytest.raises(LoweringError, match=message):
        K.w8a8_linear(
            good["x"], good["x_scale"], None, p.weight, p.scale, p.sums, None, None, good["dtype"], torch.ones(1), None, good["y_dtype"]
        )


def test_weights_of_16_bits_are_refused():
    with pytest.raises(LoweringError, match="at most 8 bits, not int16"):
        pack(torch.zeros(5, 32, dtype=torch.int16), torch.ones(1))
