"""A module with a checkpoint's integers: the same numbers as the module with the dequantized weights, in torch and in ONNX Runtime."""

import numpy as np
import pytest
import torch
from torch import nn

import qgraph
from qgraph.checkpoints.tensor import QuantizedTensor
from qgraph.errors import ModelError
from tests.quantized_files import (
    DYNAMIC,
    IDS,
    Net,
    Tied,
    Wrapper,
    close,
    folder_of,
    gguf_blocks,
    gptq,
    integers,
    loaded,
    values,
    weight,
    write_gguf,
)


def test_orders_minima_and_zero_points_compute_what_the_dequantized_weights_compute():
    gm = qgraph.from_checkpoint(Net().eval(), values(), (IDS,), dynamic_shapes=DYNAMIC)
    expected = loaded(Net(), values())(IDS)
    assert close(gm(IDS), expected)
    for name in ("gate", "up", "head"):
        assert torch.equal(integers(gm)[name], values()[f"{name}.weight"].q)
    reasons = {e.node: e.reason for e in gm.meta["qgraph"].ledger}
    assert "x is gathered in that order" in reasons["gate"] and "sums of x over groups" in reasons["up"]
    assert reasons["head"] == "given as stored"


def test_the_graph_lowers_to_kernels_that_read_the_integers(tmp_path):
    gm = qgraph.from_checkpoint(Net().eval(), values(), (IDS,), dynamic_shapes=DYNAMIC)
    program = qgraph.lower(gm, strict=True)
    assert [k.became for k in program.kernels()] == ["GatherBlockQuantized", "MatMulNBits", "MatMulNBits", "MatMulNBits"]
    assert close(program(IDS[:, :3]), loaded(Net(), values())(IDS[:, :3]))


def test_minima_that_are_multiples_of_the_scale_add_nothing():
    tensors = values()
    w = weight(48, 64, 32)
    zero = torch.randint(0, 16, w.scale.shape, generator=torch.Generator().manual_seed(3))
    tensors["up.weight"] = QuantizedTensor(w.q, w.scale.half().float(), None, w.spec, offset=-zero * w.scale.half().float())
    gm = qgraph.from_checkpoint(Net().eval(), tensors, (IDS,))
    assert {e.node: e.reason for e in gm.meta["qgraph"].ledger}["up"] == "given as stored"
    assert close(gm(IDS), loaded(Net(), tensors)(IDS))


class Pair(nn.Module):
    """Two layers that read one x, of more inputs than constants are compared by value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(96, 8, bias=False), nn.Linear(96, 16, bias=False)

    def forward(self, x):
        return self.a(x).sum(-1) + self.b(x).sum(-1)


def test_layers_that_read_one_x_share_its_gather_and_its_sums():
    order, x = torch.randperm(96, generator=torch.Generator().manual_seed(3)), torch.randn(3, 96)
    for options, shared in (({"order": order, "zero": True}, "aten.index_select"), ({"offset": True}, "aten.sum.dim_IntList(%")):
        tensors = {"a.weight": weight(8, 96, 32, **options), "b.weight": weight(16, 96, 32, seed=4, **options)}
        gm = qgraph.from_checkpoint(Pair().eval(), tensors, (x,))
        assert sum(shared in line and "[3,3]" in line or "index_select" in line for line in qgraph.text(gm).splitlines()) == 1
        assert close(gm(x), loaded(Pair(), tensors)(x))


def test_a_reader_that_cannot_take_an_order_gets_floats():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 48, bias=False)

        def forward(self, x):
            return self.first(x) + self.first.weight.sum()

    x = torch.randn(3, 64)
    tensors = {"first.weight": values()["gate.weight"]}
    gm = qgraph.from_checkpoint(Odd().eval(), tensors, (x,))
    assert close(gm(x), loaded(Odd(), tensors)(x))
    assert [e.reason for e in gm.meta["qgraph"].ledger if not e.quantized] == ["read in a form that the checkpoint's layout does not allow"]


def test_a_gptq_folder_becomes_a_graph_with_its_integers(tmp_path):
    tensors, expected = {}, {}
    for name, n, k in (("gate", 48, 64), ("up", 48, 64), ("head", 56, 48)):
        parts, _, w = gptq(4, n, k, 16, g_idx=np.random.default_rng(n).permutation(np.arange(k) // 16) if name == "gate" else None)
        tensors |= {f"{name}.{part}": t for part, t in parts.items()}
        expected[f"{name}.weight"] = torch.from_numpy(w).float()
    plain = {"embed.weight": torch.randn(50, 64), "gate.bias": torch.randn(48), "head.bias": torch.randn(56)}
    path = folder_of(tmp_path / "m", tensors | plain)

    def net():
        model = Net()
        model.head = nn.Linear(48, 56)
        return model.eval()

    reference = net()
    reference.load_state_dict(plain | expected)
    gm = qgraph.from_checkpoint(Wrapper(net()).eval(), path, (IDS,))
    # float16 weights are rounded in their definition, here they are not
    assert close(gm(IDS), reference(IDS), 1e-3)
    found = qgraph.load_checkpoint(path)
    assert all(torch.equal(q, found[f"{name.removeprefix('model.')}.weight"].q) for name, q in integers(gm).items())
    program = qgraph.lower(gm)
    assert close(program(IDS), gm(IDS))


class Attention(nn.Module):
    """The parameters of a block as torch names them; q and k are told apart from other rows by what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(64, 32, bias=False), "k_proj": nn.Linear(64, 16, bias=False)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(64, 24, bias=False)})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([Attention()])})

    def forward(self, x):
        layer = self.model.layers[0]
        return layer.self_attn.q_proj(x), layer.self_attn.k_proj(x), layer.mlp.up_proj(x)


def test_rows_of_gguf_that_its_rotary_embedding_interleaves_lie_as_in_torch(tmp_path):
    """ggml turns [first half, second half] of each head into pairs: row (h, i, s) of torch lies at (h, s, i)."""
    import gguf

    rows = {"attn_q": 32, "attn_k": 16, "ffn_up": 24}
    blocks = {name: gguf_blocks("Q4_1", n).reshape(n, -1) for name, n in rows.items()}
    path = write_gguf(tmp_path / "m.gguf", {f"blk.0.{name}.weight": (b, "Q4_1") for name, b in blocks.items()}, heads=4, kv_heads=2)
    x = torch.randn(3, 64)
    gm = qgraph.from_checkpoint(Block().eval(), path, (x,))
    for found, (name, heads) in zip(gm(x), {"attn_q": 4, "attn_k": 2, "ffn_up": None}.items(), strict=True):
        w = gguf.dequantize(blocks[name], gguf.GGMLQuantizationType.Q4_1)
        if heads is not None:
            half = rows[name] // heads // 2
            w = np.stack([w[h * 2 * half + 2 * i + s] for h in range(heads) for s in range(2) for i in range(half)])
        assert close(found, x @ torch.from_numpy(w).T)


def test_a_gguf_of_unknown_layout_is_refused_with_the_way_out(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (gguf_blocks("Q4_1"), "Q4_1")}, architecture="falcon")
    with pytest.raises(ModelError, match="architecture 'falcon' is not known.*pass a mapping of tensors"):
        qgraph.from_checkpoint(Block().eval(), path, (torch.randn(3, 64),))


def test_a_tied_weight_is_one_constant_that_both_read():
    w = weight(50, 64, 32, zero=True)
    for tensors in ({"embed.weight": w}, {"head.weight": w}, {"embed.weight": w, "head.weight": weight(50, 64, 32, zero=True)}):
        gm = qgraph.from_checkpoint(Tied().eval(), tensors, (IDS,))
        assert close(gm(IDS), nn.functional.embedding(IDS, w.dequantize()) @ w.dequantize().T)
        assert sum("uint4" in name for name, _ in gm.named_buffers()) == 1


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def with_also(name, value):
    return lambda tensors: tensors | {name: value}


@pytest.mark.parametrize(
    ("module", "change", "message"),
    [
        (Net, without("up.weight"), "no parameter 'up.weight'"),
        (Net, without("head.bias"), "no parameter 'head.bias'"),
        (Net, with_also("up.weight", weight(40, 64, 32)), r"up.weight is f32\[48,64\] in the module, but \[40, 64\]"),
        (Net, with_also("other.weight", weight(40, 64, 32)), "no parameter for 'other.weight'"),
        (Net, with_also("up.bias", torch.ones(48)), "no parameter for 'up.bias'"),
        (lambda: Net().half(), lambda t: t, "float16 in the module, which does not hold its float32 scales"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_module_is_one_sentence(module, change, message):
    with pytest.raises(ModelError, match=message):
        qgraph.from_checkpoint(module().eval(), change(values()), (IDS,))


def test_tied_weights_that_differ_in_the_checkpoint_are_refused():
    tensors = {"embed.weight": weight(50, 64, 32), "head.weight": weight(50, 64, 32, seed=9)}
    with pytest.raises(ModelError, match="ties embed.weight and head.weight, but 'embed.weight' and 'head.weight' differ"):
        qgraph.from_checkpoint(Tied().eval(), tensors, (IDS,))


def test_what_is_no_parameter_of_a_layer_in_use_is_left_alone():
    gm = qgraph.from_checkpoint(Net().eval(), values() | {"rotary.inv_freq": torch.ones(4), "up.bias": torch.zeros(48)}, (IDS,))
    assert close(gm(IDS), loaded(Net(), values())(IDS))
