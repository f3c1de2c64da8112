"""SmolLM2 with its key/value cache, quantized, writes in ONNX Runtime what the float model writes in torch."""

import pytest
import torch

import qgraph
from qgraph.generation import Generator
from tests.models import smollm2

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "What is the largest planet?",
    "Translate to French: good morning.",
)


@pytest.mark.slow
def test_greedy_text_of_8_bit_weights_is_that_of_the_float_model(tmp_path) -> None:

    lm, tokenizer = smollm2.causal_lm(), smollm2.tokenizer()
    decoder = smollm2.decoder(lm)
    path, shapes = tmp_path / "smollm2.onnx", decoder.dynamic_shapes()
    qgraph.quantize(decoder, example_inputs=decoder.example_inputs(), dynamic_shapes=shapes, recipe="w8a16", output=path)
    generator = Generator(path)
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        want = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
        found = [int(token[0]) for token in generator(ids.numpy(), tokens=24, stop={tokenizer.eos_token_id})]
        assert tokenizer.decode(found) == tokenizer.decode(want)
