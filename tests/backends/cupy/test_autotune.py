"""Measuring configurations, with a clock of our own in the place of a GPU's."""

import json
from dataclasses import dataclass

import pytest
import torch

from qgraph.backends.cupy import autotune as tuning
from qgraph.backends.cupy.autotune import autotune, bucket, preferred, tune
from qgraph.backends.cupy.ops import K, cuda_op
from qgraph.errors import LoweringError


@dataclass(frozen=True)
class Tile:
    m: int


TILES = (Tile(16), Tile(32), Tile(64))
RAN: list[tuple[Tile, int]] = []


@cuda_op("Tensor x, int step, Tensor(a!) seen", mutates=("seen",))
def tuned_by_a_test(x: torch.Tensor, step: int, seen: torch.Tensor) -> torch.Tensor:
    """x + step, by the tile that was chosen; counts its calls in `seen`."""
    RAN.append((preferred("toy", (bucket(x.shape[0]), step), TILES) or TILES[0], step))
    seen += 1
    return x + step


def program(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    y = K.tuned_by_a_test(torch.relu(x), 1, seen)
    return K.tuned_by_a_test(K.tuned_by_a_test(y, 1, seen), 2, seen)


def clock(run):
    """A tile of 32 is best for step 1, one of 64 for step 2."""
    run()
    tile, step = RAN[-1]
    return abs(tile.m - {1: 32, 2: 64}[step])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device for the bookkeeping; nothing runs on it."""
    monkeypatch.setenv("QGRAPH_CUDA_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(tuning, "device_time", clock)
    tuning._table.cache_clear()
    RAN.clear()
    yield tmp_path
    tuning._table.cache_clear()


def test_the_fastest_configurations_are_kept_and_found_again(gpu):
    x, seen = torch.zeros(5, 3), torch.zeros(())
    assert program(x, seen).eq(4).all() and [tile for tile, _ in RAN] == [TILES[0]] * 3
    assert autotune(program, x, seen) == {"toy": {"8 1": "Tile(m=32)", "8 2": "Tile(m=64)"}}
    assert seen.item() == 6, "the program ran once; measurements work on copies"
    RAN.clear()
    program(torch.zeros(7, 3), seen)
    assert [tile for tile, _ in RAN] == [Tile(32), Tile(32), Tile(64)]
    (file,) = (gpu / "tuned").iterdir()
    assert json.loads(file.read_text()) == {"toy": {"8 1": "Tile(m=32)", "8 2": "Tile(m=64)"}}


def test_tuning_another_shape_keeps_what_was_found_before(gpu):
    autotune(program, torch.zeros(5, 3), torch.zeros(()))
    assert set(autotune(program, torch.zeros(1, 3), torch.zeros(()))["toy"]) == {"8 1", "8 2", "1 1", "1 2"}


def test_a_winner_that_is_no_candidate_any_more_is_not_chosen(gpu):
    autotune(program, torch.zeros(5, 3), torch.zeros(()))
    assert preferred("toy", (8, 1), TILES) == Tile(32)
    assert preferred("toy", (8, 1), (Tile(16), Tile(64))) is None
    assert preferred("toy", (16, 1), TILES) is None
    assert preferred("other", (8, 1), TILES) is None


def test_changed_sources_begin_a_new_table(gpu, monkeypatch):
    autotune(program, torch.zeros(5, 3), torch.zeros(()))
    monkeypatch.setattr(tuning, "HERE", gpu)
    (gpu / "toy.cu").write_text("// another kernel")
    tuning._table.cache_clear()
    assert preferred("toy", (8, 1), TILES) is None


def test_a_choice_without_alternatives_is_not_measured():
    def measured(run):
        raise AssertionError("nothing to compare")

    assert tune(lambda: preferred("toy", (1,), TILES[:1]), measured) == {}


def test_choices_of_one_call_are_made_one_after_the_other():
    """The second one is measured with the winner of the first."""
    cost = {(16, 16): 5, (32, 16): 4, (64, 16): 9, (32, 32): 3, (32, 64): 6}

    def run():
        first, second = (preferred(name, (1,), TILES) or TILES[0] for name in ("a", "b"))
        return first.m, second.m

    assert tune(run, lambda r: cost[r()]) == {("a", (1,)): Tile(32), ("b", (1,)): Tile(32)}


def test_rows_share_a_choice_up_to_a_power_of_two():
    assert [bucket(m) for m in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128]


def test_without_a_gpu_nothing_is_timed_and_nothing_preferred(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with pytest.raises(LoweringError, match="timed on a CUDA device, and torch sees none"):
        autotune(program, torch.zeros(5, 3), torch.zeros(()))
    assert preferred("toy", (8, 1), TILES) is None


def test_a_damaged_table_is_named(gpu):
    autotune(program, torch.zeros(5, 3), torch.zeros(()))
    (file,) = (gpu / "tuned").iterdir()
    file.write_text("{")
    tuning._table.cache_clear()
    with pytest.raises(LoweringError, match=r"\.json is no table of tuned kernels .*: delete it, and tune again"):
        preferred("toy", (8, 1), TILES)
