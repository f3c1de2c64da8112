"""The ledger: one decision per edge, what it replaced, counts, and copies that do not share."""

import torch
from torch.fx import Graph, GraphModule

from qgraph.ledger import FLOAT, Entry, Ledger, State, state


def entry(role: str = "weight", decision: str = "int8 sym per axis 0", by: str = "annotate") -> Entry:
    return Entry("encoder.query", "aten.linear", role, decision, by, "recipe w8a8")


def test_a_later_decision_replaces_an_earlier_one_and_keeps_it_as_history() -> None:
    ledger = Ledger()
    first, second = entry(), entry(decision=FLOAT, by="mixed")
    ledger.record(first)
    ledger.record(first)
    assert ledger.history == []
    ledger.record(second)
    assert list(ledger) == [second] and ledger.history == [first]


def test_entries_are_found_by_node_and_role() -> None:
    ledger = Ledger()
    ledger.record(entry())
    ledger.record(entry("x", FLOAT))
    assert ledger.get("encoder.query", "x") == entry("x", FLOAT)
    assert ledger.get("encoder.query", "output") is None
    assert [e.role for e in ledger.of("encoder.query")] == ["weight", "x"]


def test_the_summary_counts_weights_and_activations_apart_and_leaves_out_biases() -> None:
    ledger = Ledger()
    for e in (entry(), entry("x", FLOAT), entry("output", "uint8 asym per tensor"), entry("bias", "int32")):
        ledger.record(e)
    assert ledger.summary() == {"weights": 1, "weights_quantized": 1, "activations": 2, "activations_quantized": 1}


def test_the_table_is_aligned_and_ends_with_the_reason() -> None:
    ledger = Ledger()
    ledger.record(entry())
    ledger.record(entry("x", FLOAT))
    first, second = ledger.table().splitlines()
    assert first.index("recipe") == second.index("recipe") and first.endswith("recipe w8a8")
    assert Ledger().table() == ""


def test_a_copied_state_has_a_ledger_of_its_own() -> None:
    original = State(source="onnx")
    original.ledger.record(entry())
    copy = original.copy()
    copy.ledger.record(entry("x"))
    assert len(original.ledger) == 1 and len(copy.ledger) == 2


def test_a_bare_graph_gets_a_state_when_it_is_asked_for() -> None:
    graph = Graph()
    graph.output(graph.placeholder("x"))
    gm = GraphModule(torch.nn.Module(), graph)
    assert state(gm) is state(gm) and state(gm).stage == "captured"
