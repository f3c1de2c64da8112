"""Checkpoints that are quantized already: files -> integers as they lie there -> an ordinary quantized graph, and back.

tensor.py       QuantizedTensor: integers, scales and what else a format has, in one form for all
stored.py       tensors of .safetensors files: read mapped, written one at a time
bits.py         dense streams of few-bit codes in int32 words
gptq.py, awq.py, compressed.py, gguf.py     one format each: stored tensors -> QuantizedTensor
load.py         path -> Checkpoint, a mapping that decodes when it is asked
insert.py, put.py       module + Checkpoint -> graph; how one weight lies in it
save.py, layers.py      graph -> a folder in the compressed-tensors format; how one linear lies in it
"""
