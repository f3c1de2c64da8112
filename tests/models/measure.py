"""Scores and speed of a quantized ONNX file against the float one: one protocol for the tests and the demo."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime as ort

THREADS = 2


def session(path: Path | str, *, threads: int = THREADS) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def batches(data: dict[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Copies of consecutive slices of `size` samples along the first axis of every array."""
    count = len(next(iter(data.values())))
    for first in range(0, count, size):
        yield {name: np.array(array[first : first + size]) for name, array in data.items()}


def outputs(run: ort.InferenceSession, data: dict[str, np.ndarray], *, batch: int) -> np.ndarray:
    """The first output over all samples, as float32."""
    return np.concatenate([np.asarray(run.run(None, feed)[0], np.float32) for feed in batches(data, batch)])


def sqnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    """10 log10(signal power / error power), in float64."""
    reference, output = reference.astype(np.float64), output.astype(np.float64)
    return float(10 * np.log10((reference**2).sum() / max(((reference - output) ** 2).sum(), 1e-30)))


def sentence_cosine(reference: np.ndarray, output: np.ndarray, mask: np.ndarray) -> float:
    """Mean cosine between mean-pooled sentence embeddings; hidden states [n, tokens, width], mask [n, tokens]."""
    return float((embeddings(reference, mask) * embeddings(output, mask)).sum(1).mean())


def nearest_agreement(reference: np.ndarray, output: np.ndarray, mask: np.ndarray) -> float:
    """Share of sentences whose nearest other sentence, by cosine of their embeddings, stays the same."""
    nearest = []
    for hidden in (reference, output):
        e = embeddings(hidden, mask)
        nearest.append((e @ e.T - 2 * np.eye(len(e))).argmax(1))
    return float((nearest[0] == nearest[1]).mean())


def embeddings(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean-pooled and normalised: [n, tokens, width] -> [n, width]."""
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def top1_agreement(reference: np.ndarray, output: np.ndarray) -> float:
    """Share of rows whose largest logit is at the same class."""
    return float((reference.argmax(1) == output.argmax(1)).mean())


def character_accuracy(probabilities: np.ndarray, texts: list[str], alphabet: list[str]) -> float:
    """1 - edit distance / characters, of greedily decoded CTC output [n, steps, classes] where class 0 is the blank."""
    wrong = sum(edit_distance(decoded, text) for decoded, text in zip(ctc_decode(probabilities, alphabet), texts, strict=True))
    return 1 - wrong / sum(map(len, texts))


def line_accuracy(probabilities: np.ndarray, texts: list[str], alphabet: list[str]) -> float:
    """Share of lines that are decoded without a mistake."""
    return float(np.mean([decoded == text for decoded, text in zip(ctc_decode(probabilities, alphabet), texts, strict=True)]))


def ctc_decode(probabilities: np.ndarray, alphabet: list[str]) -> list[str]:
    """Best class per step, repeats merged, blanks (class 0) dropped."""
    best = probabilities.argmax(2)
    kept = (best != 0) & (best != np.pad(best, ((0, 0), (1, 0)))[:, :-1])
    return ["".join(alphabet[c] for c in row[keep]) for row, keep in zip(best, kept, strict=True)]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: insertions, deletions and substitutions each cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def latency_ratio(
    float_path: Path | str, quantized_path: Path | str, shape: tuple[int, ...], *, runs: int = 40, warmup: int = 5, seconds: float = 5
) -> float:
    """Median latency of the quantized file over that of the float one; see `latency_ratios`."""
    return latency_ratios(float_path, [quantized_path], shape, runs=runs, warmup=warmup, seconds=seconds)[0]


def latency_ratios(
    float_path: Path | str,
    quantized_paths: Sequence[Path | str],
    shape: tuple[int, ...],
    *,
    runs: int = 40,
    warmup: int = 5,
    seconds: float = 5,
) -> list[float]:
    """Median latency of each file over that of the float one, all run in turn so that drift hits them alike.

    At least `runs` of each, and as many as `seconds` hold, so that small models are not timed in one bad moment of a shared machine.
    Every input gets `shape`: token ids for integers (ones for a mask), unit normal values for floats."""
    sessions = [session(path) for path in (float_path, *quantized_paths)]
    feeds = _random_feeds(sessions[0], shape)
    times: list[list[float]] = []
    end = perf_counter() + seconds
    while len(times) < warmup + runs or perf_counter() < end:
        times.append([_timed(run, feeds) for run in sessions])
    medians = np.median(times[warmup:], axis=0)
    return [float(m / medians[0]) for m in medians[1:]]


def _timed(run: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    start = perf_counter()
    run.run(None, feeds)
    return perf_counter() - start


def _random_feeds(run: ort.InferenceSession, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng, feeds = np.random.default_rng(0), {}
    for item in run.get_inputs():
        if "int64" in item.type:
            ids = rng.integers(1000, 20000, shape)
            feeds[item.name] = (np.ones(shape) if "mask" in item.name else ids).astype(np.int64)
        else:
            feeds[item.name] = rng.normal(0, 1, shape).astype(np.float32)
    return feeds


def file_bytes(path: Path | str) -> int:
    """Bytes of an ONNX file and of its external data beside it."""
    path = Path(path)
    return sum(p.stat().st_size for p in {path, *path.parent.glob(path.name + "*data*")})
