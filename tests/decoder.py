"""A decoder as ONNX, of any size: float16 weights in a sparse file beside it, most of them 0."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from onnx import TensorProto, helper
from torch.fx import GraphModule

from qgraph.layers import layers
from qgraph.lockstep import lockstep, original, together
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.stages import register_stage

HALF, INT = TensorProto.FLOAT16, TensorProto.INT64


class Builder:
    """Nodes and constants of the graph, the large ones written to the file at once."""

    def __init__(self, folder: Path, filled: tuple[str, ...]) -> None:
        self.nodes, self.constants, self.end, self.filled = [], [], 0, filled
        self.rng, self.file = np.random.default_rng(0), (folder / "weights.bin").open("wb")

    def op(self, kind: str, *inputs: str, name: str = "", **attributes) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name or f"n{len(self.nodes)}", **attributes))
        return output

    def weight(self, name: str, *dims: int) -> str:
        """Random in the first rows, where the name begins with one of `filled`."""
        if name.startswith(self.filled):
            rows = min(dims[0], 8 if len(dims) > 1 else dims[0])
            self.file.seek(self.end)
            self.file.write((self.rng.standard_normal((rows, *dims[1:])) / rows**0.5).astype(np.float16).tobytes())
        tensor = TensorProto(name=name, data_type=HALF, dims=dims, data_location=TensorProto.EXTERNAL)
        length = 2 * int(np.prod(dims))
        for key, value in {"location": "weights.bin", "offset": self.end, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.constants.append(tensor)
        self.end += -(-length // 4096) * 4096
        return name

    def number(self, name: str, value, kind: int = HALF) -> str:
        self.constants.append(helper.make_tensor(name, kind, np.shape(value), np.ravel(value)))
        return name


def decoder(
    folder: Path,
    *,
    hidden: int = 64,
    inner: int = 128,
    blocks: int = 2,
    heads: int = 4,
    vocabulary: int = 256,
    filled: tuple[str, ...] = ("",),
) -> Path:
    """input_ids [batch, seq] -> logits; layers are named b0.q, b0.down, head; weights embedding, norm, b0.norm1, b0.q.weight ...

    Weights whose names begin with none of `filled` are zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    b = Builder(folder, filled)
    for name, value in {"two": 2.0, "small": 1e-3, "low": -1e4, "none": 0.0, "factor": (hidden / heads) ** -0.5}.items():
        b.number(name, value)
    for name, value in {"last": [-1], "zero": 0, "one": 1, "rows": [0], "columns": [1]}.items():
        b.number(name, value, INT)
    b.number("split", [0, 0, heads, hidden // heads], INT)
    b.number("merge", [0, 0, hidden], INT)

    def norm(x: str, name: str) -> str:
        mean = b.op("ReduceMean", b.op("Pow", x, "two"), "last", keepdims=1)
        return b.op("Mul", b.op("Div", x, b.op("Sqrt", b.op("Add", mean, "small"))), b.weight(name, hidden))

    def linear(x: str, name: str, inputs: int, outputs: int) -> str:
        return b.op("MatMul", x, b.weight(f"{name}.weight", inputs, outputs), name=name)

    def attention(x: str, block: str) -> str:
        q, k, v = (b.op("Transpose", b.op("Reshape", linear(x, f"{block}.{c}", hidden, hidden), "split"), perm=[0, 2, 1, 3]) for c in "qkv")
        scores = b.op("Add", b.op("Mul", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), "factor"), mask)
        joined = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        return linear(b.op("Reshape", joined, "merge"), f"{block}.o", hidden, hidden)

    place = b.op("Range", "zero", b.op("Gather", b.op("Shape", "input_ids"), "one"), "one")
    before = b.op("LessOrEqual", b.op("Unsqueeze", place, "rows"), b.op("Unsqueeze", place, "columns"))
    mask = b.op("Where", before, "none", "low")
    x = b.op("Gather", b.weight("embedding", vocabulary, hidden), "input_ids", name="embed")
    for i in range(blocks):
        x = b.op("Add", x, attention(norm(x, f"b{i}.norm1"), f"b{i}"))
        y = norm(x, f"b{i}.norm2")
        gate = linear(y, f"b{i}.gate", hidden, inner)
        y = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), linear(y, f"b{i}.up", hidden, inner))
        x = b.op("Add", x, linear(y, f"b{i}.down", inner, hidden))
    logits = linear(norm(x, "norm"), "head", hidden, vocabulary)
    b.file.truncate(b.end)
    b.file.close()
    inputs = [helper.make_tensor_value_info("input_ids", INT, ["batch", "seq"])]
    graph = helper.make_graph(
        b.nodes, "decoder", inputs, [helper.make_tensor_value_info(logits, HALF, ["batch", "seq", vocabulary])], b.constants
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def ids(count: int, length: int, vocabulary: int = 256) -> list[dict[str, torch.Tensor]]:
    """Batches of one window of token ids."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, vocabulary, (1, length), generator=generator)} for _ in range(count)]


@dataclass(frozen=True)
class Lean(Pass):
    """A stage that goes layer by layer, cheaply: weights of inputs that are positive on average grow by 1 %, the others shrink."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"
    needs_data: ClassVar[bool] = True
    stops: ClassVar[list[tuple[str, ...]]] = []
    """Names of the stops that were made."""

    stop_at: int | None = None
    """The number of stops after which the program is interrupted."""

    models = 1

    def workspace(self, rows: int, columns: int) -> int:
        return 2 * rows * columns

    def run(self, gm: GraphModule, ctx: Context) -> int:
        sites, count = layers(gm, ctx, by=self.name, biases=False), 0
        groups = together(sites, lambda node: sites[node].view.x)
        for at in lockstep(gm, groups, ctx.data, samples=None, reference=False, label=self.name, progress=ctx.progress):
            if count == self.stop_at:
                raise KeyboardInterrupt
            self.stops.append(tuple(n.name for n in at.nodes))
            mean = sum(x.float().mean((0, 1)) for x in at.inputs(sites[at.node].view.x))
            for node in at.nodes:
                weight = original(sites[node].fake.x) * (1 + 0.01 * mean.sign()[:, None].to(sites[node].dtype))
                sites[node].set_weight(gm, weight, by=self.name)
            count += 1
        gm.graph.lint()
        gm.recompile()
        return count


register_stage("lean", Lean)
