"""A quantized graph -> a folder in the compressed-tensors format, as transformers and vLLM load it.

linear(x, dequantize(q)), 8 bits or less     pack-quantized: weight_packed, weight_scale, weight_shape[, weight_zero_point]
with x in 8 bits as well                     int-quantized: int8 weight, weight_scale[, weight_zero_point][, input_scale, ...]
everything else, embeddings too              float, as it is in the graph or dequantized
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.checkpoints.layers import Layer, integer_layer
from qgraph.checkpoints.load import config_of, files_of, prefixes
from qgraph.checkpoints.stored import Entry, Stored, read_header, write
from qgraph.errors import ModelError
from qgraph.ledger import state
from qgraph.reference import dequantize
from qgraph.text import path_of
from qgraph.views import Conv, Dequantize, Embedding, Linear, Norm, const_value, is_const, view, view_any

WEIGHTS = "model.safetensors"
_BESIDE = {".json", ".txt", ".model", ".jinja", ".py"}


def save_checkpoint(quantized: GraphModule, folder: str | os.PathLike[str], *, source: str | os.PathLike[str]) -> Path:
    """Write the graph's parameters to a new `folder`, under the names that `source` has for them: the folder of the float model that
    the graph was captured from, with its config.json and .safetensors files. Configuration and tokenizer are copied from there.

    Integers, scales and zero points are stored as they are. Tied parameters stay tied, and float, unless quantization has told them apart.
    The folder appears when it is complete. Raises ModelError: no quantized graph of a torch module, a folder that exists, weights that
    the format does not know, parameters of `source` that the graph lacks, or a bias that it has beside them."""
    target, source = Path(folder), Path(source)
    if state(quantized).stage != "converted" or state(quantized).source != "torch":
        raise ModelError("a checkpoint is written from a converted graph of a torch module; for others there is qgraph.export")
    if target.exists():
        raise ModelError(f"{target} exists already; name a new folder")
    if not target.absolute().parent.is_dir():
        raise ModelError(f"cannot write {target}: the folder {target.absolute().parent} does not exist")
    names = {name: entry for file in files_of(source, ".safetensors") for name, entry in read_header(file).items()}
    config = config_of(source)
    found = _Parameters(quantized, names)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for file in source.iterdir():
            if file.suffix in _BESIDE and not file.name.endswith(".index.json"):
                shutil.copy(file, temporary / file.name)
        described = config | {"quantization_config": _description(found.layers.values(), found.float_linears())}
        if "tie_word_embeddings" in config:
            described["tie_word_embeddings"] = bool(config["tie_word_embeddings"]) and not found.untied
        (temporary / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        write(temporary / WEIGHTS, found.entries())
        os.replace(temporary, target)
    except OSError as error:
        raise ModelError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _description(layers: Iterable[Layer], ignore: list[str]) -> dict[str, Any]:
    """config.json's quantization_config. One format is given to all linears but `ignore`, several name their layers."""
    schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for layer in layers:
        scheme = layer.scheme()
        schemes.setdefault(json.dumps(scheme), (scheme, []))[1].append(layer.name)
    if not schemes:
        raise ModelError("no linear of the graph has integer weights, so there is nothing to store in this format")
    groups = {
        f"group_{i}": {"targets": ["Linear"] if len(schemes) == 1 else names} | scheme for i, (scheme, names) in enumerate(schemes.values())
    }
    formats = {scheme["format"] for scheme, _ in schemes.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }


class _Parameters:
    """What the graph has for the parameters `names` of the source. `layers`: linears with integers; `floats`: name -> node."""

    def __init__(self, gm: GraphModule, names: Mapping[str, Stored]) -> None:
        self.names = names
        self.layers: dict[str, Layer] = {}
        self.floats: dict[str, Node] = {}
        self.weights: dict[str, Node] = {}
        sites = [(n, v) for n in gm.graph.nodes if (v := view_any((Linear, Embedding, Norm, Conv), n)) is not None]
        paths = [path_of(n) for n, _ in sites]
        self.prefix = max(prefixes(paths), key=lambda p: sum(f"{path.removeprefix(p)}.weight" in names for path in paths))
        for node in gm.graph.find_nodes(op="get_attr"):
            if (name := self.inner(str(node.target))) in names:
                self.floats[name] = node
        tied = {self.inner(p): self.inner(paths[0]) for paths in state(gm).tied for p in paths}
        for node, v in sites:
            self.site(self.inner(path_of(node)), v, tied)
        self.untied = any(name not in names for name in (*self.floats, *(f"{n}.weight" for n in self.layers)) if name in tied)
        stored = {*self.floats, *(f"{n}.weight" for n in self.layers)}
        if missing := [name for name in names if name not in stored]:
            raise ModelError(f"the graph has nothing for the parameter {missing[0]!r} of the source; was it captured from that model?")

    def inner(self, path: str) -> str:
        """The source's name of what a wrapper may hold under a path."""
        return path.removeprefix(self.prefix)

    def site(self, name: str, v: Any, tied: Mapping[str, str]) -> None:
        shared = f"{name}.weight" not in self.names and self.floats.get(tied.get(f"{name}.weight", "")) is v.weight
        layer = integer_layer(name, v) if isinstance(v, Linear) and not shared else None
        own = isinstance(v, Linear) and (layer is not None or shared or is_const(v.weight))
        if own and (self.weights.setdefault(name, v.weight) is not v.weight or _is_sorted(v.x)):
            raise ModelError(f"{name!r} sorts its columns or adds minima of groups, which have no place in the format")
        if layer is not None:
            if f"{name}.weight" not in self.names and f"{name}.weight" not in tied:
                raise ModelError(f"the source has no parameter '{name}.weight' for the integers of a product in {name!r}")
            self.layers[name] = layer
            self.bias(name, v.bias)
            return
        self.float(f"{name}.weight", v.weight, tied)
        if not isinstance(v, Embedding):
            self.bias(name, v.bias)

    def bias(self, name: str, bias: Node | None) -> None:
        if bias is not None and f"{name}.bias" not in self.names and is_const(bias):
            raise ModelError(f"{name!r} has a bias in the graph and none in the source; leave out what corrects biases")
        self.float(f"{name}.bias", bias, {})

    def float(self, name: str, node: Node | None, tied: Mapping[str, str]) -> None:
        """Note a float parameter. What a tied parameter has in common with the one that is stored is not stored again."""
        if node is None or not (is_const(node) or view(Dequantize, node) is not None):
            return
        if name in self.names or (name in tied and self.floats.get(tied[name]) is not node):
            self.floats[name] = node

    def float_linears(self) -> list[str]:
        """Linears that stay float, which the configuration lists."""
        return sorted(n for n in self.weights if n not in self.layers)

    def entries(self) -> list[Entry]:
        found = [entry for layer in self.layers.values() for entry in layer.entries()]
        for name, node in self.floats.items():
            if name.removesuffix(".weight") not in self.layers:
                found.append(_float_entry(name, node))
        return found


def _is_sorted(x: Node) -> bool:
    """A pass has put a gather of constant order in front of the layer."""
    return x.target is torch.ops.aten.index_select.default and "from" in x.meta


def _float_entry(name: str, node: Node) -> Entry:
    value, w = const_value(node), view(Dequantize, node)
    if value is not None:
        return Entry(name, value.dtype, tuple(value.shape), lambda: value)
    q, scale = (None, None) if w is None else (const_value(w.q), const_value(w.scale))
    if w is None or q is None or scale is None:
        raise ModelError(f"{name} is computed in the graph, so it cannot be stored")
    zero = None if w.zero_point is None else const_value(w.zero_point)

    def make() -> Tensor:
        return dequantize(q, scale, zero, w.dtype, w.axis, w.group)

    return Entry(name, scale.dtype, tuple(q.shape), make)
