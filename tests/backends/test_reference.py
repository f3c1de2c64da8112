"""The reference backend: the graph itself, in torch."""

import numpy as np
import pytest
import torch

import qgraph
from qgraph.backends.reference import Reference
from qgraph.errors import LoweringError
from tests.small import Mlp


def program():
    x = torch.randn(4, 16)
    gm = qgraph.quantize(Mlp().eval(), example_inputs=(x,), recipe="w8a8-dynamic", backend="reference")
    return gm, qgraph.lower(gm, backend="reference"), x


def test_a_program_returns_what_the_graph_returns_without_gradients():
    gm, run, x = program()
    assert torch.equal(run(x), gm(x)) and not run(x).requires_grad
    assert run.kernels() == [] and isinstance(Reference().lower(gm, strict=True)(x), torch.Tensor)


def test_arrays_in_give_arrays_out():
    _, run, x = program()
    found = run(x.numpy())
    assert isinstance(found, np.ndarray) and np.array_equal(found, run(x).numpy())


def test_a_reference_program_has_no_file_and_says_what_to_do(tmp_path):
    gm, run, _ = program()
    for write in (run.save, lambda path: Reference().export(gm, path)):
        with pytest.raises(LoweringError, match="export with backend='onnxruntime'"):
            write(tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_activations_alone_can_be_integers_here():
    x = torch.randn(4, 16)
    net = Mlp().eval()
    gm = qgraph.quantize(net, [(x,)], example_inputs=(x,), recipe="w32a8", backend="reference")
    entries = list(gm.meta["qgraph"].ledger)
    assert {e.decision for e in entries if e.role == "weight"} == {"float"}
    assert {e.decision for e in entries if e.role == "x"} == {"uint8 asym per tensor"}
    error = (gm(x) - net(x)).abs().max()
    assert 0 < error < 0.1


def test_zeroquant_is_groups_of_weights_and_tokens_of_activations():
    x = torch.randn(4, 16)
    gm = qgraph.quantize(Mlp().eval(), example_inputs=(x,), recipe="zeroquant", backend="reference")
    decisions = {(e.role, e.decision) for e in gm.meta["qgraph"].ledger if e.role in ("weight", "x")}
    assert decisions == {("weight", "int8 sym per group of 128 along axis 1"), ("x", "int8 sym per token dynamic")}
