"""The same on CUDA kernels: half precision, weights in 4 bits, the key/value cache in 8 bits on the device.

python examples/generate_cuda.py --prompt "Why is the sky blue?"
QGRAPH_CUDA=emulate python examples/generate_cuda.py --tiny     # the kernels on the CPU, slowly
"""

import warnings

import torch
from _smollm2 import options, prompted, smollm2, tiny, write
from transformers import DynamicCache, logging

import qgraph
from qgraph.backends.cupy import Cupy
from qgraph.backends.cupy.generation import CudaGenerator
from qgraph.decoder import Decoder
from qgraph.errors import LoweringError


def main(args):
    torch.manual_seed(0)
    model, tokenizer = tiny() if args.tiny else smollm2()
    ids, decode, stop = prompted(args.prompt, tokenizer)
    decoder = Decoder(model.half(), cache=DynamicCache, options={"logits_to_keep": 1}).eval()
    shapes = {"example_inputs": decoder.example_inputs(), "dynamic_shapes": decoder.dynamic_shapes()}
    quantized = qgraph.quantize(decoder, recipe=args.recipe, backend="cupy", **shapes)
    program = qgraph.lower(quantized, backend=Cupy(capacity=ids.shape[1] + args.tokens))
    print(f"--- {args.recipe} on {program.device}{'' if program.device.type == 'cuda' else ', kernels emulated'}")
    prompt, rate = write(CudaGenerator(program), ids, decode, tokens=args.tokens, stop=stop)
    print(f"--- {prompt * 1e3:.0f} ms for a prompt of {ids.shape[1]} tokens, then {rate:.1f} tokens/s")


if __name__ == "__main__":
    parser = options(__doc__, "w4a16kv8-g128")
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        main(parser.parse_args())
    except LoweringError as error:
        raise SystemExit(str(error)) from error
