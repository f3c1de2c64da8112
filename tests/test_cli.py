"""The command line on small files: what it writes, what it prints, how it exits."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

import qgraph
from qgraph.cli import main
from qgraph.stages import STAGES
from tests import small


@pytest.fixture
def files(tmp_path):
    small.save_mlp(tmp_path / "float.onnx")
    np.savez(tmp_path / "calibration.npz", x=small.samples())
    return tmp_path


def run(*args: object, status: int = 0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def output_of(path, x):
    return ort.InferenceSession(str(path)).run(None, {"x": x})[0]


def relative_error(files, quantized):
    x = small.samples(40, seed=11)
    expected = output_of(files / "float.onnx", x)
    return np.linalg.norm(output_of(quantized, x) - expected) / np.linalg.norm(expected)


def test_quantize_writes_a_model_that_onnxruntime_runs_close_to_the_float_one(files):
    result = run("quantize", files / "float.onnx", "-o", files / "int8.onnx", "--calibration", files / "calibration.npz", "--batch", 5)
    assert 0 < relative_error(files, files / "int8.onnx") < 0.05
    assert "2 of 2 quantized" in result.stdout and "fused" in result.stdout
    assert result.stderr == ""


def test_a_folder_of_npz_files_is_one_feed_each_and_gives_the_same_model(files):
    (files / "feeds").mkdir()
    for i, row in enumerate(small.samples().reshape(3, 4, 16)):
        np.savez(files / "feeds" / f"{i}.npz", x=row)
    run("quantize", files / "float.onnx", "-o", files / "a.onnx", "--calibration", files / "feeds")
    run("quantize", files / "float.onnx", "-o", files / "b.onnx", "--calibration", files / "calibration.npz")
    assert (files / "a.onnx").read_bytes() == (files / "b.onnx").read_bytes()


def test_a_dynamic_recipe_needs_no_calibration_data(files):
    run("quantize", files / "float.onnx", "-o", files / "int8.onnx", "--recipe", "w8a8-dynamic")
    assert 0 < relative_error(files, files / "int8.onnx") < 0.05


def test_a_torch_model_comes_from_a_function(tmp_path, monkeypatch):
    small.save_mlp(tmp_path / "float.onnx")
    run("quantize", "tests.small:mlp_torch", "-o", tmp_path / "int8.onnx", "--recipe", "w8a8-dynamic")
    x = small.samples(4)
    expected = output_of(tmp_path / "float.onnx", x)
    session = ort.InferenceSession(str(tmp_path / "int8.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: x})[0]
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.05


def test_json_is_one_object_that_accounts_for_every_weight(files):
    args = ("-o", files / "int8.onnx", "--recipe", "w8a8-dynamic", "--set", "rules.second=null", "--json")
    report = json.loads(run("quantize", files / "float.onnx", *args).stdout)
    assert report["weights"] == 2 and report["weights_quantized"] == 1
    assert report["bytes"] == (files / "int8.onnx").stat().st_size
    assert report["source_bytes"] == (files / "float.onnx").stat().st_size
    assert {row["node"] for row in report["float"]} == {"second"}
    assert all("rule 'second'" in row["reason"] for row in report["float"])
    assert report["kernels_promised"] == report["kernels_fused"] == 1


def test_a_yaml_recipe_and_set_change_what_is_quantized(files):
    (files / "recipe.yaml").write_text("recipe: w8a8-dynamic\nrules:\n  first: null\n")
    report = json.loads(
        run("quantize", files / "float.onnx", "-o", files / "int8.onnx", "--recipe", files / "recipe.yaml", "--json").stdout
    )
    assert report["recipe"] == "recipe"
    assert {row["node"] for row in report["float"]} == {"first"}


def test_an_existing_output_is_replaced_on_success(files):
    (files / "int8.onnx").write_bytes(b"old")
    run("quantize", files / "float.onnx", "-o", files / "int8.onnx", "--recipe", "w8a8-dynamic")
    onnx.checker.check_model(onnx.load(files / "int8.onnx"))
    assert sorted(p.name for p in files.iterdir()) == ["calibration.npz", "float.onnx", "int8.onnx"]


def test_inspect_counts_nodes_weights_and_what_runs(files):
    run("quantize", files / "float.onnx", "-o", files / "int8.onnx", "--calibration", files / "calibration.npz")
    before = json.loads(run("inspect", files / "float.onnx", "--json").stdout)
    after = json.loads(run("inspect", files / "int8.onnx", "--json").stdout)
    assert before["nodes"] == {"::MatMul": 1, "::Add": 1, "::Relu": 1, "::Gemm": 1}
    assert before["weights"] == [{"dtype": "float", "tensors": 4, "elements": 533, "bytes": 2132}]
    assert (before["quantized_weights"], before["quantized_nodes"]) == (0.0, [0, 2])
    int8 = next(w for w in after["weights"] if w["dtype"] == "int8")
    assert int8["elements"] >= 16 * 24 + 24 * 5
    assert 0.8 < after["quantized_weights"] < 1 and after["quantized_nodes"] == [2, 2]
    assert any(kind.startswith(("::QLinear", "com.microsoft::Q", "com.microsoft::MatMulInteger")) for kind in after["runs"])


def test_inspect_prints_a_readable_page(files):
    text = run("inspect", files / "float.onnx").stdout
    assert "0 of 2 operations with weights" in text and "MatMul" in text and "ONNX Runtime" in text


def test_inspect_says_why_onnxruntime_cannot_load_a_file(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "local" : 1]> g (float[2] x) => (float[2] y) { y = local.Odd (x) }'
    )
    onnx.save(model, tmp_path / "odd.onnx")
    text = run("inspect", tmp_path / "odd.onnx").stdout
    assert "refuses the model" in text and "Odd" in text


def test_what_a_stage_refused_is_listed(tmp_path):
    text = """<ir_version: 9, opset_import: ["": 20]> g (float[N,2] x) => (float[N,2] z)
        <float[2,2] w = {1, 0.5, -2, 1}> { [first] y = MatMul (x, w) z = Relu (y) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "float.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32))
    wanted = ("quantize", tmp_path / "float.onnx", "-o", tmp_path / "int8.onnx", "--recipe", "w8a8+bias-correct")
    found = run(*wanted, "--calibration", tmp_path / "data.npz").stdout
    assert "declined     bias_correct at first: MatMul takes no bias" in found
    (refused,) = json.loads(run(*wanted, "--calibration", tmp_path / "data.npz", "--json").stdout)["declined"]
    assert refused["node"] == "first"


def test_passes_lists_every_pass_with_its_contract_and_its_stage():
    lines = run("passes").stdout.splitlines()
    names = {line.split()[0] for line in lines}
    assert {"canonicalize", "fold_constants", "fold_batch_norm", "insert_observers", "fold_fake_quant", "remove_dead"} <= names
    assert all(len(line.split()) > 3 for line in lines)
    own = {f"+{stage}" for stage, factory in STAGES.items() if isinstance(factory, str)}  # tests register others
    assert {line.split()[2] for line in lines} >= own


def test_diff_shows_the_changed_nodes_only(files):
    model = onnx.load(files / "float.onnx")
    model.graph.node[2].op_type = "Sigmoid"
    onnx.save(model, files / "other.onnx")
    text = run("diff", files / "float.onnx", files / "other.onnx").stdout
    changed = [line for line in text.splitlines() if line.startswith(("-", "+")) and not line.startswith(("---", "+++"))]
    assert len(changed) == 2 and "Relu" in changed[0] and "Sigmoid" in changed[1]
    assert run("diff", files / "float.onnx", files / "float.onnx").stdout == ""


def test_wrong_usage_exits_with_2(files):
    assert "Missing option" in run("quantize", files / "float.onnx", status=2).stderr
    assert "No such option" in run("quantize", "--recipee", "w8a8", status=2).stderr
    assert "No such command" in run("quantise", status=2).stderr
    run("quantize", files / "float.onnx", "-o", files / "x.onnx", "--batch", 0, status=2)


def test_debug_shows_the_traceback(tmp_path):
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "none.onnx"), "--debug"])
    assert isinstance(result.exception, qgraph.ModelError)
    assert result.exit_code == 1


def test_help_comes_without_loading_torch():
    program = "import sys; from qgraph.cli import main; main(['quantize', '--help'], standalone_mode=False); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "--calibration" in result.stdout and result.stdout.endswith("False\n")


def test_sizes_include_external_data(tmp_path):
    small.save_mlp(tmp_path / "float.onnx", external=True)
    result = run("quantize", tmp_path / "float.onnx", "-o", tmp_path / "w8.onnx", "--recipe", "w8a16", "--json")
    files = [p.stat().st_size for p in tmp_path.iterdir() if p.name != "w8.onnx"]
    assert len(files) == 2 and json.loads(result.stdout)["source_bytes"] == sum(files)


def test_a_target_that_saturates_gets_exact_sums(files):
    for name in ("x86-vnni", "x86-avx2"):
        arguments = ["quantize", files / "float.onnx", "-o", files / f"{name}.onnx", "--recipe", "w8a8-dynamic", "--target", name]
        assert ("exact on x86-vnni, x86-avx2" in run(*arguments).stdout) == (name == "x86-avx2")
    failed = run("quantize", files / "float.onnx", "-o", files / "x.onnx", "--target", "haswell", status=1)
    assert failed.stderr.startswith("error: unknown target 'haswell'; known: arm64-dot, x86-avx2, x86-vnni")
