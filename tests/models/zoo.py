"""Three real models with their calibration and evaluation data, built out of installed packages.

`minilm()` and `effnet()` are torch modules, `pprec()` is an ONNX file. Each comes with its float ONNX file to compare with. What takes
time to build is kept in $QGRAPH_CACHE (default ~/.cache/qgraph-tests), in a folder named after the versions it was built with."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import onnx
import torch

from qgraph.recipe import Recipe, load_recipe
from tests.models import data, efficientnet, measure

MINILM_TOKENS = 64

BUILT_WITH = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "tokenizers",
    "pillow",
    "scikit-image",
    "scikit-learn",
    "matplotlib",
)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Metric:
    """The task metric: its name, and its value for the float and for the quantized model."""

    name: str
    float_value: float
    value: float


@dataclass(frozen=True)
class RealModel:
    """`model` is what a user has: a torch module with `example_inputs` and `dynamic_shapes` for torch.export, or an ONNX file.

    `recipe` is what the main job quantizes it with; `calibration` and `evaluation` are arrays by input name, first axis = samples;
    `latency_shapes` are the input shapes to time; `metric(evaluation, float output, quantized output)` is the task metric,
    `strict_metric` one that forgives less."""

    name: str
    title: str
    recipe: Recipe
    model: torch.nn.Module | Path
    float_onnx: Path
    calibration: Arrays
    evaluation: Arrays
    metric: Callable[[Arrays, np.ndarray, np.ndarray], Metric]
    signal: Callable[[Arrays, np.ndarray], np.ndarray]
    evaluation_batch: int
    latency_shapes: dict[str, tuple[int, ...]]
    example_inputs: tuple[torch.Tensor, ...] | None = None
    dynamic_shapes: Any = None
    strict_metric: Callable[[Arrays, np.ndarray, np.ndarray], Metric] | None = None

    def calibration_batches(self, size: int = 1) -> list[Arrays]:
        """Feeds by input name; one sample each by default, as peers are measured."""
        return list(measure.batches(self.calibration, size))

    def float_output(self) -> np.ndarray:
        """The float ONNX file's output over the evaluation set, computed once and kept."""

        def run() -> Arrays:
            return {"output": measure.outputs(measure.session(self.float_onnx), self.evaluation, batch=self.evaluation_batch)}

        return _arrays(f"{self.name}.float", run)["output"]

    def score(self, quantized: Path | str) -> tuple[float, Metric]:
        """(SQNR in dB, task metric) of a quantized ONNX file over the evaluation set."""
        sqnr, (metric, *_) = self.scores(quantized)
        return sqnr, metric

    def scores(self, quantized: Path | str) -> tuple[float, tuple[Metric, ...]]:
        """(SQNR in dB, all task metrics)."""
        reference = self.float_output()
        output = measure.outputs(measure.session(quantized), self.evaluation, batch=self.evaluation_batch)
        sqnr = measure.sqnr_db(self.signal(self.evaluation, reference), self.signal(self.evaluation, output))
        return sqnr, tuple(m(self.evaluation, reference, output) for m in (self.metric, self.strict_metric) if m is not None)


@cache
def minilm() -> RealModel:
    """all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide): token ids -> hidden states; English sentences of up to 64 tokens."""
    splits = {
        split: _arrays(f"minilm.{split}", lambda part=part: _encode(data.sentences()[part]))
        for split, part in {"calibration": slice(0, 48), "evaluation": slice(48, 304)}.items()
    }
    encoder = _minilm_encoder()
    example = tuple(torch.from_numpy(np.array(array[:2])) for array in splits["calibration"].values())
    dims = {0: torch.export.Dim("batch", min=1, max=512), 1: torch.export.Dim("seq", min=2, max=512)}
    shapes = {"input_ids": dims, "attention_mask": dims}
    names = {"input_names": list(shapes), "dynamic_shapes": shapes}
    return RealModel(
        name="minilm",
        title="MiniLM-L6 (PyTorch)",
        recipe=load_recipe("w8a8-encoder"),
        model=encoder,
        float_onnx=_file("minilm.onnx", lambda path: _export(encoder, example, path, output_names=["last_hidden_state"], **names)),
        metric=lambda feeds, a, b: Metric("cosine", 1.0, measure.sentence_cosine(a, b, feeds["attention_mask"].astype(bool))),
        strict_metric=lambda feeds, a, b: Metric(
            "nearest agreement", 1.0, measure.nearest_agreement(a, b, feeds["attention_mask"].astype(bool))
        ),
        signal=lambda feeds, output: output[feeds["attention_mask"].astype(bool)],
        evaluation_batch=16,
        latency_shapes={"b1s128": (1, 128), "b8s128": (8, 128)},
        example_inputs=example,
        dynamic_shapes=shapes,
        **splits,
    )


@cache
def effnet() -> RealModel:
    """EfficientNet-Lite0: photographs [n, 3, 224, 224] -> 1000 ImageNet logits."""
    net = efficientnet.load()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=512)}}
    example = (torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)

    def export(path: Path) -> None:
        _export(net, example, path, input_names=["x"], output_names=["logits"], dynamic_shapes=shapes)
        _fold_pads(path)

    return RealModel(
        name="effnet",
        title="EfficientNet-Lite0 (PyTorch)",
        recipe=load_recipe("w8a8+round"),
        model=net,
        float_onnx=_file("effnet.onnx", export),
        calibration=_arrays("effnet.calibration", lambda: {"x": data.photo_crops(data.CALIBRATION_PHOTOS, 48, seed=1)}),
        evaluation=_arrays("effnet.evaluation", lambda: {"x": data.photo_crops(data.EVALUATION_PHOTOS, 250, seed=2)}),
        metric=lambda feeds, a, b: Metric("top-1 agreement", 1.0, measure.top1_agreement(a, b)),
        signal=lambda feeds, output: output,
        evaluation_batch=10,
        latency_shapes={"b1": (1, 3, 224, 224)},
        example_inputs=example,
        dynamic_shapes=shapes,
    )


@cache
def pprec() -> RealModel:
    """PP-OCRv4 text recognition: text lines [n, 3, 48, w] -> character probabilities.

    Converted from opset 12 to 17: Q/DQ with one scale per channel needs 13."""
    path = _file("pprec.onnx", _convert_pprec)
    texts: list[str] = data.text_lines(300, seed=4)[1]
    properties = measure.session(path).get_modelmeta().custom_metadata_map
    alphabet = ["", *properties["character"].splitlines(), " "]

    def accuracy(feeds: Arrays, reference: np.ndarray, output: np.ndarray) -> Metric:
        values = (measure.character_accuracy(p, texts, alphabet) for p in (reference, output))
        return Metric("character accuracy", *values)

    def lines(feeds: Arrays, reference: np.ndarray, output: np.ndarray) -> Metric:
        values = (measure.line_accuracy(p, texts, alphabet) for p in (reference, output))
        return Metric("line accuracy", *values)

    return RealModel(
        name="pprec",
        title="PP-OCRv4 rec (ONNX)",
        recipe=load_recipe("w8a8+round", ["observer=percentile"]),
        model=path,
        float_onnx=path,
        calibration=_arrays("pprec.calibration", lambda: {"x": data.text_lines(48, seed=3)[0]}),
        evaluation=_arrays("pprec.evaluation", lambda: {"x": data.text_lines(300, seed=4)[0]}),
        metric=accuracy,
        strict_metric=lines,
        signal=lambda feeds, output: output,
        evaluation_batch=10,
        latency_shapes={"b1": (1, 3, 48, 320)},
    )


class Encoder(torch.nn.Module):
    """BERT's last hidden state alone."""

    def __init__(self, bert: torch.nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _minilm_encoder() -> Encoder:
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ZipFile(data.package_folder("all_minilm_l6_v2") / "model.zip").extractall(folder)
        return Encoder(BertModel.from_pretrained(folder, attn_implementation="eager")).eval()


def _encode(texts: list[str]) -> Arrays:
    from tokenizers import Tokenizer

    with ZipFile(data.package_folder("all_minilm_l6_v2") / "model.zip") as archive:
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
    tokenizer.enable_truncation(MINILM_TOKENS)
    tokenizer.enable_padding(length=MINILM_TOKENS)
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
    }


def _export(module: torch.nn.Module, args: tuple[torch.Tensor, ...], path: Path, **names: Any) -> None:
    with torch.no_grad():
        torch.onnx.export(
            module, args, str(path), dynamo=True, opset_version=18, external_data=False, optimize=True, verbose=False, **names
        )


def _fold_pads(path: Path) -> None:
    """Conv(Pad(x, zeros)) -> Conv(x, pads): torch has no begin/end padding, a user's exporter would write it this way."""
    model = onnx.load(path)
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    pads = {n.output[0]: n for n in model.graph.node if n.op_type == "Pad"}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[0] not in pads:
            continue
        pad = pads[node.input[0]]
        added = constants[pad.input[1]].tolist()
        own = next((list(a.ints) for a in node.attribute if a.name == "pads"), [0, 0, 0, 0])
        kept = [a for a in node.attribute if a.name not in ("pads", "auto_pad")]
        del node.attribute[:]
        merged = [a + b for a, b in zip(own, added[2:4] + added[6:8], strict=True)]
        node.attribute.extend([*kept, onnx.helper.make_attribute("pads", merged)])
        node.input[0] = pad.input[0]
    for pad in pads.values():
        model.graph.node.remove(pad)
    used = {name for node in model.graph.node for name in node.input}
    for initializer in [i for i in model.graph.initializer if i.name not in used]:
        model.graph.initializer.remove(initializer)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _convert_pprec(path: Path) -> None:
    original = onnx.load(data.package_folder("rapidocr_onnxruntime") / "models" / "ch_PP-OCRv4_rec_infer.onnx")
    model = onnx.version_converter.convert_version(original, 17)
    if not model.metadata_props:
        onnx.helper.set_model_props(model, {p.key: p.value for p in original.metadata_props})
    onnx.save(model, path)


@cache
def _folder() -> Path:
    """The cache folder of these package versions and of this protocol."""
    sources = b"".join(Path(m.__file__ or "").read_bytes() for m in (data, efficientnet)) + Path(__file__).read_bytes()
    versions = " ".join(f"{name}={version(name)}" for name in BUILT_WITH)
    key = hashlib.sha256(versions.encode() + sources).hexdigest()[:12]
    root = Path(os.environ.get("QGRAPH_CACHE") or Path.home() / ".cache" / "qgraph-tests")
    (root / key).mkdir(parents=True, exist_ok=True)
    return root / key


def _file(name: str, build: Callable[[Path], None]) -> Path:
    """A cached file; written under a temporary name first, so that a broken build leaves nothing behind that looks finished."""
    path = _folder() / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            build(Path(folder) / name)
            os.replace(Path(folder) / name, path)
    return path


def _arrays(name: str, build: Callable[[], Arrays]) -> Arrays:
    """Cached arrays, memory-mapped: one .npy file each and a list of their names."""
    listing = _folder() / f"{name}.txt"
    if not listing.exists():
        made = build()
        for key, array in made.items():
            _file(f"{name}.{key}.npy", lambda path, array=array: np.save(path, array))
        _file(listing.name, lambda path: path.write_text("\n".join(made)) and None)
    return {key: np.load(_folder() / f"{name}.{key}.npy", mmap_mode="r") for key in listing.read_text().splitlines()}
