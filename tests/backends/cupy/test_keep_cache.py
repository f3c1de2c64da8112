"""Decoders whose cache stays in integers: the logits of the reference program, prompts of any length, masks that the kernels do not know."""

import numpy as np
import pytest
import torch

import qgraph
from qgraph.backends.cupy import Cupy
from qgraph.backends.cupy.emulate import emulation
from qgraph.backends.cupy.generation import CudaGenerator
from qgraph.backends.cupy.keep_cache import KeepCache
from qgraph.decoder import Decoder
from qgraph.edit import copy_graph
from qgraph.errors import LoweringError
from qgraph.generation import pad_left
from qgraph.pipeline import Context
from tests.backends.cupy.decoders import SIZES, converted, llama, small

transformers = pytest.importorskip("transformers")
TEXTS = [[5, 9, 12, 3, 44, 23, 9, 90, 1, 2, 3], [7, 8, 61]]
FOLLOWING = [[4, 88, 17], [25, 6, 40]]


def generator(gm, capacity=64):
    with emulation():
        return CudaGenerator(qgraph.lower(gm, backend=Cupy(capacity=capacity), strict=True))


def stepwise(found, ids, mask, following):
    """Logits of the last position after the prompt and after each column of `following`."""
    with emulation():
        step = found.begin(ids, mask, following.shape[1])
        logits = [step(ids, mask)]
        for column in following.T:
            mask = np.concatenate([mask, np.ones((len(ids), 1), np.int64)], axis=1)
            logits.append(step(column[:, None], mask))
    return torch.from_numpy(np.stack(logits, axis=1))


def with_floats(gm, decoder, ids, mask, following):
    """The same logits by the same kernels, the cache going in and out as the floats that its integers stand for."""
    with emulation():
        program = qgraph.lower(gm, backend="cupy")
        _, _, past = decoder.feed(torch.from_numpy(ids))
        logits = []
        for new in (ids, *following.T[:, :, None]):
            mask = mask if new is ids else np.concatenate([mask, np.ones_like(new)], axis=1)
            found = program(torch.from_numpy(new), torch.from_numpy(mask), past)
            past = found["present"]
            logits.append(found["logits"][:, -1])
    return torch.stack(logits, dim=1).float()


def whole(gm, decoder, text, count):
    """The last logits of one text by the converted graph, in one go."""
    with torch.no_grad():
        return gm(*decoder.feed(torch.tensor([text])))["logits"][0, -count:].float()


def distance(found, want):
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize("recipe", ["w4a16kv8-g32", "w4a16kv4-g32", "w8a8kv8-token"])
def test_a_prompt_and_single_tokens_behind_it_have_the_logits_of_a_cache_of_floats(recipe):
    """Rows of two lengths, so that one is padded; the prompt of 11 reads the cache back, single tokens run the kernel. Against the reference
    program, keys and values that lie on the border of two integers may take the other one."""
    decoder, gm = small(recipe)
    text = generator(gm)
    assert {layer.bits for layer in text.kept.layers} == {int(recipe[recipe.index("kv") + 2])} and len(text.kept.layers) == 2
    following = np.array(FOLLOWING)
    found = stepwise(text, *pad_left(TEXTS), following)
    assert distance(found, with_floats(gm, decoder, *pad_left(TEXTS), following)) < 1e-3
    want = torch.stack([whole(gm, decoder, [*prompt, *more], 4) for prompt, more in zip(TEXTS, FOLLOWING, strict=True)])
    assert distance(found, want) < 0.05


def test_a_decoder_in_half_precision_keeps_its_cache_in_half_precision():
    decoder = llama()
    decoder = Decoder(decoder.model.half(), cache=transformers.DynamicCache)
    gm = converted(decoder)
    text = generator(gm)
    assert {layer.dtype for layer in text.kept.layers} == {torch.float16}
    inputs = (np.array([TEXTS[0]]), np.ones((1, 11), np.int64), np.array(FOLLOWING[:1]))
    assert distance(stepwise(text, *inputs), with_floats(gm, decoder, *inputs)) < 5e-3


def test_a_decoder_from_onnx_keeps_its_cache_as_well(tmp_path):
    decoder = llama()
    torch.onnx.export(
        decoder, decoder.example_inputs(), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=decoder.dynamic_shapes(), opset_version=20,
        verbose=False,
    )  # fmt: skip
    gm = qgraph.quantize(tmp_path / "m.onnx", recipe="w4a16kv8-g32", backend="cupy")
    found = stepwise(generator(gm), *pad_left(TEXTS), np.array(FOLLOWING))
    want = stepwise(generator(small()[1]), *pad_left(TEXTS), np.array(FOLLOWING))
    assert distance(found, want) < 0.02


def test_a_second_run_changes_nothing_and_without_a_capacity_the_graph_stays():
    gm = copy_graph(small()[1])
    assert KeepCache(None).run(gm, Context()) == 0
    assert (KeepCache(64).run(gm, Context()), KeepCache(64).run(gm, Context())) == (2, 0)
    assert gm.meta["qgraph"].output_names == ("logits",)
    assert sum("cached_attention" in str(n.target) for n in gm.graph.nodes) == 2


def test_a_window_that_slides_is_refused_with_the_first_place_that_differs():
    torch.manual_seed(0)
    config = transformers.MistralConfig(vocab_size=97, max_position_embeddings=128, sliding_window=16, **SIZES)
    gm = converted(Decoder(transformers.MistralForCausalLM(config).eval(), cache=transformers.DynamicCache))
    with pytest.raises(
        LoweringError, match=r"is not causal, and the kernels know no other: of 1 tokens behind 63, token 0 should see place 0"
    ):
        generator(gm)
    generator(gm, capacity=16)  # within the window it is


def test_what_has_no_cache_in_integers_is_refused_by_name():
    with pytest.raises(LoweringError, match="is in float: take a recipe that stores it in integers, such as w4a16kv8-g128"):
        generator(small("w4a16-g32")[1])
    with pytest.raises(LoweringError, match="a cache has room for 4 tokens or more, not 3"):
        generator(small("w4a16-g32")[1], capacity=3)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 8))
    gm = qgraph.quantize(plain, example_inputs=(torch.randn(2, 64),), recipe="w8a16", backend="cupy")
    with pytest.raises(LoweringError, match=r"no attention of this graph reads a cache: export the model through qgraph\.decoder\.Decoder"):
        generator(gm)
    with emulation(), pytest.raises(LoweringError, match="the program keeps no cache: quantize a qgraph.decoder.Decoder"):
        CudaGenerator(qgraph.lower(gm, backend="cupy"))


def test_a_text_longer_than_the_cache_and_a_mask_with_holes_are_refused():
    text = generator(small()[1], capacity=16)
    with pytest.raises(LoweringError, match="11 tokens and 6 more exceed the cache's capacity of 16"):
        next(text([TEXTS[0]], tokens=6))
    with pytest.raises(LoweringError, match="the mask is 0 in places that do not pad a row on its left"):
        next(text([TEXTS[1]], mask=[[1, 0, 1]], tokens=2))
