"""Wrong input: one line on stderr that says what is wrong, exit status 1, and nothing written or overwritten."""

import os
import re
import struct

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qgraph.cli import main
from tests import small

GOOD = small.samples()


def no_file(folder):
    return folder / "missing.onnx"


def a_directory(folder):
    return folder


def an_empty_file(folder):
    (folder / "empty.onnx").write_bytes(b"")
    return folder / "empty.onnx"


def a_text_file(folder):
    (folder / "notes.onnx").write_text("This is not a model.\n" * 20)
    return folder / "notes.onnx"


def a_png_file(folder):
    (folder / "image.onnx").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 13, b"IHDR") + bytes(40))
    return folder / "image.onnx"


def a_truncated_file(folder):
    whole = small.save_mlp(folder / "whole.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(whole[: len(whole) * 2 // 3])
    return folder / "cut.onnx"


def truncated_external_data(folder):
    path = small.save_mlp(folder / "model.onnx", external=True)
    os.truncate(folder / "model.onnx.data", 100)
    return path


def missing_external_data(folder):
    path = small.save_mlp(folder / "model.onnx", external=True)
    (folder / "model.onnx.data").unlink()
    return path


def external_data_elsewhere(folder, location="../outside.data"):
    path = small.save_mlp(folder / "model.onnx", external=True)
    (folder.parent / "outside.data").write_bytes((folder / "model.onnx.data").read_bytes())
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    return path


def external_data_through_a_link(folder):
    path = external_data_elsewhere(folder, location="inside.data")
    (folder / "inside.data").symlink_to(folder.parent / "outside.data")
    return path


def nothing_to_quantize(folder):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N, 16] x) => (float[N, 16] y) { s = Sigmoid (x) y = Add (s, x) }'
    )
    onnx.save(model, folder / "pointwise.onnx")
    return folder / "pointwise.onnx"


def quantized_already(folder):
    result = CliRunner().invoke(
        main, ["quantize", str(small.save_mlp(folder / "f.onnx")), "-o", str(folder / "q.onnx"), "--recipe", "w8a16"]
    )
    assert result.exit_code == 0, result.output
    return folder / "q.onnx"


BAD_MODELS = {
    no_file: "missing.onnx.*does not exist",
    a_directory: "is a directory",
    an_empty_file: "empty.onnx.*is empty",
    a_text_file: "notes.onnx.*not an ONNX model",
    a_png_file: "image.onnx.*(not an ONNX model|no ONNX graph)",
    a_truncated_file: "cut.onnx.*truncated",
    truncated_external_data: "model.onnx.data.*truncated",
    missing_external_data: "model.onnx.data.*missing",
    external_data_elsewhere: "outside.data.*outside the model's folder",
    external_data_through_a_link: "inside.data.*outside the model's folder",
    nothing_to_quantize: "nothing to quantize",
    quantized_already: "already quantized|quantized already",
}


def fails(folder, *args, match):
    """Run `qgraph quantize` over an output that exists: it must fail in one line and leave every file as it was."""
    output = folder / "out.onnx"
    output.write_bytes(b"precious")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    result = CliRunner().invoke(main, ["quantize", "-o", str(output), *map(str, args)])
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert re.search(match, lines[0]), lines[0]
    assert output.read_bytes() == b"precious"
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize("make", BAD_MODELS, ids=lambda make: make.__name__)
def test_a_bad_model_is_refused_in_one_line(tmp_path, make):
    (tmp_path / "inner").mkdir()
    fails(tmp_path / "inner", make(tmp_path / "inner"), "--recipe", "w8a8-dynamic", match=BAD_MODELS[make])


@pytest.mark.parametrize("make", [m for m in BAD_MODELS if m not in (nothing_to_quantize, quantized_already)], ids=lambda m: m.__name__)
@pytest.mark.parametrize("command", ["inspect", "diff"])
def test_the_other_commands_refuse_a_bad_model_too(tmp_path, make, command):
    (tmp_path / "inner").mkdir()
    path = make(tmp_path / "inner")
    result = CliRunner().invoke(main, [command, str(path), *([str(path)] if command == "diff" else [])])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1, result.output + repr(result.exception)


NAN = np.where(np.arange(16) == 5, np.nan, GOOD).astype(np.float32)
BAD_ARRAYS = {
    "a wrong name": ({"pixels": GOOD}, "pixels.*x|x.*pixels"),
    "one name too many": ({"x": GOOD, "mask": GOOD}, "mask"),
    "a wrong dtype": ({"x": GOOD.astype(np.int64)}, "x.*(int64.*float32|float32.*int64)"),
    "a wrong rank": ({"x": GOOD[:, None]}, r"x.*\[1, 1, 16\].*\[N,16\]"),
    "a wrong width": ({"x": GOOD[:, :9]}, r"x.*\[1, 9\].*\[N,16\]"),
    "NaN": ({"x": NAN}, "NaN"),
    "no samples": ({"x": GOOD[:0]}, "(no samples|empty)"),
    "no arrays": ({}, "no array for the model's input 'x'"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_calibration_arrays_that_do_not_fit_are_refused(tmp_path, case):
    arrays, match = BAD_ARRAYS[case]
    np.savez(tmp_path / "data.npz", **arrays)
    fails(tmp_path, small.save_mlp(tmp_path / "f.onnx"), "--calibration", tmp_path / "data.npz", match=match)


def an_empty_folder(folder):
    (folder / "feeds").mkdir()
    return folder / "feeds"


def a_missing_path(folder):
    return folder / "nowhere.npz"


def not_an_archive(folder):
    (folder / "data.npz").write_text("hello")
    return folder / "data.npz"


def pickled_objects(folder):
    np.savez(folder / "data.npz", x=np.array([{"a": 1}], dtype=object))
    return folder / "data.npz"


BAD_CALIBRATION = {
    an_empty_folder: "feeds.*(no .npz|empty)",
    a_missing_path: "nowhere.npz.*(not exist|no such|missing)",
    not_an_archive: "data.npz",
    pickled_objects: "data.npz.*(object|pickle)",
}


@pytest.mark.parametrize("make", BAD_CALIBRATION, ids=lambda make: make.__name__)
def test_a_calibration_set_that_cannot_be_read_is_refused(tmp_path, make):
    fails(tmp_path, small.save_mlp(tmp_path / "f.onnx"), "--calibration", make(tmp_path), match=BAD_CALIBRATION[make])


BAD_OPTIONS = {
    "an unknown recipe": (("--recipe", "int8"), "unknown recipe 'int8'.*llm-int8"),
    "an unknown recipe suffix": (("--recipe", "w8a8-dynamc"), "w8a8-dynamc.*dynamic"),
    "a recipe without meaning": (("--recipe", "w16a16"), "quantizes nothing"),
    "a missing recipe file": (("--recipe", "none.yaml"), "none.yaml.*No such file"),
    "an unknown field": (("--recipe", "w8a16", "--set", "wieghts.bits=4"), "wieghts.*weights"),
    "an override that is no assignment": (("--recipe", "w8a16", "--set", "observer"), "key=value"),
    "a rule that matches nothing": (("--recipe", "w8a16", "--set", "rules.secnd=null"), "secnd.*second"),
    "an unknown backend": (("--recipe", "w8a16", "--backend", "onnxruntme"), "onnxruntme.*onnxruntime"),
    "a static recipe without data": (("--recipe", "w8a8"), "--calibration"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_that_means_nothing_is_refused_with_the_nearest_that_does(tmp_path, case):
    options, match = BAD_OPTIONS[case]
    fails(tmp_path, small.save_mlp(tmp_path / "f.onnx"), *options, match=match)


BAD_FUNCTIONS = {
    "no.such_module:f": "no",
    "tests.small:nothing": "nothing",
    "tests.small:samples": r"must return \(module, example_inputs\)",
}


@pytest.mark.parametrize("source", BAD_FUNCTIONS)
def test_a_function_that_gives_no_model_is_refused(tmp_path, source):
    fails(tmp_path, source, "--recipe", "w8a16", match=BAD_FUNCTIONS[source])


def refused_output(source, output):
    result = CliRunner().invoke(main, ["quantize", str(source), "-o", str(output), "--recipe", "w8a16"])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1, result.output + repr(result.exception)
    return result.stderr


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    source = small.save_mlp(tmp_path / "f.onnx")
    assert "is a directory" in refused_output(source, tmp_path)
    assert "does not exist" in refused_output(source, tmp_path / "none" / "q.onnx")
    assert "is the input" in refused_output(source, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.onnx"]
