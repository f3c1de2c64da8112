"""Journal: finished trials in a JSON file, so that an interrupted search goes on where it was.

A file may hold several searches; each is known by a hash of all that its numbers depend on. It is written under another name first
and then renamed: an interruption leaves the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import qgraph
from qgraph.edit import graph_modules
from qgraph.errors import ModelError
from qgraph.spill import release
from qgraph.sweep import arranged
from qgraph.text import text
from qgraph.tradeoff import Trial

FORMAT = "qgraph auto 1"


@dataclass(frozen=True)
class Journal:
    """`path` None: nothing is kept beyond this search."""

    path: Path | None
    key: str

    def read(self) -> dict[str, Trial]:
        """Finished trials by candidate key. Raises ModelError for a file that is something else."""
        return {trial.candidate.key: trial for trial in map(Trial.from_json, self._runs().get(self.key, []))}

    def write(self, trials: Iterable[Trial]) -> None:
        if self.path is None:
            return
        runs = self._runs() | {self.key: [t.as_json() for t in trials]}
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps({"format": FORMAT, "runs": runs}, indent=1), encoding="utf-8")
        os.replace(part, self.path)

    def _runs(self) -> dict[str, list[dict[str, Any]]]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{self.path} is no file of finished trials: {error}; give resume another name") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ModelError(f"{self.path} is no file of finished trials of this version; give resume another name")
        found: dict[str, list[dict[str, Any]]] = data["runs"]
        return found


def fingerprint(gm: GraphModule, data: Iterable[Iterable[Any]], settings: Iterable[str]) -> str:
    """A hash of the graph with its tensors, of the batches in `data`, of `settings`, and of the versions that compute."""
    digest = hashlib.sha256("\n".join([text(gm), *settings, *_versions()]).encode())
    for part in graph_modules(gm):
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            digest.update(name.encode())
            add_to(digest, tensor)
            release()
    for batches in data:
        for _, args in arranged(gm, batches):
            for value in args:
                add_to(digest, value)
    return digest.hexdigest()


def add_to(digest: Any, value: Any) -> None:
    """Feeds a tensor with its type and shape, or a number, to a hash."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())


def _versions() -> list[str]:
    found = [f"qgraph {qgraph.__version__}"]
    for name in ("torch", "onnxruntime"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
