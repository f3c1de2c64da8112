"""A language model out of a GGUF file, quantized, exported with its key/value cache, and writing on ONNX Runtime beside its float self.

python examples/generate.py --recipe w4a8-g32-sym --prompt "Why is the sky blue?"
python examples/generate.py --tiny      # a random decoder of two layers instead, which needs no weights
"""

import tempfile
import warnings
from pathlib import Path

import torch
from _smollm2 import options, prompted, smollm2, tiny, write
from transformers import DynamicCache, logging

import qgraph
from qgraph.decoder import Decoder
from qgraph.generation import Generator


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
    parser = options(__doc__, "w4a16-g32")
    parser.add_argument("--threads", type=int)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args(), Path(temporary))
