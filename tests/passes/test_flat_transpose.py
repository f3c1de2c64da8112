"""A transposition between two reshapes whose sizes are computed -> one Transpose."""

import pytest
import torch

from qgraph.backends.onnxruntime.whole import WholeOps
from qgraph.pipeline import Context
from qgraph.testing import check, from_onnx

X = torch.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)
SIZES = """s = Shape(x)  last = Slice(s, m1, end)  before = Slice(s, m2, m1)  lead = Slice(s, m9, m2)"""


def graph(*, flat: str = "m1, before, last", perm: str = "0,2,1", full: str = "lead, last, before", shape: str = "B,3,S,4") -> str:
    return f"""<ir_version: 8, opset_import: ["": 18]> g (float[{shape}] x) => (float[K,L,M,N] y)
        <int64[1] m1 = {{-1}}, int64[1] m2 = {{-2}}, int64[1] m9 = {{-9}}, int64[1] end = {{9223372036854775807}}> {{
            {SIZES}  f = Concat<axis=0>({flat})  g = Concat<axis=0>({full})
            a = Reshape(x, f)  t = Transpose<perm=[{perm}]>(a)  y = Reshape(t, g)
        }}"""


def test_three_moves_become_one():
    check(WholeOps(), from_onnx(graph(), X), (X,), "%0: f32[B,3,4,S] = onnx.Transpose(%x, perm=[0, 1, 3, 2])\nreturn %0")


def test_sizes_may_be_known_numbers():
    gm = check(WholeOps(), from_onnx(graph(shape="2,3,5,4"), X), (X,), None)
    assert [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"] == ["Transpose"]


@pytest.mark.parametrize("changed", [{"flat": "m1, last, before"}, {"full": "lead, before, last"}, {"perm": "1,0,2"}])
def test_other_moves_stay(changed):
    """The first two read the elements in another order, the third turns the batch."""
    gm, _ = from_onnx(graph(**changed), X)
    WholeOps().run(gm, Context())
    assert [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"][-3:] == ["Reshape", "Transpose", "Reshape"]
