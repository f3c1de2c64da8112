"""INT8 on ONNX Runtime, side by side: qgraph's recipes and onnxruntime.quantization on the same models, data and machine.

    python -m tests.bench.int8 [--models minilm effnet pprec] [--recipe NAME ...] [--json FILE] [--markdown]

Each quantization runs in a process of its own, which gives its time and the memory that it adds to the loaded model and data. The files
are then scored, and timed in turn with the float one in this process. A recipe is a name, or a YAML mapping such as
'{recipe: w8a8, observer: percentile}'; without --recipe it is the model's own. NNCF takes part where it is installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

import qgraph
from examples.demo import machine
from qgraph.recipe import Recipe, from_dict, named
from tests.models import measure, zoo

MODELS = {"minilm": zoo.minilm, "effnet": zoo.effnet, "pprec": zoo.pprec}
OWN = "own"
COLUMNS = ("model", "tool, recipe", "size MB", "SQNR dB", "task metrics", "latency / float", "seconds", "memory MB")


def ort_dynamic(real: zoo.RealModel, output: str) -> None:
    """Per channel; tools recommend their preprocessing first, and warn without it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_preprocessed(real, output), output, weight_type=QuantType.QInt8, per_channel=True)


def ort_static(operators: list[str] | None) -> Callable[[zoo.RealModel, str], None]:
    """QDQ per channel, ranges by min/max. `operators` None: all that the tool knows."""

    def run(real: zoo.RealModel, output: str) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(
            _preprocessed(real, output),
            output,
            _Reader(real.calibration_batches()),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            op_types_to_quantize=operators,
            **types,
        )

    return run


def _preprocessed(real: zoo.RealModel, output: str) -> str:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = f"{output}.pre"
    quant_pre_process(str(real.float_onnx), path, skip_symbolic_shape=True)  # it fails on symbolic dimensions
    return path


class _Reader:
    """Calibration feeds as onnxruntime.quantization reads them."""

    def __init__(self, feeds: Iterable[zoo.Arrays]):
        self.feeds = iter(feeds)

    def get_next(self) -> zoo.Arrays | None:
        return next(self.feeds, None)


def nncf_static(real: zoo.RealModel, output: str) -> None:
    import nncf  # not a dependency
    import onnx

    model_type = {"model_type": nncf.ModelType.TRANSFORMER} if real.name == "minilm" else {}
    onnx.save(nncf.quantize(onnx.load(real.float_onnx), nncf.Dataset(list(real.calibration_batches())), **model_type), output)


PEERS: dict[str, dict[str, Callable[[zoo.RealModel, str], None]]] = {
    "minilm": {"onnxruntime dynamic": ort_dynamic},
    "effnet": {"onnxruntime static": ort_static(None)},
    "pprec": {"onnxruntime static, Conv": ort_static(["Conv"]), "onnxruntime static": ort_static(None)},
}


def tools(model: str) -> dict[str, Callable[[zoo.RealModel, str], None]]:
    return PEERS[model] | ({"nncf static": nncf_static} if find_spec("nncf") else {})


def ours(recipe: str) -> Callable[[zoo.RealModel, str], None]:
    def run(real: zoo.RealModel, output: str) -> None:
        batches, shapes = list(real.calibration_batches()), real.dynamic_shapes
        wanted = _recipe(recipe, real)
        qgraph.quantize(real.model, batches, example_inputs=real.example_inputs, recipe=wanted, dynamic_shapes=shapes, output=output)

    return run


def _recipe(text: str, real: zoo.RealModel) -> qgraph.Recipe:
    if text == OWN:
        return real.recipe
    if not text.startswith("{"):
        return qgraph.load_recipe(text)
    fields = {"name": text, **yaml.safe_load(text)}
    base = named(fields.pop("recipe")) if "recipe" in fields else None
    return from_dict(fields, base=base)


def _title(recipe: Recipe) -> str:
    return recipe.name if recipe.observer == "minmax" else f"{recipe.name}, {recipe.observer}"


@dataclass(frozen=True)
class Row:
    """One quantized model. `metrics` maps a name to (value of the float model, value); `memory_mb` is what quantizing added to the
    process that held the model and the data."""

    model: str
    tool: str
    mb: float
    float_mb: float
    sqnr_db: float
    metrics: dict[str, tuple[float, float]]
    latency: dict[str, float]
    seconds: float
    memory_mb: float

    def cells(self) -> tuple[str, ...]:
        metrics = ", ".join(f"{name} {value:.3f}" for name, (_, value) in self.metrics.items())
        latency = ", ".join(f"{ratio:.2f} ({label})" for label, ratio in self.latency.items())
        sizes = f"{self.float_mb:.1f} → {self.mb:.1f}"
        return self.model, self.tool, sizes, f"{self.sqnr_db:.1f}", metrics, latency, f"{self.seconds:.1f}", f"{self.memory_mb:.0f}"


def rows(real: zoo.RealModel, recipes: list[str], folder: Path, runs: int) -> list[Row]:
    """A tool that fails is reported on stderr and left out."""
    found: dict[str, tuple[Path, dict[str, float]]] = {}
    for i, (tool, recipe) in enumerate([*((t, "") for t in tools(real.name)), *(("qgraph", r) for r in recipes)]):
        path = folder / f"{real.name}.{i}.onnx"
        title = tool if tool != "qgraph" else f"qgraph {_title(_recipe(recipe, real))}"
        child = [sys.executable, "-m", "tests.bench.int8", "--worker", real.name, tool, recipe, str(path)]
        result = subprocess.run(child, check=False, capture_output=True, text=True)
        if result.returncode:
            print(f"{real.title}: {title} failed: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        else:
            found[title] = path, json.loads(result.stdout.splitlines()[-1])
    paths = [path for path, _ in found.values()]
    timed = {label: measure.latency_ratios(real.float_onnx, paths, shape, runs=runs) for label, shape in real.latency_shapes.items()}
    sizes = [measure.file_bytes(p) / 1e6 for p in (real.float_onnx, *paths)]
    return [
        Row(
            *(real.title, title, sizes[i + 1], sizes[0], sqnr, {m.name: (m.float_value, m.value) for m in metrics}),
            latency={label: ratios[i] for label, ratios in timed.items()},
            **cost,
        )
        for i, (title, (path, cost)) in enumerate(found.items())
        for sqnr, metrics in [real.scores(path)]
    ]


def worker(model: str, tool: str, recipe: str, output: str) -> dict[str, float]:
    """Quantizes; runs in a child. Seconds, and the peak of the resident memory above what it was before."""
    _quiet()
    real = MODELS[model]()
    run = ours(recipe) if tool == "qgraph" else tools(model)[tool]
    process = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading the model
    before, start = process.memory_info().rss, perf_counter()
    run(real, output)
    return {"seconds": perf_counter() - start, "memory_mb": (_peak() - before) / 1e6}


def _peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def show(found: list[Row], markdown: bool) -> None:
    if markdown:
        print(f"`python -m tests.bench.int8 {' '.join(sys.argv[1:])}` on {machine()}:\n")
        lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in found)]
        print(*(f"| {' | '.join(cells)} |" for cells in lines), sep="\n")
        return
    console = Console()
    console.width = console.width if console.is_terminal else 180
    table = Table(*COLUMNS, caption=machine())
    for row in found:
        table.add_row(*row.cells())
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipe", action="append", help="may be repeated; default: the model's own")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(*args.worker)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = [row for m in args.models for row in rows(MODELS[m](), args.recipe or [OWN], Path(folder), args.runs)]
    show(found, args.markdown)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in found]}, indent=1))


if __name__ == "__main__":
    main()
