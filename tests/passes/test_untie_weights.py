"""An embedding table that is the last weight, too."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qgraph
from qgraph.formats import TIED
from qgraph.passes import InferTypes, TieWeights, UntieWeights
from qgraph.pipeline import Context

ROWS, WIDTH = 320, 48


class Tied(torch.nn.Module):
    """ids -> table -> relu(x W + b) -> x table^T"""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.middle = torch.nn.Embedding(ROWS, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        return torch.nn.functional.linear(torch.relu(self.middle(self.table(ids))), self.table.weight)


def proto():
    net = Tied()
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], name="look_up"),
        helper.make_node("MatMul", ["x", "middle"], ["h"], name="middle"),
        helper.make_node("Add", ["h", "bias"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0], name="turn"),
        helper.make_node("MatMul", ["r", "turned"], ["logits"], name="head"),
    ]
    weights = {"table": net.table.weight, "middle": net.middle.weight.T, "bias": net.middle.bias}
    stored = [numpy_helper.from_array(np.ascontiguousarray(v.detach().numpy()), k) for k, v in weights.items()]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 5])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5, ROWS])
    return helper.make_model(
        helper.make_graph(nodes, "tied", [ids], [logits], stored), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


IDS = torch.tensor([[1, 5, 319, 0, 7], [2, 2, 3, 300, 11]])


def first(y):
    return y[0] if isinstance(y, tuple | list) else y


def model(origin):
    return (Tied().eval(), {"example_inputs": (IDS,)}) if origin == "torch" else (proto(), {})


def test_the_turned_table_becomes_a_weight_on_the_same_memory_and_back() -> None:
    gm = qgraph.from_onnx(proto())
    InferTypes().run(gm, Context())
    before, y = qgraph.text(gm), first(gm(IDS))
    assert UntieWeights().run(gm, Context()) == 1
    assert "Transpose" not in qgraph.text(gm) and torch.equal(first(gm(IDS)), y)
    head = next(n for n in gm.graph.nodes if TIED in n.meta)
    weight, table = gm.get_buffer(str(head.args[1].target)), next(b for _, b in gm.named_buffers() if b.shape == (ROWS, WIDTH))
    assert weight.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    assert UntieWeights().run(gm, Context()) == 0
    assert TieWeights().run(gm, Context()) == 1
    assert qgraph.text(gm).count("Transpose") == before.count("Transpose") and torch.equal(first(gm(IDS)), y)
    assert TieWeights().run(gm, Context()) == 0


def test_a_turned_weight_that_is_no_table_stays() -> None:
    made = proto()
    made.graph.node[4].input[0] = "middle"
    made.graph.node[5].input[0] = "h"
    del made.graph.output[0].type.tensor_type.shape.dim[2]
    made.graph.output[0].type.tensor_type.shape.dim.add().dim_value = WIDTH
    gm = qgraph.from_onnx(made)
    InferTypes().run(gm, Context())
    assert UntieWeights().run(gm, Context()) == 0


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_the_last_weight_has_the_format_of_the_table(origin: str) -> None:
    source, options = model(origin)
    graph = qgraph.quantize(source, recipe="w4a16-g16-sym", **options)
    decisions = {e.node: e.decision for e in graph.meta["qgraph"].ledger if e.role == "weight"}
    tables = [d for d in decisions.values() if d.startswith("int8")]
    assert len(tables) == 2 and all("group of 128" in d for d in tables) and "int4 sym per group of 16" in str(decisions)


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_a_float_table_leaves_the_last_weight_in_float_and_is_written_once(origin: str, tmp_path) -> None:
    source, options = model(origin)
    recipe = qgraph.load_recipe("w4a16-g16-sym", ["embeddings=null"])
    qgraph.quantize(source, recipe=recipe, output=tmp_path / "m.onnx", **options)
    sizes = [int(np.prod(t.dims)) for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.data_type == TensorProto.FLOAT]
    assert sizes.count(ROWS * WIDTH) == 1
