"""Groups of a Llama-like decoder, found in what torch.export and the ONNX exporter make of it; what is left alone, and why."""

import functools

import onnx
import pytest
import torch
import transformers
from torch import nn
from torch.fx import Node

import qgraph
from qgraph.diagonal import diagonals
from qgraph.edit import copy_graph
from qgraph.passes import SmoothQuant
from qgraph.pipeline import Context
from qgraph.testing import from_torch
from qgraph.text import path_of
from qgraph.views import Embedding, Linear, const_value, view

IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
DATA = [(torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(i)),) for i in range(1, 4)]
DYNAMIC = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)},)
HEADS, KEYS, SIZE = 4, 2, 8


class Logits(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def decoder(*, attention: str, tied: bool) -> nn.Module:
    """One layer with random weights and an outlier channel behind each norm, 4 heads that share 2 keys and values."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HEADS * SIZE, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 96, "max_position_embeddings": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "attn_implementation": attention}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(len(parameter)) + 0.5)
                parameter[5] = 40
            elif "embed" not in name:
                parameter.mul_(4)
    return Logits(model).eval()


@functools.cache
def program(*, attention: str = "sdpa", tied: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(decoder(attention=attention, tied=tied), (IDS,), dynamic_shapes=DYNAMIC)


@functools.cache
def proto() -> onnx.ModelProto:
    return torch.onnx.export(program(), dynamo=True, verbose=False).model_proto


MODELS = {"eager": lambda: program(attention="eager"), "sdpa": program, "onnx": proto}


@pytest.mark.parametrize("origin", MODELS)
def test_the_groups_of_a_decoder_are_found_in_its_graph(origin):
    gm = qgraph.prepare(MODELS[origin](), recipe="w8a8-token+smoothquant")
    groups = diagonals(gm).groups
    assert [(g.size, len(g.producers), len(g.consumers)) for g in groups] == [(32, 1, 3), (16, 1, 1), (32, 1, 2), (48, 1, 1), (32, 1, 1)]
    values = groups[1].consumers[0].channels
    assert values.tolist() == torch.arange(KEYS * SIZE).reshape(KEYS, 1, SIZE).expand(KEYS, HEADS // KEYS, SIZE).flatten().tolist()
    if origin != "onnx":
        names = [[path_of(m.node).rpartition(".")[2] for m in (*g.producers, *g.consumers)] for g in groups]
        assert names == [
            ["input_layernorm", "q_proj", "k_proj", "v_proj"],
            ["v_proj", "o_proj"],
            ["post_attention_layernorm", "gate_proj", "up_proj"],
            ["up_proj", "down_proj"],
            ["norm", "lm_head"],
        ]


@pytest.mark.parametrize("recipe", ["w8a8-token+smoothquant", "w4a16-g16-sym+awq"])
@pytest.mark.parametrize("origin", ["sdpa", "onnx"])
def test_nothing_is_added_to_a_decoder_and_every_linear_has_its_reason(origin, recipe):
    gm = qgraph.prepare(MODELS[origin](), recipe=recipe)
    before = copy_graph(gm)
    qgraph.calibrate(gm, DATA, verify="numerics")
    assert [n.target for n in calls(gm)] == [n.target for n in calls(before)]
    found = [e for e in gm.meta["qgraph"].ledger if e.role == "scale"]
    assert len(found) == 8
    assert sum("readers" in e.decision for e in found) >= 6


def calls(gm) -> list[Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def test_a_smoothed_decoder_loses_less():
    gm, plain = (qgraph.prepare(program(), recipe=name) for name in ("w8a8-token+smoothquant", "w8a8-token"))
    with torch.no_grad():
        want = plain(IDS)
        qgraph.calibrate(gm, DATA)
        balanced, rounded = (float((qgraph.convert(g)(IDS) - want).square().sum()) for g in (gm, plain))
    assert balanced < 0.5 * rounded


def head_of(gm) -> tuple[Node, Node]:
    """(the head's weight, the table)"""
    table = next(v.weight for n in gm.graph.nodes if (v := view(Embedding, n)) is not None)
    return next(v.weight for n in gm.graph.nodes if (v := view(Linear, n)) is not None and "lm_head" in path_of(n)), table


def test_a_tied_head_in_its_tables_format_is_not_scaled_apart():
    recipe = qgraph.load_recipe("w8a8-token+smoothquant", ["embeddings={bits: 8, group: null}"])
    gm = qgraph.prepare(program(tied=True), recipe=recipe)
    qgraph.calibrate(gm, DATA)
    reason = gm.meta["qgraph"].ledger.get("model.lm_head", "scale").reason
    assert reason == "its weight is the embedding table @model.model.embed_tokens.weight, stored once for both"
    head, table = head_of(gm)
    assert head.target == table.target


def test_a_tied_head_in_a_format_of_its_own_gets_its_factors_and_the_table_none():
    gm = qgraph.prepare(program(tied=True), recipe="w8a8-token+smoothquant")
    before = const_value(head_of(gm)[1]).clone()
    qgraph.calibrate(gm, DATA, verify="numerics")
    head, table = head_of(gm)
    assert "readers" in gm.meta["qgraph"].ledger.get("model.lm_head", "scale").decision
    assert torch.equal(const_value(table), before)
    assert not torch.equal(const_value(head), before)


def test_what_the_recipe_leaves_in_float_is_left_alone():
    recipe = qgraph.load_recipe("w8a8-token+smoothquant", ["rules.*lm_head=null", "rules.*.o_proj=null"])
    gm = qgraph.prepare(program(), recipe=recipe)
    qgraph.calibrate(gm, DATA)
    found = {e.node.rpartition(".")[2]: e for e in gm.meta["qgraph"].ledger if e.role == "scale"}
    for name in ("lm_head", "o_proj"):
        assert (found[name].decision, found[name].reason) == ("unchanged", "the recipe leaves what reads its input in float")
    assert "readers" in found["q_proj"].decision


class Twice(nn.Module):
    """One layer behind two norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.layer = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.first.weight.data[2] = 30

    def forward(self, x):
        return self.layer(self.second(self.layer(self.first(x))))


def test_a_layer_that_is_called_twice_keeps_one_weight():
    x = torch.randn(3, 8)
    gm, _ = from_torch(Twice(), x)
    assert SmoothQuant(0.5).run(gm, Context(data=[(x,)])) == 0
    reasons = {e.reason for e in gm.meta["qgraph"].ledger}
    assert reasons == {"its weight is that of layer, too, which has other factors"}
