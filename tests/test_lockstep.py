"""lockstep: both models side by side, stopped where something is to be changed."""

import pytest
import torch

import qgraph
from qgraph.errors import CalibrationError
from qgraph.layers import layers
from qgraph.lockstep import MERGED, lockstep, together
from qgraph.pipeline import Context
from qgraph.spill import is_mapped, size
from qgraph.text import path_of
from tests.decoder import decoder, ids
from tests.simulated import ConvNet, images, simulated
from tests.small import mlp_proto, samples


def sites_of(graph):
    return layers(graph, Context(), by="test")


def last_outputs(graph, batches, **options):
    """(float, quantized) output of the last layer, which is the model's, for each batch."""
    sites = sites_of(graph)
    found = []
    for at in lockstep(graph, sites, batches, **options):
        x = sites[at.node].view.x
        found = [at.call(x, *pair) for pair in at.values(x)]
    return [torch.cat(side) for side in zip(*found, strict=True)]


def rows_of(x):
    return sorted(map(tuple, x.tolist()))


def close(a, b):
    torch.testing.assert_close(torch.tensor(rows_of(a)), torch.tensor(rows_of(b)), rtol=1e-4, atol=1e-4)


def test_one_side_is_the_float_model_and_the_other_the_quantized_one() -> None:
    net, batches = ConvNet().eval(), images(6)
    graph = simulated(net, batches)
    floats, quantized = last_outputs(graph, batches)
    x = torch.cat([b[0] for b in batches])
    with torch.no_grad():
        close(floats, net(x))
        close(quantized, torch.cat([graph(*b) for b in batches]))
    assert not torch.allclose(floats, quantized, atol=1e-3)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
def test_onnx_graphs_with_static_and_dynamic_ranges(recipe: str) -> None:
    batches = [{"x": x[None]} for x in samples(8)]
    graph = simulated(mlp_proto(), batches, recipe)
    floats, quantized = last_outputs(graph, batches)
    float_graph = qgraph.from_onnx(mlp_proto())
    rows = [torch.from_numpy(b["x"]) for b in batches]
    close(floats, torch.cat([_first(float_graph(x)) for x in rows]))
    close(quantized, torch.cat([_first(graph(x)) for x in rows]))
    assert not torch.allclose(floats, quantized, atol=1e-4)


def _first(value):
    return value[0] if isinstance(value, tuple | list) else value


def test_what_is_changed_at_a_site_is_seen_by_what_follows_on_the_quantized_side_alone() -> None:
    batches = images(4)
    graph = simulated(ConvNet(), batches)
    before = last_outputs(graph, batches)
    sites = sites_of(graph)
    first = next(iter(sites))
    for at in lockstep(graph, sites, batches):
        layer = sites[at.node]
        if at.node is first:
            layer.set_bias(graph, layer.bias() + 1, by="test")
        after = [torch.cat(side) for side in zip(*(at.call(layer.view.x, *p) for p in at.values(layer.view.x)), strict=True)]
    close(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-2)
    close(last_outputs(graph, batches)[0], before[0])  # a later sweep still knows the float model


def test_early_layers_see_fewer_samples_when_memory_is_short_and_later_ones_all() -> None:
    batches = images(8)
    graph = simulated(ConvNet(), batches)
    seen = {b: [sum(len(x) for x, _ in at.values(n.view.x)) for at, n in _walk(graph, batches, b)] for b in (1, 40_000, 2**28)}
    assert set(seen[2**28]) == {8}
    assert seen[40_000][0] < 8 and seen[40_000][-1] == 8 and seen[40_000] == sorted(seen[40_000])
    assert seen[1] == [MERGED] * len(seen[1])


def test_batches_of_one_size_are_merged_where_the_model_takes_any_number() -> None:
    batches = [(torch.cat([b for (b,) in images(n, seed=n)]),) for n in (1, 2, 1, 1)]
    sizes = [len(x) for at, n in _walk(simulated(ConvNet(), batches), batches, 2**28) for x, _ in at.values(n.view.x)]
    assert sizes[:2] in ([3, 2], [2, 3])
    rows = [{"x": x[None]} for x in samples(4)]
    dynamic = simulated(mlp_proto(), rows, "w8a8-dynamic")
    assert {len(list(at.values(n.view.x))) for at, n in _walk(dynamic, rows, 2**28)} == {4}  # each row has its own range


def test_a_model_that_asks_for_a_memory_layout_runs() -> None:
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4 * 18 * 18, 2)

        def forward(self, x):
            y = torch.relu(self.conv(x))
            return self.head(y.view(y.shape[0], -1))

    net, batches = Flat().eval(), images(3)
    floats, _ = last_outputs(simulated(net, batches), batches)
    close(floats, net(torch.cat([b[0] for b in batches])).detach())


def _walk(graph, batches, budget):
    sites = sites_of(graph)
    return ((at, sites[at.node]) for at in lockstep(graph, sites, batches, budget=budget))


def test_a_stop_holds_only_what_is_read_later() -> None:
    batches = images(3)
    for at, layer in _walk(simulated(ConvNet(), batches), batches, 2**28):
        held = [values for pair in at.envs for values in pair]
        assert all(len(values) == 1 for values in held), (at.node, layer)


def test_samples_are_spread_over_the_data_and_bounded() -> None:
    batches = images(40)
    graph = simulated(ConvNet(), batches)
    sites = sites_of(graph)
    at = next(lockstep(graph, sites, batches, samples=4))
    inputs = [row[None] for x, _ in at.values(sites[at.node].view.x) for row in x]
    positions = sorted(next(i for i, (b,) in enumerate(batches) if torch.equal(b, x)) for x in inputs)
    assert len(positions) == 4 and positions[0] < 10 and positions[-1] >= 20


def test_sites_that_read_one_value_are_one_stop(tmp_path) -> None:
    graph, batches, sites = decoding(tmp_path)
    groups = together(sites, lambda node: sites[node].view.x)
    names = [[path_of(n) for n in at.nodes] for at in lockstep(graph, groups, batches, samples=None)]
    assert names[:5] == [["b0.q", "b0.k", "b0.v"], ["b0.o"], ["b0.gate", "b0.up"], ["b0.down"], ["b1.q", "b1.k", "b1.v"]]
    assert names[-1] == ["head"] and len(names) == 9


def test_without_a_float_model_the_quantized_one_is_the_same(tmp_path) -> None:
    graph, batches, sites = decoding(tmp_path)
    for both, alone in zip(lockstep(graph, sites, batches), lockstep(graph, sites, batches, reference=False), strict=True):
        x = sites[both.node].view.x
        values = rows_of(torch.cat([y.flatten(0, 1) for _, y in both.values(x)]))
        assert values == rows_of(torch.cat([y.flatten(0, 1) for y in alone.inputs(x)]))
        assert values == rows_of(torch.cat([y.flatten(0, 1) for y in both.inputs(x)]))
        assert len(alone.envs[0]) == 1


def test_all_samples_are_seen_and_what_memory_does_not_hold_lies_in_files(tmp_path) -> None:
    graph, batches, sites = decoding(tmp_path, count=70)
    seen = {}
    for budget in (2**28, 10_000):
        seen[budget] = []
        for at in lockstep(graph, sites, batches, samples=None, budget=budget, reference=False):
            x = sites[at.node].view.x
            values = list(at.inputs(x))
            held = sum(size(v) for v in values if not is_mapped(v))
            assert held <= budget and (budget == 2**28) == (held == sum(map(size, values)))
            seen[budget].append(torch.cat([v.flatten(0, 1) for v in values]))
        assert {len(v) for v in seen[budget]} == {70 * 16}
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_long_windows_are_not_merged(tmp_path) -> None:
    graph, _, sites = decoding(tmp_path)
    for length, merged in ((16, 4), (1500, 2), (3000, 1)):
        at = next(lockstep(graph, list(sites)[:1], ids(4, length), samples=None, reference=False))
        assert {len(x) for x in at.inputs(sites[at.node].view.x)} == {merged}


def decoding(folder, count=6):
    """A quantized decoder, windows for it, and its layers."""
    batches = ids(count, 16)
    graph = simulated(decoder(folder), batches, "w4a16-g32")
    return graph, batches, layers(graph, Context(), by="test", biases=False)


def test_no_data_is_an_error() -> None:
    batches = images(2)
    graph = simulated(ConvNet(), batches)
    with pytest.raises(CalibrationError, match="batches are empty"):
        next(lockstep(graph, sites_of(graph), []))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        next(lockstep(graph, sites_of(graph), None, label="stage x"))
