"""Perplexity of small decoders against a definition written out in float64; text and token ids; the command line for both."""

import json
import re

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx.numpy_helper import from_array

import qgraph
from qgraph.cli import main
from qgraph.errors import CalibrationError, ModelError
from qgraph.feeds import inputs_of
from qgraph.tokens import TokenBatches, calibration_batches, decoder_feeds, load_windows, spread

VOCABULARY = 40
TEXT = "".join(f"the {a} {b} of line {i}\n" for i, (a, b) in enumerate([("cat", "sat"), ("dog", "ran"), ("sun", "set")] * 40))


def table(seed=0, rows=VOCABULARY):
    return np.random.default_rng(seed).normal(0, 1, (rows, 16)).astype(np.float32)


def bigram(path, *, inputs="int64[B, L] input_ids", nodes="x = Gather (table, input_ids)", output="float[B, L, 40] logits", seed=0):
    """A decoder that looks at the last token alone: logits = embedding[id] @ head."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({output}) {{ {nodes} {output.split()[-1]} = MatMul (x, head) }}'
    )
    model.graph.initializer.extend(
        [from_array(table(seed), "table"), from_array(table(1).T.copy(), "head"), from_array(table()[:3], "few")]
    )
    onnx.save(model, path)
    return path


def expected(windows, seed=0):
    logits = table(seed).astype(np.float64)[windows[:, :-1]] @ table(1).T.astype(np.float64)
    logs = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    return float(np.exp(logs.mean()))


WINDOWS = np.random.default_rng(2).integers(0, VOCABULARY, (5, 12))
WINDOWS[0, :2] = 39, 0


class Bigram(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(VOCABULARY, 16), torch.nn.Linear(16, VOCABULARY, bias=False)
        self.load_state_dict({"embed.weight": torch.from_numpy(table()), "head.weight": torch.from_numpy(table(1))})

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def bigram_torch():
    """As `qgraph quantize PACKAGE.MODULE:FUNCTION` wants it."""
    free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    return Bigram().eval(), (torch.from_numpy(WINDOWS[:2]),), free


def test_a_file_a_proto_a_module_a_graph_and_a_program_have_the_same_perplexity(tmp_path):
    path = bigram(tmp_path / "m.onnx")
    module, example, free = bigram_torch()
    graph = qgraph.capture(module, example, dynamic_shapes=free)
    program = qgraph.lower(qgraph.quantize(path, recipe="w8a16"))
    for model, tolerance in ((path, 1e-5), (onnx.load(path), 1e-5), (module, 1e-5), (graph, 1e-5), (program, 0.05)):
        found = qgraph.perplexity(model, WINDOWS)
        assert float(found) == pytest.approx(expected(WINDOWS), rel=tolerance)
        assert (found.tokens, found.windows) == (55, 5)


def test_windows_may_come_one_by_one_from_an_iterator(tmp_path):
    assert float(qgraph.perplexity(bigram(tmp_path / "m.onnx"), iter(WINDOWS.tolist()))) == pytest.approx(expected(WINDOWS), rel=1e-5)


EVERYTHING = "int64[B, L] input_ids, int64[B, T] attention_mask, int64[B, L] position_ids, float[B, 2, P, 8] past_key_values.0.key"
USED = """
  mask = ReduceMin <keepdims = 0> (attention_mask)  first = ReduceSum <keepdims = 0> (position_ids)  old = Size (past_key_values_0_key)
  other = Sub (first, sixty_six)  both = Add (other, old)  wrong = Sub (both, mask)  shift = Add (wrong, one)
  moved = Add (input_ids, shift)  x = Gather (table, moved)
"""


def test_masks_are_ones_positions_count_and_the_cache_is_empty(tmp_path):
    """The model adds to the ids what is wrong with the other inputs: positions 0..11 sum to 66."""
    path = bigram(tmp_path / "m.onnx", inputs=EVERYTHING.replace("values.0.", "values_0_"), nodes=USED)
    model = onnx.load(path)
    model.graph.initializer.extend([from_array(np.array(66, np.int64), "sixty_six"), from_array(np.array(1, np.int64), "one")])
    onnx.save(model, path)
    assert float(qgraph.perplexity(path, WINDOWS)) == pytest.approx(expected(WINDOWS), rel=1e-5)


def test_logits_are_found_by_their_shape_where_they_have_another_name(tmp_path):
    path = bigram(tmp_path / "m.onnx", output="float[B, L, V] scores")
    assert float(qgraph.perplexity(path, WINDOWS)) == pytest.approx(expected(WINDOWS), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "windows", "error", "message"),
    [
        ({}, WINDOWS + 30, CalibrationError, "window 0: token id 69 is beyond the model's table of 40 rows"),
        ({}, WINDOWS - 30, CalibrationError, "token id -30 is beyond"),
        ({"nodes": "y = Gather (table, input_ids)  z = Gather (few, input_ids)  x = Add (y, z)"}, WINDOWS, ModelError, "does not run the model: .*out of data bounds"),
        ({}, WINDOWS[:0], CalibrationError, "no windows"),
        ({}, WINDOWS[:, :1], CalibrationError, "two tokens at least"),
        ({"inputs": "int64[B, 16] input_ids"}, WINDOWS, ModelError, r"input 'input_ids' is i64\[B,16\], so it takes no windows of shape \[1, 12\]"),
        ({"inputs": "int64[B, L] input_ids, int64[B, L] types"}, WINDOWS, ModelError, "this model takes input_ids, types"),
    ],
)  # fmt: skip
def test_what_is_no_decoder_or_no_text_of_it_is_one_sentence(tmp_path, options, windows, error, message):
    with pytest.raises(error, match=message):
        qgraph.perplexity(bigram(tmp_path / "m.onnx", **options), windows)


def test_a_model_without_logits_is_refused_with_what_it_has():
    text = '<ir_version: 10, opset_import: ["": 21]> g (int64[B, L] input_ids) => (int64[B, L] best) { best = Identity (input_ids) }'
    with pytest.raises(ModelError, match=r"no output logits .*; it has best: i64\[B,L\]"):
        qgraph.perplexity(onnx.parser.parse_model(text), WINDOWS)


def test_logits_that_are_nan_are_an_error(tmp_path):
    path = bigram(tmp_path / "m.onnx", nodes="y = Gather (table, input_ids)  x = Sqrt (y)")
    with pytest.raises(ModelError, match="window 0: the model's logits are NaN"):
        qgraph.perplexity(path, WINDOWS)


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer of single words; the file, in a folder of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["?", "the", "cat", "dog", "sun", "sat", "ran", "set", "of", "line"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="the $A", special_tokens=[("the", 1)])
    (tmp_path / "tokenizer").mkdir()
    made.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path / "tokenizer"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_text_becomes_windows_without_additions_and_without_the_rest(text, tokenizer, monkeypatch):
    monkeypatch.setattr("qgraph.tokens._PIECE", 10)  # pieces end where lines do: nothing changes
    windows = load_windows(text, tokenizer, length=100)
    assert windows.shape == (7, 100)  # 120 lines of 6 words
    assert windows[0, :7].tolist() == [1, 2, 5, 8, 9, 0, 1]
    assert np.array_equal(load_windows(text, tokenizer / "tokenizer.json", length=100), windows)


def test_samples_are_spread_over_the_text():
    windows = np.arange(20).reshape(10, 2)
    assert spread(windows, 3)[:, 0].tolist() == [0, 8, 18] and spread(windows, None) is windows
    with pytest.raises(CalibrationError, match="10 windows of 2 tokens, fewer than the 11 samples"):
        spread(windows, 11)


def test_token_ids_come_from_npz_as_windows_or_to_be_cut(tmp_path):
    np.savez(tmp_path / "a.npz", input_ids=WINDOWS, attention_mask=np.ones_like(WINDOWS))
    np.savez(tmp_path / "b.npz", WINDOWS.reshape(-1).astype(np.int32))
    assert np.array_equal(load_windows(tmp_path / "a.npz"), WINDOWS)
    assert load_windows(tmp_path / "b.npz", length=25).shape == (2, 25)


def test_batches_of_a_decoder_are_fed_by_name_and_can_be_gone_through_again(tmp_path):
    graph = qgraph.from_onnx(bigram(tmp_path / "m.onnx", inputs="int64[B, L] input_ids, float[B, L] attention_mask"))
    batches = TokenBatches(WINDOWS, inputs_of(graph), batch=2)
    assert len(batches) == 3 == len(list(batches)) == len(list(batches))
    last = list(batches)[2]
    assert np.array_equal(last["input_ids"], WINDOWS[4:]) and last["attention_mask"].dtype == np.float32
    assert last["attention_mask"].shape == (1, 12) and last["attention_mask"].all()
    assert decoder_feeds(inputs_of(graph), WINDOWS[:1]).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(path="nothing.txt"), "nothing.txt: no such file"),
        (dict(tokenizer=None), "text.txt is text: give the tokenizer.json"),
        (dict(tokenizer="nothing"), "tokenizer .*nothing does not exist"),
        (dict(tokenizer="text.txt"), "text.txt is no tokenizer.json"),
        (dict(tokenizer="."), "tokenizer.json does not exist"),
        (dict(length=1000), "720 tokens, less than one window of 1000"),
        (dict(path="broken.npz"), "broken.npz: not a readable .npz"),
        (dict(path="floats.npz"), "floats.npz holds a; an array input_ids of integers"),
        (dict(path="latin.txt"), "latin.txt is not text in UTF-8"),
    ],
)
def test_text_that_cannot_be_read_is_one_sentence(tmp_path, text, tokenizer, change, message):
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1") * 9)
    np.savez(tmp_path / "floats.npz", a=np.ones(4))
    options = {"path": "text.txt", "tokenizer": "tokenizer", "length": 12} | change
    given = None if options["tokenizer"] is None else tmp_path / options["tokenizer"]
    with pytest.raises((CalibrationError, ModelError), match=message) as error:
        load_windows(tmp_path / options["path"], given, length=options["length"])
    assert "\n" not in str(error.value)


def run(*args, status=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def test_eval_prints_perplexity_beside_another_model(tmp_path, text, tokenizer):
    a, b = bigram(tmp_path / "a.onnx"), bigram(tmp_path / "b.onnx", seed=5)
    windows = load_windows(text, tokenizer, length=100)
    args = ("eval", a, "--perplexity", text, "--tokenizer", tokenizer, "--window", 100)
    found = json.loads(run(*args, "--beside", b, "--json").stdout)
    assert found["perplexity"] == pytest.approx(expected(windows), rel=1e-4) and found["windows"] == 7
    assert found["ratio"] == pytest.approx(expected(windows) / expected(windows, seed=5), rel=1e-4)
    assert f"perplexity {expected(windows[[0, 6]]):.2f}" in run(*args, "--samples", 2).stdout
    assert "text.txt is text" in run("eval", a, "--perplexity", text, status=1).stderr
    assert "missing.onnx" in run("eval", tmp_path / "missing.onnx", "--perplexity", text, "--tokenizer", tokenizer, status=1).stderr


def test_quantize_calibrates_a_decoder_with_text(tmp_path, text, tokenizer):
    path = bigram(tmp_path / "m.onnx")
    words = ("--tokenizer", tokenizer, "--window", 60, "--samples", 5)
    for source in (path, "tests.test_perplexity:bigram_torch"):
        output = tmp_path / "out.onnx"
        run("quantize", source, "-o", output, "--recipe", "w8a8", "--calibration", text, *words)
        windows = load_windows(text, tokenizer, length=60)
        assert float(qgraph.perplexity(output, windows)) == pytest.approx(expected(windows), rel=0.1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--calibration", "text.txt", "--tokenizer", "tokenizer", "--window", "800"), "720 tokens, less than one window of 800"),
        (("--calibration", "text.txt", "--tokenizer", "tokenizer", "--window", "60", "--samples", "99"), "fewer than the 99 samples"),
        (("--calibration", "text.txt", "--window", "60"), "which needs the model's tokenizer as well"),
        (("--calibration", "ids.npz"), "batch 0: input 'input_ids' holds index 69, but the table .* has 40 rows"),
        (("--calibration", "large.txt", "--tokenizer", "tokenizer", "--window", "4"), "large.txt: token id 77 is beyond the model's table of 40 rows"),
    ],
)  # fmt: skip
def test_calibration_text_that_does_not_fit_writes_nothing(tmp_path, text, tokenizer, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    np.savez("ids.npz", input_ids=WINDOWS + 30)
    (tmp_path / "large.txt").write_text("the large large sun " * 4)
    file = tokenizer / "tokenizer.json"
    made = json.loads(file.read_text())
    made["model"]["vocab"]["large"] = 77
    file.write_text(json.dumps(made))
    bigram(tmp_path / "m.onnx")
    result = run("quantize", "m.onnx", "-o", "out.onnx", "--recipe", "w8a8", *args, status=1)
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_that_is_no_decoder_takes_no_text(tmp_path, text, tokenizer):
    from tests import small

    graph = qgraph.from_onnx(small.save_mlp(tmp_path / "mlp.onnx"))
    with pytest.raises(ModelError, match="input 'x' is f32.* so it takes no windows"):
        calibration_batches(text, 1, inputs_of(graph), tokenizer=tokenizer)
