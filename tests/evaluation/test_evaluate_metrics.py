"""The figures as metrics of the evaluate library."""

import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch

from cxr_backbone.evaluation.evaluate_metrics import CalibrationMetrics, ClassificationMetrics
from cxr_backbone.evaluation.metrics import calibration_summary, classification_figures

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
POSITIVE = np.array([0.1, 0.2, 0.3, 0.8, 0.25, 0.4, 0.6, 0.7, 0.9, 0.95])
SCORES = np.stack([1 - POSITIVE, POSITIVE], axis=1)


def test_findings_with_unknown_labels_are_taken():
    labels, scores = [[1, 0], [0, np.nan], [1, 1]], [[0.9, 0.2], [0.4, 0.9], [0.3, 0.6]]
    figures = ClassificationMetrics().compute(predictions=scores, references=labels)
    assert figures == classification_figures(np.array(labels), np.array(scores))


def test_one_score_a_film_is_refused():
    with pytest.raises(ValueError, match="don't match the expected format"):
        ClassificationMetrics().compute(predictions=POSITIVE, references=LABELS)


def test_two_metrics_combine_batch_by_batch_and_give_plain_numbers():
    combined = evaluate.combine([ClassificationMetrics(), CalibrationMetrics()])
    for films in (slice(0, 4), slice(4, 10)):
        combined.add_batch(predictions=torch.from_numpy(SCORES[films]), references=torch.from_numpy(LABELS[films]))
    figures = combined.compute()
    assert figures == classification_figures(LABELS, SCORES) | calibration_summary(LABELS, SCORES)
    assert {type(value) for value in figures.values()} == {float}


def test_metrics_need_no_network_and_no_cache_to_write_to(tmp_path):
    tmp_path.joinpath("file").touch()
    code = """
import socket, sys
def refuse(*arguments): raise AssertionError("network")
socket.socket.connect = refuse
import evaluate
from cxr_backbone.evaluation.evaluate_metrics import CalibrationMetrics, ClassificationMetrics
combined = evaluate.combine([ClassificationMetrics(), CalibrationMetrics()])
print(combined.compute(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[0, 1])["auroc"])
"""
    cache = str(tmp_path / "file" / "cache")  # can't be made: a file is in its way
    environment = {**os.environ, "HF_METRICS_CACHE": cache, "HF_EVALUATE_CACHE": cache}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "1.0", done.stderr
