"""A small decoder with grouped queries and rotary embeddings, random weights, for tests of caches."""

from functools import cache

import pytest
import torch

import qgraph
from qgraph.decoder import Decoder

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, max_position_embeddings=128, initializer_range=0.2, **SIZES | options)
    return Decoder(transformers.LlamaForCausalLM(config).eval(), cache=transformers.DynamicCache)


def converted(decoder, recipe="w4a16kv8-g32"):
    shapes = {"example_inputs": decoder.example_inputs(), "dynamic_shapes": decoder.dynamic_shapes()}
    return qgraph.quantize(decoder, recipe=recipe, backend="cupy", **shapes)


@cache
def small(recipe="w4a16kv8-g32"):
    """(llama(), its converted graph), which no test changes."""
    decoder = llama()
    return decoder, converted(decoder, recipe)
