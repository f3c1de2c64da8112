"""Decoders with a cache, exported, and the text that a Generator makes of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import qgraph
from qgraph.decoder import Decoder
from qgraph.errors import CaptureError, ModelError
from qgraph.generation import Generator, pad_left
from qgraph.ledger import state

# Text whose next token says what is in the cache.


def summed(*text: int, tokens: int) -> list[int]:
    found = list(text)
    for _ in range(tokens):
        found.append(sum(found) % 7)
    return found[len(text) :]


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A file whose next token is the sum of all tokens so far, modulo 7: wrong as soon as the cache is."""
    source = """<ir_version: 8, opset_import: ["": 18]>
        g (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,1,P,1] past) => (float[B,1,7] logits, float[B,1,T,1] present)
        <int64[2] front = {1, 3}, int64[3] inner = {1, 2, 3}, int64 seven = {7}, float[2] values = {0.0, 3.0}, int64[1] one = {1}> {
            new = Cast<to=1>(input_ids)  four = Unsqueeze(new, front)  present = Concat<axis=2>(past, four)
            sum = ReduceSum<keepdims=0>(present, inner)  whole = Cast<to=7>(sum)  rest = Mod(whole, seven)
            row = OneHot(rest, seven, values)  logits = Unsqueeze(row, one)
        }"""
    path = tmp_path_factory.mktemp("counting") / "model.onnx"
    onnx.save(onnx.parser.parse_model(source), path)
    return Generator(path, threads=1)


def test_each_token_is_computed_from_all_before_it(counting):
    assert [int(t[0]) for t in counting([[1, 2, 4, 3]], tokens=6)] == summed(1, 2, 4, 3, tokens=6)


def test_rows_of_different_lengths_are_padded_on_the_left(counting):
    ids, mask = pad_left([[5, 6, 1], [2]])
    assert ids.tolist() == [[5, 6, 1], [0, 0, 2]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    found = np.stack(list(counting(ids, mask=mask, tokens=5)), axis=1)
    assert found.tolist() == [summed(5, 6, 1, tokens=5), summed(2, tokens=5)]


def test_positions_count_the_tokens_of_each_row(tmp_path):
    """A model that takes positions and no mask: the next token is the position of the last one plus 2."""
    source = """<ir_version: 8, opset_import: ["": 18]>
        g (int64[B,S] tokens, int64[B,S] position_ids, float[B,1,P,1] past_key) => (float[B,S,9] logits, float[B,1,T,1] present_key)
        <int64[2] front = {1, 3}, int64 nine = {9}, int64 two = {2}, float[2] values = {0.0, 1.0}> {
            new = Cast<to=1>(tokens)  four = Unsqueeze(new, front)  present_key = Concat<axis=2>(past_key, four)
            next = Add(position_ids, two)  logits = OneHot(next, nine, values)
        }"""
    onnx.save(onnx.parser.parse_model(source), tmp_path / "model.onnx")
    ids, mask = pad_left([[5, 6, 1], [2]])
    found = np.stack(list(Generator(tmp_path / "model.onnx", threads=1)(ids, mask=mask, tokens=3)), axis=1)
    assert found.tolist() == [[4, 5, 6], [2, 3, 4]]


def test_text_ends_with_a_stop_token_in_every_row(counting):
    first, second = summed(1, tokens=9), summed(2, tokens=9)
    found = np.stack(list(counting([[1], [2]], tokens=9, stop={4})), axis=1).tolist()
    ends = [row.index(4) for row in (first, second)]
    assert len(found[0]) == max(ends) + 1
    assert found == [(row[:end] + [4] * 9)[: max(ends) + 1] for row, end in zip((first, second), ends, strict=True)]


def test_no_token_is_computed_before_it_is_asked_for(counting):
    stream = counting([[1]], tokens=10**9)
    assert [int(next(stream)[0]) for _ in range(3)] == summed(1, tokens=3)
    assert list(counting([[1]], tokens=0)) == []


def test_tokens_are_drawn_with_their_probabilities(counting):
    """One token has logit 3, six have 0: at temperature 2 its share is e^1.5 / (e^1.5 + 6)."""
    (drawn,) = counting([[3]] * 4000, tokens=1, temperature=2.0, seed=1)
    share = np.exp(1.5) / (np.exp(1.5) + 6)
    assert np.mean(drawn == 3) == pytest.approx(share, abs=0.03) and set(drawn.tolist()) == set(range(7))
    again = counting([[3]] * 4000, tokens=1, temperature=2.0, seed=1)
    assert (next(again) == drawn).all()


def test_only_the_most_probable_tokens_are_drawn(counting):
    found = [int(t[0]) for t in counting([[1, 2, 4, 3]], tokens=6, temperature=50.0, top_k=1)]
    assert found == summed(1, 2, 4, 3, tokens=6)


def test_a_file_without_a_cache_is_refused(tmp_path):
    onnx.save(
        onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 18]> g (int64[B] x) => (int64[B] y) { y = Identity(x) }'),
        tmp_path / "m.onnx",
    )
    with pytest.raises(ModelError, match=r"m\.onnx has inputs x and outputs y: a generator needs tokens, as many past as present"):
        Generator(tmp_path / "m.onnx")


# Decoders.


class Toy(torch.nn.Module):
    """One layer of attention without positions whose cache is a tuple of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = torch.nn.Embedding(11, 32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 11)

    def forward(self, input_ids, attention_mask, past_key_values=(), use_cache=True):
        x = self.embed(input_ids)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        before = 0
        if past_key_values:
            before = past_key_values[0][0].shape[2]
            k, v = torch.cat([past_key_values[0][0], k], 2), torch.cat([past_key_values[0][1], v], 2)
        rows = torch.arange(q.shape[2])[:, None] + before
        mask = torch.where(torch.arange(k.shape[2]) <= rows, 0.0, torch.finfo(torch.float32).min)
        y = torch.softmax(q @ k.transpose(2, 3) * 8**-0.5 + mask, -1) @ v
        logits = self.head(x + y.transpose(1, 2).flatten(2))
        return SimpleNamespace(logits=logits, past_key_values=((k, v),) if use_cache else None)


def test_a_decoder_with_tuples_gives_the_same_logits_in_one_go_and_step_by_step():
    torch.manual_seed(0)
    model = Toy().eval()
    decoder = Decoder(model)
    ids = torch.randint(0, 11, (2, 6))
    whole = model(ids, torch.ones(2, 6)).logits
    gm = qgraph.capture(decoder, decoder.example_inputs(), dynamic_shapes=decoder.dynamic_shapes())
    _, _, past = decoder.feed(ids[:, :4])
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        found = gm(ids[:, start:stop], torch.ones(2, stop, dtype=torch.int64), past)
        torch.testing.assert_close(found["logits"], whole[:, start:stop])
        past = found["present"]
    assert past[0]["key"].shape == (2, 4, 6, 8)


class Grouped(Toy):
    """Two heads of keys and values for four of q, in torch's own attention."""

    def forward(self, input_ids, attention_mask, past_key_values=(), use_cache=True):
        x = self.embed(input_ids)
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.qkv(x)[..., :64].split([32, 16, 16], -1))
        before = 0
        if past_key_values:
            before = past_key_values[0][0].shape[2]
            k, v = torch.cat([past_key_values[0][0], k], 2), torch.cat([past_key_values[0][1], v], 2)
        mask = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + before
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return SimpleNamespace(logits=self.head(x + y.transpose(1, 2).flatten(2)), past_key_values=((k, v),) if use_cache else None)


def test_torchs_own_grouped_attention_is_one_attention_with_its_cache(tmp_path):
    torch.manual_seed(0)
    decoder = Decoder(Grouped().eval())
    example, shapes = decoder.example_inputs(), decoder.dynamic_shapes()
    gm = qgraph.quantize(decoder, example_inputs=example, dynamic_shapes=shapes, recipe="w8a16", output=tmp_path / "m.onnx")
    ops = [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]
    assert ops.count("Attention") == 1 and not {"Expand", "Concat", "Softmax"} & set(ops)
    found = [int(t[0]) for t in Generator(tmp_path / "m.onnx", threads=1)([[1, 2, 3]], tokens=6)]
    assert found == greedy(gm, decoder, [1, 2, 3], 6)


def greedy(gm: torch.fx.GraphModule, decoder: Decoder, text: list[int], tokens: int) -> list[int]:
    """Each token from the whole text before it, without a cache."""
    for _ in range(tokens):
        text = [*text, int(gm(*decoder.feed(torch.tensor([text])))["logits"][0, -1].argmax())]
    return text[-tokens:]


def test_static_ranges_are_calibrated_with_texts_from_their_start(tmp_path):
    torch.manual_seed(0)
    decoder = Decoder(Toy().eval())
    texts = [decoder.feed(torch.randint(0, 11, (2, 9))) for _ in range(3)]
    example, shapes = decoder.example_inputs(), decoder.dynamic_shapes()
    gm = qgraph.quantize(decoder, texts, example_inputs=example, dynamic_shapes=shapes, recipe="w8a8", output=tmp_path / "toy.onnx")
    assert "Attention" in [n.op_type for n in onnx.load(tmp_path / "toy.onnx").graph.node]
    found = [int(t[0]) for t in Generator(tmp_path / "toy.onnx", threads=1)([[1, 2, 3]], tokens=6)]
    assert found == greedy(gm, decoder, [1, 2, 3], 6)


def test_a_model_without_a_cache_is_refused():
    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return SimpleNamespace(logits=input_ids)

    with pytest.raises(CaptureError, match="Plain returns no past_key_values with use_cache=True: it has no cache to export"):
        Decoder(Plain())


@pytest.fixture(scope="module")
def llama():
    """A decoder with rotary embeddings and 4 heads for 2 of k and v, random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, max_position_embeddings=512, **sizes)).eval()


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """(quantized graph, file, decoder) with 8-bit weights."""
    from transformers import DynamicCache

    decoder = Decoder(llama, cache=DynamicCache, options={"logits_to_keep": 1})
    path = tmp_path_factory.mktemp("llama") / "model.onnx"
    quantized = qgraph.quantize(
        decoder, example_inputs=decoder.example_inputs(), dynamic_shapes=decoder.dynamic_shapes(), recipe="w8a16", output=path
    )
    return quantized, path, decoder


def test_names_of_the_cache_are_those_of_the_layers(exported):
    quantized, path, _ = exported
    layers = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert state(quantized).input_names == ("input_ids", "attention_mask", *(f"past_key_values.{n}" for n in layers))
    graph = onnx.load(path).graph
    assert [o.name for o in graph.output] == ["logits", *(f"present.{n}" for n in layers)]
    assert [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input][::2][:2] == [
        ["batch", "sequence"],
        ["batch", 2, "past", 16],
    ]


def test_attention_of_each_layer_is_one_operator(exported):
    kinds = [n.op_type for n in onnx.load(exported[1]).graph.node]
    assert (kinds.count("Attention"), kinds.count("RotaryEmbedding"), kinds.count("Softmax")) == (2, 4, 0)


def test_generated_text_is_that_of_the_quantized_graph(exported):
    quantized, path, decoder = exported
    texts = [[5, 6, 7, 8, 9, 10, 11], [3, 4], [100, 101, 102, 103]]
    ids, mask = pad_left(texts)
    found = np.stack(list(Generator(path, threads=1)(ids, mask=mask, tokens=10)), axis=1)
    assert found.tolist() == [greedy(quantized, decoder, text, 10) for text in texts]


def test_text_of_8_bit_weights_is_that_of_the_float_model(llama, exported):
    ids = torch.tensor([[7, 77, 177, 17]])
    want = llama.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    assert [int(t[0]) for t in Generator(exported[1], threads=1)(ids.numpy(), tokens=10)] == want
