"""Real models: the captured graph and its ONNX form compute what the module does, in every spelling of attention and for other sizes."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from torch.fx import GraphModule

from qgraph.capture import capture
from qgraph.ledger import state
from qgraph.onnx_io import to_proto
from qgraph.torch_export import to_onnx_dialect
from tests.models.zoo import RealModel

pytestmark = pytest.mark.slow


def outputs(gm: GraphModule, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(to_proto(gm).SerializeToString())
    names = [o.name for o in session.get_outputs()]
    return {k: torch.from_numpy(v) for k, v in zip(names, session.run(None, {k: v.numpy() for k, v in feeds.items()}), strict=True)}


def shapes(gm: GraphModule) -> dict[str, list[str | int]]:
    graph = to_proto(gm).graph
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}


def weights_copied(gm: GraphModule, module: torch.nn.Module) -> list[str]:
    """Large constants of the graph that are not the module's own memory."""
    own = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    constants = (*gm.named_parameters(), *gm.named_buffers())
    return [name for name, t in constants if t.numel() > 4096 and t.data_ptr() not in own]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_minilm_with_its_own_output_type(minilm: RealModel, attention: str) -> None:
    bert = copy.deepcopy(minilm.model).bert
    bert.set_attn_implementation(attention)
    feeds = {k: torch.from_numpy(np.array(v[:3])) for k, v in minilm.evaluation.items()}
    gm = capture(bert, feeds, minilm.dynamic_shapes)
    assert state(gm).output_names == ("last_hidden_state", "pooler_output")
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    fused = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert len(linears) == 37 and len(fused) == (6 if attention == "sdpa" else 0)
    onnx = to_onnx_dialect(gm)
    assert shapes(onnx) == {
        "input_ids": ["batch", "seq"],
        "attention_mask": ["batch", "seq"],
        "last_hidden_state": ["batch", "seq", 384],
        "pooler_output": ["batch", 384],
    }
    assert weights_copied(onnx, bert) == []
    for rows, tokens in ((3, 64), (5, 21)):
        feeds = {k: torch.from_numpy(np.array(v[:rows, :tokens])) for k, v in minilm.evaluation.items()}
        with torch.no_grad():
            want, got = bert(**feeds), gm(**feeds)
        assert type(got) is type(want)
        for name, value in outputs(onnx, feeds).items():
            torch.testing.assert_close(got[name], want[name])
            torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-4)


def test_the_imported_graph_runs_in_torch(minilm: RealModel) -> None:
    assert minilm.example_inputs is not None
    onnx = to_onnx_dialect(capture(minilm.model, minilm.example_inputs, minilm.dynamic_shapes))
    with torch.no_grad():
        torch.testing.assert_close(onnx(*minilm.example_inputs)[0], minilm.model(*minilm.example_inputs), rtol=1e-4, atol=1e-4)


def test_efficientnet(effnet: RealModel) -> None:
    assert effnet.example_inputs is not None and isinstance(effnet.model, torch.nn.Module)
    gm = capture(effnet.model, effnet.example_inputs, effnet.dynamic_shapes)
    onnx = to_onnx_dialect(gm)
    assert shapes(onnx) == {"x": ["batch", 3, 224, 224], "output": ["batch", 1000]}
    x = torch.from_numpy(np.array(effnet.evaluation["x"][:3]))
    with torch.no_grad():
        want = effnet.model(x)
        torch.testing.assert_close(gm(x), want)
    torch.testing.assert_close(outputs(onnx, {"x": x})["output"], want, rtol=1e-3, atol=1e-3)
    assert weights_copied(onnx, effnet.model) == []
