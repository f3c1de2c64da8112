"""Calibration: both runners against numbers computed directly, feeds and files, errors, memory."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import from_array
from torch.fx import GraphModule

import qgraph
from qgraph.calibrate import Calibration, calibrate, load_batches, runner_for
from qgraph.errors import CalibrationError
from qgraph.ledger import State
from qgraph.observe import Observer, observer
from qgraph.onnx_io import from_onnx
from qgraph.runners import OrtRunner, TorchRunner
from qgraph.types import PerAxis, QSpec, type_of

ROOT = Path(__file__).parents[1]
UINT8 = QSpec("uint8", symmetric=False)
RUNNERS = [TorchRunner, OrtRunner]
RNG = np.random.default_rng(11)
WEIGHTS = {
    "k": RNG.normal(0.1, 0.4, (6, 3, 3, 3)),
    "kb": RNG.normal(0.5, 0.2, 6),
    "w": RNG.normal(-0.1, 0.3, (6, 5)),
    "b": RNG.normal(0.3, 0.1, 5),
}
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net ({type}[N, 3, H, W] x, {type}[M, 6] extra) => ({type}[N, M, 5] y) {{
  [conv] c = Conv <pads = [1, 1, 1, 1]> (x, k, kb)
  [relu] r = Relu (c)
  [pool] p = GlobalAveragePool (r)
  [flat] f = Flatten (p)
  axis = Constant <value_ints = [1]> ()
  [rows] q = Unsqueeze (f, axis)
  [sum] s = Add (q, extra)
  [product] m = MatMul (s, w)
  [bias] y = Add (m, b)
}}
"""


def proto(type_: str = "float") -> onnx.ModelProto:
    """A convolution, a broadcast sum and a matmul, all with biases; shapes symbolic."""
    model = onnx.parser.parse_model(TEXT.format(type=type_))
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64, "bfloat16": onnx.helper.tensor_dtype_to_np_dtype(16)}[type_]
    model.graph.initializer.extend(from_array(v.astype(dtype), k) for k, v in WEIGHTS.items())
    return onnx.shape_inference.infer_shapes(model)


def watch(gm: GraphModule, names: dict[str, Observer]) -> GraphModule:
    """Puts observers behind nodes, by ONNX node name or FX name; the same observer may be given several times."""
    targets: dict[int, str] = {}
    for name, found in names.items():
        node = next(n for n in gm.graph.nodes if name in (n.name, getattr(n.meta.get("onnx"), "name", None)))
        target = targets.setdefault(id(found), f"observer_{len(targets)}")
        gm.add_submodule(target, found)
        with gm.graph.inserting_after(node):
            watched = gm.graph.call_module(target, (node,))
        node.replace_all_uses_with(watched, delete_user_cb=lambda user, keep=watched: user is not keep)
    gm.recompile()
    return gm


def prepared(kind: str = "minmax", type_: str = "float", **options: object) -> GraphModule:
    names = ["conv", "relu", "rows", "product", "bias"]
    return watch(from_onnx(proto(type_)), {n: observer(kind, UINT8, name=n, **options) for n in names})


def batches(count: int = 3, dtype: type = np.float32, *, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Batches of different sizes and image shapes."""
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.normal(0.2, 1 + i, (2 + i, 3, 5 + i, 7)).astype(dtype), "extra": rng.normal(1, 2, (i + 1, 6)).astype(dtype)}
        for i in range(count)
    ]


def observers(gm: GraphModule) -> dict[str, Observer]:
    return {m.name: m for m in gm.modules() if isinstance(m, Observer)}


class Net(torch.nn.Module):
    """The same function in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.product = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Linear(6, 5)
        w = {k: torch.from_numpy(v.astype(np.float32)) for k, v in WEIGHTS.items()}
        self.load_state_dict({"conv.weight": w["k"], "conv.bias": w["kb"], "product.weight": w["w"].T, "product.bias": w["b"]})

    def forward(self, x: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        return self.product(torch.relu(self.conv(x)).mean((2, 3)).unsqueeze(1) + extra)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("kind", "options"), [("minmax", {}), ("moving-average", {"momentum": 0.3}), ("percentile", {"percentile": 97.0})])
def test_both_runners_and_both_dialects_see_what_the_model_computes(runner: type, kind: str, options: dict) -> None:
    gm = prepared(kind, **options)
    assert calibrate(gm, batches(), runner=runner(gm)) == Calibration(3, 9)
    reference = {n: observer(kind, UINT8, **options) for n in ("conv", "bias")}
    net = Net()
    net.conv.register_forward_hook(lambda module, args, out: reference["conv"](out))
    net.register_forward_hook(lambda module, args, out: reference["bias"](out))
    for b in batches():
        net(torch.from_numpy(b["x"]), torch.from_numpy(b["extra"]))
    for name, want in reference.items():
        torch.testing.assert_close(observers(gm)[name].range(), want.range(), rtol=1e-5, atol=1e-5)
        assert observers(gm)[name].seen == want.seen
    captured = qgraph.capture(Net(), tuple(torch.from_numpy(v) for v in batches()[1].values()), dynamic_shapes=_dynamic())
    watch(captured, {n.name: observer(kind, UINT8, name="conv", **options) for n in captured.graph.nodes if n.name.startswith("conv2d")})
    assert isinstance(runner_for(captured), TorchRunner)
    calibrate(captured, [tuple(b.values()) for b in batches()])
    torch.testing.assert_close(observers(captured)["conv"].range(), reference["conv"].range(), rtol=1e-5, atol=1e-5)


def _dynamic() -> tuple[dict[int, torch.export.Dim], ...]:
    auto = torch.export.Dim.AUTO
    return {0: auto, 2: auto, 3: auto}, {0: auto}


@pytest.mark.parametrize("kind", ["minmax", "percentile"])
@pytest.mark.parametrize(("type_", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)])
def test_other_float_types_are_observed_in_float32(kind: str, type_: str, dtype: torch.dtype) -> None:
    gm, reference = prepared(kind, type_), prepared(kind)
    data = [{k: torch.from_numpy(v).to(dtype) for k, v in b.items()} for b in batches()]
    calibrate(gm, data)
    calibrate(reference, [{k: v.float() for k, v in b.items()} for b in data])
    for name, found in observers(gm).items():
        low, high = found.range()
        assert (low.dtype, found.dtype) == (torch.float32, dtype)
        want_low, want_high = observers(reference)[name].range()
        tolerance = 0.03 * float(want_high - want_low)
        assert abs(low - want_low) < tolerance and abs(high - want_high) < tolerance


def test_graphs_from_onnx_run_in_onnx_runtime_and_bfloat16_in_torch() -> None:
    assert isinstance(runner_for(prepared()), OrtRunner)
    assert isinstance(runner_for(prepared("percentile", "float16")), OrtRunner)
    assert isinstance(runner_for(prepared("minmax", "bfloat16")), TorchRunner)


@pytest.mark.parametrize("runner", RUNNERS)
def test_one_observer_may_watch_several_values_and_one_value_several_observers(runner: type) -> None:
    gm = from_onnx(proto())
    shared = observer("minmax", UINT8, name="shared")
    watch(gm, {"conv": shared, "bias": shared, "x": observer("minmax", UINT8, name="x")})
    single = prepared()
    calibrate(gm, batches(), runner=runner(gm))
    calibrate(single, batches())
    both = [observers(single)[n].range() for n in ("conv", "bias")]
    want = min(r[0] for r in both), max(r[1] for r in both)
    torch.testing.assert_close(shared.range(), want, rtol=1e-5, atol=1e-5)
    assert observers(gm)["x"].range()[1] == max(b["x"].max() for b in batches())


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_same_value_can_be_watched_per_tensor_and_per_axis(runner: type) -> None:
    gm = from_onnx(proto())
    node = next(n for n in gm.graph.nodes if getattr(n.meta.get("onnx"), "name", None) == "conv")
    found = [observer("minmax", UINT8, name="tensor"), observer("minmax", QSpec("int8", granularity=PerAxis(1)), name="channels")]
    for i, module in enumerate(found):
        gm.add_submodule(f"observer_{i}", module)
        with gm.graph.inserting_after(node):
            gm.graph.call_module(f"observer_{i}", (node,))
    gm.recompile()
    calibrate(gm, batches(), runner=runner(gm))
    assert found[1].range()[0].shape == (6,)
    assert found[1].range()[0].min() == found[0].range()[0] and found[1].range()[1].max() == found[0].range()[1]


@pytest.mark.parametrize("runner", RUNNERS)
def test_infinities_inside_the_model_are_ignored_and_nan_is_named(runner: type) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4] x, float[4] d) => (float[N, 4] y) { [quotient] q = Div (x, d)  [scaled] y = Mul (q, d) }
    """
    gm = watch(from_onnx(onnx.parser.parse_model(text)), {"quotient": observer("minmax", UINT8, name="quotient")})
    run = runner(gm)
    one = np.ones((2, 4), np.float32)
    calibrate(
        gm, [(one, np.array([2, 4, -5, 1], np.float32)), (3 * one, np.array([2, 0, 6, 1], np.float32)), (one, one[0] / 8)], runner=run
    )
    found = observers(gm)["quotient"]
    torch.testing.assert_close(found.range(), (torch.tensor(-0.2), torch.tensor(8.0)))
    assert (found.seen, found.infinite) == (22, 2)
    with pytest.raises(CalibrationError, match=r"^calibration batch 1: the value 'quotient' contains NaN \(2 of 8 elements\)"):
        calibrate(gm, [(one, one[0]), (0 * one, np.array([2, 4, 0, 1], np.float32))], runner=run)


@pytest.mark.parametrize("runner", RUNNERS)
def test_constants_of_masks_never_widen_a_range(runner: type) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4] x, float[N, 4] mask) => (float[N, 4] y) { [masked] q = Add (x, mask)  y = Softmax (q) }
    """
    gm = watch(from_onnx(onnx.parser.parse_model(text)), {"masked": observer("minmax", UINT8, name="masked")})
    one, least = np.ones((1, 4), np.float32), np.finfo(np.float32).min
    masks = [0 * one, np.array([[0, 1, least, 0]], np.float32), np.array([[least / 2, 0, -np.inf, -3]], np.float32), least * one]
    calibrate(gm, [(one, mask) for mask in masks], runner=runner(gm))
    found = observers(gm)["masked"]
    assert found.range() == (torch.tensor(-2.0), torch.tensor(2.0))
    assert (found.seen, found.infinite) == (9, 7)


@pytest.mark.parametrize("runner", RUNNERS)
def test_empty_tensors_in_a_batch_are_fine(runner: type) -> None:
    gm = prepared()
    first, second = batches(2)
    calibrate(gm, [first, second | {"extra": np.zeros((0, 6), np.float32)}], runner=runner(gm))
    assert observers(gm)["bias"].seen == first["x"].shape[0] * 5


def test_observers_inside_control_flow_are_fed_by_the_torch_runner() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N] x, bool[] c) => (float[N] y) {
      y = If (c) <then_branch = t () => (float[N] a) { a = Mul (x, x) }, else_branch = e () => (float[N] z) { z = Neg (x) }>
    }
    """
    gm = from_onnx(onnx.parser.parse_model(text))
    body = next(
        m for m in gm.modules() if isinstance(m, GraphModule) and any(getattr(n.target, "op_type", "") == "Mul" for n in m.graph.nodes)
    )
    multiply = next(n for n in body.graph.nodes if getattr(n.target, "op_type", "") == "Mul")
    watch(body, {multiply.name: observer("minmax", UINT8, name="inner")})
    assert isinstance(runner_for(gm), TorchRunner)
    calibrate(gm, [{"x": np.array([1, -3], np.float32), "c": np.array(True)}, {"x": np.array([9], np.float32), "c": np.array(False)}])
    assert observers(gm)["inner"].range() == (torch.tensor(1.0), torch.tensor(9.0))
    assert observers(gm)["inner"].seen == 2


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_form_of_feed_means_the_same(runner: type) -> None:
    ranges = []
    for convert in (
        lambda b: b,
        lambda b: tuple(b.values()),
        lambda b: [torch.from_numpy(v) for v in b.values()],
        lambda b: {k: torch.from_numpy(v).double() for k, v in reversed(b.items())},
        lambda b: {k: np.asfortranarray(v).astype(">f4") for k, v in b.items()},
    ):
        gm = prepared()
        calibrate(gm, (convert(b) for b in batches()), runner=runner(gm))
        ranges.append([o.range() for o in observers(gm).values()])
    assert all(r == ranges[0] for r in ranges)


def test_a_single_input_is_fed_by_itself() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> net (int64[N] ids) => (float[N] y) { f = Cast <to = 1> (ids) [neg] y = Neg (f) }'
    gm = watch(from_onnx(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))), {"neg": observer("minmax", UINT8, name="neg")})
    calibrate(gm, [torch.tensor([3, 4]), np.array([7], np.int32), [np.array([1])]])
    assert observers(gm)["neg"].range() == (torch.tensor(-7.0), torch.tensor(-1.0))


def test_calibrating_twice_continues() -> None:
    once, twice = prepared("percentile"), prepared("percentile")
    calibrate(once, batches())
    calibrate(twice, batches()[:1])
    calibrate(twice, iter(batches()[1:]))
    assert [o.range() for o in observers(once).values()] == [o.range() for o in observers(twice).values()]


def test_the_state_says_that_the_graph_is_calibrated() -> None:
    gm = prepared()
    assert isinstance(gm.meta["qgraph"], State)
    calibrate(gm, batches(1))
    assert gm.meta["qgraph"].stage == "calibrated"


def test_without_observers_no_data_is_read() -> None:
    def explode() -> Iterator[None]:
        raise AssertionError("data was read")
        yield

    gm = from_onnx(proto())
    assert calibrate(gm, explode()) == Calibration(0, 0)
    assert gm.meta["qgraph"].stage == "calibrated"


def test_an_interruption_leaves_usable_statistics() -> None:
    def interrupted() -> Iterator[dict[str, np.ndarray]]:
        yield batches(2)[0]
        raise KeyboardInterrupt

    gm, want = prepared(), prepared()
    with pytest.raises(KeyboardInterrupt):
        calibrate(gm, interrupted())
    calibrate(want, batches(1))
    assert [o.range() for o in observers(gm).values()] == [o.range() for o in observers(want).values()]


def test_progress_is_shown_when_asked_for_only(capfd: pytest.CaptureFixture[str]) -> None:
    calibrate(prepared(), batches())
    assert capfd.readouterr() == ("", "")
    calibrate(prepared(), batches(), progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "calibrating" in err and "3/3" in err


GOOD = batches(1)[0]
BAD = {
    "batches are empty": [],
    "batches is one Tensor": torch.ones(2, 3, 5, 5),
    "batches is one dict": GOOD,
    "batch 1 has an array 'extras', but the model has no such input; did you mean 'extra'": [
        GOOD,
        {"x": GOOD["x"], "extras": GOOD["extra"]},
    ],
    "batch 0 lacks the model's input 'extra'; it has: x": [{"x": GOOD["x"]}],
    "batch 0 has 1 values, but the model has 2 inputs: x, extra": [GOOD["x"]],
    "batch 0: input 'x' has type int64, the model takes float32; convert": [GOOD | {"x": np.ones((1, 3, 5, 5), np.int64)}],
    "'x' has type float64, the model takes float32, and the values do not survive": [GOOD | {"x": np.full((1, 3, 5, 5), 0.1)}],
    "'x' has type <U1": [GOOD | {"x": np.array("a")}],
    r"'x' has shape \[3, 5, 5\], the model takes f32\[N,3,H,W\]; add the batch axis": [GOOD | {"x": GOOD["x"][0, :, :, :5]}],
    r"'x' has shape \[1, 4, 5, 5\], the model takes f32\[N,3,H,W\]": [GOOD | {"x": np.ones((1, 4, 5, 5), np.float32)}],
    r"batch 2: input 'extra' contains NaN \(1 of 6 elements\)": [
        GOOD,
        GOOD,
        GOOD | {"extra": np.array([[1, 2, 3, 4, 5, np.nan]], np.float32)},
    ],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_batches_are_one_line_errors(message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        calibrate(prepared(), BAD[message])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_batch_on_which_the_model_fails_is_named(runner: type) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, K] x, float[L, 3] w) => (float[N, 3] y) { [times] y = MatMul (x, w) }
    """
    gm = watch(from_onnx(onnx.parser.parse_model(text)), {"times": observer("minmax", UINT8, name="times")})
    good = (np.ones((2, 4), np.float32), np.ones((4, 3), np.float32))
    with pytest.raises(CalibrationError, match=r"^calibration batch 1: .*does not run.*") as error:
        calibrate(gm, [good, (good[0], np.ones((5, 3), np.float32))], runner=runner(gm))
    assert "\n" not in str(error.value) and "times" in str(error.value)
    assert observers(gm)["times"].seen == 6


def test_weights_outside_the_file_and_beyond_protobuf_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(proto(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    want = prepared()
    calibrate(want, batches())
    for limit in (2**30, 0):
        monkeypatch.setattr("qgraph.taps._IN_MEMORY", limit)
        gm = from_onnx(tmp_path / "m.onnx") if limit else from_onnx(proto())
        watch(gm, {n: observer("minmax", UINT8, name=n) for n in observers(want)})
        calibrate(gm, batches(), runner=OrtRunner(gm))
        assert [o.range() for o in observers(gm).values()] == [o.range() for o in observers(want).values()]


def test_the_prepared_graph_itself_is_not_changed_by_the_session() -> None:
    gm = prepared()
    before = [(n.op, str(n.target), n.args) for n in gm.graph.nodes]
    calibrate(gm, batches())
    assert [(n.op, str(n.target), n.args) for n in gm.graph.nodes] == before
    assert type_of(next(n for n in gm.graph.nodes if n.name == "x")).rank == 4


# .npz files

SAMPLES = np.arange(7 * 3 * 2, dtype=np.float32).reshape(7, 3, 2)
MASK = np.arange(7) % 2 == 0


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("fortran", [False, True])
def test_a_npz_file_is_streamed_in_batches_and_can_be_read_again(tmp_path: Path, save, fortran: bool) -> None:
    x = np.asfortranarray(SAMPLES) if fortran else SAMPLES
    save(tmp_path / "d.npz", x=x, mask=MASK, _labels=np.array(["a", "b"], object))
    found = load_batches(tmp_path / "d.npz", 3, ["x", "mask"])
    assert len(found) == 3
    for _ in range(2):
        got = list(found)
        assert [len(b["x"]) for b in got] == [3, 3, 1] and set(got[0]) == {"x", "mask"}
        assert np.array_equal(np.concatenate([b["x"] for b in got]), SAMPLES)
        assert np.array_equal(np.concatenate([b["mask"] for b in got]), MASK)


def test_a_folder_holds_one_feed_per_file_in_order(tmp_path: Path) -> None:
    for i in (10, 2, 1):
        np.savez(tmp_path / f"{i:03}.npz", x=SAMPLES[: i % 4 + 1] + i, _note=np.array("n"))
    (tmp_path / "readme.txt").write_text("not data")
    found = load_batches(tmp_path, 8, ["x"])
    assert len(found) == 3
    assert [(len(b["x"]), b["x"].flat[0]) for b in found] == [(2, 1), (3, 2), (3, 10)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": SAMPLES}, "no array for the model's input 'mask'; known: x"),
        ({"x": SAMPLES, "masc": MASK}, "array 'masc' is no input of the model; did you mean 'mask'"),
        ({"x": SAMPLES, "mask": MASK[:4]}, "different numbers of samples: x 7, mask 4"),
        ({"x": SAMPLES, "mask": np.array([{}], object)}, "array 'mask' holds pickled Python objects"),
        ({"x": SAMPLES, "mask": np.array(1)}, "array 'mask' is a single number"),
    ],
)
def test_wrong_arrays_in_a_file_are_named(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(CalibrationError, match=message):
        load_batches(tmp_path / "d.npz", 2, ["x", "mask"])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    text, damaged, empty = tmp_path / "text.npz", tmp_path / "damaged.npz", tmp_path / "empty"
    text.write_text("hello")
    empty.mkdir()
    np.savez(damaged, x=np.random.default_rng(0).normal(size=(64, 64)))
    content = bytearray(damaged.read_bytes())
    content[9000] ^= 0xFF
    damaged.write_bytes(content)
    np.save(tmp_path / "array.npy", SAMPLES)
    for path, message in [
        (tmp_path / "nothing.npz", "no such calibration file or folder"),
        (text, "not a readable .npz file.*numpy.savez"),
        (tmp_path / "array.npy", "not a readable .npz file"),
        (empty, "the folder holds no .npz file"),
    ]:
        with pytest.raises(CalibrationError, match=message) as error:
            load_batches(path, 2, ["x"])
        assert str(path) in str(error.value)
    with pytest.raises(CalibrationError, match="damaged"):
        list(load_batches(damaged, 2, ["x"]))
    with pytest.raises(CalibrationError, match="batch size must be at least 1"):
        load_batches(damaged, 0, ["x"])


PEAK = """
import sys, numpy as np
from tests.test_calibrate import prepared, calibrate, OrtRunner, TorchRunner

gm = prepared(sys.argv[1])
runner, rng = globals()[sys.argv[2]](gm), np.random.default_rng(0)
for count in (10, 190):
    sizes = ((4 + i % 3, 3, 64 + 32 * (i % 4), 128) for i in range(count))
    feeds = ({"x": rng.random(size, np.float32), "extra": rng.random((2, 6), np.float32)} for size in sizes)
    assert calibrate(gm, feeds, runner=runner).batches == count
    print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's VmHWM")
@pytest.mark.parametrize("kind", ["minmax", "percentile"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_peak_memory_does_not_grow_with_the_number_of_batches(runner: type, kind: str) -> None:
    command = [sys.executable, "-c", PEAK, kind, runner.__name__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    few, many = map(int, done.stdout.split())
    assert many <= 1.05 * few, f"{few} kB after 10 batches, {many} kB after 200"
