"""path -> Checkpoint: what is quantized in it as QuantizedTensor, the rest as float tensors, each decoded when it is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qgraph.checkpoints import awq, compressed, gguf, gptq
from qgraph.checkpoints.stored import Stored, read_header
from qgraph.checkpoints.tensor import QuantizedTensor, Value
from qgraph.errors import ModelError, nearest


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, Value]):
    """Parameters by name ("model.layers.0.mlp.up_proj.weight"; GGUF has names of its own, see `gguf.renamed`).

    `format` is "GPTQ", "AWQ", "compressed-tensors", "GGUF" or "float". Nothing is kept: asking twice decodes twice."""

    path: Path
    format: str
    decoders: Mapping[str, Callable[[], Value]] = field(repr=False)
    architecture: gguf.Architecture | None = None

    def __getitem__(self, name: str) -> Value:
        return self.decoders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.decoders)

    def __len__(self) -> int:
        return len(self.decoders)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The tensors of a quantized checkpoint, bit for bit: a .gguf or .safetensors file, or a folder with one or the other.

    GPTQ (versions 1 and 2, also sorted by activation), AWQ ("gemm"), compressed-tensors (pack-quantized, int-quantized) and GGUF
    (Q4_0 to Q8_0, Q2_K to Q6_K). Files are mapped; a tensor is read when it is asked for. Raises ModelError for what is missing,
    truncated, contradictory or of another format."""
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such checkpoint file or folder")
    files = files_of(path, ".safetensors", ".gguf") if path.is_dir() else [path]
    if files[0].suffix == ".gguf":
        if len(files) > 1:
            raise ModelError(f"{path}: the folder holds {len(files)} GGUF files; name one of them")
        return _gguf(files[0])
    stored: dict[str, Stored] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in stored:
                raise ModelError(f"tensor {name!r} lies in {stored[name].path.name} and in {file.name}; remove one of the files")
            stored[name] = entry
    folder = path if path.is_dir() else path.parent
    if missing := _promised(folder, stored) if path.is_dir() else None:
        raise ModelError(f"{folder}: the index lists tensor {missing!r}, which no file holds: a part of the checkpoint is missing")
    return _safetensors(path, stored, _quantization(folder))


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    """The folder's files with the first of these endings that it has. Raises ModelError when it has none."""
    found = next((f for s in suffixes if folder.is_dir() and (f := sorted(folder.glob(f"*{s}")))), None)
    if found is None:
        raise ModelError(f"{folder} is no folder with a {' or '.join(suffixes)} file")
    return found


def prefixes(names: Iterable[str]) -> list[str]:
    """Paths under which a wrapper may hold the model whose parameters these are: "" and the parts that all names begin with."""
    parts = os.path.commonprefix(sorted(names)).split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts) + 1)]


def _gguf(path: Path) -> Checkpoint:
    reader = gguf.open_gguf(path)
    decoders = {t.name: partial(gguf.decode, t) for t in reader.tensors}
    return Checkpoint(path, "GGUF", decoders, gguf.architecture(path, reader))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object")
    return found


def _promised(folder: Path, stored: Mapping[str, Stored]) -> str | None:
    """A tensor that the index of a checkpoint in several files names and none of them has."""
    index = folder / "model.safetensors.index.json"
    return next((n for n in _json(index).get("weight_map", {}) if n not in stored), None) if index.exists() else None


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError when there is none."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json")
    return _json(folder / "config.json")


def _quantization(folder: Path) -> dict[str, Any]:
    """What the folder says about quantization, {} for nothing: in config.json, or in a file of its own as first versions wrote."""
    for name, key in (("config.json", "quantization_config"), ("quantize_config.json", ""), ("quant_config.json", "")):
        if (folder / name).exists():
            found = _json(folder / name)
            config = found.get(key, found.get("compression_config")) if key else found
            if isinstance(config, dict):
                return config
    return {}


def _safetensors(path: Path, stored: Mapping[str, Stored], config: Mapping[str, Any]) -> Checkpoint:
    layers: dict[str, dict[str, Stored]] = {}
    for name, entry in stored.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = entry
    decoders: dict[str, Callable[[], Value]] = {}
    formats = set()
    for layer, parts in layers.items():
        names: tuple[str, ...] = ()
        if "qweight" in parts:
            names = gptq.NAMES
            _require(layer, parts, names[:3])
            is_awq = awq.is_awq({n: p.shape for n, p in parts.items()})
            formats.add("AWQ" if is_awq else "GPTQ")
            decode = partial(awq.decode, layer) if is_awq else partial(gptq.decode, layer, version=_gptq_version(config))
        elif "weight_packed" in parts or ("weight" in parts and parts["weight"].dtype == "I8"):
            names = compressed.NAMES
            formats.add("compressed-tensors")
            decode = partial(compressed.decode, layer, group=compressed.group_of(layer, config))
        if names:
            decoders[f"{layer}.weight"] = partial(_decoded, decode, {n: parts[n] for n in names if n in parts})
        decoders |= {f"{layer}.{n}" if layer else n: p.read for n, p in parts.items() if n not in names}
    if len(formats) > 1:
        raise ModelError(f"{path} mixes the formats {' and '.join(sorted(formats))}; keep the files of one checkpoint in a folder")
    return Checkpoint(path, next(iter(formats), "float"), decoders)


def _decoded(decode: Callable[[Mapping[str, Tensor]], QuantizedTensor], parts: Mapping[str, Stored]) -> QuantizedTensor:
    return decode({name: entry.read() for name, entry in parts.items()})


def _require(layer: str, parts: Mapping[str, Stored], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in parts:
            raise ModelError(f"tensor '{layer}.{name}' is missing; the layer has {', '.join(parts)}")


def _gptq_version(config: Mapping[str, Any]) -> int:
    layout = str(config.get("checkpoint_format", "gptq"))
    versions = {"gptq": 1, "gptq_v2": 2}
    if layout not in versions:
        raise ModelError(f"GPTQ layout {layout!r} is not known{nearest(layout, versions)}")
    return versions[layout]
