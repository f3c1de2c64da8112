"""Bits spent where they matter, within a size."""

import pytest
import torch

import qgraph
from qgraph.errors import RecipeError
from qgraph.passes.allocate_bits import AllocateBits, _spend, _Steps
from tests.passes.test_gptq import DYNAMIC, batches, error, net, proto


def quantized(origin, size, scheme="w4a16-g16-sym", **options):
    recipe = qgraph.load_recipe(scheme, [f"stages=[{{bits: {{size: {size}, samples: 16}}}}]"])
    data = batches()
    if origin == "onnx":
        return qgraph.quantize(proto(net()), [{"x": x.numpy()} for x in data], recipe=recipe, backend="reference", **options)
    data = [(x,) for x in data]
    return qgraph.quantize(net(), data, recipe=recipe, example_inputs=data[0], dynamic_shapes=DYNAMIC, backend="reference", **options)


def formats(graph):
    return {e.node: e.decision.split()[0] for e in graph.meta["qgraph"].ledger if e.role == "weight"}


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_more_room_gives_more_bits_and_a_smaller_error(origin: str) -> None:
    few, some, all_ = (quantized(origin, size) for size in (0.0101, 0.0125, 1.0))
    counts = [list(formats(g).values()).count("int8") for g in (few, some, all_)]
    assert counts[0] < counts[1] < counts[2] == len(formats(all_))
    assert error(few) > error(some) > error(all_)


def test_the_ledger_says_what_each_costs_the_output() -> None:
    graph = quantized("torch", 0.0125)
    assert all("of its power at 4 bits" in e.reason for e in graph.meta["qgraph"].ledger if e.role == "weight")


def test_both_origins_choose_the_same() -> None:
    assert sorted(formats(quantized("torch", 0.0125)).values()) == sorted(formats(quantized("onnx", 0.0125)).values())


def test_a_size_that_the_fewest_bits_do_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the weights take 0\.00967 MB at 4 bits: more than size=0\.001"):
        quantized("torch", 0.001)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 10, "choices": (4,)}])
def test_options_without_meaning_are_refused(options) -> None:
    with pytest.raises(RecipeError, match="size in MB and two or more choices"):
        AllocateBits(**options)


def test_outside_a_recipe_it_says_what_to_do() -> None:
    graph = qgraph.capture(net(), (batches(1)[0],))
    with pytest.raises(RecipeError, match="name it in one"):
        AllocateBits(size=1)(graph)


def test_bits_are_spent_as_an_exhaustive_search_would() -> None:
    g = torch.fx.Graph()
    nodes = [g.placeholder(f"x{i}") for i in range(4)]
    steps = [_Steps(n, lost, [4.0, 8.0]) for n, lost in zip(nodes, (1.0, 8.0, 2.0, 4.0), strict=True)]
    assert _spend(steps, (4, 8), 8.0) == {nodes[1]: 8, nodes[3]: 8}
    three = [_Steps(n, lost, [2.0, 3.0, 4.0]) for n, lost in zip(nodes, (1.0, 100.0), strict=False)]
    assert _spend(three, (2, 3, 4), 2.0) == {nodes[1]: 4}


def test_choices_without_a_kernel_are_refused_by_name() -> None:
    recipe = qgraph.load_recipe("w4a16-g16-sym", ["stages=[{bits: {size: 1, choices: [4, 12]}}]"])
    data = [(x,) for x in batches()]
    with pytest.raises(RecipeError, match=r"cannot choose among \[4, 12\] bits at 0.gate: .*at most 8 bits"):
        qgraph.quantize(net(), data, recipe=recipe, example_inputs=data[0], dynamic_shapes=DYNAMIC)


def test_what_a_rule_names_keeps_its_format() -> None:
    recipe = qgraph.load_recipe("w4a16-g16-sym", ["stages=[{bits: {size: 1}}]", "rules.0.gate={weights: {bits: 4}}"])
    data = [(x,) for x in batches()]
    graph = qgraph.quantize(net(), data, recipe=recipe, example_inputs=data[0], dynamic_shapes=DYNAMIC)
    assert [name for name, format in formats(graph).items() if format == "int4"] == ["0.gate"]
