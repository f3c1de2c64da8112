"""GraphModule -> ONNX file."""
from __future__ import annotations
import os
from pathlib import Path
from torch.fx import GraphModule
from qgraph.onnx_write import to_proto


def save_onnx(gm: GraphModule, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
    p = Path(path)
    tmp = p.with_name(p.name + ".tmp")
    tmp.write_bytes(to_proto(gm).SerializeToString())
    os.replace(tmp, p)
