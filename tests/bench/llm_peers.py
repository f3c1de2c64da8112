"""Other tools in the table of tests.bench.llm: each quantizes the same linears of the same torch module by its own entry point.

What a tool made of the weights is read back in float and run in a float module, so that one code measures every row, and embedding and
last layer are float for certain. Bits, groups and symmetry are those of the column; what is not said here is the tool's default.

    pip install llmcompressor    # in an environment of its own beside ours: 0.14 wants transformers 5.17, compressed-tensors 0.19

llm-compressor is run with its defaults, and with scales searched, as ours are. Both tools use all 2^bits integers, as ours do
where scales are searched; the row RTN leaves the lowest out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch.utils.data import DataLoader

from tests.models import smollm2

Weights = Mapping[str, torch.Tensor]
"""Name of a linear -> its weight [outputs, inputs], dequantized."""

Tool = Callable[[Any, int, int], Callable[[], Weights]]
"""(the transformers model, which it may change, bits, group) -> what reads the weights back, which is no part of the cost."""


@dataclass(frozen=True)
class Peer:
    """`load` imports the package."""

    package: str
    load: Callable[[], Tool]

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


def linears(lm: Any) -> dict[str, torch.nn.Linear]:
    """Those that every row quantizes: all but the last layer."""
    last = lm.get_output_embeddings()
    return {name: module for name, module in lm.named_modules() if isinstance(module, torch.nn.Linear) and module is not last}


def llm_compressor(observer: str) -> Tool:
    """Its GPTQ; `observer` chooses the scales of the groups."""
    from llmcompressor import oneshot  # not a dependency
    from llmcompressor.modifiers.quantization import GPTQModifier

    def quantize(lm: Any, bits: int, group: int) -> Callable[[], Weights]:
        weights = {"num_bits": bits, "symmetric": True, "strategy": "group", "group_size": group, "observer": observer}
        modifier = GPTQModifier(config_groups={"linears": {"targets": list(linears(lm)), "weights": weights}})
        windows = DataLoader([{"input_ids": torch.from_numpy(window)} for window in smollm2.windows()[0]])
        with tempfile.TemporaryDirectory() as folder:
            lm.config.save_pretrained(folder)  # it looks for config.json, which no GGUF file has beside it
            lm.config.name_or_path = folder
            oneshot(model=lm, processor=smollm2.tokenizer(), recipe=modifier, dataset=windows)
        return lambda: {name: module.weight.detach() for name, module in linears(lm).items()}

    return quantize


def onnxruntime_rtn() -> Tool:
    """MatMulNBits. The tool sees one weight at a time, so its graph is the products alone; each gives back its weight for the identity."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    def quantize(lm: Any, bits: int, group: int) -> Callable[[], Weights]:
        tool = MatMulNBitsQuantizer(_products(lm), bits=bits, block_size=group, is_symmetric=True)
        tool.process()
        return lambda: _products_of_identity(tool.model.model)

    return quantize


def _products(lm: Any) -> onnx.ModelProto:
    """x_n @ W -> a graph output named after the linear, for each; linears with n inputs share x_n."""
    graph = onnx.GraphProto(name="linears")
    for name, module in linears(lm).items():
        weight, size = f"{name}.weight", module.in_features
        graph.node.append(onnx.helper.make_node("MatMul", [f"x_{size}", weight], [name], name))
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(module.weight.detach().numpy().T), weight))
        graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", module.out_features]))
    for size in {module.in_features for module in linears(lm).values()}:
        graph.input.append(onnx.helper.make_tensor_value_info(f"x_{size}", onnx.TensorProto.FLOAT, ["rows", size]))
    return onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])


def _products_of_identity(model: onnx.ModelProto) -> Weights:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {x.name: np.eye(x.shape[1], dtype=np.float32) for x in session.get_inputs()}
    names = [y.name for y in session.get_outputs()]
    return {name: torch.from_numpy(y.T) for name, y in zip(names, session.run(names, feeds), strict=True)}


PEERS: dict[str, Peer] = {
    "ONNX Runtime, RTN": Peer("onnxruntime", onnxruntime_rtn),
    "llm-compressor, GPTQ": Peer("llmcompressor", lambda: llm_compressor("minmax")),
    "llm-compressor, GPTQ, searched scales": Peer("llmcompressor", lambda: llm_compressor("mse")),
}


def with_weights(weights: Weights, bits: int, group: int) -> torch.nn.Module:
    """The float module with these weights. Raises ValueError where one is missing, or is not on a grid of so many bits."""
    lm = smollm2.causal_lm()
    for name, module in linears(lm).items():
        if name not in weights:
            raise ValueError(f"{name} was not quantized")
        found = int((weights[name].reshape(-1, group).sort(-1).values.diff(dim=-1) != 0).sum(-1).max()) + 1
        if found > 2**bits:
            raise ValueError(f"a group of {name} holds {found} values, more than {bits} bits do")
        module.weight.data.copy_(weights[name])
    return smollm2.LogitsOnly(lm)
