"""Progress: what a stage of a recipe has done at the stops of lockstep, so that an interrupted run goes on behind the last of them.

In one process the graph itself holds what is done. With a folder, each finished stop is a file of new constants there and a file that
says what reads them, which gets its name last: a run that was killed loses no more than one stop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.edit import add_constant
from qgraph.errors import ModelError
from qgraph.journal import add_to, fingerprint
from qgraph.ledger import Entry, state
from qgraph.lockstep import ORIGINAL
from qgraph.rewriter import Decline, Rewriter
from qgraph.spill import size
from qgraph.types import attribute
from qgraph.views import const_value

log = logging.getLogger(__name__)

FORMAT = "qgraph run 1"
HEADER = "run.json"


def open_run(folder: str | os.PathLike[str], prepared: GraphModule, batches: Iterable[Any] | None, backend: str) -> None:
    """Lets `calibrate` go on with the run that `folder` keeps; a new one where it keeps none.

    Raises ModelError when the folder cannot be written, or holds something else: a run with another recipe, model or data."""
    path, recipe = Path(folder), repr(state(prepared).recipe)
    header = {"format": FORMAT, "recipe": recipe, "key": fingerprint(prepared, [] if batches is None else [batches], [recipe, backend])}
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not any(path.iterdir()):
            _write(path / HEADER, [json.dumps(header).encode()])
        found = json.loads((path / HEADER).read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} holds other files; give resume a new folder") from None
    except OSError as error:
        raise ModelError(f"{path} cannot keep a run: {error.strerror or error}; give resume a folder that can be written") from error
    except ValueError as error:
        raise ModelError(f"{path / HEADER} does not describe a run: {error}; give resume a new folder") from error
    if found != header:
        same = isinstance(found, dict) and found.get("recipe") == header["recipe"]
        other = "on another model, other data, for another backend or by other versions" if same else "with another recipe"
        raise ModelError(f"{path} keeps a run {other}; give resume a new folder, or delete this one")
    state(prepared).progress = Progress(path)


@dataclass
class Progress:
    """`declines` are those of the stage that runs; `done`: the number of finished stops of each stage in this process, and their data."""

    folder: Path | None = None
    declines: list[Decline] = field(default_factory=list)
    done: dict[str, tuple[str, int]] = field(default_factory=dict)

    def stage(self, gm: GraphModule, label: str, feeds: Iterable[Iterable[Any]]) -> Stage:
        """The stops of the stage `label` on this data; a recipe may have it several times."""
        name, seen = f"{len(state(gm).pending)}-{label}", hashlib.sha256()
        for feed in feeds:
            for value in feed:
                add_to(seen, value)
        known, count = self.done.get(name, ("", 0))
        return Stage(self, gm, name, seen.hexdigest(), count if known == seen.hexdigest() else 0)


@dataclass
class Stage:
    """One stage. The first `finished` stops are in the graph; `stop` is the number of the next."""

    progress: Progress
    gm: GraphModule
    name: str
    seen: str
    finished: int
    stop: int = 0

    def restore(self, nodes: Iterable[Node]) -> bool:
        """Whether the stop before `nodes` is done, in this process or, now, from the folder. If not, `finish` follows."""
        done = self.stop < self.finished or self._read([n.name for n in nodes])
        if done:
            self._count()
        elif self.progress.folder is not None:
            self.before = {n: _slots(n) for n in self.gm.graph.nodes if n.op == "call_function"}
            self.ledger = {(e.node, e.role): e for e in state(self.gm).ledger}
            self.declines = len(self.progress.declines)
        return done

    def finish(self, nodes: Iterable[Node]) -> None:
        """The caller has changed what it wanted to change."""
        if self.progress.folder is not None:
            self._keep(self.progress.folder, [n.name for n in nodes])
        self._count()

    def _count(self) -> None:
        self.stop += 1
        self.progress.done[self.name] = self.seen, self.stop

    def _files(self, folder: Path) -> tuple[Path, Path]:
        stem = f"{self.name}-{self.stop:05d}"
        return folder / f"{stem}.bin", folder / f"{stem}.json"

    def _keep(self, folder: Path, nodes: list[str]) -> None:
        data, description = self._files(folder)
        changed = _changed(self.gm, self.before)
        if isinstance(changed, str):
            log.warning("%s at %s cannot be kept, and is done again by the next run: %s", self.name, nodes[0], changed)
            return
        record = {
            "nodes": nodes,
            "constants": [_description(self.before, *place) for place in changed],
            "ledger": [asdict(e) for e in state(self.gm).ledger if self.ledger.get((e.node, e.role)) != e],
            "declines": [asdict(d) for d in self.progress.declines[self.declines :]],
        }
        try:
            _write(data, (_bytes(attribute(_slots(node)[slot])) for node, slot in changed))
            _write(description, [json.dumps(record).encode()])
        except OSError as error:
            raise ModelError(f"{folder} cannot keep what is done: {error.strerror or error}") from error

    def _read(self, nodes: list[str]) -> bool:
        if self.progress.folder is None:
            return False
        data, description = self._files(self.progress.folder)
        if not description.exists():
            return False
        record, named = json.loads(description.read_bytes()), {n.name: n for n in self.gm.graph.nodes}
        if record["nodes"] != nodes or any(_digest(_slots(named[c["node"]]).get(c["slot"])) != c["before"] for c in record["constants"]):
            log.warning("%s at %s is done again: stages before it gave other numbers", self.name, nodes[0])
            return False
        with data.open("rb") as file:
            for c in record["constants"]:
                _put(self.gm, named[c["node"]], c, _tensor(np.fromfile(file, np.uint8, c["bytes"]), c))
        for entry in record["ledger"]:
            state(self.gm).ledger.record(Entry(**entry))
        self.progress.declines += [Decline(**d) for d in record["declines"]]
        return True


Slots = dict[str, Any]
"""What a call reads, by the position or keyword."""


def _slots(node: Node) -> Slots:
    return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)


def _changed(gm: GraphModule, before: Mapping[Node, Slots]) -> list[tuple[Node, str]] | str:
    """(node, slot) of what reads another constant than before; or what else has changed."""
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node not in before:
            return f"%{node.name} is new"
        old = before[node]
        for slot, value in _slots(node).items():
            if value is old.get(slot) or not isinstance(value, Node) and value == old.get(slot):
                continue
            if not isinstance(value, Node) or const_value(value) is None:
                return f"operand {slot} of %{node.name} has become something else than a constant"
            found.append((node, slot))
    return found


def _description(before: Mapping[Node, Slots], node: Node, slot: str) -> dict[str, Any]:
    new = _slots(node)[slot]
    value = attribute(new)
    about = {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "bytes": size(value),
        "by": new.meta.get("from", ""),
    }
    return {"node": node.name, "slot": slot, "name": str(new.target), "before": _digest(before[node].get(slot)), **about}


def _digest(constant: Node | None) -> str:
    """ "" where there is none."""
    found = hashlib.sha256()
    if constant is None:
        return ""
    add_to(found, attribute(constant))
    return found.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensor(data: np.ndarray[Any, np.dtype[np.uint8]], c: Mapping[str, Any]) -> Tensor:
    if len(data) != c["bytes"]:
        raise ModelError(f"what was kept of {c['node']} is truncated; delete the folder and start anew")
    return torch.from_numpy(data).view(getattr(torch, c["dtype"])).reshape(c["shape"])


def _put(gm: GraphModule, node: Node, c: Mapping[str, Any], value: Tensor) -> None:
    """Lets the slot of the node read the constant, as the stage did."""
    old = _slots(node).get(c["slot"])
    new = Rewriter(gm, node, by=c["by"]).const(value, name=c["name"])
    if old is None:
        new.meta[ORIGINAL] = add_constant(gm, f"{c['name']}_absent", torch.zeros_like(value))
    else:
        new.meta[ORIGINAL] = old.meta.get(ORIGINAL, old.target)
    if not c["slot"].isdigit():
        node.kwargs = {**node.kwargs, c["slot"]: new}
    else:
        i = int(c["slot"])
        node.args = (*node.args[:i], *[None] * (i - len(node.args)), new, *node.args[i + 1 :])
    if old is not None and not old.users:
        gm.graph.erase_node(old)


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Under another name first, and on disk before it is renamed."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        for data in parts:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
