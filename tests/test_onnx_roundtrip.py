"""An untouched model is written back equal, after normalising the presence of proto defaults."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases

from qgraph.onnx_io import from_onnx, to_proto
from tests.models import data, zoo
from tests.protos import equal, normalised

EXCEPTIONS: dict[str, str] = {}
"""Model -> why it is not written back equal."""


def node_cases() -> Iterator[tuple[str, onnx.ModelProto]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        cases = collect_testcases(None)
    yield from ((case.name, case.model) for case in cases)


def data_files() -> Iterator[tuple[str, Path]]:
    root = Path(onnx.__file__).parent / "backend" / "test" / "data"
    yield from ((str(path.relative_to(root)), path) for path in sorted(root.rglob("*.onnx")))


def written_back_equal(models) -> tuple[int, list[str]]:
    """(how many models, names of those that differ)."""
    different, count = [], 0
    for name, model in models:
        count += 1
        source = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
        if not equal(to_proto(from_onnx(model)), source):
            different.append(name)
    return count, different


def check(models, expected: int, what: str):
    count, different = written_back_equal(models)
    print(  # noqa: T201
        f"\n{count - len(different)} of {count} {what} written back equal; exceptions: {EXCEPTIONS or 'none'}"
    )
    assert count == expected
    assert set(different) == {name for name in EXCEPTIONS if name in dict(models)}


def test_every_node_case_of_onnx_is_written_back_equal():
    check(list(node_cases()), 1884, "node cases")


def test_every_model_file_of_the_onnx_package_is_written_back_equal():
    check(list(data_files()), 149, "model files")


def original_pprec() -> Path:
    return data.package_folder("rapidocr_onnxruntime") / "models" / "ch_PP-OCRv4_rec_infer.onnx"


@pytest.mark.parametrize("name", ["minilm", "pprec", "effnet", "pprec as shipped"])
def test_a_real_model_is_written_back_equal(name):
    path = original_pprec() if name == "pprec as shipped" else getattr(zoo, name)().float_onnx
    check([(name, path)], 1, f"real models ({name})")


def test_a_copy_of_a_graph_is_written_back_equal():
    name, path = next(item for item in data_files() if "test_densenet121" in item[0] or "light_resnet50" in item[0])
    gm = copy.deepcopy(from_onnx(path))
    assert normalised(to_proto(gm)) == normalised(onnx.load(path)), name


def test_a_changed_dimension_or_weight_is_not_equal():
    """The comparison itself can fail."""
    path = zoo_free_model()
    changed = onnx.ModelProto.FromString(path.SerializeToString())
    changed.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_value")
    assert normalised(changed) != normalised(path)
    changed = onnx.ModelProto.FromString(path.SerializeToString())
    changed.graph.node[0].attribute[0].i += 1
    assert normalised(changed) != normalised(path)


def zoo_free_model() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]> g (float[0,3] x) => (float[3,0] y) { y = Softmax <axis = 0> (z) z = Transpose (x) }"""
    )
