"""A quantized key/value cache: appended rows are dynamic_quantize's bit for bit, and attention is that over the dequantized cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph import reference
from qgraph.backends.cupy import kv_cache, kv_reference
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.kv_cache import KERNELS, QuantizedCache, advance, append_work, choose, row_bytes, splits, work
from qgraph.backends.cupy.ops import K
from qgraph.errors import LoweringError

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
ROUNDING = {HALF: 2**-11, BFLOAT: 2**-8, FLOAT: 2**-24}
"""Of the result to its type."""


def allocate(batch, kv_heads, head_dim, capacity, bits, dtype, symmetric=False):
    return QuantizedCache.allocate(batch, kv_heads, head_dim, capacity=capacity, bits=bits, symmetric=symmetric, dtype=dtype, device="cpu")


def uneven(*shape, dtype, seed=0):
    """Values with a mean, whose rows and channels differ in size: zero points, scales and maxima all matter."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) + 0.5
    return (x * torch.exp(torch.randn(*shape[:-1], 1, generator=random)) * torch.linspace(0.3, 2, shape[-1])).to(dtype)


def filled(lengths, kv_heads, head_dim, capacity, bits, dtype, seed=0):
    """A cache written by the reference; what lies behind the length of a sequence is garbage that must not be seen."""
    cache = allocate(len(lengths), kv_heads, head_dim, capacity, bits, dtype)
    k, v = (uneven(len(lengths), capacity, kv_heads, head_dim, dtype=dtype, seed=seed + i) for i in (1, 2))
    kv_reference.append(k, v, cache.codes, cache.params, cache.lengths, bits, False)
    cache.lengths.copy_(torch.tensor(lengths))
    for b, length in enumerate(lengths):
        cache.params[:, b, :, length:, 0] = torch.nan
    return cache


def agrees(cache, q, fresh, schedule=0, scale=0.2, starts=None):
    """kv_attention is the reference within 1e-3, as a whole and for each row, besides the rounding to q's type."""
    with emulation(schedule=schedule):
        found = K.kv_attention(q, cache.codes, cache.params, cache.lengths, starts, scale, cache.bits, fresh).to(FLOAT)
    cleaned = cache.params.nan_to_num(nan=0.0)
    expected = kv_reference.attention(q, cache.codes, cleaned, cache.lengths, starts, scale, cache.bits, fresh)
    error, size = (found - expected).norm(dim=-1), expected.norm(dim=-1)
    assert bool((error <= (1e-3 + ROUNDING[q.dtype]) * size).all()), (error / size).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "head_dim"), [(HALF, 64), (FLOAT, 80), (BFLOAT, 256)])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_appended_rows_are_quantized_bit_for_bit(dtype, head_dim, bits, data):
    batch, new, heads = (data.draw(st.integers(1, n)) for n in (3, 9, 3))
    symmetric = data.draw(st.booleans())
    found, expected = (allocate(batch, heads, head_dim, 16, bits, dtype, symmetric) for _ in range(2))
    for cache in (found, expected):
        cache.lengths.copy_(torch.arange(batch) * 3)
    k, v = (uneven(batch, new, heads, head_dim, dtype=dtype, seed=data.draw(st.integers(0, 99))) for _ in range(2))
    with emulation(schedule=data.draw(st.sampled_from([0, 1, 7]))):
        found.append(k, v)
    kv_reference.append(k, v, expected.codes, expected.params, expected.lengths, bits, symmetric)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.params, expected.params)


def test_rows_without_a_range_with_nan_and_with_infinity_are_the_references():
    k = uneven(1, 6, 1, 64, dtype=HALF)
    k[0, 0], k[0, 1, 0, 3], k[0, 2, 0, 5], k[0, 3, 0, 7], k[0, 4], k[0, 5] = 0.0, torch.nan, torch.inf, -torch.inf, 6e-8, k[0, 5].abs()
    for symmetric in (False, True):
        cache = allocate(1, 1, 64, 16, 8, HALF, symmetric)
        with emulation():
            cache.append(k, k)
        q, scale, zero_point = reference.dynamic_quantize(k, "uint8", symmetric, axis=-1, group=-1)
        assert torch.equal(cache.codes[0, 0, 0, :6], q[0, :, 0]) and torch.equal(cache.codes[1], cache.codes[0])
        assert torch.equal(cache.params[0, 0, 0, :6, 0], scale[0, :, 0, 0])
        assert torch.equal(cache.params[0, 0, 0, :6, 1], zero_point[0, :, 0, 0].to(HALF))


def test_a_prompts_warps_take_several_rows_and_those_beyond_the_capacity_are_dropped(monkeypatch):
    monkeypatch.setattr(kv_cache, "PROMPT", 1)
    for dtype in (HALF, FLOAT):
        found, expected = (allocate(2, 3, 64 if dtype == HALF else 80, 32, 8, dtype) for _ in range(2))
        k, v = (uneven(2, 21, 3, found.head_dim, dtype=dtype, seed=s) for s in (1, 2))
        for cache in (found, expected):
            cache.lengths.copy_(torch.tensor([0, 20]))
        with emulation():
            found.append(k, v)
        kv_reference.append(k, v, expected.codes, expected.params, expected.lengths, 8, False)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.params, expected.params)


@pytest.mark.parametrize(
    ("dtype", "bits", "head_dim", "rows"), [(HALF, 8, 64, (1, 8)), (HALF, 4, 128, (9, 20)), (BFLOAT, 4, 80, (1, 8)), (FLOAT, 8, 48, (1, 8))]
)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_attention_is_that_over_the_dequantized_cache(dtype, bits, head_dim, rows, data):
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=2))
    queries = data.draw(st.integers(1, min(8, *lengths)))
    groups = [g for g in range(1, 21) if rows[0] <= g * queries <= rows[1]] or [1]
    group, kv_heads = data.draw(st.sampled_from(groups)), data.draw(st.integers(1, 2))
    cache = filled(lengths, kv_heads, head_dim, 304, bits, dtype, data.draw(st.integers(0, 99)))
    q = uneven(len(lengths), queries, kv_heads * group, head_dim, dtype=dtype)
    cache.lengths.sub_(queries)
    starts = None
    if data.draw(st.booleans()):
        starts = torch.tensor([data.draw(st.integers(0, n - queries)) for n in lengths], dtype=torch.int32)
        for b, start in enumerate(starts.tolist()):
            cache.params[:, b, :, :start, 0] = torch.nan
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kv_cache, "_multiprocessors", lambda device: data.draw(st.sampled_from([1, 132])))
        agrees(cache, q, queries, data.draw(st.sampled_from([0, 1, 7])), starts=starts)


def test_queries_that_see_no_token_and_sequences_without_one_give_zero():
    cache = filled([0, 1], 1, 64, 16, 8, HALF)
    q = uneven(2, 2, 3, 64, dtype=HALF)
    with emulation():
        found = K.kv_attention(q, cache.codes, cache.params, cache.lengths, None, 0.2, 8, 0)
    assert bool((found[0] == 0).all()) and bool((found[1, 0] == 0).all()) and bool((found[1, 1] != 0).any())


@pytest.mark.parametrize("size", [1e-4, 3e4])
def test_values_of_any_size_keep_their_precision(size):
    """The weights are halves: without the values' scales in the running maximum, those of tiny or huge values would vanish or overflow."""
    cache = filled([90], 1, 48, 96, 8, FLOAT)
    cache.params[1, ..., 0] *= size
    agrees(cache, uneven(1, 1, 3, 48, dtype=FLOAT), 0)
    agrees(cache, uneven(1, 1, 3, 48, dtype=FLOAT) * 1e6, 0, scale=2e-7)


def test_a_late_outlier_rescales_what_was_summed_before():
    cache = filled([200], 1, 64, 208, 8, HALF)
    cache.params[0, 0, 0, 150, 0] *= 30
    agrees(cache, uneven(1, 1, 4, 64, dtype=HALF), 0)


def test_decoding_token_by_token_is_the_reference_and_ends_when_the_cache_is_full():
    cache, lengths = allocate(1, 2, 64, 16, 8, HALF), []
    k, v, q = (uneven(1, 16, heads, 64, dtype=HALF, seed=s) for s, heads in ((1, 2), (2, 2), (3, 4)))
    with emulation():
        for piece in (slice(0, 10), slice(10, 13), slice(13, 14), slice(14, 16)):
            new = piece.stop - piece.start
            cache.append(k[:, piece], v[:, piece])
            if new < 9:
                found = cache.attend(q[:, piece]).to(FLOAT)
                expected = kv_reference.attention(q[:, piece], cache.codes, cache.params, cache.lengths, None, 64**-0.5, 8, new)
                assert (found - expected).norm() <= 2e-3 * expected.norm()
            advance([cache], new)
            lengths.append(cache.lengths.item())
        assert lengths == [10, 13, 14, 16]
        with pytest.raises(LoweringError, match="the cache is full: it has 16 tokens, and 1 more exceed its capacity of 16"):
            cache.append(k[:, :1], v[:, :1])


def test_every_byte_of_the_cache_is_read_once_in_whole_sectors_and_without_bank_conflicts():
    for bits in (4, 8):
        cache = filled([512], 1, 64, 512, bits, HALF)
        q = uneven(1, 1, 4, 64, dtype=HALF)
        with pytest.MonkeyPatch.context() as patched, emulation(checked=True, schedule=5) as run:
            patched.setattr(kv_cache, "_multiprocessors", lambda device: 0)
            K.kv_attention(q, cache.codes, cache.params, cache.lengths, None, 0.2, bits, 0)
            K.kv_attention(q, cache.codes, cache.params, cache.lengths, torch.tensor([300], dtype=torch.int32), 0.2, bits, 0)
        (_, profile), (_, later) = run.profiles
        assert profile.sector_efficiency == 1.0 and profile.bank_conflicts == 0
        least = work((1, 1, 4, 64), 1, 512, bits, HALF).bytes
        own = 3 * 4 * 64 * 2 + 4 * 32  # each of the four warps reads q and a length
        assert profile.unique <= least + 4 and profile.traffic <= min(least + own, 1.05 * least), (profile.traffic, least)
        assert later.unique <= work((1, 1, 4, 64), 1, 512 - 288, bits, HALF).bytes + 8, "what no query sees is not read"


def test_appending_reads_and_writes_once_in_whole_sectors(monkeypatch):
    monkeypatch.setattr(kv_cache, "PROMPT", 1)
    cache, (k, v) = allocate(1, 2, 64, 64, 8, HALF), (uneven(1, 64, 2, 64, dtype=HALF, seed=s) for s in (1, 2))
    with emulation(checked=True) as run:
        cache.append(k, v)
    ((_, profile),) = run.profiles
    least = append_work((1, 64, 2, 64), 8, HALF).bytes
    assert profile.sector_efficiency == 1.0 and profile.traffic <= 1.05 * least, (profile.traffic, least)


def test_layers_that_share_their_lengths_advance_together():
    first = allocate(2, 1, 64, 16, 8, HALF)
    second = QuantizedCache.allocate(2, 1, 64, capacity=16, bits=8, dtype=HALF, device="cpu", lengths=first.lengths)
    advance([first, second], 9)
    assert first.lengths.tolist() == [9, 9] and (first.appended, second.appended) == (9, 9)
    with pytest.raises(LoweringError, match="the cache is full"):
        advance([first, second], 8)


def test_packing_is_undone():
    for bits, head_dim in ((4, 80), (4, 64), (8, 48)):
        q = torch.randint(0, 2**bits, (3, head_dim), dtype=torch.uint8)
        rows = kv_reference.pack(q, bits)
        assert rows.shape == (3, row_bytes(head_dim, bits)) and torch.equal(kv_reference.unpack(rows, bits, head_dim), q)


def test_the_ops_have_shapes_without_data_and_say_what_they_change():
    cache = filled([20], 1, 64, 32, 8, HALF)
    k, q = uneven(1, 1, 1, 64, dtype=HALF), uneven(1, 1, 2, 64, dtype=HALF)
    with emulation():
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(K.kv_append, (k, k, cache.codes, cache.params, cache.lengths, 8, False), test_utils=tests)
        torch.library.opcheck(K.kv_attention, (q, cache.codes, cache.params, cache.lengths, None, 0.2, 8, 0), test_utils=tests)


def test_what_does_not_fit_is_said():
    with pytest.raises(LoweringError, match="4 or 8 bits and heads of 32 to 256, in steps of 16, not 8 bits and 40"):
        choose(HALF, 8, 40, 1)
    with pytest.raises(LoweringError, match="float32, float16 or bfloat16, not torch.float64"):
        choose(torch.float64, 8, 64, 1)
    cache = allocate(1, 2, 64, 16, 8, HALF)
    with pytest.raises(LoweringError, match=r"takes keys and values \[1, new, 2, 64\] of torch.float16, not \[1, 1, 3, 64\]"):
        cache.append(torch.zeros(1, 1, 3, 64, dtype=HALF), torch.zeros(1, 1, 3, 64, dtype=HALF))
    with pytest.raises(LoweringError, match=r"answers queries \[1, 1 to 8, a multiple of 2, 64\] of torch.float16, not \[1, 9, 2, 64\]"):
        cache.attend(torch.zeros(1, 9, 2, 64, dtype=HALF))


def test_sequences_are_split_until_the_device_is_busy_but_not_into_less_than_128_tokens():
    assert splits(64, 8, 4096, 132) == 1
    assert splits(1, 8, 65536, 132) == 33
    assert splits(1, 8, 1024, 132) == 8
    assert all(k.file.startswith("kv_") for k in KERNELS) and len(set(KERNELS)) == len(KERNELS)
