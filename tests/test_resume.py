"""Runs that were interrupted go on where they were, and end as those that were not."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import qgraph
from qgraph import resume
from qgraph.errors import ModelError
from qgraph.recipe import load_recipe
from tests.decoder import Lean, decoder, ids

RECIPE = "w4a16-g32+lean"


@pytest.fixture
def model(tmp_path) -> Path:
    Lean.stops.clear()
    return decoder(tmp_path / "model")


def interrupted(after: int) -> qgraph.Recipe:
    return load_recipe(RECIPE, [f"stages=[{{lean: {{stop_at: {after}}}}}]"])


def same(a, b) -> bool:
    """Equal constants under equal names, and equal ledgers."""
    left, right = ({k: v for k, v in g.named_buffers() if not k.endswith("_absent")} for g in (a, b))
    ledgers = [g.meta["qgraph"].ledger.table() for g in (a, b)]
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left) and ledgers[0] == ledgers[1]


def test_in_one_process_what_is_done_stays_done(model):
    batches = ids(3, 16)
    whole = qgraph.quantize(model, batches, recipe=RECIPE)
    stops = list(Lean.stops)
    Lean.stops.clear()
    prepared = qgraph.prepare(model, recipe=interrupted(4))
    with pytest.raises(KeyboardInterrupt):
        qgraph.calibrate(prepared, batches)
    prepared.meta["qgraph"].pending = load_recipe(RECIPE).stages
    qgraph.calibrate(prepared, batches)
    assert Lean.stops == stops and len(stops) == 9
    assert same(qgraph.convert(prepared), whole)


def test_other_data_start_from_the_beginning(model):
    prepared = qgraph.prepare(model, recipe=interrupted(4))
    with pytest.raises(KeyboardInterrupt):
        qgraph.calibrate(prepared, ids(3, 16))
    prepared.meta["qgraph"].pending = load_recipe(RECIPE).stages
    Lean.stops.clear()
    qgraph.calibrate(prepared, ids(2, 16))
    assert len(Lean.stops) == 9
    x = ids(1, 8)[0]["input_ids"]
    assert torch.equal(qgraph.convert(prepared)(x)[0], qgraph.quantize(model, ids(2, 16), recipe=RECIPE)(x)[0])


def test_another_process_goes_on_from_the_folder(model, tmp_path, monkeypatch):
    """A process that ends between two stops leaves what `finish` has written."""
    whole = qgraph.quantize(model, ids(3, 16), recipe=RECIPE)
    stops = list(Lean.stops)
    kept = _killed(model, tmp_path / "run", monkeypatch, after=5)
    assert kept == stops[:6]  # the sixth was under way
    Lean.stops.clear()
    resumed = qgraph.quantize(model, ids(3, 16), recipe=RECIPE, resume=tmp_path / "run")
    assert Lean.stops == stops[5:]
    assert same(resumed, whole)


KILLED = textwrap.dedent("""
    import os, signal, sys
    import qgraph
    from qgraph import resume
    from tests.decoder import ids
    finish, count = resume.Stage.finish, iter(range(100))
    def dies(self, nodes):
        if next(count) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, nodes)
    resume.Stage.finish = dies
    qgraph.quantize(sys.argv[1], ids(2, 16), recipe="w4a16-g32+lean", resume=sys.argv[2])
""")


@pytest.mark.skipif(sys.platform == "win32", reason="kills itself with a signal")
def test_a_process_that_was_killed_leaves_what_was_done(model, tmp_path):
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(model), str(tmp_path / "run")], check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL
    resumed = qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=tmp_path / "run")
    assert len(Lean.stops) == 5
    assert same(resumed, qgraph.quantize(model, ids(2, 16), recipe=RECIPE))


def _killed(model, folder, monkeypatch, after):
    Lean.stops.clear()
    finish, count = resume.Stage.finish, iter(range(100))

    def dies(self, nodes):
        if next(count) == after:
            raise KeyboardInterrupt
        finish(self, nodes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume.Stage, "finish", dies)
        qgraph.quantize(model, ids(3, 16), recipe=RECIPE, resume=folder)
    return list(Lean.stops)


def test_another_recipe_and_other_data_are_refused(model, tmp_path):
    folder = tmp_path / "run"
    qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=folder)
    with pytest.raises(ModelError, match="with another recipe; give resume a new folder"):
        qgraph.quantize(model, ids(2, 16), recipe="w4a16-g16+lean", resume=folder)
    with pytest.raises(ModelError, match="on another model, other data"):
        qgraph.quantize(model, ids(3, 16), recipe=RECIPE, resume=folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(ModelError, match="does not describe a run"):
        qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=folder)
    with pytest.raises(ModelError, match="holds other files"):
        qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=model.parent)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot keep a run"):
        qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=tmp_path / "file")


def test_stops_are_done_again_where_an_earlier_stage_gave_other_numbers(model, tmp_path, caplog):
    folder = tmp_path / "run"
    whole = qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=folder)
    stops = list(Lean.stops)
    file = min(folder.glob("*-00003.json"))
    record = json.loads(file.read_text())
    record["constants"][0]["before"] = "0" * 64
    file.write_text(json.dumps(record))
    Lean.stops.clear()
    assert same(qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=folder), whole)
    assert Lean.stops == [stops[3]]
    assert "is done again: stages before it gave other numbers" in caplog.text


def test_a_full_disk_is_an_error_and_leaves_what_was_kept(model, tmp_path, monkeypatch):
    write, count = resume._write, iter(range(100))

    def full(path, parts):
        if next(count) == 6:  # the header, two stops of two files, then the constants of the third
            path.with_name(f"{path.name}.part").touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, parts)

    with monkeypatch.context() as patch, pytest.raises(ModelError, match="cannot keep what is done: No space left on device"):
        patch.setattr(resume, "_write", full)
        qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=tmp_path / "run")
    Lean.stops.clear()
    qgraph.quantize(model, ids(2, 16), recipe=RECIPE, resume=tmp_path / "run")
    assert len(Lean.stops) == 7


def test_biases_that_a_stage_adds_are_kept(tmp_path):
    """A linear without a bias gets one, and one with a bias another."""
    net = torch.nn.Sequential(torch.nn.Linear(12, 9, bias=False), torch.nn.ReLU(), torch.nn.Linear(9, 5)).eval()
    batches = [(torch.randn(4, 12, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    run = {"recipe": load_recipe("w8a8-dynamic+bias-correct", ["rules.*={}"]), "example_inputs": batches[0], "backend": "reference"}
    first = qgraph.quantize(net, batches, **run, resume=tmp_path / "run")
    assert len(list((tmp_path / "run").glob("*.json"))) == 3
    torch.testing.assert_close(
        qgraph.quantize(net, batches, **run, resume=tmp_path / "run")(*batches[0]), first(*batches[0]), rtol=0, atol=0
    )
