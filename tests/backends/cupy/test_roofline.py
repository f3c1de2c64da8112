"""Time at the roofline, by hand; blocks an SM holds, by CUDA's occupancy calculator."""

import pytest

from qgraph.backends.cupy.resources import MULTIPROCESSORS
from qgraph.backends.cupy.roofline import (
    A100,
    A100_40,
    DEVICES,
    H100,
    RTX4090,
    Work,
    known,
    predicted_fraction,
    traffic_fraction,
    wave_fraction,
)
from tests.backends.cupy.cases import rows_to_integers
from tests.bench.traffic import CPU, HEADER, Traffic


def test_a_matrix_times_a_vector_waits_for_memory():
    """int4 weights [4096, 4096] with one half scale for 128 of them, x and y in half."""
    work = Work(bytes=4096 * 4096 // 2 + 4096 * 32 * 2 + 2 * 4096 * 2, fp16_ops=2 * 4096 * 4096)
    assert A100.bound(work) == "memory"
    assert A100.time(work) == pytest.approx(8667136 / 2.039e12)
    assert A100_40.time(work) > A100.time(work) > H100.time(work)


def test_a_large_integer_product_waits_for_tensor_cores():
    work = Work(bytes=2 * 4096**2 + 2 * 4096**2, int8_ops=2 * 4096**3)
    assert all(d.bound(work) == "tensor" for d in DEVICES)
    assert H100.time(work) == pytest.approx(2 * 4096**3 / 1979e12)


def test_half_and_int8_share_the_tensor_cores_and_float32_does_not():
    both = Work(0, int8_ops=624_000_000, fp16_ops=312_000_000)
    assert A100.time(both) == pytest.approx(2e-6)
    assert A100.time(both + Work(0, fp32_ops=19_500_000)) == pytest.approx(2e-6)
    assert A100.bound(both + Work(0, fp32_ops=10**9)) == "fp32"


def test_work_adds_up():
    assert Work(1, 2, 3, 4) + Work(10, 20, 30, 40) == Work(11, 22, 33, 44)


def test_the_last_wave_is_as_long_as_the_others():
    assert wave_fraction(108, 108) == 1.0
    assert wave_fraction(109, 108) == pytest.approx(109 / 216)
    assert wave_fraction(27, 108) == 0.25
    assert wave_fraction(0, 108) == 1.0


def test_sectors_that_are_half_used_halve_the_fraction():
    assert traffic_fraction(3200, 100) == 1.0
    assert traffic_fraction(1600, 100) == 0.5
    work = Work(1600)
    assert predicted_fraction(A100, work, sectors=100, blocks=108) == pytest.approx(0.5)
    assert predicted_fraction(A100, work, sectors=50, blocks=27) == pytest.approx(0.25)
    assert predicted_fraction(A100, work, sectors=50, blocks=216, blocks_per_sm=2) == pytest.approx(1.0)


def test_traffic_does_not_matter_to_what_tensor_cores_bound():
    work = Work(3200, int8_ops=10**12)
    assert predicted_fraction(H100, work, sectors=200, blocks=132) == pytest.approx(1.0)


def test_the_traffic_of_a_call_is_counted_beside_the_least():
    """tests/bench/traffic.py, on rows that are whole sectors."""
    found = Traffic.of("rows", lambda: rows_to_integers(CPU, 4, 512))
    assert found.work.bytes <= found.sectors * 32 <= 1.1 * found.work.bytes, "a scale has a sector of its own"
    assert len(found.cells()) == len(HEADER) and found.cells()[4:6] == ("100.0%", "0")


@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks",
    [
        (80, 256, 32, 0, 8),  # 2048 threads
        (80, 256, 64, 0, 4),  # 65536 registers
        (80, 256, 65, 0, 3),  # 72 registers a thread: 7 warps of each quarter of 16384
        (80, 128, 168, 0, 3),
        (80, 128, 40, 48 << 10, 3),  # 49 KiB with what is reserved, of 164
        (80, 256, 255, 163 << 10, 1),
        (80, 256, 64, (163 << 10) + 1, 0),
        (90, 128, 64, 100 << 10, 2),
        (120, 256, 32, 0, 6),  # 1536 threads
        (120, 32, 16, 0, 24),
        (120, 128, 64, 99 << 10, 1),
        (120, 1024, 64, 0, 1),
        (120, 1024, 65, 0, 0),
    ],
)
def test_an_sm_holds_as_many_blocks_as_its_scarcest_resource_allows(arch, threads, registers, shared, blocks):
    assert MULTIPROCESSORS[arch].holds(threads, registers, shared) == blocks


def test_devices_are_known_by_their_drivers_names():
    assert known("NVIDIA H100 80GB HBM3") is H100
    assert known("NVIDIA GeForce RTX 4090") is RTX4090
    assert known("NVIDIA H100 PCIe") is known("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_every_device_has_a_known_sm():
    assert {d.multiprocessor.threads for d in (A100, H100)} == {2048}
    assert RTX4090.multiprocessor.shared == 100 << 10
