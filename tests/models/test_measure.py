"""The scores themselves, on inputs small enough to work out by hand."""

import numpy as np
import pytest

from tests import small
from tests.models import measure


def test_sqnr_counts_ten_decibels_per_decade_of_error_power():
    reference = np.array([[3.0, -4.0]])
    assert measure.sqnr_db(reference, reference + [[0.3, 0.4]]) == pytest.approx(20)
    assert measure.sqnr_db(reference, reference) > 200


def test_sentence_cosine_ignores_masked_tokens():
    reference = np.array([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    mask = np.array([[True, True, False]])
    output = reference * 3
    output[0, 2] = -7
    assert measure.sentence_cosine(reference, output, mask) == pytest.approx(1)
    assert measure.sentence_cosine(reference, output, np.array([[True, True, True]])) < 0.5


def test_top1_agreement_is_the_share_of_equal_winners():
    reference = np.array([[1, 2, 0], [5, 1, 1], [0, 0, 1], [3, 2, 1]])
    assert measure.top1_agreement(reference, reference[:, ::-1]) == 0.25


def test_ctc_merges_repeats_and_drops_blanks():
    steps = [0, 2, 2, 0, 2, 1, 1, 0]
    probabilities = np.eye(3)[steps][None]
    assert measure.ctc_decode(probabilities, ["", "a", "b"]) == ["bba"]
    assert measure.character_accuracy(probabilities, ["bca"], ["", "a", "b"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("a", "b", "distance"), [("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)])
def test_edit_distance(a, b, distance):
    assert measure.edit_distance(a, b) == measure.edit_distance(b, a) == distance


def test_file_bytes_includes_external_data(tmp_path):
    path = small.save_mlp(tmp_path / "m.onnx", external=True)
    assert measure.file_bytes(path) == path.stat().st_size + (tmp_path / "m.onnx.data").stat().st_size


def test_the_latency_of_a_model_against_itself_is_about_one(tmp_path):
    path = small.save_mlp(tmp_path / "m.onnx")
    assert 0.1 < measure.latency_ratio(path, path, (4, 16), runs=20) < 10
