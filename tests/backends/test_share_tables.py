"""Codes of a tied embedding table, stored once."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import qgraph
from tests.passes.test_untie_weights import IDS, ROWS, WIDTH, Tied, first, proto


def bytes_of(path, kinds=(onnx.TensorProto.UINT8, onnx.TensorProto.INT8)):
    return [len(t.raw_data) for t in onnx.load(path).graph.initializer if t.data_type in kinds]


@pytest.mark.parametrize("origin", ["torch", "onnx"])
@pytest.mark.parametrize("recipe", ["w4a16-g16-sym", "w4a8-g16-sym"])
def test_the_table_is_stored_once_and_the_numbers_stay(origin: str, recipe: str, tmp_path) -> None:
    model, options = (Tied().eval(), {"example_inputs": (IDS,)}) if origin == "torch" else (proto(), {})
    graph = qgraph.quantize(model, recipe=recipe, output=tmp_path / "m.onnx", **options)
    assert [n for n in bytes_of(tmp_path / "m.onnx") if n >= ROWS * WIDTH] == [ROWS * WIDTH]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    want = first(graph(IDS)).detach().numpy()
    np.testing.assert_allclose(y, want, atol=(0.02 if "a8" in recipe else 1e-5) * np.abs(want).max())


def test_the_kernel_of_a_shared_weight_is_the_promised_one() -> None:
    program = qgraph.lower(qgraph.quantize(Tied().eval(), example_inputs=(IDS,), recipe="w4a8-g16-sym"), strict=True)
    assert [k.became for k in program.kernels()].count("MatMulNBits") == 2


def test_other_weights_of_the_same_shape_are_not_taken_for_the_table(tmp_path) -> None:
    net = Tied().eval()
    net.head = torch.nn.Linear(WIDTH, ROWS, bias=False)
    net.forward = lambda ids: net.head(torch.relu(net.middle(net.table(ids))))
    qgraph.quantize(net, example_inputs=(IDS,), recipe="w8a16", output=tmp_path / "m.onnx")
    assert len([n for n in bytes_of(tmp_path / "m.onnx") if n >= ROWS * WIDTH]) == 2


def test_a_stage_that_weighs_channels_leaves_the_table_shared(tmp_path) -> None:
    batches = [(IDS,), (IDS + 3 - 3 * (IDS > 315),)]
    graph = qgraph.quantize(
        Tied().eval(), batches, example_inputs=(IDS,), recipe="w4a16-g16-sym+weigh-channels", output=tmp_path / "m.onnx"
    )
    assert [n for n in bytes_of(tmp_path / "m.onnx") if n >= ROWS * WIDTH] == [ROWS * WIDTH]
    assert any("stored once" in d.reason for d in graph.meta["qgraph"].declines)
